"""U-Nets the searched networks are compared with, all trained and timed the same way.

Every factory takes ``in_channels`` and ``n_classes`` and gives a module that maps float32 images (N, C, H, W) to logits
(N, K, H, W) of the same height and width.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from glioma_nas.errors import ConfigError
from glioma_nas.plugins.network_inputs import MultipleOf, require_channels
from glioma_nas.registry import networks


@networks.register("monai_unet")
def monai_unet(
    in_channels: int, n_classes: int, *, channels: Sequence[int] = (16, 32, 64, 128), res_units: int = 2
) -> nn.Module:
    """MONAI's residual U-Net; ``channels`` per level, ``res_units`` convolutions in each residual unit.

    Reference: Kerfoot et al., Left-Ventricle Quantification Using Residual U-Net, STACOM 2018.
    """
    from monai.networks.nets import UNet

    require_channels("monai_unet", "channels", channels, at_least=2)
    network = UNet(
        spatial_dims=2,
        in_channels=in_channels,
        out_channels=n_classes,
        channels=tuple(channels),
        strides=(2,) * (len(channels) - 1),
        num_res_units=res_units,
    )
    return MultipleOf(network, 2 ** (len(channels) - 1))


@networks.register("monai_basic_unet")
def monai_basic_unet(
    in_channels: int, n_classes: int, *, features: Sequence[int] = (32, 32, 64, 128, 256, 32)
) -> nn.Module:
    """MONAI's BasicUNet; ``features`` of the five levels and of the last layer.

    Reference: Falk et al., U-Net: deep learning for cell counting, Nature Methods 16, 2019.
    """
    from monai.networks.nets import BasicUNet

    require_channels("monai_basic_unet", "features", features, at_least=6, at_most=6)
    network = BasicUNet(spatial_dims=2, in_channels=in_channels, out_channels=n_classes, features=tuple(features))
    return MultipleOf(network, 16)


@networks.register("monai_dints")
def monai_dints(
    in_channels: int, n_classes: int, *, channel_multiplier: float = 0.5, blocks: int = 6, depths: int = 3
) -> nn.Module:
    """MONAI's DiNTS in two dimensions, every path of its grid kept: an architecture of that space, not a searched one.

    ``blocks`` layers of cells at ``depths`` resolutions from 1/2 on, 64·``channel_multiplier`` channels at the finest.
    Its searched architectures were published for three dimensions; of their operations 2-D has convolution and skip.

    Reference: He et al., DiNTS: differentiable neural network topology search for 3D medical image segmentation, CVPR
    2021.
    """
    import numpy as np
    from monai.networks.nets import DiNTS, TopologyInstance

    if not isinstance(channel_multiplier, int | float) or not 1 / 32 <= channel_multiplier <= 8:
        raise ConfigError(f"monai_dints: channel_multiplier is {channel_multiplier!r}; give a number from 1/32 to 8")
    require_channels("monai_dints", "blocks", [blocks], at_least=1)
    require_channels("monai_dints", "depths", [depths], at_least=1)
    paths = np.ones((blocks, 3 * depths - 2), dtype=np.int64)
    convolutions = np.ones_like(paths)  # the second of the operations
    with contextlib.redirect_stdout(io.StringIO()):  # it prints advice that MultipleOf gives as an error
        topology = TopologyInstance(
            arch_code=[paths, convolutions],
            channel_mul=float(channel_multiplier),
            num_blocks=blocks,
            num_depths=depths,
            spatial_dims=2,
            use_downsample=True,
        )
    network = DiNTS(
        dints_space=topology, in_channels=in_channels, num_classes=n_classes, spatial_dims=2, use_downsample=True
    )
    return MultipleOf(network, 2 ** (depths + 1))


@networks.register("unet_thesis")
def unet_thesis(in_channels: int, n_classes: int, *, width: int = 64) -> nn.Module:
    """Plain U-Net of five levels, ``width`` to 16·``width`` channels: 64 … 1024, the baseline of table 4-5.

    Convolutions are padded, so that the output keeps the input's size, and followed by batch normalisation.

    Reference: Ronneberger et al., U-Net, MICCAI 2015, figure 1.
    """
    require_channels("unet_thesis", "width", [width], at_least=1)
    return MultipleOf(PlainUNet(in_channels, n_classes, width=width, levels=5), 16)


class PlainUNet(nn.Module):
    """Encoder of double convolutions and max pooling, decoder of transposed convolutions and concatenated skips.

    Args:
        in_channels: C of the images.
        n_classes: K of the logits.
        width: Channels of the first level; each level below has twice as many.
        levels: Number of resolutions.
    """

    def __init__(self, in_channels: int, n_classes: int, *, width: int, levels: int) -> None:
        super().__init__()
        channels = [width * 2**level for level in range(levels)]
        self.down = nn.ModuleList(
            _double_conv(before, after) for before, after in zip([in_channels, *channels], channels, strict=False)
        )
        self.pool = nn.MaxPool2d(2)
        pairs = list(zip(channels[1:], channels, strict=False))[::-1]
        self.up = nn.ModuleList(nn.ConvTranspose2d(below, above, 2, stride=2) for below, above in pairs)
        self.merge = nn.ModuleList(_double_conv(2 * above, above) for _, above in pairs)
        self.classify = nn.Conv2d(width, n_classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Return logits (N, K, H, W), float32, for images (N, C, H, W) with sides divisible by 2^(levels-1)."""
        skips: list[Tensor] = []
        x = image
        for level, block in enumerate(self.down):
            x = block(self.pool(x) if level else x)
            skips.append(x)
        for up, merge, skip in zip(self.up, self.merge, skips[-2::-1], strict=True):
            x = merge(torch.cat([skip, up(x)], dim=1))
        logits: Tensor = self.classify(x)
        return logits


def _double_conv(in_channels: int, out_channels: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before in (in_channels, out_channels):
        # The normalisation that follows has the bias.
        layers += [
            nn.Conv2d(before, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)
