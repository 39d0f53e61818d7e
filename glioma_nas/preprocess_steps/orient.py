"""Turn volumes to the closest canonical orientation, so that axes mean the same in every case."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt

from glioma_nas.case_volumes import CaseVolumes, PreprocessStep
from glioma_nas.config import PreprocessConfig
from glioma_nas.images import Affine, FloatVolume
from glioma_nas.registry import preprocess_steps


@preprocess_steps.register("orient")
class Orient(PreprocessStep):
    """Permute and flip axes to right, anterior, superior (RAS+), without interpolation; oblique angles stay."""

    takes_many_grids = True

    def apply(self, volumes: CaseVolumes, config: PreprocessConfig) -> tuple[CaseVolumes, dict[str, Any]]:
        """See `PreprocessStep.apply`; the record holds, for each axis, its canonical axis and direction."""
        turned = replace(
            volumes,
            images={name: _turn(data, _orientation(volumes.affine_of(name))) for name, data in volumes.images.items()},
            mask=None if volumes.mask is None else _turn(volumes.mask, _orientation(_mask_affine(volumes))),
            affine=_turned_affine(volumes.affine, volumes.shape),
            other_affines={
                name: _turned_affine(affine, volumes.images[name].shape)
                for name, affine in volumes.other_affines.items()
            },
        )
        return turned, {"axes": [[int(axis), int(direction)] for axis, direction in _orientation(volumes.affine)]}

    def revert(self, probability: FloatVolume, record: Mapping[str, Any]) -> FloatVolume:
        """See `PreprocessStep.revert`."""
        canonical = np.array([[0, 1], [1, 1], [2, 1]])
        return _turn(probability, nib.orientations.ornt_transform(canonical, np.array(record["axes"])))


def _orientation(affine: Affine) -> npt.NDArray[Any]:
    found: npt.NDArray[Any] = nib.orientations.io_orientation(affine)
    return found


def _mask_affine(volumes: CaseVolumes) -> Affine:
    return volumes.affine if volumes.mask_on is None else volumes.affine_of(volumes.mask_on)


def _turned_affine(affine: Affine, shape: tuple[int, ...]) -> Affine:
    turned: Affine = affine @ nib.orientations.inv_ornt_aff(_orientation(affine), shape)
    return turned


def _turn(data: npt.NDArray[Any], orientation: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.ascontiguousarray(nib.orientations.apply_orientation(data, orientation))
