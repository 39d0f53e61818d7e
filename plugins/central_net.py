"""CentralNet for Ki67: the published network that KiNet is compared with (METHOD §9, table 5-2, fig. 5-5).

Two single-modality branches (T1c and FLAIR, each with the mask) and a central branch on all four channels. Before each
of its four stages the central branch adds up, with weights that are learnt, its own maps and those of both branches:
h = α_C·h_C + α_1·h_1 + α_2·h_2. Every branch has a classifier and a loss of its own.

Reference:
    Vielzeuf et al., CentralNet: a Multilayer Approach for Multimodal Fusion, ECCV Workshops 2018, eq. 1 and 2,
    https://arxiv.org/abs/1808.07275.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from glioma_nas.errors import StorageError
from glioma_nas.marker_study import ClassifierSettings, MarkerStudy
from glioma_nas.plugins.backbones import backbone_design, pooled
from glioma_nas.plugins.ki67 import Ki67Evaluator, ki67_inputs
from glioma_nas.plugins.metadata_head import MetadataHead
from glioma_nas.registry import classifiers
from glioma_nas.slice_classifier import WEIGHTS_FILE, SliceAttention, SliceNetwork

BRANCHES = ("t1c", "central", "t2f")
PRESETS: Mapping[str, str] = {"small": "small_resnest", "full": "resnest50"}
N_STAGES = 4


class CentralNet(SliceNetwork):
    """Two branches and a central one, merged by learnt weighted sums.

    Args:
        preset: One of `PRESETS`; all three branches have its backbone.
        metadata: Give age and sex to the central classifier, which the published network lacks.
        attention: Return the weight of each slice too.
    """

    def __init__(self, preset: str, *, metadata: bool = False, attention: bool = False) -> None:
        super().__init__()
        design = backbone_design(PRESETS[preset])
        channels = {"t1c": 2, "central": 4, "t2f": 2}
        self.stems = nn.ModuleDict({name: design.build_stem(channels[name]) for name in BRANCHES})
        self.stages = nn.ModuleDict({name: design.build_stages() for name in BRANCHES})
        # One weight a branch for each stage, all alike at first.
        self.fusion = nn.Parameter(torch.full((N_STAGES, len(BRANCHES)), 1.0 / len(BRANCHES)))
        features = design.feature_channels
        self.heads = nn.ModuleDict(
            {name: MetadataHead(features, metadata=metadata and name == "central") for name in BRANCHES}
        )
        self.attention = SliceAttention(features) if attention else None

    @property
    def stages_of_trunks(self) -> list[list[nn.Module]]:
        """The stages whose maps Grad-CAM may look at: those of the central branch."""
        return [list(self.stages["central"].children())]

    def forward(self, image: Tensor, mask: Tensor, metadata: Tensor) -> Mapping[str, Tensor]:
        """Return logits ``t1c``, ``t2f`` and ``final``, float32 (N,), and ``attention`` if wanted."""
        t1c, t2f, both = ki67_inputs(image, mask)
        inputs = {"t1c": t1c, "central": both, "t2f": t2f}
        maps = {name: self.stems[name](inputs[name]) for name in BRANCHES}
        for number in range(1, N_STAGES + 1):
            merged = torch.stack([self.fusion[number - 1, k] * maps[name] for k, name in enumerate(BRANCHES)]).sum(0)
            entering = {**maps, "central": merged}
            maps = {name: getattr(self.stages[name], f"layer{number}")(entering[name]) for name in BRANCHES}
        features = {name: pooled(maps[name]) for name in BRANCHES}
        outputs = {name: self.heads[name](features[name], metadata) for name in ("t1c", "t2f")}
        central = features["central"]
        outputs["final"] = self.heads["central"](central, metadata)
        if self.attention is not None:
            outputs["attention"] = self.attention(central)
        return outputs

    def loss(self, outputs: Mapping[str, Tensor], target: Tensor) -> Tensor:
        """Return the sum of the three branches' binary cross-entropies, as published.

        Args:
            outputs: What ``forward`` returned.
            target: (N,), float32, 0 or 1.
        """
        names = ("t1c", "t2f", "final")
        return torch.stack([F.binary_cross_entropy_with_logits(outputs[name], target) for name in names]).sum()


@classifiers.register("central_net")
class CentralNetEvaluator(Ki67Evaluator):
    """CentralNet for Ki67: T1c and FLAIR branches and a central one, merged by learnt weighted sums.

    Args:
        settings: See `Ki67Evaluator`.
        study: What `evaluate` works on.
        preset: ``small`` for CPUs, or ``full``.
        metadata: Use age and sex.
        aggregate: See `SliceClassifierEvaluator`.
        weight_decay: Of the optimiser.

    Raises:
        ConfigError: An option has a value that is not allowed, or there are not exactly two sequences.
    """

    name = "central_net"
    presets = PRESETS

    def __init__(
        self,
        settings: ClassifierSettings,
        *,
        study: MarkerStudy | None = None,
        preset: str = "small",
        metadata: bool = False,
        aggregate: str = "mean",
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(settings, study=study, preset=preset, aggregate=aggregate, weight_decay=weight_decay)
        self.metadata = metadata

    def options(self) -> dict[str, Any]:
        """See `MarkerEvaluator.options`."""
        return {"metadata": self.metadata, **super().options()}

    def build_network(self, *, pretrained: bool) -> SliceNetwork:
        """See `SliceClassifierEvaluator.build_network`."""
        return CentralNet(self.preset, metadata=self.metadata, attention=self.aggregate == "attention")

    def fusion_weights(self, folder: Path) -> dict[str, list[float]]:
        """Return what each branch weighs at the central branch's four stages (fig. 5-5), shares of |α| that sum to 1.

        Args:
            folder: A finished fold.

        Raises:
            StorageError: ``folder`` holds no finished training.
        """
        if not (folder / WEIGHTS_FILE).is_file():
            raise StorageError(f"{folder / WEIGHTS_FILE}: no such file; run the classify stage first")
        size = load_file(folder / WEIGHTS_FILE)["fusion"].abs()
        share = size / size.sum(dim=1, keepdim=True)
        return {name: share[:, k].tolist() for k, name in enumerate(BRANCHES)}
