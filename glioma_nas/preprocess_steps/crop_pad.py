"""Cut or pad every axial slice to one square around the brain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from glioma_nas.case_volumes import CaseVolumes, PreprocessStep
from glioma_nas.config import PreprocessConfig
from glioma_nas.errors import ImageError
from glioma_nas.images import FloatVolume
from glioma_nas.registry import preprocess_steps


@preprocess_steps.register("crop_pad")
class CropPad(PreprocessStep):
    """Take a square of ``crop_size_px`` about the centre of the brain's bounding box, zeros beyond the borders."""

    def apply(self, volumes: CaseVolumes, config: PreprocessConfig) -> tuple[CaseVolumes, dict[str, Any]]:
        """See `PreprocessStep.apply`; the record also counts tumour voxels that the square leaves out."""
        size = config.crop_size_px
        seen: npt.NDArray[np.bool_] = np.logical_or.reduce(volumes.brain, axis=2)
        if not seen.any():
            raise ImageError("every voxel is 0, so there is no brain to centre on")
        start = [_centre(seen, axis=0) - size // 2, _centre(seen, axis=1) - size // 2]
        shape = list(volumes.shape[:2])
        mask = None if volumes.mask is None else _window(volumes.mask, start, [size, size])
        shift = np.eye(4)
        shift[:2, 3] = start
        cut = (
            0
            if mask is None or volumes.mask is None
            else int(volumes.mask.sum(dtype=np.int64) - mask.sum(dtype=np.int64))
        )
        cropped = replace(
            volumes,
            images={name: _window(data, start, [size, size]) for name, data in volumes.images.items()},
            mask=mask,
            affine=volumes.affine @ shift,
        )
        return cropped, {"start": start, "shape": shape, "tumour_voxels_cut": cut}

    def revert(self, probability: FloatVolume, record: Mapping[str, Any]) -> FloatVolume:
        """See `PreprocessStep.revert`; what the square left out is 0."""
        return _window(probability, [-start for start in record["start"]], record["shape"])


def _centre(seen: npt.NDArray[np.bool_], *, axis: int) -> int:
    places = np.flatnonzero(seen.any(axis=1 - axis))
    return (int(places[0]) + int(places[-1]) + 1) // 2


def _window(data: npt.NDArray[Any], start: list[int], shape: list[int]) -> npt.NDArray[Any]:
    # The in-plane window of `data` that begins at `start`, perhaps outside; zeros where there is no data.
    window = np.zeros((*shape, data.shape[2]), dtype=data.dtype)
    low = [max(0, first) for first in start]
    high = [min(side, first + length) for side, first, length in zip(data.shape, start, shape, strict=False)]
    if all(a < b for a, b in zip(low, high, strict=True)):
        source = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        target = tuple(slice(a - first, b - first) for a, b, first in zip(low, high, start, strict=True))
        window[target] = data[source]
    return window
