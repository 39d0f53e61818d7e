"""What networks for Ki67 share (METHOD §9): two sequences, T1c then FLAIR, each with the mask, and sizes by preset."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from glioma_nas.errors import ConfigError, did_you_mean
from glioma_nas.marker_study import ClassifierSettings, MarkerStudy
from glioma_nas.slice_classifier import SliceClassifierEvaluator


def ki67_inputs(image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return T1C-IN (N, 2, H, W), T2F-IN (N, 2, H, W) and Merge-IN, both together (N, 4, H, W).

    Args:
        image: (N, 2, H, W), T1c and FLAIR.
        mask: (N, 1, H, W), 0 or 1.
    """
    t1c, t2f = torch.cat([image[:, 0:1], mask], dim=1), torch.cat([image[:, 1:2], mask], dim=1)
    return t1c, t2f, torch.cat([t1c, t2f], dim=1)


class Ki67Evaluator(SliceClassifierEvaluator):
    """A classifier of T1c and FLAIR slices in one of several sizes.

    Args:
        settings: What all classifiers are told; ``sequences`` are T1c and FLAIR, in this order.
        study: What `evaluate` works on.
        preset: One of ``presets``.
        aggregate: See `SliceClassifierEvaluator`.
        weight_decay: Of the optimiser.

    Attributes:
        name: Registered name, for messages.
        presets: Name → sizes; ``small`` for CPUs, ``full`` as published.

    Raises:
        ConfigError: There is no such preset, or there are not exactly two sequences.
    """

    name: ClassVar[str]
    presets: ClassVar[Mapping[str, Any]]

    def __init__(
        self,
        settings: ClassifierSettings,
        *,
        study: MarkerStudy | None,
        preset: str,
        aggregate: str,
        weight_decay: float,
    ) -> None:
        super().__init__(settings, study=study, aggregate=aggregate, weight_decay=weight_decay)
        if preset not in self.presets:
            raise ConfigError(f"unknown preset '{preset}': {did_you_mean(preset, self.presets)}")
        if len(settings.sequences) != 2:
            raise ConfigError(
                f"classifier '{self.name}' takes two sequences, T1c then FLAIR, got {', '.join(settings.sequences)}; "
                "set sequences: [t1ce, flair] in the marker"
            )
        self.preset = preset

    def options(self) -> dict[str, Any]:
        """See `MarkerEvaluator.options`."""
        return {"preset": self.preset, **super().options()}
