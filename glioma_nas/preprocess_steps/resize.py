"""Resample slices in-plane to the size the networks see, without aliasing.

Resampling is a product with one sparse matrix for each axis. That is exact, needs no imaging library, and gives the
same bits whatever the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy import sparse

from glioma_nas.case_volumes import CaseVolumes, PreprocessStep
from glioma_nas.config import PreprocessConfig
from glioma_nas.images import FloatVolume
from glioma_nas.preprocess_steps.percentile import NEARLY_ZERO
from glioma_nas.registry import preprocess_steps

Kernel = Literal["linear", "area"]


@preprocess_steps.register("resize")
class Resize(PreprocessStep):
    """Resample in-plane to ``image_size_px``: images anti-aliased and linear, masks where at least half is tumour.

    Background stays 0 and the brain keeps its size, see `inside_only`.
    """

    def apply(self, volumes: CaseVolumes, config: PreprocessConfig) -> tuple[CaseVolumes, dict[str, Any]]:
        """See `PreprocessStep.apply`."""
        size = (config.image_size_px, config.image_size_px)
        shape = volumes.shape[:2]
        # Pixel i of the new grid covers [i, i+1)·ratio of the old one, so its centre lies at (i + ½)·ratio - ½.
        to_old = np.eye(4)
        for axis in (0, 1):
            ratio = shape[axis] / size[axis]
            to_old[axis, axis], to_old[axis, 3] = ratio, (ratio - 1) / 2
        mask = volumes.mask
        if mask is not None:
            mask = (resample(mask.astype(np.float32), size, "area") >= 0.5).astype(np.uint8)
        images = {
            name: inside_only(data, lambda part: resample(part, size, "linear"))
            for name, data in volumes.images.items()
        }
        return replace(volumes, images=images, mask=mask, affine=volumes.affine @ to_old), {"shape": list(shape)}

    def revert(self, probability: FloatVolume, record: Mapping[str, Any]) -> FloatVolume:
        """See `PreprocessStep.revert`."""
        shape = record["shape"]
        return np.clip(resample(probability, (shape[0], shape[1]), "linear"), 0.0, 1.0)


def inside_only(data: FloatVolume, resampled: Callable[[FloatVolume], FloatVolume]) -> FloatVolume:
    """Resample a scan whose background is 0 without blending the two.

    A voxel is brain where at least half of it is, and its brightness is that of its brain alone. Blended, the brain
    would grow by a rim of voxels whose brightness lies between its own and 0, which after normalisation is not dark
    but the mean of the brain.

    Args:
        data: (X, Y, Z) float32, background 0.
        resampled: Any linear resampling whose weights add up to 1.
    """
    inside = data != 0
    if inside.all():
        return resampled(data)
    share = resampled(inside.astype(np.float32))
    # Half of a voxel is half of it also where sums of weights miss it in the last digit.
    brain = share >= np.float32(0.5 - 1e-5)
    whole: FloatVolume = np.divide(resampled(data), share, out=np.zeros_like(share), where=brain)
    whole[brain & (whole == 0)] = NEARLY_ZERO
    return whole


def resample(data: FloatVolume, size: tuple[int, int], kernel: Kernel) -> FloatVolume:
    """Resample the first two axes.

    Args:
        data: (X, Y, Z) float32.
        size: New (X, Y).
        kernel: See `resampling_matrix`.

    Returns:
        (size[0], size[1], Z) float32.
    """
    result: npt.NDArray[Any] = data
    for axis in (0, 1):
        if result.shape[axis] != size[axis]:
            moved = np.moveaxis(result, axis, 0)
            matrix = resampling_matrix(moved.shape[0], size[axis], kernel)
            product = matrix @ moved.reshape(moved.shape[0], -1)
            result = np.moveaxis(product.reshape(size[axis], *moved.shape[1:]), 0, axis)
    return np.ascontiguousarray(result, dtype=np.float32)


@lru_cache(maxsize=32)
def resampling_matrix(n_in: int, n_out: int, kernel: Kernel) -> sparse.csr_array:
    """Return the (n_out, n_in) matrix that resamples one axis; rows sum to 1.

    ``linear`` is a triangle as wide as the coarser of both pixels: linear interpolation when enlarging, low-pass when
    shrinking. ``area`` is the share of each old pixel in the new one.
    """
    ratio = n_in / n_out
    old, new = np.arange(n_in), np.arange(n_out)[:, None]
    if kernel == "area":
        weights = np.clip(np.minimum(old + 1, (new + 1) * ratio) - np.maximum(old, new * ratio), 0, None)
    else:
        centre = (new + 0.5) * ratio - 0.5
        weights = np.clip(1 - np.abs(old - centre) / max(ratio, 1.0), 0, None)
    return sparse.csr_array(weights / weights.sum(axis=1, keepdims=True))
