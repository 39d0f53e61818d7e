"""Hash the scans of a cohort, so that folds can be checked for copies before anything is prepared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from glioma_nas.cohort import Case
from glioma_nas.errors import ImageError
from glioma_nas.images import read_volume
from glioma_nas.progress import Progress
from glioma_nas.worker_pool import outcomes


@dataclass(frozen=True)
class HashedCase:
    """A case as `glioma_nas.folds.check_folds` wants it."""

    case_id: str
    patient_id: str
    labels: Mapping[str, str]
    voxel_hashes: Mapping[str, str]


@dataclass(frozen=True)
class HashedCohort:
    """Case id → case."""

    cases: Mapping[str, HashedCase]


def hash_cohort(cases: Sequence[Case], *, workers: int, progress: Progress) -> HashedCohort:
    """Read every scan completely and hash it.

    Raises:
        ImageError: A scan cannot be read.
    """
    hashed: dict[str, HashedCase] = {}
    with progress.task("hash scans", len(cases)) as task:
        for _, case in outcomes(_hash_case, cases, workers=workers):
            hashed[case.case_id] = case
            task.advance()
    return HashedCohort({case.case_id: hashed[case.case_id] for case in cases})


def _hash_case(case: Case) -> HashedCase:
    hashes = {}
    for name, path in case.images.items():
        try:
            hashes[name] = read_volume(path).voxel_hash()
        except ImageError as err:
            # The case says which file; its path may name the patient.
            raise ImageError(f"case {case.case_id}: {name}: {str(err).replace(f'{path}: ', '')}") from err
    return HashedCase(case.case_id, case.patient_id, case.labels, hashes)
