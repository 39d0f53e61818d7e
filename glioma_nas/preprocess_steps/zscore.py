"""Make intensities comparable between scanners: zero mean and unit deviation inside the brain, per sequence."""

from __future__ import annotations

from typing import Any

import numpy as np

from glioma_nas.case_volumes import CaseVolumes, IntensityStep
from glioma_nas.config import PreprocessConfig
from glioma_nas.errors import ImageError
from glioma_nas.images import FloatVolume
from glioma_nas.preprocess_steps.percentile import inside
from glioma_nas.registry import preprocess_steps


@preprocess_steps.register("zscore")
class ZScore(IntensityStep):
    """Subtract the mean and divide by the deviation of the non-zero voxels; zero voxels stay zero."""

    def apply(self, volumes: CaseVolumes, config: PreprocessConfig) -> tuple[CaseVolumes, dict[str, Any]]:
        """See `PreprocessStep.apply`; the record holds mean and deviation of each sequence.

        Raises:
            ImageError: The brain of a sequence is one flat value.
        """
        images: dict[str, FloatVolume] = {}
        record: dict[str, Any] = {}
        for name, data in volumes.images.items():
            brain = data != 0
            values = data[brain].astype(np.float64)
            mean, deviation = (float(values.mean()), float(values.std())) if values.size else (0.0, 0.0)
            if deviation <= 1e-6 * max(1.0, abs(mean)):
                raise ImageError(
                    f"sequence '{name}': all {values.size} non-zero voxels are {mean:g}; export the scan again"
                )
            images[name] = inside(data, brain, ((values - mean) / deviation).astype(np.float32))
            record[name] = {"mean": mean, "deviation": deviation}
        return volumes.with_images(images), record
