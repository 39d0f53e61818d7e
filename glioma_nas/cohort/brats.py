"""A BraTS folder: one folder for each case, whose files end in the sequence's name or ``seg``.

All years' names are known (``_t1ce``, ``-t1c``, ``_flair``, ``-t2f`` …), and folders between, such as ``HGG`` and
``LGG``. A time point at the end of a name (``BraTS-GLI-00005-001``) is not part of the patient; otherwise every case
counts as a patient of its own. Ages and labels come from a sheet named in ``cohort.clinical``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from glioma_nas.cohort.column_names import CANONICAL_SEQUENCES, is_mask_file, sequence_of_file
from glioma_nas.cohort.records import NIFTI_SUFFIXES, CohortTable, Problem, Row
from glioma_nas.errors import CohortError

_TIME_POINT = re.compile(r"^(BraTS-[A-Z]+-\d+)-\d{3}$")
_MAX_DEPTH = 2


def is_brats(folder: Path) -> bool:
    """Tell whether the folder holds folders of scans named as in BraTS."""
    return any(any(sequence_of_file(name) for name in files) for _, files in _case_folders(folder))


def read_brats(folder: Path) -> CohortTable:
    """Read a BraTS folder.

    Raises:
        CohortError: It holds no folder with scans.
    """
    rows: list[Row] = []
    problems: list[Problem] = []
    for case, files in _case_folders(folder):
        cells = {"case_id": case.name, "patient_id": patient_of(case.name)}
        for name in files:
            column = "mask" if is_mask_file(name) else sequence_of_file(name)
            if column is None:
                continue
            if column in cells:
                text = f"case {case.name} has two files for {column}, {Path(cells[column]).name} and {name}; keep one"
                problems.append(Problem(str(case), text, case.name))
            cells[column] = str((case / name).relative_to(folder))
        if len(cells) > 2:
            rows.append(Row(str(case), cells))
    if not rows:
        raise CohortError(f"{folder}: holds no folder with scans named as in BraTS, such as CASE/CASE_flair.nii.gz")
    found = {column for row in rows for column in row.cells}
    columns = [name for name in (*CANONICAL_SEQUENCES, "mask") if name in found]
    return CohortTable(folder, folder, ("case_id", "patient_id", *columns), tuple(rows), tuple(problems))


def patient_of(case_name: str) -> str:
    """Return the patient a BraTS case belongs to.

    >>> patient_of("BraTS-GLI-00005-001"), patient_of("BraTS2021_00005")
    ('BraTS-GLI-00005', 'BraTS2021_00005')
    """
    match = _TIME_POINT.match(case_name)
    return match.group(1) if match else case_name


def _case_folders(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    # os.walk does not follow links to folders, so neither a circle nor a link to / is walked.
    for root, folders, files in os.walk(folder):
        here = Path(root)
        depth = len(here.relative_to(folder).parts)
        folders[:] = sorted(name for name in folders if not name.startswith(".")) if depth < _MAX_DEPTH else []
        scans = sorted(
            name for name in files if name.lower().endswith(NIFTI_SUFFIXES) and not name.startswith((".", "._"))
        )
        if depth and scans:
            yield here, scans
