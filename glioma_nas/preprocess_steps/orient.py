"""Turn volumes to the closest canonical orientation, so that axes mean the same in every case."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt

from glioma_nas.case_volumes import CaseVolumes, PreprocessStep
from glioma_nas.config import PreprocessConfig
from glioma_nas.images import FloatVolume
from glioma_nas.registry import preprocess_steps


@preprocess_steps.register("orient")
class Orient(PreprocessStep):
    """Permute and flip axes to right, anterior, superior (RAS+), without interpolation; oblique angles stay."""

    def apply(self, volumes: CaseVolumes, config: PreprocessConfig) -> tuple[CaseVolumes, dict[str, Any]]:
        """See `PreprocessStep.apply`; the record holds, for each axis, its canonical axis and direction."""
        orientation = nib.orientations.io_orientation(volumes.affine)
        turned = CaseVolumes(
            {name: _turn(data, orientation) for name, data in volumes.images.items()},
            None if volumes.mask is None else _turn(volumes.mask, orientation),
            volumes.affine @ nib.orientations.inv_ornt_aff(orientation, volumes.shape),
        )
        return turned, {"axes": [[int(axis), int(direction)] for axis, direction in orientation]}

    def revert(self, probability: FloatVolume, record: Mapping[str, Any]) -> FloatVolume:
        """See `PreprocessStep.revert`."""
        canonical = np.array([[0, 1], [1, 1], [2, 1]])
        return _turn(probability, nib.orientations.ornt_transform(canonical, np.array(record["axes"])))


def _turn(data: npt.NDArray[Any], orientation: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.ascontiguousarray(nib.orientations.apply_orientation(data, orientation))
