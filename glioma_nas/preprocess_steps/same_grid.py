"""Bring sequences of different grids onto the reference's by what their headers say, without registration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from glioma_nas.case_volumes import CaseVolumes, PreprocessStep
from glioma_nas.config import PreprocessConfig
from glioma_nas.grids import IDENTITY, resample_to_grid
from glioma_nas.images import Affine, FloatVolume
from glioma_nas.registry import preprocess_steps


@preprocess_steps.register("same_grid")
class SameGrid(PreprocessStep):
    """Interpolate every sequence and the mask on the grid of the reference, trusting the scanner's coordinates."""

    joins_grids = True
    takes_many_grids = True

    def apply(self, volumes: CaseVolumes, config: PreprocessConfig) -> tuple[CaseVolumes, dict[str, Any]]:
        """See `PreprocessStep.apply`."""
        return join_grids(volumes, {}), {"resampled": sorted(volumes.other_affines)}

    def revert(self, probability: FloatVolume, record: Mapping[str, Any]) -> FloatVolume:
        """Return the map as it is: the reference's own grid does not change."""
        return probability


def join_grids(volumes: CaseVolumes, motions: Mapping[str, Affine]) -> CaseVolumes:
    """Put every sequence and the mask on the reference's grid.

    Args:
        volumes: The case.
        motions: Sequence → map from the reference's scanner space to that sequence's, where it is not the identity.
    """
    images: dict[str, FloatVolume] = {}
    for name, data in volumes.images.items():
        images[name] = resample_to_grid(
            data, volumes.affine_of(name), volumes.affine, volumes.shape, motion=motions.get(name, IDENTITY)
        )
    mask = volumes.mask
    if mask is not None and volumes.mask_on is not None:
        spread = resample_to_grid(
            mask.astype(np.float32),
            volumes.affine_of(volumes.mask_on),
            volumes.affine,
            volumes.shape,
            motion=motions.get(volumes.mask_on, IDENTITY),
        )
        mask = (spread >= 0.5).astype(np.uint8)
    return replace(
        volumes,
        images=images,
        mask=mask,
        other_affines={},
        mask_on=None,
        motions={**volumes.motions, **motions},
    )
