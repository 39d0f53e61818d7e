"""Can this run serve this case? Asked, and answered in one sentence, before anything is computed.

What makes a prediction impossible or meaningless is refused: a sequence the network needs and does not have, something
that is no MR volume, slices the run has never seen the like of. What makes it less sure is said on the case's page.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from glioma_nas.cohort import Case
from glioma_nas.errors import CohortError, StorageError
from glioma_nas.files import read_json
from glioma_nas.images import Volume, read_volume
from glioma_nas.new_patients.frozen_run import FrozenRun

MIN_SLICES = 5
HOUNSFIELD_AIR = -500.0
"""No MR intensity, raw or normalised, lies below; in CT all of the air around the head does."""
MAX_LABELS = 8
MOST_TIMES = 3.0
"""Slices so many times nearer or farther than any of the run's are refused; half of it is pointed out."""

_AIR_SHARE = 0.02
_SAMPLE = 50_000


@dataclass(frozen=True)
class SliceDistances:
    """How far apart the axial slices of the run's scans lie, in millimetres: least and greatest."""

    least_mm: float
    greatest_mm: float

    def times_outside(self, distance_mm: float) -> float:
        """Return how many times nearer or farther a distance is than all of the run's; 1 inside their range.

        >>> SliceDistances(5, 6).times_outside(1.0), SliceDistances(5, 6).times_outside(5.5)
        (5.0, 1.0)
        """
        return max(self.least_mm / distance_mm, distance_mm / self.greatest_mm, 1.0)


def require_servable(case: Case, run: FrozenRun, *, any_spacing: bool = False) -> None:
    """Make sure, before anything is computed, that the run can serve the case.

    Args:
        case: The case; its scans are read and looked at.
        run: The run.
        any_spacing: Let slices pass that are much thinner or thicker than the run's.

    Raises:
        CohortError: A sequence its segmentation network needs is missing, a scan is none of MR or a label map, has too
            few axial slices, or lies on a grid unlike any of the run's.
        ImageError: A scan cannot be read, or is not one volume.
    """
    require_sequences(case, run)
    for name in run.recipe.sequences:
        if name in case.images:
            _require_mr(case, name, read_volume(case.images[name]))
    if any_spacing:
        return
    times, sentence = _spacing(case, run)
    if times > MOST_TIMES:
        raise CohortError(
            f"case {case.case_id}: {sentence}; give the series of slices as they were in training, or allow it with "
            "--any-spacing, which the page will say"
        )


def require_sequences(case: Case, run: FrozenRun) -> None:
    """Make sure that the case has the sequences its segmentation network needs; no file is opened.

    Raises:
        CohortError: One is missing.
    """
    needed = run.config.cohort.sequences
    missing = [name for name in needed if name not in case.images]
    if not missing:
        return
    if run.config.cohort.feeds_zeros and len(missing) < len(needed):
        return
    there = ", ".join(sorted(case.images)) or "none"
    raise CohortError(
        f"case {case.case_id} lacks {', '.join(missing)}: this run's network needs {', '.join(needed)} and was not "
        f"trained to do without; the case has {there}"
    )


def problems_of_input(case: Case, run: FrozenRun) -> list[str]:
    """List what is not as it was in training, in sentences without identifiers."""
    found = []
    for name in run.config.cohort.sequences:
        if name not in case.images:
            found.append(f"{name} is missing and was replaced by zeros, which the network has met in training")
    if case.age is None:
        found.append("age is unknown; classifiers that use it take their training mean")
    if case.sex is None:
        found.append("sex is unknown; classifiers that use it take their training mean")
    times, sentence = _spacing(case, run)
    if times > MOST_TIMES / 2:
        found.append(sentence)
    return found


def slice_distance_mm(affine: NDArray[np.float64]) -> float:
    """Return the distance of neighbouring axial slices: the voxel's side along the axis nearest to feet-head.

    Args:
        affine: (4, 4) voxel index → millimetres, RAS+.

    >>> slice_distance_mm(np.diag([1.0, 1.0, 5.0, 1.0]))
    5.0
    """
    axis = int(np.flatnonzero(nib.io_orientation(affine)[:, 0] == 2)[0])
    return float(np.linalg.norm(affine[:3, axis]))


def _spacing(case: Case, run: FrozenRun) -> tuple[float, str]:
    """Return how many times outside the run's slice distances the case's lie, and that as a sentence."""
    if "resample" in run.config.preprocess.steps:
        return 1.0, ""  # every case comes to one spacing, whatever it was scanned with
    known = [slice_distance_mm(scan.affine) for own in run.cohort.cases.values() for scan in own.scans.values()]
    distances = SliceDistances(min(known), max(known))
    worst: tuple[float, str] = (1.0, "")
    for name in run.recipe.sequences:
        if name not in case.images:
            continue
        # The header is enough: the whole file was read and checked by `require_servable`.
        here = slice_distance_mm(np.asarray(nib.load(case.images[name]).affine, dtype=np.float64))
        times = distances.times_outside(here)
        if times > worst[0]:
            worst = (
                times,
                f"axial slices of {name} are {here:.3g} mm apart, while the run learnt from slices "
                f"{distances.least_mm:.3g} to {distances.greatest_mm:.3g} mm apart and does not resample",
            )
    return worst


def _require_mr(case: Case, name: str, volume: Volume) -> None:
    where = f"case {case.case_id}: {case.images[name].name} as {name}"
    modality = _modality(case.images[name])
    if modality not in ("", "MR"):
        raise CohortError(f"{where}: its sidecar says modality {modality}; the run's networks read MR only")
    if float(np.mean(volume.data < HOUNSFIELD_AIR)) > _AIR_SHARE:
        raise CohortError(
            f"{where}: intensities down to {volume.data.min():g} look like Hounsfield units of a CT; the run's "
            "networks read MR only"
        )
    step = max(1, volume.data.size // _SAMPLE)
    if len(np.unique(volume.data.ravel()[::step])) <= MAX_LABELS and len(found := np.unique(volume.data)) <= MAX_LABELS:
        raise CohortError(f"{where}: holds only {len(found)} different values, as a label map does; give the scan")
    axis = int(np.flatnonzero(nib.io_orientation(volume.affine)[:, 0] == 2)[0])
    if volume.data.shape[axis] < MIN_SLICES:
        raise CohortError(
            f"{where}: has {volume.data.shape[axis]} axial slices; at least {MIN_SLICES} are needed to outline a tumour"
        )


def _modality(scan: Path) -> str:
    """Return what the sidecar of a converted scan says, in capitals; empty where there is none."""
    sidecar = scan.with_name(f"{scan.name.removesuffix('.gz').removesuffix('.nii')}.json")
    if not sidecar.is_file():
        return ""
    try:
        found = read_json(sidecar)
    except StorageError:
        return ""  # a sidecar of something else; the voxels are looked at all the same
    return str(found.get("Modality", "")).upper() if isinstance(found, dict) else ""
