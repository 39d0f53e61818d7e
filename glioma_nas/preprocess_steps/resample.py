"""Bring every case to one voxel size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from glioma_nas.case_volumes import CaseVolumes, PreprocessStep
from glioma_nas.config import PreprocessConfig
from glioma_nas.errors import ConfigError
from glioma_nas.grids import spacing_mm
from glioma_nas.images import FloatVolume
from glioma_nas.preprocess_steps.resize import Kernel, inside_only
from glioma_nas.preprocess_steps.resize import resample as resample_in_plane
from glioma_nas.registry import preprocess_steps


@preprocess_steps.register("resample")
class Resample(PreprocessStep):
    """Resample to a voxel size: in-plane always, across slices only when asked, because thick slices hold no more.

    Images are interpolated linearly without aliasing; background stays 0 and the brain keeps its size, see
    `glioma_nas.preprocess_steps.resize.inside_only`. Masks are set where at least half of a voxel is tumour.

    Args:
        spacing_mm: Side of a pixel.
        slice_mm: Distance of the slices; none keeps them as they are.
    """

    def __init__(self, *, spacing_mm: float = 1.0, slice_mm: float | None = None) -> None:
        if spacing_mm <= 0 or (slice_mm is not None and slice_mm <= 0):
            raise ConfigError(
                f"preprocess.step_options.resample: spacing_mm is {spacing_mm}, slice_mm {slice_mm}; expected above 0"
            )
        self.spacing_mm = spacing_mm
        self.slice_mm = slice_mm

    def apply(self, volumes: CaseVolumes, config: PreprocessConfig) -> tuple[CaseVolumes, dict[str, Any]]:
        """See `PreprocessStep.apply`."""
        old, shape = spacing_mm(volumes.affine), np.array(volumes.shape)
        wanted = np.array([self.spacing_mm, self.spacing_mm, self.slice_mm or old[2]])
        new = np.maximum(1, np.rint(shape * old / wanted)).astype(int)
        # Whole voxels that cover the field of view: the size is met to half a voxel over the whole image.
        ratio = shape / new
        to_old = np.diag([*ratio, 1.0])
        to_old[:3, 3] = (ratio - 1) / 2
        size = (int(new[0]), int(new[1]), int(new[2]))
        mask = volumes.mask
        if mask is not None:
            mask = (_resample(mask.astype(np.float32), size, "area") >= 0.5).astype(np.uint8)
        images = {
            name: inside_only(data, lambda part: _resample(part, size, "linear"))
            for name, data in volumes.images.items()
        }
        return replace(volumes, images=images, mask=mask, affine=volumes.affine @ to_old), {"shape": shape.tolist()}

    def revert(self, probability: FloatVolume, record: Mapping[str, Any]) -> FloatVolume:
        """See `PreprocessStep.revert`."""
        first, second, third = record["shape"]
        return np.clip(_resample(probability, (first, second, third), "linear"), 0.0, 1.0)


def _resample(data: FloatVolume, size: tuple[int, int, int], kernel: Kernel) -> FloatVolume:
    planar = resample_in_plane(data, size[:2], kernel)
    # The same for the third axis, laid first for the moment.
    turned = resample_in_plane(np.ascontiguousarray(planar.transpose(2, 0, 1)), (size[2], size[0]), kernel)
    return np.ascontiguousarray(turned.transpose(1, 2, 0))
