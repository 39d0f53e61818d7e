"""The IDH classifier (METHOD §8): a residual network over slices, their masks, age and sex, for any binary marker."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from glioma_nas.errors import ConfigError
from glioma_nas.marker_study import ClassifierSettings, MarkerStudy
from glioma_nas.plugins.backbones import Stages, backbone_design
from glioma_nas.plugins.fusion import FusedBackbone, check_fusion
from glioma_nas.plugins.metadata_head import MetadataHead
from glioma_nas.registry import classifiers
from glioma_nas.slice_classifier import SliceAttention, SliceClassifierEvaluator, SliceNetwork


class IdhNetwork(SliceNetwork):
    """A backbone, then one fully connected layer over its features and, if wanted, age and sex.

    Args:
        sequences: Number of sequences C.
        backbone: One of `glioma_nas.plugins.backbones.BACKBONES`.
        mode: ``IMG``: the slices; ``ROI``: the slices times the mask; ``MIX``: the slices and the mask.
        fusion: See `glioma_nas.plugins.fusion`.
        metadata: Concatenate age and sex with the features.
        attention: Return the weight of each slice too.
        pretrained: Weights file of the backbone; none for random weights.
    """

    def __init__(
        self,
        sequences: int,
        *,
        backbone: str,
        mode: str,
        metadata: bool,
        fusion: str = "early",
        attention: bool = False,
        pretrained: Path | None = None,
    ) -> None:
        super().__init__()
        self.backbone = FusedBackbone(sequences, backbone=backbone, mode=mode, fusion=fusion, pretrained=pretrained)
        self.trunks: list[Stages] = [trunk for trunk in self.backbone.stages if isinstance(trunk, Stages)]
        self.classifier = MetadataHead(self.backbone.feature_channels, metadata=metadata)
        self.attention = SliceAttention(self.backbone.feature_channels) if attention else None

    @property
    def stages_of_trunks(self) -> list[list[nn.Module]]:
        """The stages whose maps Grad-CAM may look at; see `glioma_nas.saliency.HasStages`."""
        return [list(trunk.children()) for trunk in self.trunks]

    def forward(self, image: Tensor, mask: Tensor, metadata: Tensor) -> Mapping[str, Tensor]:
        """Return ``final``, float32 (N,), and ``attention`` if wanted; see `SliceNetwork`."""
        features = self.backbone(image, mask)
        outputs = {"final": self.classifier(features, metadata)}
        if self.attention is not None:
            outputs["attention"] = self.attention(features)
        return outputs


@classifiers.register("idh")
class IdhEvaluator(SliceClassifierEvaluator):
    """Residual network over slices (IMG, ROI or MIX) with age and sex; for IDH and any other binary marker.

    Args:
        settings: What all classifiers are told.
        study: What `evaluate` works on.
        backbone: One of `glioma_nas.plugins.backbones.BACKBONES`; ``small_resnet`` suits CPUs.
        mode: ``IMG``, ``ROI`` or ``MIX``.
        fusion: ``early``, ``late``, ``middle1`` or ``middle2``.
        metadata: Use age and sex.
        pretrained: Weights file of the backbone, see `glioma_nas.plugins.pretrained`; none for random weights.
        aggregate: See `SliceClassifierEvaluator`.
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
        fusion: str = "early",
        metadata: bool = True,
        pretrained: str | None = None,
        aggregate: str = "mean",
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(settings, study=study, aggregate=aggregate, weight_decay=weight_decay)
        check_fusion(mode, fusion)
        backbone_design(backbone)
        self.backbone = backbone
        self.mode = mode
        self.fusion = fusion
        self.metadata = metadata
        self.pretrained = pretrained

    def options(self) -> dict[str, Any]:
        """See `MarkerEvaluator.options`."""
        names = ("backbone", "mode", "fusion", "metadata", "pretrained")
        return {**{name: getattr(self, name) for name in names}, **super().options()}

    def check_training_files(self) -> None:
        """See `MarkerEvaluator.check_training_files`."""
        if self.pretrained is not None and not Path(self.pretrained).is_file():
            raise ConfigError(f"{self.pretrained}: no such weights file; correct 'pretrained' or leave it out")

    def build_network(self, *, pretrained: bool) -> SliceNetwork:
        """See `SliceClassifierEvaluator.build_network`."""
        return IdhNetwork(
            len(self.settings.sequences),
            backbone=self.backbone,
            mode=self.mode,
            fusion=self.fusion,
            metadata=self.metadata,
            attention=self.aggregate == "attention",
            pretrained=Path(self.pretrained) if pretrained and self.pretrained else None,
        )
