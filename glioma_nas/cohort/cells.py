"""Check the cells of one row and turn them into a `Case`."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from glioma_nas.cohort.records import NIFTI_SUFFIXES, UNKNOWN_VALUES, Case, Sex
from glioma_nas.errors import CohortError
from glioma_nas.files import sha256_text

MAX_AGE_YEARS = 120.0

_SEXES: Mapping[str, Sex] = {"m": "M", "male": "M", "f": "F", "female": "F"}
_MAX_CASE_ID_LENGTH = 128
# File systems count bytes, of which a name has 255, and files are named after cases with something added.
_MAX_CASE_ID_BYTES = 200
# DICOM's three digits. With fewer, years alone are beyond doubt: `45M` may be 45 years and M for male.
_DICOM_AGE = re.compile(r"^(?:(\d{3})([DWMY])|(\d{1,2})Y)$", re.IGNORECASE)
_UNITS_PER_YEAR = {"D": 365.25, "W": 365.25 / 7, "M": 12.0, "Y": 1.0}
# Names that Windows, or a share it serves, keeps for devices.
_RESERVED = re.compile(r"^(con|prn|aux|nul|com\d|lpt\d)(\..*)?$", re.IGNORECASE)


def case_of_row(
    folder: Path, cells: Mapping[str, str], sequences: Sequence[str], labels: Sequence[str], *, follow_links: bool
) -> Case:
    """Check a row's cells.

    Args:
        folder: Relative paths start here.
        cells: Column → text.
        sequences: Columns that hold scans.
        labels: Columns that hold labels.
        follow_links: Allow links that lead out of ``folder``.

    Raises:
        CohortError: A cell cannot be used; the message names the case and the column.
    """
    case_id = cells["case_id"]
    check_case_id(case_id)
    if not cells["patient_id"]:
        raise CohortError(f"case {case_id} has no patient_id; folds are drawn by patient, so every case needs one")
    images = {
        name: existing_scan(folder, case_id, name, cells[name], follow_links=follow_links)
        for name in sequences
        if cells.get(name)
    }
    mask = cells.get("mask")
    return Case(
        case_id,
        cells["patient_id"],
        images,
        existing_scan(folder, case_id, "mask", mask, follow_links=follow_links) if mask else None,
        read_age(case_id, cells.get("age", "")),
        read_sex(case_id, cells.get("sex", "")),
        {name: cells[name] for name in labels if cells.get(name, "").lower() not in UNKNOWN_VALUES},
    )


def check_case_id(case_id: str) -> None:
    """Make sure that a case id can name a folder, and cannot name any folder but its own.

    Raises:
        CohortError: It is empty, too long, or could be read as a path, an option or a device.
    """
    if not case_id:
        raise CohortError("case_id is empty; every case needs its own")
    if case_id.startswith((".", "-")) or any(char in "/\\:" or not char.isprintable() for char in case_id):
        raise CohortError(
            f"case_id {case_id!r} cannot name a folder; leave out '/', '\\', ':', control characters and a leading "
            "'.' or '-'"
        )
    if case_id.endswith((".", " ")) or _RESERVED.match(case_id):
        raise CohortError(
            f"case_id {case_id!r} cannot name a folder on every system; choose another one, without a final '.'"
        )
    if len(case_id) > _MAX_CASE_ID_LENGTH:
        raise CohortError(
            f"case_id '{case_id[:20]}…' has {len(case_id)} characters; at most {_MAX_CASE_ID_LENGTH} are allowed"
        )
    if (size := len(case_id.encode())) > _MAX_CASE_ID_BYTES:
        raise CohortError(
            f"case_id '{case_id[:20]}…' takes {size} bytes; at most {_MAX_CASE_ID_BYTES} fit into names of files"
        )


def sanitised_case_id(name: str) -> str:
    """Turn the name of a folder, file or DICOM patient into a case id that `check_case_id` accepts.

    What was changed is marked by a hash of the original, so that two names never become one.

    >>> sanitised_case_id("P001"), sanitised_case_id("../../etc")
    ('P001', 'etc-74ccf3c5')
    """
    kept = "".join(char if char.isprintable() and char not in '/\\:*?"<>|' else "_" for char in name)
    kept = kept.strip(" ._-")
    fits = len(kept) <= _MAX_CASE_ID_LENGTH and len(kept.encode()) <= _MAX_CASE_ID_BYTES
    if kept and kept == name and fits and not _RESERVED.match(kept):
        return name
    if _RESERVED.match(kept):
        kept = f"case_{kept}"  # a final hash does not change what Windows reads before the first dot
    kept = kept[: _MAX_CASE_ID_LENGTH - 9].encode()[: _MAX_CASE_ID_BYTES - 9].decode(errors="ignore")
    return f"{kept.rstrip(' .') or 'case'}-{sha256_text(name)[:8]}"


def existing_scan(folder: Path, case_id: str, column: str, cell: str, *, follow_links: bool) -> Path:
    """Return the real path of a NIfTI file named in a cell.

    A path may be written absolute or with ``..``, which is the user's own word. A link below ``folder`` that leads out
    of it is not: in a data set from elsewhere it may point at anything.

    Raises:
        CohortError: It is not NIFTI, does not exist, or a link leads out of ``folder``.
    """
    if not cell.lower().endswith(NIFTI_SUFFIXES):
        raise CohortError(
            f"case {case_id}: {column} is '{cell}'; expected a NIfTI file ending in {' or '.join(NIFTI_SUFFIXES)}"
        )
    path = folder / cell
    try:
        found = path.is_file()
        real = path.resolve()
    except (OSError, ValueError, RuntimeError):  # a name too long, one that holds a NUL, a circle of links
        found = False
    if not found:
        raise CohortError(
            f"case {case_id}: {column} is '{cell}', no such file below {folder}; mend the path or empty the cell"
        )
    written = Path(os.path.normpath(path.absolute()))
    root = Path(os.path.normpath(folder.absolute()))
    if not follow_links and written.is_relative_to(root) and not real.is_relative_to(root.resolve()):
        raise CohortError(
            f"case {case_id}: {column} is '{cell}', a link that leads out of {folder}; copy the file there, or set "
            "cohort.follow_links to true when you made the link"
        )
    return real


def read_age(case_id: str, cell: str) -> float | None:
    """Read an age in years, plain or as DICOM writes it: ``045Y``, ``018M``, ``010W``, ``003D``.

    >>> read_age("A", "045Y"), read_age("A", "018M"), read_age("A", "n/a")
    (45.0, 1.5, None)

    Raises:
        CohortError: It is neither, or not between 0 and 120 years. Fewer than DICOM's three digits are read as years
            alone (``45Y``), since ``45M`` may be a man of 45.
    """
    if cell.lower() in UNKNOWN_VALUES:
        return None
    match = _DICOM_AGE.match(cell)
    digits, unit, years = match.groups() if match else (None, None, None)
    age = int(digits) / _UNITS_PER_YEAR[unit.upper()] if digits and unit else _number(years or cell)
    if age is None or not 0 <= age <= MAX_AGE_YEARS:
        raise CohortError(
            f"case {case_id}: age is '{cell}'; expected years between 0 and {MAX_AGE_YEARS:g}, plain or with DICOM's "
            "three digits and unit (045Y), or an empty cell when unknown"
        )
    return age


def read_sex(case_id: str, cell: str) -> Sex | None:
    """Read M, F, male or female in any case; ``O`` and ``other``, which BIDS and DICOM allow, count as unknown.

    Raises:
        CohortError: It is something else and not one of the words for unknown.
    """
    if cell.lower() in UNKNOWN_VALUES | {"o", "other"}:
        return None
    if cell.lower() not in _SEXES:
        raise CohortError(f"case {case_id}: sex is '{cell}'; expected M or F, or an empty cell when unknown")
    return _SEXES[cell.lower()]


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
