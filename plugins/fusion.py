"""Ways to bring the sequences of a slice together (METHOD §8, fig. 3-1): early, late, middle-1, middle-2.

A stream is one sequence with its mask. ``early`` concatenates all streams at the input of one backbone; ``late`` gives
every stream a backbone and concatenates their features; ``middle1`` gives every stream a shallow stem and concatenates
the maps before the residual stages; ``middle2`` adds to these a copy of all streams reduced to the channels of one,
which keeps where things lie relative to each other.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from glioma_nas.errors import ConfigError, did_you_mean
from glioma_nas.plugins.backbones import BackboneDesign, Stages, backbone_design, pooled
from glioma_nas.plugins.pretrained import load_weights, read_weights

FUSIONS = ("early", "late", "middle1", "middle2")
MODES = ("IMG", "ROI", "MIX")


def streams_of(image: Tensor, mask: Tensor, mode: str) -> list[Tensor]:
    """Cut slices into one stream a sequence.

    Args:
        image: (N, C, H, W).
        mask: (N, 1, H, W), 0 or 1.
        mode: ``IMG``: the sequence; ``ROI``: the sequence times the mask; ``MIX``: the sequence and the mask.

    Returns:
        C tensors (N, 1 or 2, H, W).
    """
    sequences = image.split(1, dim=1)
    if mode == "ROI":
        return [sequence * mask for sequence in sequences]
    if mode == "MIX":
        return [torch.cat([sequence, mask], dim=1) for sequence in sequences]
    return list(sequences)


class FusedBackbone(nn.Module):
    """From slices and masks to features of a slice.

    Args:
        sequences: Number of sequences C.
        backbone: One of `glioma_nas.plugins.backbones.BACKBONES`.
        mode: See `streams_of`. With early fusion MIX takes the mask once, not once for each sequence.
        fusion: One of `FUSIONS`.
        pretrained: Weights file, loaded into every stem and all stages; none for random weights.

    Raises:
        ConfigError: An option has a value that is not allowed, or the file does not fit.
    """

    def __init__(
        self, sequences: int, *, backbone: str, mode: str, fusion: str = "early", pretrained: Path | None = None
    ) -> None:
        super().__init__()
        check_fusion(mode, fusion)
        design = backbone_design(backbone)
        self.mode, self.fusion = mode, fusion
        channels = 2 if mode == "MIX" else 1
        if fusion == "early":
            stems, channels = 1, sequences + (mode == "MIX")
        else:
            stems = sequences
        self.stems = nn.ModuleList(design.build_stem(channels) for _ in range(stems))
        self.stages = nn.ModuleList(_stages(design, stems, fusion))
        self.reduce: nn.Module | None = None
        if fusion == "middle2":
            self.reduce = nn.Sequential(
                nn.Conv2d(stems * design.stem, design.stem, 1, bias=False), nn.BatchNorm2d(design.stem), nn.ReLU()
            )
        self.feature_channels = design.feature_channels * len(self.stages)
        if pretrained is not None:
            weights = read_weights(pretrained)
            for module in (*self.stems, *self.stages):
                load_weights(module, weights, source=pretrained, name=backbone)

    def maps(self, image: Tensor, mask: Tensor) -> list[Tensor]:
        """Return the last maps of every trunk, each (N, F, H', W'): one, or with late fusion one a sequence."""
        streams = streams_of(image, mask, self.mode)
        if self.fusion == "early":
            # The mask is the same in every stream: once is enough.
            streams = [torch.cat([image, mask], dim=1) if self.mode == "MIX" else torch.cat(streams, dim=1)]
        shallow = [stem(stream) for stem, stream in zip(self.stems, streams, strict=True)]
        if self.fusion.startswith("middle"):
            together = torch.cat(shallow, dim=1)
            shallow = [together if self.reduce is None else torch.cat([together, self.reduce(together)], dim=1)]
        return [trunk(maps) for trunk, maps in zip(self.stages, shallow, strict=True)]

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        """Return (N, feature_channels) of images (N, C, H, W) and masks (N, 1, H, W)."""
        return torch.cat([pooled(maps) for maps in self.maps(image, mask)], dim=1)


def check_fusion(mode: str, fusion: str) -> None:
    """Make sure that both names are known.

    Raises:
        ConfigError: One is not.
    """
    if mode not in MODES:
        raise ConfigError(f"unknown mode '{mode}': {did_you_mean(mode, MODES)}")
    if fusion not in FUSIONS:
        raise ConfigError(f"unknown fusion '{fusion}': {did_you_mean(fusion, FUSIONS)}")


def _stages(design: BackboneDesign, stems: int, fusion: str) -> list[Stages]:
    if fusion == "late":
        return [design.build_stages() for _ in range(stems)]
    if fusion == "middle1":
        return [design.build_stages(stems * design.stem)]
    if fusion == "middle2":
        return [design.build_stages((stems + 1) * design.stem)]
    return [design.build_stages()]
