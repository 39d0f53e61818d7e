"""ICNet and BiSeNet: segmentation networks designed by hand for speed, baselines of table 4-5.

Both halve their images several times before most of the work is done. In evaluation mode they give logits (N, K, H, W)
of the image's size; while training a dict of such logits: ``logits`` and the auxiliary ``scale_s`` of the coarser
branches, s being the downsampling rate they are predicted at.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from glioma_nas.plugins.network_inputs import MultipleOf, require_channels
from glioma_nas.registry import networks


@networks.register("icnet")
def icnet(in_channels: int, n_classes: int, *, width: int = 32, blocks: Sequence[int] = (3, 4, 6, 3)) -> nn.Module:
    """ICNet: a deep path on a quarter of the resolution, guided by shallow ones; ``width`` 32 is half a ResNet-50.

    ``width`` is the number of channels of the first layer, ``blocks`` the bottlenecks of the four stages.

    Reference: Zhao et al., ICNet for real-time semantic segmentation on high-resolution images, ECCV 2018.
    """
    require_channels("icnet", "width", [width], at_least=1)
    require_channels("icnet", "blocks", blocks, at_least=4, at_most=4)
    return MultipleOf(ImageCascade(in_channels, n_classes, width=width, blocks=blocks), 32)


@networks.register("bisenet")
def bisenet(in_channels: int, n_classes: int, *, width: int = 64) -> nn.Module:
    """BiSeNet: a wide shallow path for detail beside a ResNet-18 for context; ``width`` channels in its first layer.

    Reference: Yu et al., BiSeNet: bilateral segmentation network, ECCV 2018.
    """
    require_channels("bisenet", "width", [width], at_least=1)
    return MultipleOf(BilateralNetwork(in_channels, n_classes, width=width), 32)


class ImageCascade(nn.Module):
    """ICNet: three branches, at 1, 1/2 and 1/4 of the resolution, merged by cascade feature fusion.

    Args:
        in_channels: C of the images.
        n_classes: K of the logits.
        width: Channels of the first layer.
        blocks: Bottlenecks of the four stages of the deep branch; the last two are dilated by 2 and 4.
    """

    def __init__(self, in_channels: int, n_classes: int, *, width: int, blocks: Sequence[int]) -> None:
        super().__init__()
        fused = 4 * width
        # The branches at 1/2 and 1/4 share the layers up to the first bottleneck of the second stage.
        self.shared = nn.Sequential(
            conv_bn(in_channels, width, stride=2),
            conv_bn(width, width),
            conv_bn(width, 2 * width),
            nn.MaxPool2d(3, stride=2, padding=1),
            bottlenecks(2 * width, 4 * width, blocks[0]),
            bottlenecks(4 * width, 8 * width, 1, stride=2),
        )
        self.deep = nn.Sequential(
            bottlenecks(8 * width, 8 * width, blocks[1] - 1) if blocks[1] > 1 else nn.Identity(),
            bottlenecks(8 * width, 16 * width, blocks[2], dilation=2),
            bottlenecks(16 * width, 32 * width, blocks[3], dilation=4),
        )
        self.pyramid = PyramidPooling((1, 2, 3, 6))
        self.reduce = conv_bn(32 * width, 8 * width, kernel=1)
        self.detail = nn.Sequential(
            conv_bn(in_channels, width, stride=2), conv_bn(width, width, stride=2), conv_bn(width, 2 * width, stride=2)
        )
        self.fuse_half = CascadeFusion(8 * width, 8 * width, fused)
        self.fuse_full = CascadeFusion(fused, 2 * width, fused)
        self.classify = nn.Conv2d(fused, n_classes, 1)
        self.classify_deep = nn.Conv2d(8 * width, n_classes, 1)
        self.classify_half = nn.Conv2d(fused, n_classes, 1)

    def forward(self, image: Tensor) -> Tensor | dict[str, Tensor]:
        """Return logits for images (N, C, H, W), float32, with sides divisible by 32; see the module."""
        size = (image.shape[2], image.shape[3])
        half = self.shared(enlarged(image, (size[0] // 2, size[1] // 2)))
        quarter = enlarged(half, (half.shape[2] // 2, half.shape[3] // 2))
        deep = enlarged(self.reduce(self.pyramid(self.deep(quarter))), (half.shape[2], half.shape[3]))
        middle = self.fuse_half(deep, half)
        detail = self.detail(image)
        fused = self.fuse_full(enlarged(middle, (detail.shape[2], detail.shape[3])), detail)
        logits = enlarged(self.classify(enlarged(fused, (size[0] // 4, size[1] // 4))), size)
        if not self.training:
            return logits
        return {
            "logits": logits,
            "scale_16": enlarged(self.classify_deep(deep), size),
            "scale_8": enlarged(self.classify_half(middle), size),
        }


class CascadeFusion(nn.Module):
    """Sum of a coarse map, filtered by a dilated convolution, and a projected finer one (ICNet, figure 3).

    Args:
        coarse_channels: Channels of the coarse map, which has been enlarged to the finer one's size.
        fine_channels: Channels of the finer map.
        out_channels: Channels of the sum.
    """

    def __init__(self, coarse_channels: int, fine_channels: int, out_channels: int) -> None:
        super().__init__()
        self.coarse = conv_bn(coarse_channels, out_channels, dilation=2, relu=False)
        self.fine = conv_bn(fine_channels, out_channels, kernel=1, relu=False)

    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        """Return (N, out_channels, h, w) of two maps (N, ·, h, w)."""
        return functional.relu(self.coarse(coarse) + self.fine(fine))


class PyramidPooling(nn.Module):
    """Add to a map its averages over grids of bins, enlarged again (summed, as ICNet does, not concatenated).

    Args:
        bins: Cells of each grid along each axis.
    """

    def __init__(self, bins: Sequence[int]) -> None:
        super().__init__()
        self.bins = tuple(bins)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the shape of ``x`` (N, C, h, w)."""
        height, width = int(x.shape[2]), int(x.shape[3])
        total = x
        for n in self.bins:
            # Adaptive pooling as two products, because ONNX has no such operator for sides that bins do not divide.
            rows, columns = bin_averages(height, n).to(x), bin_averages(width, n).to(x)
            total = total + enlarged(rows @ x @ columns.T, (height, width))
        return total


def bin_averages(size: int, bins: int) -> Tensor:
    """Return the matrix (bins, size), float32, that averages like adaptive pooling; every row sums to 1."""
    matrix = torch.zeros(bins, size)
    for row in range(bins):
        first, last = (row * size) // bins, -((-(row + 1) * size) // bins)
        matrix[row, first:last] = 1 / (last - first)
    return matrix


class BilateralNetwork(nn.Module):
    """BiSeNet: spatial path and context path, merged by feature fusion.

    Args:
        in_channels: C of the images.
        n_classes: K of the logits.
        width: Channels of the first layer of both paths.
    """

    def __init__(self, in_channels: int, n_classes: int, *, width: int) -> None:
        super().__init__()
        fused = 2 * width
        self.spatial = nn.Sequential(
            conv_bn(in_channels, width, kernel=7, stride=2),
            conv_bn(width, width, stride=2),
            conv_bn(width, width, stride=2),
            conv_bn(width, fused, kernel=1),
        )
        self.stem = nn.Sequential(conv_bn(in_channels, width, kernel=7, stride=2), nn.MaxPool2d(3, stride=2, padding=1))
        channels = [width, width, 2 * width, 4 * width, 8 * width]
        self.stages = nn.ModuleList(
            nn.Sequential(BasicBlock(before, after, stride=1 if before == after else 2), BasicBlock(after, after))
            for before, after in pairwise(channels)
        )
        self.tail = conv_bn(8 * width, fused, kernel=1)
        self.attend_16, self.attend_32 = AttentionRefinement(4 * width, fused), AttentionRefinement(8 * width, fused)
        self.refine_16, self.refine_8 = conv_bn(fused, fused), conv_bn(fused, fused)
        self.fuse = FeatureFusion(2 * fused, 2 * fused)
        self.classify = nn.Sequential(conv_bn(2 * fused, 2 * fused), nn.Conv2d(2 * fused, n_classes, 1))
        self.classify_16 = nn.Sequential(conv_bn(fused, width), nn.Conv2d(width, n_classes, 1))
        self.classify_8 = nn.Sequential(conv_bn(fused, width), nn.Conv2d(width, n_classes, 1))

    def forward(self, image: Tensor) -> Tensor | dict[str, Tensor]:
        """Return logits for images (N, C, H, W), float32, with sides divisible by 32; see the module."""
        size = (image.shape[2], image.shape[3])
        features = [self.stem(image)]
        for stage in self.stages:
            features.append(stage(features[-1]))
        at_16, at_32 = features[-2], features[-1]
        context = self.attend_32(at_32) + self.tail(at_32.mean((2, 3), keepdim=True))
        context_16 = self.refine_16(enlarged(context, (at_16.shape[2], at_16.shape[3])))
        spatial = self.spatial(image)
        context_8 = self.refine_8(enlarged(self.attend_16(at_16) + context_16, (spatial.shape[2], spatial.shape[3])))
        logits = enlarged(self.classify(self.fuse(spatial, context_8)), size)
        if not self.training:
            return logits
        return {
            "logits": logits,
            "scale_16": enlarged(self.classify_16(context_16), size),
            "scale_8": enlarged(self.classify_8(context_8), size),
        }


class AttentionRefinement(nn.Module):
    """A 3×3 convolution whose channels are weighted by what their averages say (BiSeNet, figure 2b)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = conv_bn(in_channels, out_channels)
        self.weigh = conv_bn(out_channels, out_channels, kernel=1, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, out_channels, h, w) of a map (N, in_channels, h, w)."""
        x = self.conv(x)
        weight: Tensor = torch.sigmoid(self.weigh(x.mean((2, 3), keepdim=True)))
        return x * weight


class FeatureFusion(nn.Module):
    """Merge detail and context: 1×1 convolution, then channels weighted and added (BiSeNet, figure 2c)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.merge = conv_bn(in_channels, out_channels, kernel=1)
        self.squeeze = nn.Conv2d(out_channels, max(out_channels // 4, 1), 1)
        self.excite = nn.Conv2d(max(out_channels // 4, 1), out_channels, 1)

    def forward(self, spatial: Tensor, context: Tensor) -> Tensor:
        """Return (N, out_channels, h, w) of two maps that have in_channels together."""
        x: Tensor = self.merge(torch.cat([spatial, context], dim=1))
        weight = self.excite(functional.relu(self.squeeze(x.mean((2, 3), keepdim=True))))
        return x + x * torch.sigmoid(weight)


class BasicBlock(nn.Module):
    """Residual block of two 3×3 convolutions (He et al., CVPR 2016)."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv_bn(in_channels, out_channels, stride=stride), conv_bn(out_channels, out_channels, relu=False)
        )
        self.shortcut = _shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, out_channels, h/stride, w/stride) of a map (N, in_channels, h, w)."""
        return functional.relu(self.body(x) + self.shortcut(x))


class Bottleneck(nn.Module):
    """Residual block 1×1, 3×3, 1×1 with a quarter of the channels inside (He et al., CVPR 2016)."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        inside = max(out_channels // 4, 1)
        self.body = nn.Sequential(
            conv_bn(in_channels, inside, kernel=1, stride=stride),
            conv_bn(inside, inside, dilation=dilation),
            conv_bn(inside, out_channels, kernel=1, relu=False),
        )
        self.shortcut = _shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, out_channels, h/stride, w/stride) of a map (N, in_channels, h, w)."""
        return functional.relu(self.body(x) + self.shortcut(x))


def bottlenecks(in_channels: int, out_channels: int, count: int, *, stride: int = 1, dilation: int = 1) -> nn.Module:
    """Return ``count`` bottlenecks, of which the first changes channels and size."""
    first = Bottleneck(in_channels, out_channels, stride=stride, dilation=dilation)
    rest = [Bottleneck(out_channels, out_channels, dilation=dilation) for _ in range(count - 1)]
    return nn.Sequential(first, *rest)


def conv_bn(
    in_channels: int, out_channels: int, *, kernel: int = 3, stride: int = 1, dilation: int = 1, relu: bool = True
) -> nn.Sequential:
    """Return a padded convolution with batch normalisation and, if asked for, ReLU."""
    padding = dilation * (kernel // 2)
    layers: list[nn.Module] = [
        nn.Conv2d(in_channels, out_channels, kernel, stride, padding, dilation, bias=False),
        nn.BatchNorm2d(out_channels),
    ]
    return nn.Sequential(*layers, nn.ReLU(inplace=True)) if relu else nn.Sequential(*layers)


def enlarged(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Return a map (N, C, h, w) resampled bilinearly to (N, C, *size)."""
    return functional.interpolate(x, size=size, mode="bilinear", align_corners=False)


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    if in_channels == out_channels and stride == 1:
        return nn.Identity()
    return conv_bn(in_channels, out_channels, kernel=1, stride=stride, relu=False)
