"""NAS-UNet: a U-Net of two searched cells, the baseline of table 4-5 that was searched as well.

Reference: Weng et al., NAS-Unet: neural architecture search for medical image segmentation, IEEE Access 7, 2019. The
cells are the ones its authors published; both were searched on Pascal VOC.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from glioma_nas.errors import ConfigError
from glioma_nas.plugins.network_inputs import MultipleOf, require_channels
from glioma_nas.registry import networks

Node = tuple[tuple[str, int], tuple[str, int]]
"""Two operations whose results are added, each with the index of its input: 0, 1 of the cell, 2 … earlier nodes."""

DOWN_CELL: tuple[Node, ...] = (
    (("down_conv", 1), ("down_dep_conv", 0)),
    (("down_cweight", 1), ("down_dil_conv", 0)),
    (("down_dil_conv", 1), ("down_conv", 0)),
)
UP_CELL: tuple[Node, ...] = (
    (("identity", 0), ("up_cweight", 1)),
    (("identity", 2), ("up_cweight", 1)),
    (("cweight", 3), ("up_conv", 1)),
)


@networks.register("nas_unet")
def nas_unet(in_channels: int, n_classes: int, *, width: int = 48, depth: int = 5) -> nn.Module:
    """NAS-UNet of the published cells; ``width`` channels in every node, ``depth`` resolutions.

    Reference: Weng et al., IEEE Access 7, 2019.
    """
    require_channels("nas_unet", "width", [width], at_least=1)
    require_channels("nas_unet", "depth", [depth], at_least=1)
    if depth < 3:
        raise ConfigError(f"nas_unet: depth is {depth}; give at least 3, or no cell goes down")
    return MultipleOf(CellUNet(in_channels, n_classes, width=width, depth=depth), 2 ** (depth - 1))


class CellUNet(nn.Module):
    """U-shaped network of down cells and up cells.

    A down cell reads the two maps before it, an up cell the map below and the one beside it on the way down.

    Args:
        in_channels: C of the images.
        n_classes: K of the logits.
        width: Channels of every node.
        depth: Number of resolutions, the full one included.
    """

    def __init__(self, in_channels: int, n_classes: int, *, width: int, depth: int) -> None:
        super().__init__()
        wide = len(DOWN_CELL) * width
        self.full = convolution(in_channels, wide, kernel=1, relu=False)
        self.halved = convolution(in_channels, wide, stride=2, relu=False)
        self.down = nn.ModuleList(Cell(DOWN_CELL, (wide, wide), width, first_stride=2) for _ in range(depth - 2))
        self.up = nn.ModuleList(Cell(UP_CELL, (wide, wide), width) for _ in range(depth - 1))
        self.classify = nn.Conv2d(len(UP_CELL) * width, n_classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Return logits (N, K, H, W), float32, for images (N, C, H, W) with sides divisible by 2^(depth-1)."""
        maps = [self.full(image), self.halved(image)]
        for cell in self.down:
            maps.append(cell(maps[-2], maps[-1]))
        x = maps.pop()
        for cell in self.up:
            x = cell(maps.pop(), x)
        logits: Tensor = self.classify(x)
        return logits


class Cell(nn.Module):
    """A cell: two inputs reduced to ``width`` channels, nodes, and the nodes' maps concatenated.

    Args:
        nodes: Its wiring.
        in_channels: Channels of its two inputs.
        width: Channels of every node.
        first_stride: Stride at which the first input is read, 2 where it is twice as large as the second.
    """

    def __init__(
        self, nodes: tuple[Node, ...], in_channels: tuple[int, int], width: int, *, first_stride: int = 1
    ) -> None:
        super().__init__()
        first, second = in_channels
        self.reduce = nn.ModuleList(
            [
                nn.Sequential(nn.ReLU(), convolution(first, width, kernel=1, stride=first_stride, relu=False)),
                nn.Sequential(nn.ReLU(), convolution(second, width, kernel=1, relu=False)),
            ]
        )
        self.sources = [(left[1], right[1]) for left, right in nodes]
        self.operations = nn.ModuleList(operation(name, width) for node in nodes for name, _ in node)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Return (N, nodes·width, h, w), half or twice the size of ``second`` for a down or an up cell."""
        maps = [self.reduce[0](first), self.reduce[1](second)]
        for number, (left, right) in enumerate(self.sources):
            maps.append(self.operations[2 * number](maps[left]) + self.operations[2 * number + 1](maps[right]))
        return torch.cat(maps[2:], dim=1)


class ChannelWeighting(nn.Module):
    """Weight channels by what their averages say (squeeze and excitation), then convolve if the size changes.

    Args:
        channels: C of input and output.
        resize: What follows the weighting.
    """

    def __init__(self, channels: int, resize: nn.Module) -> None:
        super().__init__()
        inside = max(channels // 16, 1)
        self.squeeze = nn.Conv2d(channels, inside, 1)
        self.excite = nn.Conv2d(inside, channels, 1)
        self.resize = resize

    def forward(self, x: Tensor) -> Tensor:
        """Return the weighted map of (N, C, h, w), resized."""
        weight = self.excite(torch.relu(self.squeeze(x.mean((2, 3), keepdim=True))))
        resized: Tensor = self.resize(x * torch.sigmoid(weight))
        return resized


def operation(name: str, channels: int) -> nn.Module:
    """Return an operation of the paper's search space by its name in the wiring."""
    match name:
        case "identity":
            return nn.Identity()
        case "cweight":
            return ChannelWeighting(channels, nn.Identity())
        case "down_conv":
            return convolution(channels, channels, stride=2)
        case "down_dil_conv":
            return convolution(channels, channels, stride=2, dilation=2)
        case "down_dep_conv":
            return convolution(channels, channels, stride=2, depthwise=True)
        case "down_cweight":
            return ChannelWeighting(channels, convolution(channels, channels, stride=2, relu=False))
        case "up_conv":
            return enlargement(channels, relu=True)
        case "up_cweight":
            return ChannelWeighting(channels, enlargement(channels, relu=False))
    raise ValueError(f"unknown operation '{name}'")


def convolution(
    in_channels: int,
    out_channels: int,
    *,
    kernel: int = 3,
    stride: int = 1,
    dilation: int = 1,
    depthwise: bool = False,
    relu: bool = True,
) -> nn.Sequential:
    """Return a padded convolution, group normalisation and, if asked for, ReLU."""
    padding = dilation * (kernel // 2)
    layers: list[nn.Module] = [
        nn.Conv2d(
            in_channels,
            in_channels if depthwise else out_channels,
            kernel,
            stride,
            padding,
            dilation,
            groups=in_channels if depthwise else 1,
            bias=False,
        )
    ]
    if depthwise:
        layers.append(nn.Conv2d(in_channels, out_channels, 1, bias=False))
    return nn.Sequential(*layers, *_normalised(out_channels, relu=relu))


def enlargement(channels: int, *, relu: bool) -> nn.Sequential:
    """Return a transposed convolution that doubles both sides, with group normalisation and, if asked for, ReLU."""
    layer = nn.ConvTranspose2d(channels, channels, 3, stride=2, padding=1, output_padding=1, bias=False)
    return nn.Sequential(layer, *_normalised(channels, relu=relu))


def _normalised(channels: int, *, relu: bool) -> list[nn.Module]:
    groups = channels // 16 if channels % 16 == 0 else 1
    layers: list[nn.Module] = [nn.GroupNorm(groups, channels)]
    return [*layers, nn.ReLU(inplace=True)] if relu else layers
