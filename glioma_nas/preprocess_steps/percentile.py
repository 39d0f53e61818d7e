"""Make intensities comparable between scanners by two percentiles of the brain."""

from __future__ import annotations

from typing import Any

import numpy as np

from glioma_nas.case_volumes import CaseVolumes, IntensityStep
from glioma_nas.config import PreprocessConfig
from glioma_nas.errors import ConfigError, ImageError
from glioma_nas.images import FloatVolume
from glioma_nas.registry import preprocess_steps

NEARLY_ZERO = np.float32(1e-4)
"""Stands for 0 inside the brain, because exactly 0 means background everywhere else."""


@preprocess_steps.register("percentile")
class Percentile(IntensityStep):
    """Map two percentiles of each sequence's non-zero voxels to -1 and 1, clip beyond; zero voxels stay zero.

    Args:
        low: Lower percentile, 0 to 100.
        high: Upper percentile.
    """

    def __init__(self, *, low: float = 1.0, high: float = 99.0) -> None:
        if not 0 <= low < high <= 100:
            raise ConfigError(
                f"preprocess.step_options.percentile: low is {low}, high is {high}; expected 0 ≤ low < high ≤ 100"
            )
        self.low, self.high = low, high

    def apply(self, volumes: CaseVolumes, config: PreprocessConfig) -> tuple[CaseVolumes, dict[str, Any]]:
        """See `PreprocessStep.apply`; the record holds the two intensities.

        Raises:
            ImageError: Both percentiles are one value.
        """
        images: dict[str, FloatVolume] = {}
        record: dict[str, Any] = {}
        for name, data in volumes.images.items():
            brain = data != 0
            low, high = np.percentile(data[brain].astype(np.float64), [self.low, self.high]) if brain.any() else (0, 0)
            if high <= low:
                raise ImageError(
                    f"sequence '{name}': percentiles {self.low:g} and {self.high:g} of its {int(brain.sum())} non-zero "
                    f"voxels are both {low:g}; export the scan again"
                )
            scaled = np.clip((data[brain] - low) / (high - low) * 2 - 1, -1, 1).astype(np.float32)
            images[name] = inside(data, brain, scaled)
            record[name] = {"low": float(low), "high": float(high)}
        return volumes.with_images(images), record


def inside(data: FloatVolume, brain: np.ndarray, values: np.ndarray) -> FloatVolume:
    """Return zeros with ``values`` in the brain, none of them exactly 0: that means background everywhere else."""
    filled = np.zeros_like(data)
    filled[brain] = np.where(values == 0, NEARLY_ZERO, values)
    return filled
