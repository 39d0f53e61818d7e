"""KiNet (METHOD §9): two single-modality branches feed a main branch that is judged at every scale, for Ki67.

Main stage 1 takes the shallow features T1C : Merge : T2F in the channel ratio 1:2:1, main stage 2 takes the branches'
and its own stage-1 outputs 1:4:1, stages 3 and 4 take nothing from the branches. Every main stage has a classifier
(s1 … s4); the final one (cat) sees their four outputs with age and sex, and starts as their mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glioma_nas.marker_study import ClassifierSettings, MarkerStudy
from glioma_nas.plugins.backbones import ShallowStem, pooled, residual_stage
from glioma_nas.plugins.ki67 import Ki67Evaluator, ki67_inputs
from glioma_nas.plugins.metadata_head import MetadataHead
from glioma_nas.plugins.split_attention import SplitAttentionBlock
from glioma_nas.registry import classifiers
from glioma_nas.slice_classifier import SliceAttention, SliceNetwork

SCALE_WEIGHTS: Mapping[str, float] = {"s1": 0.025, "s2": 0.025, "s3": 0.2, "s4": 0.35, "final": 0.4}
"""β of eq. 5-2: the main branch's classifiers."""

BRANCH_WEIGHTS: Mapping[str, float] = {"t1c": 0.35, "t2f": 0.25, "master": 0.4}
"""α of eq. 5-3: the two single-modality branches and the main branch."""


@dataclass(frozen=True)
class KiNetPreset:
    """Sizes of a KiNet.

    Attributes:
        stem: Channels of a branch's shallow features; the Merge stem has twice as many.
        branch: Output channels of a branch's four stages.
        main: Output channels of main stages 2, 3, 4; stage 1 has four times those of a branch.
        blocks: Split-attention blocks of the four stages.
        stem_kernel: Side of the shallow features' convolution.
    """

    stem: int
    branch: tuple[int, int, int, int]
    main: tuple[int, int, int]
    blocks: tuple[int, int, int, int]
    stem_kernel: int = 7


PRESETS: Mapping[str, KiNetPreset] = {
    "small": KiNetPreset(stem=8, branch=(8, 16, 32, 48), main=(48, 64, 96), blocks=(1, 1, 1, 1), stem_kernel=3),
    "full": KiNetPreset(stem=32, branch=(64, 128, 256, 512), main=(512, 1024, 2048), blocks=(3, 4, 6, 3)),
}


def _stages(in_channels: Sequence[int], out_channels: Sequence[int], blocks: Sequence[int]) -> nn.ModuleList:
    return nn.ModuleList(
        residual_stage(SplitAttentionBlock, before, after, blocks=count, stride=1 if index == 0 else 2)
        for index, (before, after, count) in enumerate(zip(in_channels, out_channels, blocks, strict=True))
    )


class KiNet(SliceNetwork):
    """The network of METHOD §9 for slices of two sequences, T1c then FLAIR.

    Args:
        preset: Sizes.
        multi_scale: Weigh the losses of s1 … s4 and the final classifier by β; off: the final classifier's alone.
        merge_in: Feed the main branch the four channels of Merge-IN; off: the branches' shallow features only.
        metadata: Give age and sex to the final classifier.
        attention: Return the weight of each slice too.
    """

    def __init__(
        self,
        preset: KiNetPreset,
        *,
        multi_scale: bool = True,
        merge_in: bool = True,
        metadata: bool = True,
        attention: bool = False,
    ) -> None:
        super().__init__()
        self.multi_scale = multi_scale
        self.merge_in = merge_in
        stem, branch, blocks = preset.stem, preset.branch, preset.blocks
        main = (4 * branch[0], *preset.main)
        self.t1c_stem = ShallowStem(2, stem, kernel=preset.stem_kernel)
        self.t2f_stem = ShallowStem(2, stem, kernel=preset.stem_kernel)
        self.merge_stem = ShallowStem(4, 2 * stem, kernel=preset.stem_kernel) if merge_in else None
        self.t1c_stages = _stages((stem, *branch[:3]), branch, blocks)
        self.t2f_stages = _stages((stem, *branch[:3]), branch, blocks)
        first = 4 * stem if merge_in else 2 * stem
        self.main_stages = _stages((first, main[0] + 2 * branch[0], main[1], main[2]), main, blocks)
        self.t1c_head = nn.Linear(branch[3], 1)
        self.t2f_head = nn.Linear(branch[3], 1)
        self.main_heads = nn.ModuleList(nn.Linear(width, 1) for width in main)
        self.final_head = MetadataHead(len(main), metadata=metadata, start="mean")
        self.attention = SliceAttention(main[-1]) if attention else None

    @property
    def stages_of_trunks(self) -> list[list[nn.Module]]:
        """The stages whose maps Grad-CAM may look at: those of the main branch."""
        return [list(self.main_stages)]

    def forward(self, image: Tensor, mask: Tensor, metadata: Tensor) -> Mapping[str, Tensor]:
        """Return logits ``t1c``, ``t2f``, ``s1`` … ``s4``, ``final``, float32 (N,), and ``attention`` if wanted."""
        t1c_in, t2f_in, merge_in = ki67_inputs(image, mask)
        t1c, t2f = self.t1c_stem(t1c_in), self.t2f_stem(t2f_in)
        shallow = [t1c, t2f] if self.merge_stem is None else [t1c, self.merge_stem(merge_in), t2f]
        t1c, t2f = self.t1c_stages[0](t1c), self.t2f_stages[0](t2f)
        main = self.main_stages[0](torch.cat(shallow, dim=1))
        scales = [main]
        main = self.main_stages[1](torch.cat([t1c, main, t2f], dim=1))
        scales.append(main)
        for stage in list(self.main_stages)[2:]:
            main = stage(main)
            scales.append(main)
        for t1c_stage, t2f_stage in zip(list(self.t1c_stages)[1:], list(self.t2f_stages)[1:], strict=True):
            t1c, t2f = t1c_stage(t1c), t2f_stage(t2f)
        judged = [head(pooled(scale)) for head, scale in zip(self.main_heads, scales, strict=True)]
        final = self.final_head(torch.cat(judged, dim=1), metadata)
        outputs = {f"s{index}": logit[:, 0] for index, logit in enumerate(judged, start=1)}
        if self.attention is not None:
            outputs["attention"] = self.attention(pooled(scales[-1]))
        return {
            "t1c": self.t1c_head(pooled(t1c))[:, 0],
            "t2f": self.t2f_head(pooled(t2f))[:, 0],
            **outputs,
            "final": final,
        }

    def loss(self, outputs: Mapping[str, Tensor], target: Tensor) -> Tensor:
        """Return .35·T1C + .25·T2F + .4·master with master = Σ β_j·BCE_j (eq. 5-2, 5-3; the BCE of eq. 3-1).

        Args:
            outputs: What ``forward`` returned.
            target: (N,), float32, 0 or 1.
        """
        losses = {name: F.binary_cross_entropy_with_logits(logits, target) for name, logits in outputs.items()}
        master = losses["final"]
        if self.multi_scale:
            master = torch.stack([weight * losses[name] for name, weight in SCALE_WEIGHTS.items()]).sum()
        return (
            BRANCH_WEIGHTS["t1c"] * losses["t1c"]
            + BRANCH_WEIGHTS["t2f"] * losses["t2f"]
            + BRANCH_WEIGHTS["master"] * master
        )


@classifiers.register("kinet")
class KiNetEvaluator(Ki67Evaluator):
    """KiNet for Ki67: T1c and FLAIR branches, a main branch judged at four scales, age and sex.

    Args:
        settings: See `Ki67Evaluator`.
        study: What `evaluate` works on.
        preset: ``small`` for CPUs, or ``full``.
        multi_scale: See `KiNet`; with the two below, the 2³ ablation of table 5-3.
        merge_in: See `KiNet`.
        metadata: See `KiNet`.
        aggregate: See `SliceClassifierEvaluator`.
        weight_decay: Of the optimiser.

    Raises:
        ConfigError: An option has a value that is not allowed, or there are not exactly two sequences.
    """

    name = "kinet"
    presets = PRESETS

    def __init__(
        self,
        settings: ClassifierSettings,
        *,
        study: MarkerStudy | None = None,
        preset: str = "small",
        multi_scale: bool = True,
        merge_in: bool = True,
        metadata: bool = True,
        aggregate: str = "mean",
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(settings, study=study, preset=preset, aggregate=aggregate, weight_decay=weight_decay)
        self.multi_scale = multi_scale
        self.merge_in = merge_in
        self.metadata = metadata

    def options(self) -> dict[str, Any]:
        """See `MarkerEvaluator.options`."""
        switches = {name: getattr(self, name) for name in ("multi_scale", "merge_in", "metadata")}
        return {**switches, **super().options()}

    def build_network(self, *, pretrained: bool) -> SliceNetwork:
        """See `SliceClassifierEvaluator.build_network`."""
        return KiNet(
            PRESETS[self.preset],
            multi_scale=self.multi_scale,
            merge_in=self.merge_in,
            metadata=self.metadata,
            attention=self.aggregate == "attention",
        )
