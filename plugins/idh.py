"""The IDH classifier (METHOD §8): a residual network over slices, their masks, age and sex, for any binary marker."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from glioma_nas.errors import ConfigError, did_you_mean
from glioma_nas.marker_evaluator import ClassifierSettings, MarkerStudy
from glioma_nas.plugins.backbones import BACKBONES, build_backbone
from glioma_nas.registry import classifiers
from glioma_nas.slice_classifier import SliceClassifierEvaluator, SliceNetwork

MODES = ("IMG", "ROI", "MIX")


class IdhNetwork(SliceNetwork):
    """A backbone, then one fully connected layer over its features and, if wanted, age and sex.

    Args:
        sequences: Number of sequences C.
        backbone: One of `BACKBONES`.
        mode: ``IMG``: the slices; ``ROI``: the slices times the mask; ``MIX``: the slices and the mask as one channel
            more.
        metadata: Concatenate age and sex with the features.
        pretrained: Weights file of the backbone; none for random weights.
    """

    def __init__(
        self, sequences: int, *, backbone: str, mode: str, metadata: bool, pretrained: Path | None = None
    ) -> None:
        super().__init__()
        self.mode = mode
        self.metadata = metadata
        self.backbone = build_backbone(backbone, sequences + (mode == "MIX"), pretrained=pretrained)
        self.classifier = nn.Linear(self.backbone.feature_channels + 2 * metadata, 1)

    def forward(self, image: Tensor, mask: Tensor, metadata: Tensor) -> Mapping[str, Tensor]:
        """Return ``final``, float32 (N,); see `SliceNetwork`."""
        if self.mode == "ROI":
            image = image * mask
        elif self.mode == "MIX":
            image = torch.cat([image, mask], dim=1)
        features = self.backbone(image)
        if self.metadata:
            features = torch.cat([features, metadata], dim=1)
        return {"final": self.classifier(features)[:, 0]}


@classifiers.register("idh")
class IdhEvaluator(SliceClassifierEvaluator):
    """Residual network over slices (IMG, ROI or MIX) with age and sex; for IDH and any other binary marker.

    Args:
        settings: What all classifiers are told.
        study: What `evaluate` works on.
        backbone: One of `BACKBONES`; ``small_resnet`` suits CPUs.
        mode: ``IMG``, ``ROI`` or ``MIX``.
        metadata: Use age and sex.
        pretrained: Weights file of the backbone, see `build_backbone`; none for random weights.
        aggregate: ``mean`` or ``max`` of the slices' probabilities.
        weight_decay: Of the optimiser.

    Raises:
        ConfigError: An option has a value that is not allowed.
    """

    def __init__(
        self,
        settings: ClassifierSettings,
        *,
        study: MarkerStudy | None = None,
        backbone: str = "small_resnet",
        mode: str = "MIX",
        metadata: bool = True,
        pretrained: str | None = None,
        aggregate: str = "mean",
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(settings, study=study, aggregate=aggregate, weight_decay=weight_decay)
        if mode not in MODES:
            raise ConfigError(f"unknown mode '{mode}': {did_you_mean(mode, MODES)}")
        if backbone not in BACKBONES:
            raise ConfigError(f"unknown backbone '{backbone}': {did_you_mean(backbone, BACKBONES)}")
        if pretrained is not None and not Path(pretrained).is_file():
            raise ConfigError(f"{pretrained}: no such weights file; correct 'pretrained' or leave it out")
        self.backbone = backbone
        self.mode = mode
        self.metadata = metadata
        self.pretrained = pretrained

    def options(self) -> dict[str, Any]:
        """See `MarkerEvaluator.options`."""
        own = {"backbone": self.backbone, "mode": self.mode, "metadata": self.metadata, "pretrained": self.pretrained}
        return {**own, **super().options()}

    def build_network(self, *, pretrained: bool) -> SliceNetwork:
        """See `SliceClassifierEvaluator.build_network`."""
        return IdhNetwork(
            len(self.settings.sequences),
            backbone=self.backbone,
            mode=self.mode,
            metadata=self.metadata,
            pretrained=Path(self.pretrained) if pretrained and self.pretrained else None,
        )
