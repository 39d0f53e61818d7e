"""Draw the scans of a synthetic patient: MNI152 tissue maps, a tumour, contrasts, bias field, noise, thick slices.

The maps are those nilearn ships (MNI ICBM152 2009 nonlinear symmetric, Fonov et al. 2011,
https://doi.org/10.1016/j.neuroimage.2010.07.033), so nothing is downloaded. Brightness is given with white
matter on T1 as 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from scipy.spatial.transform import Rotation

from glioma_nas.images import Affine, MaskVolume
from glioma_nas.synthetic_patients import SyntheticPatient
from glioma_nas.synthetic_tumours import Field, Tumour, TumourPlan, draw_centre, grow

SEQUENCES = ("t1", "t1ce", "t2", "flair")

_SIDE_PX = 120
_SUBSLICES = 3
_HEIGHT_MM = 134.0
# Where the middle of the field of view lies in MNI space.
_MIDDLE_MM = np.array([0.0, -18.0, 14.0])

# Brightness of each sequence for fluid, grey and white matter, oedema, solid core, necrosis.
_BRIGHTNESS = {
    "t1": {"csf": 0.30, "gm": 0.72, "wm": 1.00, "oedema": 0.74, "core": 0.60, "necrosis": 0.42},
    "t1ce": {"csf": 0.30, "gm": 0.74, "wm": 1.00, "oedema": 0.74, "core": 0.62, "necrosis": 0.42},
    "t2": {"csf": 1.05, "gm": 0.62, "wm": 0.46, "oedema": 0.84, "core": 0.86, "necrosis": 0.98},
    "flair": {"csf": 0.16, "gm": 0.62, "wm": 0.52, "oedema": 0.92, "core": 0.86, "necrosis": 0.46},
}
# In a T2-FLAIR mismatch the core is like fluid within a bright rim.
_MISMATCH = {"t1": 0.46, "t1ce": 0.46, "t2": 1.0, "flair": 0.42}
_CONTRAST_DEVIATION = 0.035


@dataclass(frozen=True)
class _Atlas:
    """Tissue maps (X, Y, Z) float32 in [0, 1], their affine, and places in white matter where tumours begin."""

    t1: Field
    gm: Field
    wm: Field
    to_voxel: Affine
    white_matter_mm: npt.NDArray[np.float64]


@dataclass(frozen=True)
class SyntheticScan:
    """The images of one patient.

    Attributes:
        images: Sequence → (X, Y, Z) int16, skull-stripped: 0 outside the brain, at least 1 inside.
        mask: (X, Y, Z) uint8, labels 1 necrosis or non-enhancing core, 2 oedema, 4 enhancing.
        affine: (4, 4), oblique, axes towards left, posterior, superior; voxels of about 1.7×1.7×5.8 mm.
    """

    images: dict[str, npt.NDArray[np.int16]]
    mask: MaskVolume
    affine: Affine


def draw_scan(patient: SyntheticPatient, generator: np.random.Generator) -> SyntheticScan:
    """Draw all four sequences and the mask of a patient; the same generator state gives the same voxels."""
    atlas = _atlas()
    pixel_mm = float(generator.uniform(1.65, 1.75))
    n_slices = int(generator.integers(22, 25))
    slice_mm = _HEIGHT_MM / n_slices
    shape = (_SIDE_PX, _SIDE_PX, n_slices * _SUBSLICES)
    steps_mm = (-pixel_mm, -pixel_mm, slice_mm / _SUBSLICES)
    axes_mm = [(np.arange(side) - (side - 1) / 2) * step for side, step in zip(shape, steps_mm, strict=True)]
    grid = np.meshgrid(*(axis.astype(np.float32) for axis in axes_mm), indexing="ij", sparse=True)

    head = _draw_head(generator)
    plan = TumourPlan.draw(patient, generator)
    centre = np.linalg.solve(head, draw_centre(patient, atlas.white_matter_mm, generator) - _MIDDLE_MM)
    offset = (grid[0] - centre[0], grid[1] - centre[1], grid[2] - centre[2])
    tissue = _warp(atlas, shape, grid, head, offset, plan, generator)
    noise = [_smooth_field(shape, 11, generator) for _ in range(4)] + [_smooth_field(shape, 26, generator)]
    tumour = grow(plan, (offset[0], offset[1], offset[2]), tissue, noise)
    vessels = _vessels(tissue, generator)

    brain = _thicken(tissue["brain"]) >= 0.5
    grain = ndimage.gaussian_filter(generator.standard_normal(shape, dtype=np.float32), 0.8) * 3.0
    images = {}
    for name in SEQUENCES:
        clean = _paint(name, tissue, tumour, plan, patient, vessels, generator)
        clean *= 1 + 0.02 * grain
        images[name] = _acquire(_thicken(clean), brain, generator)
    mask = _thick_labels(tumour.labels)
    mask[~brain] = 0
    return SyntheticScan(images, mask, _draw_affine((pixel_mm, pixel_mm, slice_mm), mask.shape, generator))


@lru_cache(maxsize=1)
def _atlas() -> _Atlas:
    # Imported here because nilearn takes a second to load and only this function needs it.
    from nilearn.datasets import load_mni152_gm_template, load_mni152_template, load_mni152_wm_template

    t1, gm, wm = (
        load(resolution=1) for load in (load_mni152_template, load_mni152_gm_template, load_mni152_wm_template)
    )
    white = wm.get_fdata(dtype=np.float32)
    coarse = white[::4, ::4, ::4]
    places = np.argwhere(coarse > 0.7) * 4
    places_mm = places @ t1.affine[:3, :3].T + t1.affine[:3, 3]
    x, _, z = places_mm.T
    hemisphere = (np.abs(x) > 16) & (np.abs(x) < 55) & (z > -18) & (z < 58)
    grey = gm.get_fdata(dtype=np.float32)
    return _Atlas(t1.get_fdata(dtype=np.float32), grey, white, np.linalg.inv(t1.affine), places_mm[hemisphere])


def _draw_head(generator: np.random.Generator) -> npt.NDArray[np.float64]:
    # (3, 3) from patient to atlas millimetres: pose, size, a little shear, and left for right in half of the patients.
    turn = Rotation.from_euler("xyz", generator.uniform([-7, -5, -7], [7, 5, 7]), degrees=True).as_matrix()
    size = np.diag(generator.uniform(0.94, 1.06, 3))
    shear = np.eye(3) + np.triu(generator.normal(0, 0.02, (3, 3)), 1)
    mirror = np.diag([generator.choice([-1.0, 1.0]), 1.0, 1.0])
    head: npt.NDArray[np.float64] = mirror @ turn @ shear @ size
    return head


def _warp(
    atlas: _Atlas,
    shape: tuple[int, int, int],
    grid: tuple[Field, ...],
    head: npt.NDArray[np.float64],
    offset: tuple[Field, Field, Field],
    plan: TumourPlan,
    generator: np.random.Generator,
) -> dict[str, Field]:
    # Individual anatomy is a smooth displacement; the tumour pushes tissue outwards, so samples are taken further in.
    squared = sum((part / (1.5 * plan.core_mm)) ** 2 for part in offset)
    pull = plan.mass_effect_mm / plan.core_mm * np.exp(-squared)
    moved = [
        axis + 2.5 * _smooth_field(shape, 6, generator) - part * pull for axis, part in zip(grid, offset, strict=True)
    ]
    matrix = (atlas.to_voxel[:3, :3] @ head).astype(np.float32)
    origin = atlas.to_voxel[:3, :3] @ _MIDDLE_MM + atlas.to_voxel[:3, 3]
    places = np.stack([sum(matrix[row, k] * moved[k] for k in range(3)) + np.float32(origin[row]) for row in range(3)])
    t1, gm, wm = (
        ndimage.map_coordinates(volume, places, order=1, cval=0.0) for volume in (atlas.t1, atlas.gm, atlas.wm)
    )
    brain = np.clip(t1 / 0.25, 0, 1)
    # The atlas is an average of 152 heads and therefore blurred; one head has steeper borders.
    wm, gm = _steepen(wm), _steepen(gm)
    total = np.maximum(wm + gm, 1.0)
    wm, gm = wm / total, gm / total
    return {"t1": t1, "gm": gm, "wm": wm, "csf": np.clip(brain - gm - wm, 0, 1), "brain": brain}


def _steepen(share: Field) -> Field:
    return np.asarray(1 / (1 + np.exp(-9 * (share - 0.45))), dtype=np.float32)


def _vessels(tissue: dict[str, Field], generator: np.random.Generator) -> Field:
    # Vessels and meninges in the sulci also take up contrast agent, so brightness alone does not give the tumour away.
    speckle = ndimage.gaussian_filter(generator.standard_normal(tissue["csf"].shape, dtype=np.float32), (0.7, 0.7, 2.0))
    threshold = float(generator.uniform(2.2, 2.6)) * float(speckle.std())
    return np.asarray((speckle > threshold) * tissue["csf"] * generator.uniform(0.5, 0.9), dtype=np.float32)


def _paint(
    name: str,
    tissue: dict[str, Field],
    tumour: Tumour,
    plan: TumourPlan,
    patient: SyntheticPatient,
    vessels: Field,
    generator: np.random.Generator,
) -> Field:
    tone = {key: value * (1 + generator.normal(0, _CONTRAST_DEVIATION)) for key, value in _BRIGHTNESS[name].items()}
    image: npt.NDArray[Any] = np.zeros_like(tissue["wm"])
    for key in ("csf", "gm", "wm"):
        image = image + np.float32(tone[key]) * tissue[key]
    if name.startswith("t1"):
        image = 0.5 * image + 0.5 * np.float32(1.13) * tissue["t1"]
    solid: float | npt.NDArray[Any] = tone["core"]
    if patient.t2_flair_mismatch:
        inner = _MISMATCH[name] * (1 + generator.normal(0, _CONTRAST_DEVIATION))
        solid = inner + (tone["core"] - inner) * tumour.rim
    lesion = tone["oedema"] + (solid - tone["oedema"]) * tumour.core
    lesion = lesion + (tone["necrosis"] - lesion) * tumour.necrosis
    image = image + (lesion - image) * (0.92 * tumour.presence) + tumour.texture
    if name == "t1ce":
        image = image + plan.enhancement * tumour.enhancing + vessels
    return np.asarray(image, dtype=np.float32)


def _acquire(clean: Field, brain: npt.NDArray[np.bool_], generator: np.random.Generator) -> npt.NDArray[np.int16]:
    # What a scanner does: uneven coil sensitivity, noise in magnitude images (Rician), arbitrary units.
    shape = (clean.shape[0], clean.shape[1], clean.shape[2])
    biased = clean * np.exp(float(generator.uniform(0.04, 0.12)) * _smooth_field(shape, 4, generator))
    deviation = float(generator.uniform(0.012, 0.03))
    real, imaginary = generator.standard_normal((2, *shape), dtype=np.float32) * np.float32(deviation)
    magnitude = np.hypot(np.clip(biased, 0, None) + real, imaginary) * float(generator.uniform(300, 900))
    return np.where(brain, np.clip(np.rint(magnitude), 1, 32767), 0).astype(np.int16)


def _thicken(fine: Field) -> Field:
    return np.asarray(fine.reshape(*fine.shape[:2], -1, _SUBSLICES).mean(axis=3), dtype=np.float32)


def _thick_labels(labels: npt.NDArray[np.uint8]) -> MaskVolume:
    # The label most of a thick voxel has; background wins ties.
    parts = labels.reshape(*labels.shape[:2], -1, _SUBSLICES)
    values = np.array([0, 1, 2, 4], dtype=np.uint8)
    votes = np.stack([(parts == value).sum(axis=3) for value in values])
    # A voxel is tumour when at least half of it is, whatever the parts.
    chosen = values[1:][np.argmax(votes[1:], axis=0)]
    return np.where(2 * votes[0] > _SUBSLICES, 0, chosen).astype(np.uint8)


def _smooth_field(shape: tuple[int, int, int], knots: int, generator: np.random.Generator) -> Field:
    # Random values on a coarse lattice, joined by Gaussian bumps along each axis; unit deviation on average.
    field: npt.NDArray[np.float32] = generator.standard_normal((knots, knots, knots), dtype=np.float32)
    for side in shape:
        # Contracting the first axis and appending its result turns the axes once round.
        field = np.tensordot(field, _bumps(side, knots), axes=(0, 1))
    return field


@lru_cache(maxsize=64)
def _bumps(side: int, knots: int) -> npt.NDArray[np.float32]:
    place = np.linspace(0, knots - 1, side)[:, None] - np.arange(knots)
    weights = np.exp(-0.5 * (place / 0.6) ** 2)
    return np.asarray(weights / np.sqrt((weights**2).sum(axis=1, keepdims=True)), dtype=np.float32)


def _draw_affine(
    spacing_mm: tuple[float, float, float], shape: tuple[int, ...], generator: np.random.Generator
) -> Affine:
    # How the head lay in the scanner: slices tilted a few degrees, middle of the volume near the isocentre.
    tilt = Rotation.from_euler("xyz", generator.uniform([-12, -3, -3], [12, 3, 3]), degrees=True).as_matrix()
    affine = np.eye(4)
    affine[:3, :3] = tilt @ np.diag([-1.0, -1.0, 1.0]) @ np.diag(spacing_mm)
    affine[:3, 3] = generator.uniform(-15, 15, 3) - affine[:3, :3] @ ((np.array(shape[:3]) - 1) / 2)
    return affine
