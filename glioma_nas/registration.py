"""Registration of two scans by mutual information, the same on every machine and number of workers.

Mattes et al. 2003, https://doi.org/10.1109/TMI.2003.809072: the joint histogram is smoothed by B-splines, so that the
metric has a derivative. Each level of the pyramid is made here, because thick slices must not be shrunk across.
Everything runs on one thread with a fixed seed: sums in another order would end in another last digit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

from glioma_nas.errors import ImageError
from glioma_nas.grids import IDENTITY, LPS_FROM_RAS, spacing_mm
from glioma_nas.images import Affine, FloatVolume

_SEED = 1
_HISTOGRAM_BINS = 32
_MAX_SAMPLES = 60_000
_COARSE_MM = (12.0, 6.0)
_FINE_MM = (3.0, 1.5)
_START_TURNS_DEGREES = (-6.0, 6.0)
_STARTS_KEPT = (2, 1)
_STEP_SHARES = (0.5, 0.1)
_START_UP_MM = (-20.0, 0.0, 20.0, 40.0, 60.0)
_START_FORWARD_MM = (-20.0, 0.0, 20.0)
_START_NOD_DEGREES = (-15.0, 0.0, 15.0)


@dataclass(frozen=True)
class Registration:
    """What a registration found.

    Attributes:
        motion: (4, 4), from the fixed scan's scanner space to the moving scan's, RAS+ millimetres.
        information_before: Mutual information (nats) with the scans where their headers put them.
        information: The same after.
        improved: Whether the motion is better than none; if not, `motion` is the identity.
    """

    motion: Affine
    information_before: float
    information: float
    improved: bool


class _Pyramid:
    """A SimpleITK image at every level that is asked for, each made once."""

    def __init__(self, image: Any) -> None:
        self._image = image
        self._levels: dict[float, Any] = {}

    def at(self, level_mm: float) -> Any:
        if level_mm not in self._levels:
            self._levels[level_mm] = shrunk(self._image, level_mm)
        return self._levels[level_mm]


def to_itk(data: npt.NDArray[Any], affine: Affine) -> Any:  # a SimpleITK image, whose package has no types
    """Make a SimpleITK image in LPS+ space of a volume (X, Y, Z) and its RAS+ affine."""
    import SimpleITK as sitk

    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    image = sitk.GetImageFromArray(np.ascontiguousarray(data.transpose(2, 1, 0)))
    lps = LPS_FROM_RAS @ affine
    spacing = spacing_mm(affine)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    # ITK insists on orthogonal axes to six digits, which rounded headers miss; a shear that small is rounded away.
    u, _, v = np.linalg.svd(lps[:3, :3] / spacing)
    image.SetDirection((u @ v).flatten().tolist())
    return image


def from_itk(image: Any) -> npt.NDArray[Any]:  # see to_itk
    """Return the voxels (X, Y, Z) of a SimpleITK image."""
    import SimpleITK as sitk

    return np.ascontiguousarray(sitk.GetArrayFromImage(image).transpose(2, 1, 0))


def register_rigid(
    fixed: FloatVolume, fixed_affine: Affine, moving: FloatVolume, moving_affine: Affine
) -> Registration:
    """Find the rigid motion that lays ``moving`` over ``fixed``.

    The search starts from the headers, from the centres of the heads, and from small turns about each axis.

    Args:
        fixed: (X, Y, Z) float32, background 0 or air.
        fixed_affine: Its grid.
        moving: Another scan of the same head.
        moving_affine: Its grid.

    Raises:
        ImageError: The scans overlap from none of these places.
    """
    import SimpleITK as sitk

    target, source = _Pyramid(to_itk(fixed, fixed_affine)), _Pyramid(to_itk(moving, moving_affine))
    identity = sitk.Euler3DTransform()
    identity.SetCenter(_centre(fixed, fixed_affine).tolist())
    before = _information(target, source, identity)
    moments = sitk.Euler3DTransform(identity)
    moments.SetTranslation((_centre(moving, moving_affine) - _centre(fixed, fixed_affine)).tolist())
    # A single descent can end in a local optimum, so several go through the coarse levels, which cost little.
    starts = [identity, moments]
    for axis, degrees in product(range(3), _START_TURNS_DEGREES):
        turned = sitk.Euler3DTransform(identity)
        turned.SetRotation(*(float(np.deg2rad(degrees)) if axis == other else 0.0 for other in range(3)))
        starts.append(turned)

    def information(transform: Any) -> float:
        return _information(target, source, transform)

    for level, kept in zip(_COARSE_MM, _STARTS_KEPT, strict=True):
        starts = [start for start in starts if _descended(target, source, start, level_mm=level)]
        if not starts:
            raise ImageError("two sequences do not overlap wherever the search begins; are both of one head?")
        starts = sorted(starts, key=information, reverse=True)[:kept]
    transform = _refined(target, source, starts[0], information, levels_mm=_FINE_MM)
    after = information(transform)
    improved = after > before
    motion = _matrix(transform) if improved else IDENTITY.copy()
    return Registration(motion, before, after if improved else before, improved)


def register_template(
    head: FloatVolume,
    head_affine: Affine,
    template: FloatVolume,
    template_affine: Affine,
    *,
    region: npt.NDArray[np.bool_],
    level_mm: float,
) -> Any:
    """Lay a template over a head: rigid from several starts, then affine.

    Args:
        head: (X, Y, Z) float32.
        head_affine: Its grid.
        template: (X, Y, Z) float32.
        template_affine: Its grid.
        region: Where in the template the metric looks. The outline of a brain template must not be part of it: the
            metric would lay it over the outline of the head.
        level_mm: Finest resolution; the search starts at twice that.

    Returns:
        A SimpleITK transform from the head's space to the template's.
    """
    import SimpleITK as sitk

    target, source = _Pyramid(to_itk(head, head_affine)), _Pyramid(to_itk(template, template_affine))
    seen = to_itk(region.astype(np.uint8), template_affine)
    # From the template to the head, so that the metric always sees the whole brain.
    rigid = sitk.Euler3DTransform()
    rigid.SetCenter(_centre(template, template_affine).tolist())
    rigid = _best_start(source, target, rigid, _centre(head, head_affine), region=seen, level_mm=2 * level_mm)

    def information(transform: Any) -> float:
        return _information(source, target, transform, region=seen, level_mm=level_mm)

    rigid = _refined(source, target, rigid, information, levels_mm=(2 * level_mm, level_mm), region=seen)
    affine = sitk.AffineTransform(3)
    affine.SetCenter(rigid.GetCenter())
    affine.SetMatrix(rigid.GetMatrix())
    affine.SetTranslation(rigid.GetTranslation())
    affine = _refined(source, target, affine, information, levels_mm=(2 * level_mm, level_mm), region=seen)
    return affine.GetInverse()


def _refined(
    fixed: _Pyramid,
    moving: _Pyramid,
    transform: Any,
    information: Callable[[Any], float],
    *,
    levels_mm: Sequence[float],
    region: Any = None,
) -> Any:
    """Descend through the levels and return the transform with the most information, at worst the one given.

    The optimiser ends where its last step led, which can be worse than where it began: then shorter steps are tried.
    """
    most = information(transform)
    for level in levels_mm:
        for share in _STEP_SHARES:
            trial = type(transform)(transform)
            if not _descended(fixed, moving, trial, level_mm=level, step_share=share, region=region):
                continue
            if (found := information(trial)) > most:
                transform, most = trial, found
                break
    return transform


def _best_start(
    fixed: _Pyramid,
    moving: _Pyramid,
    start: Any,
    centre: npt.NDArray[np.float64],
    *,
    region: Any,
    level_mm: float,
) -> Any:
    """Try shifts and nods about the centre of the head, which lies below the brain's by as much as the neck is long."""
    import SimpleITK as sitk

    target, source = fixed.at(level_mm), moving.at(level_mm)
    method = _method(target)
    method.SetMetricFixedMask(region)
    best, found = start, np.inf
    for up, forward, nod in product(_START_UP_MM, _START_FORWARD_MM, _START_NOD_DEGREES):
        trial = sitk.Euler3DTransform(start)
        shift = centre - np.array(start.GetCenter()) + np.array([0.0, -forward, up])
        trial.SetTranslation(shift.tolist())
        trial.SetRotation(float(np.deg2rad(nod)), 0.0, 0.0)
        method.SetInitialTransform(trial)
        try:
            value = method.MetricEvaluate(target, source)
        except RuntimeError:
            continue  # the template lies outside the scan
        if value < found:
            best, found = trial, value
    return best


def _centre(data: FloatVolume, affine: Affine) -> npt.NDArray[np.float64]:
    # Centre of the voxels brighter than the mean, in LPS+ millimetres: the head, whatever the contrast.
    places = np.argwhere(data > data.mean())
    lps = LPS_FROM_RAS @ affine
    centre: npt.NDArray[np.float64] = lps[:3, :3] @ places.mean(axis=0) + lps[:3, 3]
    return centre


def shrunk(image: Any, level_mm: float) -> Any:
    """Smooth a SimpleITK image and sample it at voxels of about ``level_mm``, each axis by a whole number.

    Interpolated, not picked: the middle of two voxels is no voxel, and `sitk.Shrink` takes the one or the other as
    floating point has it, so that two scans of one grid can come out a voxel apart.
    """
    import SimpleITK as sitk

    sizes = image.GetSize()
    factors = [
        max(1, min(int(level_mm / side + 0.5), size // 8)) for side, size in zip(image.GetSpacing(), sizes, strict=True)
    ]
    if max(factors) == 1:
        return image
    for axis, factor in enumerate(factors):
        if factor > 1:
            sigma_mm = 0.5 * factor * image.GetSpacing()[axis]
            image = sitk.RecursiveGaussian(image, sigma_mm, False, sitk.RecursiveGaussianImageFilter.ZeroOrder, axis)
    new = [size // factor for size, factor in zip(sizes, factors, strict=True)]
    grid = sitk.ResampleImageFilter()
    grid.SetSize(new)
    grid.SetOutputSpacing([side * factor for side, factor in zip(image.GetSpacing(), factors, strict=True)])
    grid.SetOutputDirection(image.GetDirection())
    first = [(size - 1 - (n - 1) * factor) / 2 for size, n, factor in zip(sizes, new, factors, strict=True)]
    grid.SetOutputOrigin(image.TransformContinuousIndexToPhysicalPoint(first))
    grid.SetInterpolator(sitk.sitkLinear)
    return grid.Execute(image)


def _method(target: Any) -> Any:
    import SimpleITK as sitk

    method = sitk.ImageRegistrationMethod()
    method.SetNumberOfThreads(1)
    method.SetMetricAsMattesMutualInformation(_HISTOGRAM_BINS)
    method.SetInterpolator(sitk.sitkLinear)
    n_voxels = int(np.prod(target.GetSize()))
    if n_voxels > _MAX_SAMPLES:
        method.SetMetricSamplingStrategy(sitk.ImageRegistrationMethod.RANDOM)
        method.SetMetricSamplingPercentage(_MAX_SAMPLES / n_voxels, _SEED)
    return method


def _optimise(
    fixed: _Pyramid, moving: _Pyramid, transform: Any, *, level_mm: float, region: Any = None, step_share: float = 0.5
) -> None:
    target, source = fixed.at(level_mm), moving.at(level_mm)
    method = _method(target)
    if region is not None:
        method.SetMetricFixedMask(region)
    method.SetOptimizerAsRegularStepGradientDescent(
        learningRate=level_mm * step_share,
        minStep=level_mm * 1e-3,
        numberOfIterations=100,
        relaxationFactor=0.6,
        gradientMagnitudeTolerance=1e-6,
    )
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetInitialTransform(transform, inPlace=True)
    method.Execute(target, source)


def _descended(
    fixed: _Pyramid, moving: _Pyramid, transform: Any, *, level_mm: float, step_share: float = 0.5, region: Any = None
) -> bool:
    # Headers can place two scans metres apart, which is no reason to give up the other places to begin from.
    try:
        _optimise(fixed, moving, transform, level_mm=level_mm, step_share=step_share, region=region)
    except RuntimeError:
        return False  # no overlap, at the start or on the way
    return True


def _information(
    fixed: _Pyramid, moving: _Pyramid, transform: Any, *, region: Any = None, level_mm: float = _FINE_MM[0]
) -> float:
    target, source = fixed.at(level_mm), moving.at(level_mm)
    method = _method(target)
    if region is not None:
        method.SetMetricFixedMask(region)
    method.SetInitialTransform(transform)
    try:
        return -float(method.MetricEvaluate(target, source))
    except RuntimeError:
        return 0.0  # the scans do not overlap at all: no information


def _matrix(transform: Any) -> Affine:
    lps = np.eye(4)
    lps[:3, :3] = np.array(transform.GetMatrix()).reshape(3, 3)
    centre, shift = np.array(transform.GetCenter()), np.array(transform.GetTranslation())
    lps[:3, 3] = shift + centre - lps[:3, :3] @ centre
    matrix: Affine = LPS_FROM_RAS @ lps @ LPS_FROM_RAS
    return matrix
