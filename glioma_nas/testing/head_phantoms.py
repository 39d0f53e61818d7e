"""A whole head with everything known: brain, tumour, and how far the patient moved between sequences.

The brain is nilearn's MNI152 template (ICBM 2009a); a cerebrospinal gap, skull and scalp are put round it. Every
sequence is sampled from the same continuous head on a grid of its own, so registration and skull stripping have one
right answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from glioma_nas.grids import IDENTITY, resample_to_grid, rotation_about
from glioma_nas.images import Affine, FloatVolume
from glioma_nas.seeding import numpy_generator
from glioma_nas.testing.phantoms import write_nifti

HEAD_CENTRE_MM = np.array([0.0, -18.0, 20.0])

# Brightness of cerebrospinal fluid, grey matter, white matter, tumour, scalp; the skull is dark everywhere.
_CONTRASTS = {
    "t1": (0.25, 0.65, 1.0, 0.45, 1.1),
    "t1ce": (0.25, 0.68, 1.0, 1.35, 1.1),
    "t2": (1.3, 0.75, 0.5, 1.05, 0.8),
    "flair": (0.2, 0.75, 0.6, 1.3, 0.7),
}
_SKULL = 0.08
_GAP_MM, _SKULL_MM, _SCALP_MM = 2.0, 8.0, 14.0
_TUMOUR_CENTRE_MM, _TUMOUR_RADIUS_MM = np.array([32.0, 0.0, 28.0]), 17.0


@dataclass(frozen=True)
class Head:
    """One sequence of the phantom head.

    Attributes:
        data: (X, Y, Z) float32, about 0 to 1400, with a smooth bias field and Rician noise.
        affine: (4, 4), RAS+ millimetres.
        brain: (X, Y, Z) bool, the template's brain.
        tumour: (X, Y, Z) bool.
        motion: (4, 4) from the head's own space to this scan's scanner space.
    """

    data: FloatVolume
    affine: Affine
    brain: npt.NDArray[np.bool_]
    tumour: npt.NDArray[np.bool_]
    motion: Affine


def head_grid(
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 5.0), oblique_degrees: tuple[float, float, float] = (0, 0, 0)
) -> tuple[Affine, tuple[int, int, int]]:
    """Return affine and shape of a field of view of 190 × 226 × 190 mm round the head."""
    extent = np.array([190.0, 226.0, 190.0])
    shape = np.rint(extent / spacing_mm).astype(int)
    affine: Affine = np.diag([*spacing_mm, 1.0])
    affine[:3, 3] = HEAD_CENTRE_MM - extent / 2 + np.array(spacing_mm) / 2
    turned: Affine = rotation_about(HEAD_CENTRE_MM, oblique_degrees, (0.0, 0.0, 0.0)) @ affine
    return turned, (int(shape[0]), int(shape[1]), int(shape[2]))


def make_head(
    sequence: str,
    *,
    affine: Affine,
    shape: tuple[int, int, int],
    motion: Affine = IDENTITY,
    seed: int = 0,
    bias: float = 0.15,
    noise: float = 0.02,
) -> Head:
    """Scan the head.

    Args:
        sequence: ``t1``, ``t1ce``, ``t2`` or ``flair``.
        affine: Grid of the scan.
        shape: Its shape.
        motion: How the patient lies: from the head's own space to scanner space.
        seed: Of bias field and noise.
        bias: Amplitude of the logarithm of the bias field.
        noise: Deviation of the noise, as a share of white matter on T1.
    """
    tissues, source = _tissues()
    back = np.linalg.inv(motion).astype(np.float64)

    def sampled(volume: FloatVolume) -> FloatVolume:
        return resample_to_grid(volume, source, affine, shape, motion=back)

    fluid, grey, white, tumour_brightness, scalp = _CONTRASTS[sequence]
    parts = {name: sampled(volume) for name, volume in tissues.items()}
    tumour = parts["tumour"]
    brain = grey * parts["grey"] + white * parts["white"] + fluid * parts["fluid"]
    image = brain * (1 - tumour) + tumour_brightness * tumour + _SKULL * parts["skull"] + scalp * parts["scalp"]
    generator = numpy_generator(seed, "head", sequence)
    places = np.meshgrid(*(np.linspace(-1, 1, side) for side in shape), indexing="ij", sparse=True)
    direction = generator.normal(size=3)
    slope = sum(float(part) * place for part, place in zip(direction, places, strict=True))
    image = image * np.exp(bias * slope / np.abs(direction).sum())
    real, imaginary = (generator.normal(0, noise, shape) for _ in range(2))
    noisy = np.hypot(image + real, imaginary) * 1000
    return Head(noisy.astype(np.float32), affine, parts["brain"] >= 0.5, tumour >= 0.5, motion)


def write_raw_patient(
    folder: Path,
    *,
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 5.0),
    motions: Mapping[str, Affine] | None = None,
    mask_on: str = "flair",
    seed: int = 0,
) -> dict[str, Path]:
    """Write four sequences and the tumour mask of one patient; return name → path, the mask's under ``mask``.

    Args:
        folder: Created.
        spacing_mm: Voxel sides.
        motions: Sequence → see `make_head`; a sequence that is not named did not move.
        mask_on: The sequence whose grid and position the mask has.
        seed: Of bias fields and noise.
    """
    folder.mkdir(parents=True, exist_ok=True)
    affine, shape = head_grid(spacing_mm)
    paths = {}
    for name in _CONTRASTS:
        head = make_head(name, affine=affine, shape=shape, motion=(motions or {}).get(name, IDENTITY), seed=seed)
        paths[name] = write_nifti(folder / f"{name}.nii.gz", np.rint(head.data).astype(np.int16), affine)
        if name == mask_on:
            paths["mask"] = write_nifti(folder / "mask.nii.gz", head.tumour.astype(np.uint8), affine)
    return paths


@lru_cache(maxsize=1)
def _tissues() -> tuple[dict[str, FloatVolume], Affine]:
    from nilearn.datasets import load_mni152_brain_mask, load_mni152_gm_template, load_mni152_wm_template
    from scipy import ndimage

    mask = load_mni152_brain_mask(resolution=2)
    pad = 12
    affine: npt.NDArray[Any] = np.asarray(mask.affine, dtype=np.float64).copy()
    affine[:3, 3] -= affine[:3, :3] @ np.full(3, pad)
    brain = np.pad(np.asarray(mask.dataobj) > 0, pad)
    grey = np.pad(np.asarray(load_mni152_gm_template(resolution=2).dataobj, dtype=np.float32), pad) * brain
    white = np.pad(np.asarray(load_mni152_wm_template(resolution=2).dataobj, dtype=np.float32), pad) * brain
    outside_mm = ndimage.distance_transform_edt(~brain, sampling=2.0)
    gap = (outside_mm > 0) & (outside_mm <= _GAP_MM)
    places = np.indices(brain.shape).reshape(3, -1)
    world = (affine[:3, :3] @ places + affine[:3, 3:]).T
    distance = np.linalg.norm(world - _TUMOUR_CENTRE_MM, axis=1).reshape(brain.shape)
    parts = {
        "brain": brain,
        "grey": np.clip(grey, 0, 1),
        "white": np.clip(white, 0, 1),
        "fluid": np.clip(brain - grey - white, 0, 1) + gap,
        "skull": (outside_mm > _GAP_MM) & (outside_mm <= _SKULL_MM),
        "scalp": (outside_mm > _SKULL_MM) & (outside_mm <= _SCALP_MM),
        "tumour": np.clip((_TUMOUR_RADIUS_MM - distance) / 2 + 0.5, 0, 1) * brain,
    }
    return {name: np.asarray(part, dtype=np.float32) for name, part in parts.items()}, affine
