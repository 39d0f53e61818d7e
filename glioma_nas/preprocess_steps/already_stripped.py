"""State that the scans come without skull, and check it."""

from __future__ import annotations

from typing import Any

import numpy as np

from glioma_nas.case_volumes import CaseVolumes, IntensityStep
from glioma_nas.config import PreprocessConfig
from glioma_nas.errors import ImageError
from glioma_nas.registry import preprocess_steps


@preprocess_steps.register("already_stripped")
class AlreadyStripped(IntensityStep):
    """Check that the background of every sequence is 0, as it is after skull stripping; change nothing.

    Args:
        min_background: Smallest share of voxels that must be 0.
    """

    def __init__(self, *, min_background: float = 0.2) -> None:
        self.min_background = min_background

    def apply(self, volumes: CaseVolumes, config: PreprocessConfig) -> tuple[CaseVolumes, dict[str, Any]]:
        """See `PreprocessStep.apply`.

        Raises:
            ImageError: Fewer voxels are 0: the head still has its skull, or its background another value.
        """
        shares = {name: float(np.mean(data == 0)) for name, data in volumes.images.items()}
        for name, share in shares.items():
            if share < self.min_background:
                raise ImageError(
                    f"sequence '{name}': {share:.0%} of its voxels are 0, expected at least {self.min_background:.0%} "
                    "of a stripped scan; add 'strip_deepbet' or 'strip_template' to preprocess.steps instead"
                )
        return volumes, {"background": {name: round(share, 4) for name, share in shares.items()}}
