"""Remove the smooth brightness changes that the receive coil leaves."""

from __future__ import annotations

from typing import Any

import numpy as np

from glioma_nas.case_volumes import CaseVolumes, IntensityStep
from glioma_nas.config import PreprocessConfig
from glioma_nas.errors import ConfigError
from glioma_nas.grids import spacing_mm
from glioma_nas.images import Affine, FloatVolume
from glioma_nas.registry import preprocess_steps


@preprocess_steps.register("n4")
class N4(IntensityStep):
    """N4 bias field correction of every sequence, inside its non-zero voxels.

    Tustison et al. 2010, https://doi.org/10.1109/TMI.2010.2046908. The field is estimated on a coarse copy, since it is
    smooth, and divided out at full resolution.

    Args:
        coarse_mm: Voxel side of that copy, at least; thick slices stay as they are.
        iterations: Iterations of each level, coarse to fine.
    """

    def __init__(self, *, coarse_mm: float = 4.0, iterations: tuple[int, ...] = (30, 30, 20)) -> None:
        if coarse_mm <= 0 or not iterations or any(count < 1 for count in iterations):
            raise ConfigError(
                f"preprocess.step_options.n4: coarse_mm is {coarse_mm}, iterations {list(iterations)}; both must be "
                "positive"
            )
        self.coarse_mm = coarse_mm
        self.iterations = tuple(iterations)

    def apply(self, volumes: CaseVolumes, config: PreprocessConfig) -> tuple[CaseVolumes, dict[str, Any]]:
        """See `PreprocessStep.apply`; the record holds the spread of the field of each sequence."""
        images: dict[str, FloatVolume] = {}
        record: dict[str, Any] = {}
        for name, data in volumes.images.items():
            images[name], spread = self._corrected(data, volumes.affine_of(name))
            record[name] = {"field_deviation": round(spread, 6)}
        return volumes.with_images(images), record

    def _corrected(self, data: FloatVolume, affine: Affine) -> tuple[FloatVolume, float]:
        import SimpleITK as sitk

        from glioma_nas.registration import from_itk, to_itk

        inside = data > 0
        image, mask = to_itk(data, affine), to_itk(inside.astype(np.uint8), affine)
        factors = [
            max(1, min(int(self.coarse_mm / side + 0.5), length // 16))
            for side, length in zip(spacing_mm(affine), data.shape, strict=True)
        ]
        method = sitk.N4BiasFieldCorrectionImageFilter()
        method.SetNumberOfThreads(1)
        method.SetMaximumNumberOfIterations(self.iterations)
        method.SetConvergenceThreshold(1e-3)
        method.Execute(sitk.Shrink(image, factors), sitk.Shrink(mask, factors))
        log_field = from_itk(method.GetLogBiasFieldAsImage(image))
        # Only brightness relative to the rest of the brain means anything, so the mean stays where it was.
        log_field -= log_field[inside].mean()
        corrected = np.where(inside, data / np.exp(log_field), data).astype(np.float32)
        return corrected, float(log_field[inside].std())
