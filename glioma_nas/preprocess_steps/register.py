"""Lay a patient's sequences over the reference by rigid registration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from glioma_nas.case_volumes import CaseVolumes, PreprocessStep
from glioma_nas.config import PreprocessConfig
from glioma_nas.grids import same_grid
from glioma_nas.images import Affine, FloatVolume
from glioma_nas.preprocess_steps.same_grid import join_grids
from glioma_nas.registry import preprocess_steps


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
                "same_grid_before": same_grid(data.shape, affine, fixed.shape, volumes.affine),
            }
        return join_grids(volumes, motions), record

    def revert(self, probability: FloatVolume, record: Mapping[str, Any]) -> FloatVolume:
        """Return the map as it is: the reference does not move."""
        return probability
