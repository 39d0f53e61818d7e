"""Feature extractors of the marker classifiers: residual and split-attention (ResNeSt) networks for n channels.

Parameters are named as in torchvision and timm, so that weights published in either layout fit.

References:
    He et al., Deep Residual Learning for Image Recognition, CVPR 2016.
    Zhang et al., ResNeSt: Split-Attention Networks, CVPR Workshops 2022, https://arxiv.org/abs/2004.08955.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from glioma_nas.errors import ConfigError, did_you_mean
from glioma_nas.plugins.split_attention import SplitAttentionBlock

BlockFactory = Callable[[int, int, int], nn.Module]


class ShallowStem(nn.Module):
    """The shallow feature extractor: convolution with stride 2 and 3×3 max pooling with stride 2, ÷4 in all.

    Args:
        in_channels: Channels of the slices.
        out_channels: Channels of the features.
        kernel: Side of the one convolution.
        deep: Three 3×3 convolutions instead, the first two of half the width (ResNeSt).
    """

    def __init__(self, in_channels: int, out_channels: int, *, kernel: int = 7, deep: bool = False) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.conv1: nn.Module = nn.Conv2d(in_channels, out_channels, kernel, 2, kernel // 2, bias=False)
        if deep:
            half = out_channels // 2
            self.conv1 = nn.Sequential(
                nn.Conv2d(in_channels, half, 3, 2, 1, bias=False),
                nn.BatchNorm2d(half),
                nn.ReLU(),
                nn.Conv2d(half, half, 3, padding=1, bias=False),
                nn.BatchNorm2d(half),
                nn.ReLU(),
                nn.Conv2d(half, out_channels, 3, padding=1, bias=False),
            )
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.maxpool = nn.MaxPool2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, out_channels, ⌈H/4⌉, ⌈W/4⌉)."""
        features: Tensor = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
        return features


def residual_stage(
    block: BlockFactory, in_channels: int, out_channels: int, *, blocks: int, stride: int
) -> nn.Sequential:
    """Return ``blocks`` blocks, the first with the stride and the change of channels."""
    first = block(in_channels, out_channels, stride)
    return nn.Sequential(first, *(block(out_channels, out_channels, 1) for _ in range(blocks - 1)))


class Stages(nn.Module):
    """Four residual stages, ÷8 in all.

    Args:
        block: Makes a block of (in_channels, out_channels, stride).
        in_channels: Channels of the shallow features.
        widths: Output channels of the stages.
        blocks: Blocks of the stages.
    """

    def __init__(self, block: BlockFactory, in_channels: int, widths: Sequence[int], blocks: Sequence[int]) -> None:
        super().__init__()
        before = in_channels
        for number, (width, count) in enumerate(zip(widths, blocks, strict=True), start=1):
            stage = residual_stage(block, before, width, blocks=count, stride=1 if number == 1 else 2)
            self.add_module(f"layer{number}", stage)
            before = width

    def forward(self, x: Tensor) -> Tensor:
        """Return the last stage's maps, (N, widths[-1], H', W')."""
        for stage in self.children():
            x = stage(x)
        return x


def _torchvision_block(name: str) -> BlockFactory:
    def build(in_channels: int, out_channels: int, stride: int) -> nn.Module:
        from torchvision.models import resnet

        block = getattr(resnet, name)
        downsample = None
        if stride != 1 or in_channels != out_channels:
            downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )
        made: nn.Module = block(in_channels, out_channels // block.expansion, stride, downsample)
        return made

    return build


@dataclass(frozen=True)
class BackboneDesign:
    """Sizes of a backbone.

    Attributes:
        block: Makes a block of (in_channels, out_channels, stride).
        stem: Channels of the shallow features.
        widths: Output channels of the four stages.
        blocks: Blocks of the four stages.
        deep_stem: See `ShallowStem`.
    """

    block: BlockFactory
    stem: int
    widths: tuple[int, int, int, int]
    blocks: tuple[int, int, int, int]
    deep_stem: bool = False

    @property
    def feature_channels(self) -> int:
        """Features of a slice."""
        return self.widths[-1]

    def build_stem(self, in_channels: int) -> ShallowStem:
        """Build the shallow part for slices of ``in_channels``."""
        return ShallowStem(in_channels, self.stem, deep=self.deep_stem)

    def build_stages(self, in_channels: int | None = None) -> Stages:
        """Build the deep part for shallow features of ``in_channels``; by default those of one stem."""
        return Stages(self.block, self.stem if in_channels is None else in_channels, self.widths, self.blocks)


BACKBONES: dict[str, BackboneDesign] = {
    # For CPUs and small cohorts.
    "small_resnet": BackboneDesign(_torchvision_block("BasicBlock"), 16, (16, 32, 64, 96), (1, 1, 1, 1)),
    "small_resnest": BackboneDesign(SplitAttentionBlock, 16, (32, 64, 96, 128), (1, 1, 1, 1)),
    # The published networks.
    "resnet18": BackboneDesign(_torchvision_block("BasicBlock"), 64, (64, 128, 256, 512), (2, 2, 2, 2)),
    "resnet50": BackboneDesign(_torchvision_block("Bottleneck"), 64, (256, 512, 1024, 2048), (3, 4, 6, 3)),
    "resnest50": BackboneDesign(SplitAttentionBlock, 64, (256, 512, 1024, 2048), (3, 4, 6, 3), deep_stem=True),
}


def backbone_design(name: str) -> BackboneDesign:
    """Return the design called ``name``.

    Raises:
        ConfigError: There is none.
    """
    if name not in BACKBONES:
        raise ConfigError(f"unknown backbone '{name}': {did_you_mean(name, BACKBONES)}")
    return BACKBONES[name]


def pooled(maps: Tensor) -> Tensor:
    """Return the global average (N, C) of maps (N, C, H, W)."""
    return maps.mean(dim=(2, 3))
