"""Lay a patient's sequences over the reference by rigid registration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from glioma_nas.case_volumes import CaseVolumes, PreprocessStep
from glioma_nas.config import PreprocessConfig
from glioma_nas.grids import resample_to_grid, same_grid
from glioma_nas.images import Affine, FloatVolume
from glioma_nas.preprocess_steps.same_grid import join_grids
from glioma_nas.registry import preprocess_steps

_HEAD_BRIGHTNESS = 0.2


@preprocess_steps.register("register")
class Register(PreprocessStep):
    """Move every sequence rigidly onto the reference (multi-resolution, Mattes mutual information), then to its grid.

    The mask moves with the sequence it was drawn on. Each sequence is interpolated once, motion and change of grid
    together. A registration that does not raise the mutual information is not used.
    """

    joins_grids = True
    takes_many_grids = True

    def apply(self, volumes: CaseVolumes, config: PreprocessConfig) -> tuple[CaseVolumes, dict[str, Any]]:
        """See `PreprocessStep.apply`; the record holds each sequence's motion and mutual information."""
        from glioma_nas.registration import register_rigid

        fixed = volumes.images[volumes.reference]
        motions: dict[str, Affine] = {}
        record: dict[str, Any] = {"reference": volumes.reference, "sequences": {}}
        for name, data in volumes.images.items():
            if name == volumes.reference:
                continue
            affine = volumes.affine_of(name)
            found = register_rigid(fixed, volumes.affine, data, affine)
            if found.improved:
                motions[name] = found.motion
            record["sequences"][name] = {
                "motion": found.motion.tolist(),
                "information_before": round(found.information_before, 6),
                "information": round(found.information, 6),
                "improved": found.improved,
                "overlap_before": _overlap(fixed, resample_to_grid(data, affine, volumes.affine, volumes.shape)),
                "same_grid_before": same_grid(data.shape, affine, fixed.shape, volumes.affine),
            }
        joined = join_grids(volumes, motions)
        for name, own in record["sequences"].items():
            own["overlap"] = _overlap(fixed, joined.images[name])
        return joined, record

    def revert(self, probability: FloatVolume, record: Mapping[str, Any]) -> FloatVolume:
        """Return the map as it is: the reference does not move."""
        return probability


def _overlap(fixed: FloatVolume, moved: FloatVolume) -> float:
    """Return the Dice coefficient of the two heads: voxels brighter than a fifth of the 99th percentile."""
    heads = [data > _HEAD_BRIGHTNESS * np.percentile(data, 99) for data in (fixed, moved)]
    total = int(heads[0].sum()) + int(heads[1].sum())
    return round(2 * int((heads[0] & heads[1]).sum()) / total, 5) if total else 0.0
