"""Find the brain by a template and the dark gap round the brain; no weights, no download."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from glioma_nas.errors import ImageError
from glioma_nas.images import Affine, FloatVolume
from glioma_nas.preprocess_steps.skull_strip import SkullStrip
from glioma_nas.registry import preprocess_steps

_TEMPLATE_MM = 2
_REGISTRATION_MM = 4.0
_SURFACE_MM = 2.5
_CORE_MM = 12.0
_KEPT_MM = 8.0
_REACH_MM = 5.0
_NECK_MM = 4.0
_SULCUS_MM = 8.0
_BRIGHTNESS = (0.7, 1.7)


@preprocess_steps.register("strip_template")
class TemplateStrip(SkullStrip):
    """Skull stripping by a template: MNI152 laid over the head by affine registration, then the surface by brightness.

    The template is the one nilearn ships (ICBM 2009a, symmetric; Fonov et al. 2011,
    https://doi.org/10.1016/j.neuroimage.2010.07.033). Its outline is corrected to what is about as bright as the middle
    of the brain: of that, everything joined to the brain by more than a thin neck stays, sulci are closed and holes
    filled. Made for T1-weighted scans; without contrast it is less sure, and the quality control flags the case. A dark
    tumour on the surface can be notched: look at the contact sheets.
    """

    sure_in = ("t1ce",)

    def brain_mask(self, data: FloatVolume, affine: Affine) -> npt.NDArray[np.bool_]:
        """See `SkullStrip.brain_mask`.

        Raises:
            ImageError: Nothing under the template looks like a brain.
        """
        import SimpleITK as sitk

        from glioma_nas.registration import from_itk, register_template, shrunk, to_itk

        template, brain, template_affine = _template()
        transform = register_template(data, affine, template, template_affine, region=brain, level_mm=_REGISTRATION_MM)
        head = to_itk(data, affine)
        coarse = shrunk(head, _SURFACE_MM)
        laid = sitk.Resample(to_itk(brain.astype(np.float32), template_affine), coarse, transform, sitk.sitkLinear, 0.0)
        surface = _to_surface(from_itk(coarse), from_itk(laid) >= 0.5, coarse.GetSpacing())
        mask = sitk.GetImageFromArray(np.ascontiguousarray(surface.astype(np.float32).transpose(2, 1, 0)))
        mask.CopyInformation(coarse)
        identity = sitk.Transform(3, sitk.sitkIdentity)
        fine = sitk.Resample(mask, head, identity, sitk.sitkLinear, 0.0)
        found: npt.NDArray[np.bool_] = from_itk(fine) >= 0.5
        return found


def _to_surface(
    data: FloatVolume, laid: npt.NDArray[np.bool_], spacing: tuple[float, float, float]
) -> npt.NDArray[np.bool_]:
    """Move the outline of the template, (X, Y, Z), to the surface of the brain."""
    from scipy import ndimage

    core = _eroded(laid, _CORE_MM, spacing)
    if not core.any() or not np.median(data[core]) > 0:
        raise ImageError("the template finds no brain in the scan; try 'strip_deepbet', or strip it elsewhere")
    middle = float(np.median(data[core]))
    reach = _dilated(laid, _REACH_MM, spacing)
    bright = (data > _BRIGHTNESS[0] * middle) & (data < _BRIGHTNESS[1] * middle) & reach
    inner = _eroded(bright, _NECK_MM, spacing)
    parts, _ = ndimage.label(inner)
    sizes = np.bincount(parts[core & inner], minlength=2)
    if sizes[1:].max() == 0:
        raise ImageError("the template finds no brain in the scan; try 'strip_deepbet', or strip it elsewhere")
    brain = _dilated(parts == int(sizes[1:].argmax()) + 1, _NECK_MM + 1, spacing) & reach
    # What lies deep under the template stays whatever its brightness: ventricles and tumours are dark.
    brain |= _eroded(laid, _KEPT_MM, spacing)
    closed = _eroded(_dilated(brain, _SULCUS_MM, spacing), _SULCUS_MM, spacing)
    filled: npt.NDArray[np.bool_] = ndimage.binary_fill_holes(closed)
    return filled


def _eroded(mask: npt.NDArray[np.bool_], mm: float, spacing: tuple[float, float, float]) -> npt.NDArray[np.bool_]:
    from scipy import ndimage

    inside: npt.NDArray[np.bool_] = ndimage.distance_transform_edt(mask, sampling=spacing) > mm
    return inside


def _dilated(mask: npt.NDArray[np.bool_], mm: float, spacing: tuple[float, float, float]) -> npt.NDArray[np.bool_]:
    from scipy import ndimage

    around: npt.NDArray[np.bool_] = ndimage.distance_transform_edt(~mask, sampling=spacing) <= mm
    return around


@lru_cache(maxsize=1)
def _template() -> tuple[FloatVolume, npt.NDArray[np.bool_], Affine]:
    from nilearn.datasets import load_mni152_brain_mask, load_mni152_template

    image = load_mni152_template(resolution=_TEMPLATE_MM)
    mask = load_mni152_brain_mask(resolution=_TEMPLATE_MM)
    data: npt.NDArray[Any] = np.asarray(image.dataobj, dtype=np.float32)
    return data, np.asarray(mask.dataobj) > 0, np.asarray(image.affine, dtype=np.float64)
