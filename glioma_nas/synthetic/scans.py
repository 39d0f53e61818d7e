"""Draw all scans of a synthetic patient: head, tumour, contrasts, scanner, in this order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from glioma_nas.images import Affine, MaskVolume
from glioma_nas.seeding import numpy_generator
from glioma_nas.synthetic.anatomy import Head
from glioma_nas.synthetic.contrasts import SEQUENCES, LesionTones, paint
from glioma_nas.synthetic.patients import SyntheticPatient
from glioma_nas.synthetic.scalp import add_scalp
from glioma_nas.synthetic.scanner import Acquisition, Grid, Site, draw_motion, slice_thickly
from glioma_nas.synthetic.tumours import CORE, ENHANCING, OEDEMA, TumourPlan, grow_tumour, shares_of

_FIELD_MM = 204.0
_HEIGHT_MM = 134.0
_RAW_FIELD_MM = 250.0
_RAW_HEIGHT_MM = 172.0
# How far the head moves between sequences, in millimetres and degrees: before registration, and after it.
_RAW_MOTION = (4.0, 4.0)
_ALIGNED_MOTION = (0.4, 0.4)


@dataclass(frozen=True)
class Scan:
    """One sequence of one patient: (X, Y, Z) int16 with its grid, and how the head lay."""

    data: npt.NDArray[np.int16]
    grid: Grid
    head_to_scanner: Affine


@dataclass(frozen=True)
class PatientScans:
    """The images of one patient.

    Attributes:
        scans: Sequence → scan. Aligned: on one grid, 0 outside the brain and at least 1 inside. Raw: the whole head,
            each sequence on a grid of its own.
        mask: (X, Y, Z) uint8 on the grid of ``reference``, labels 1 core without enhancement, 2 oedema, 4 enhancing.
        brain: (X, Y, Z) uint8 0/1, brain and tumour, on the same grid.
        reference: The sequence that mask and brain belong to.
        truth: Plain data about what was drawn.
    """

    scans: dict[str, Scan]
    mask: MaskVolume
    brain: MaskVolume
    reference: str
    truth: dict[str, Any]


def draw_scans(
    patient: SyntheticPatient,
    seed: int,
    *,
    size_px: int = 120,
    raw: bool = False,
    noise_factor: float = 1.0,
    missing: tuple[str, ...] = (),
) -> PatientScans:
    """Draw the sequences and the mask of a patient; the same arguments give the same voxels.

    Head, tumour and brightness depend on patient and seed alone, so another ``size_px`` shows the same person.

    Args:
        patient: Whose scans.
        seed: Of the cohort.
        size_px: Pixels along each side of a slice, which is 204 mm wide (250 mm when raw).
        raw: Whole heads, each sequence on a grid of its own with motion between them.
        noise_factor: Factor on noise and, as its square root, on bias.
        missing: Sequences that were not acquired.
    """
    generator = numpy_generator(seed, "synthetic", "scan", patient.case_id)
    head = Head.draw(generator)
    plan = TumourPlan.draw(patient, generator)
    centre_mm = head.seed_mm(patient.lobe, generator)
    lesion = LesionTones.draw(generator)
    tumour = grow_tumour(plan, head, centre_mm, generator)
    site = Site.of(patient.site, seed)

    generator = numpy_generator(seed, "synthetic", "grid", patient.case_id)
    present = tuple(name for name in SEQUENCES if name not in missing)
    reference = "t1ce" if raw and "t1ce" in present else "flair"
    grids = _raw_grids(size_px, generator) if raw else _aligned_grids(size_px, generator)
    canvas = grids["t1"] if raw else grids[reference]
    axes = canvas.fine_axes
    tissue = head.tissue(axes, tumour.push_on(axes))
    shares = shares_of(tumour, plan, tissue, axes)
    lie = canvas.head_to_scanner
    size = _RAW_MOTION if raw else _ALIGNED_MOTION
    motions = {name: np.eye(4) if name == reference else draw_motion(*size, generator) for name in SEQUENCES}

    def taken(fine: npt.NDArray[np.float32], name: str) -> npt.NDArray[np.float32]:
        return slice_thickly(fine, axes, grids[name], motions[name] @ lie)

    brain = taken(tissue.brain, reference) >= 0.5
    core, oedema, enhancing = (taken(share, reference) for share in shares.labels)
    mask = _hard_labels(core, oedema, enhancing)
    mask[~brain] = 0
    scalp_noise = numpy_generator(seed, "synthetic", "scalp", patient.case_id)
    scalp = add_scalp(tissue.brain, axes, scalp_noise) if raw else None
    scans = {}
    for name in present:
        chance = numpy_generator(seed, "synthetic", "series", patient.case_id, name)
        clean = paint(name, tissue, shares, plan, lesion, site.tones[name])
        if scalp is not None:
            clean = scalp.paint(name, clean)
        acquisition = Acquisition.draw(site, name, noise_factor, chance)
        data = acquisition.apply(taken(clean, name), grids[name], chance)
        if not raw:
            data = np.where(brain, np.maximum(data, 1), 0).astype(np.int16)
        scans[name] = Scan(data, grids[name], motions[name] @ lie)
    voxel_ml = float(np.prod(grids[reference].spacing_mm)) / 1000
    truth = {
        "reference": reference,
        "lobe": patient.lobe,
        "enhancement": patient.enhancement,
        "t2_flair_mismatch": patient.t2_flair_mismatch,
        "volume_ml": {
            str(label): round(int((mask == label).sum()) * voxel_ml, 2) for label in (CORE, OEDEMA, ENHANCING)
        },
        # Rigid transforms from where the head lay for the reference to where it lay for each sequence, RAS+ mm.
        "motion": {name: np.round(motions[name], 6).tolist() for name in present},
    }
    return PatientScans(scans, mask, brain.astype(np.uint8), reference, truth)


def _aligned_grids(size_px: int, generator: np.random.Generator) -> dict[str, Grid]:
    pixel_mm = _FIELD_MM / size_px * float(generator.uniform(0.97, 1.03))
    n_slices = int(generator.integers(22, 27))
    grid = Grid.draw(size_px, pixel_mm, n_slices, _HEIGHT_MM / n_slices, generator)
    return dict.fromkeys(SEQUENCES, grid)


def _raw_grids(size_px: int, generator: np.random.Generator) -> dict[str, Grid]:
    grids = {}
    for name in SEQUENCES:
        slice_mm = float(generator.uniform(5.0, 6.5))
        n_slices = int(np.ceil(_RAW_HEIGHT_MM / slice_mm))
        pixel_mm = _RAW_FIELD_MM / size_px * float(generator.uniform(0.97, 1.03))
        grids[name] = Grid.draw(size_px, pixel_mm, n_slices, slice_mm, generator)
    return grids


def _hard_labels(
    core: npt.NDArray[np.float32], oedema: npt.NDArray[np.float32], enhancing: npt.NDArray[np.float32]
) -> MaskVolume:
    # A voxel is tumour when at least half of it is, whatever the parts; then the largest part names it.
    parts = np.stack([core, oedema, enhancing])
    values = np.array([CORE, OEDEMA, ENHANCING], dtype=np.uint8)
    return np.where(parts.sum(axis=0) >= 0.5, values[parts.argmax(axis=0)], 0).astype(np.uint8)
