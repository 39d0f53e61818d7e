"""Read the cohort sheet: one row per case, checked before any image is opened.

The sheet is a CSV with the columns ``case_id``, ``patient_id``, one column of NIfTI paths for each sequence, and
optionally ``mask``, ``age`` (years), ``sex`` (M or F) and any number of label columns (``idh``, ``ki67``, …). Paths
are relative to the sheet; an empty cell means unknown or missing. Messages name cases, never patients.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Protocol

from glioma_nas.config import CohortConfig
from glioma_nas.errors import CohortError, did_you_mean

Sex = Literal["M", "F"]

UNKNOWN_VALUES = frozenset({"", "unknown", "na", "n/a", "nan", "none", "not tested", "not available", "indeterminate"})
"""Contents of a label cell, in lower case, that mean that the value is not known."""

_REQUIRED = ("case_id", "patient_id")
_KNOWN = (*_REQUIRED, "mask", "age", "sex")
_SUFFIXES = (".nii", ".nii.gz")
_SEXES: Mapping[str, Sex] = {"m": "M", "male": "M", "f": "F", "female": "F"}
_MAX_AGE_YEARS = 120.0
_MAX_CASE_ID_LENGTH = 128


@dataclass(frozen=True)
class Case:
    """One examination of one patient.

    Attributes:
        case_id: Unique in the sheet; becomes a folder name.
        patient_id: Cases with one patient id never stand on both sides of a split.
        images: Sequence name → scan, only for the sequences the case has.
        mask: Expert tumour mask, or None.
        age: Years, or None when unknown.
        sex: ``M``, ``F`` or None when unknown.
        labels: Every other column whose value is known, as text.
    """

    case_id: str
    patient_id: str
    images: Mapping[str, Path]
    mask: Path | None = None
    age: float | None = None
    sex: Sex | None = None
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Exclusion:
    """A case that takes no part in the run, and why."""

    case_id: str
    reason: str


@dataclass(frozen=True)
class Cohort:
    """The cases of a sheet, in its order.

    Attributes:
        sheet: Absolute path of the CSV.
        cases: One for each row.
        sequences: Names of the image columns.
        label_columns: Names of the other columns, known or not for any one case.
    """

    sheet: Path
    cases: tuple[Case, ...]
    sequences: tuple[str, ...] = ()
    label_columns: tuple[str, ...] = ()


class Labelled(Protocol):
    """What a case with labels has; `Case` and a prepared case both do."""

    @property
    def case_id(self) -> str: ...  # noqa: D102 - see Case

    @property
    def labels(self) -> Mapping[str, str]: ...  # noqa: D102 - see Case


def read_cohort(config: CohortConfig) -> Cohort:
    """Read and check the sheet; no image is opened, but every file named must exist.

    A column holds images when ``config.sequences`` names it or one of its cells ends in .nii or .nii.gz.

    Raises:
        CohortError: The sheet is missing or not a CSV, a column is missing, or a row is not usable. The message is the
            first finding with sheet, line and value, and how many more there are.
    """
    sheet = config.sheet
    header, rows = _read_rows(sheet)
    sequences = _image_columns(sheet, header, rows, config.sequences)
    labels = tuple(name for name in header if name not in _KNOWN and name not in sequences)
    problems: list[str] = []
    cases: list[Case] = []
    first_line: dict[str, int] = {}
    for line, row in rows:
        try:
            case = _read_row(sheet.parent, row, sequences, labels)
            if case.case_id in first_line:
                raise CohortError(
                    f"case_id '{case.case_id}' is the same as in line {first_line[case.case_id]}; "
                    "every case needs its own"
                )
        except CohortError as err:
            problems.append(f"{sheet}: line {line}: {err}")
            continue
        first_line[case.case_id] = line
        cases.append(case)
    if problems:
        raise CohortError(first_of(problems))
    if not cases:
        raise CohortError(f"{sheet}: holds no rows below the header; add one line for each case")
    return Cohort(sheet.resolve(), tuple(cases), sequences, labels)


def select_complete(cohort: Cohort, config: CohortConfig) -> tuple[Cohort, tuple[Exclusion, ...]]:
    """Apply ``config.missing_sequence`` to the cases that lack one of ``config.sequences``.

    Returns:
        The cohort of the cases that stay, and those that do not. A case with none of the sequences never stays.

    Raises:
        CohortError: A sequence is missing and the rule is ``error``, or no case is left.
    """
    kept: list[Case] = []
    excluded: list[Exclusion] = []
    problems: list[str] = []
    for case in cohort.cases:
        missing = [name for name in config.sequences if name not in case.images]
        if not missing:
            kept.append(case)
        elif config.missing_sequence == "error":
            problems.append(
                f"{cohort.sheet}: case {case.case_id} has no {', '.join(missing)}; add the file, or set "
                "cohort.missing_sequence to 'exclude' or 'zero'"
            )
        elif config.missing_sequence == "exclude" or len(missing) == len(config.sequences):
            excluded.append(Exclusion(case.case_id, f"has no {', '.join(missing)}"))
        else:
            kept.append(case)
    if problems:
        raise CohortError(first_of(problems))
    if not kept:
        raise CohortError(
            f"{cohort.sheet}: no case has the sequences {', '.join(config.sequences)}; all {len(excluded)} would be "
            "left out: correct cohort.sequences or add the files"
        )
    return replace(cohort, cases=tuple(kept)), tuple(excluded)


def first_of(problems: Sequence[str]) -> str:
    """Return the first finding and how many more there are, as one line."""
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{problems[0]}{more}"


def _read_rows(sheet: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    try:
        with sheet.open(encoding="utf-8-sig", newline="") as handle:
            reader = csv.reader(handle, strict=True)
            header = [name.strip() for name in next(reader, [])]
            lines = [
                (reader.line_num, [cell.strip() for cell in cells]) for cells in reader if any(map(str.strip, cells))
            ]
    except OSError as err:
        raise CohortError(f"{sheet}: {err.strerror or err}; give the path of a CSV in cohort.sheet") from err
    except (UnicodeDecodeError, csv.Error) as err:
        raise CohortError(f"{sheet}: not a comma-separated text file in UTF-8 ({err}); save it as CSV UTF-8") from err
    for name in _REQUIRED:
        if name not in header:
            raise CohortError(
                f"{sheet}: no column '{name}' (columns: {', '.join(header) or 'none'}); add it, separated by commas"
            )
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise CohortError(f"{sheet}: column '{repeated[0]}' stands {header.count(repeated[0])} times; keep one")
    for line, cells in lines:
        if len(cells) != len(header):
            raise CohortError(
                f"{sheet}: line {line}: {len(cells)} cells, but the header has {len(header)} columns; "
                "quote cells that hold commas"
            )
    return header, [(line, dict(zip(header, cells, strict=True))) for line, cells in lines]


def _image_columns(
    sheet: Path, header: Sequence[str], rows: Sequence[tuple[int, dict[str, str]]], wanted: Sequence[str]
) -> tuple[str, ...]:
    free = [name for name in header if name not in _KNOWN]
    images = tuple(
        name for name in free if name in wanted or any(row[name].lower().endswith(_SUFFIXES) for _, row in rows)
    )
    for name in wanted:
        if name not in images:
            raise CohortError(f"{sheet}: no column for sequence '{name}': {did_you_mean(name, free)}")
    return images


def _read_row(folder: Path, row: Mapping[str, str], sequences: Sequence[str], labels: Sequence[str]) -> Case:
    case_id = row["case_id"]
    _check_case_id(case_id)
    if not row["patient_id"]:
        raise CohortError(f"case {case_id} has no patient_id; folds are drawn by patient, so every case needs one")
    images = {name: _existing(folder, case_id, name, row[name]) for name in sequences if row[name]}
    mask = _existing(folder, case_id, "mask", row["mask"]) if row.get("mask") else None
    return Case(
        case_id,
        row["patient_id"],
        images,
        mask,
        _read_age(case_id, row.get("age", "")),
        _read_sex(case_id, row.get("sex", "")),
        {name: row[name] for name in labels if row[name].lower() not in UNKNOWN_VALUES},
    )


def _check_case_id(case_id: str) -> None:
    # A case id becomes a folder name of the run, so it must not be able to point anywhere else.
    if not case_id:
        raise CohortError("case_id is empty; every case needs its own")
    if case_id.startswith(".") or any(char in "/\\:" or not char.isprintable() for char in case_id):
        raise CohortError(
            f"case_id {case_id!r} cannot name a folder; leave out '/', '\\', ':', control characters and a leading '.'"
        )
    if len(case_id) > _MAX_CASE_ID_LENGTH:
        raise CohortError(
            f"case_id '{case_id[:20]}…' has {len(case_id)} characters; at most {_MAX_CASE_ID_LENGTH} are allowed"
        )


def _existing(folder: Path, case_id: str, column: str, cell: str) -> Path:
    if not cell.lower().endswith(_SUFFIXES):
        raise CohortError(
            f"case {case_id}: {column} is '{cell}'; expected a NIfTI file ending in {' or '.join(_SUFFIXES)}"
        )
    path = folder / cell
    try:
        found = path.is_file()
    except (OSError, ValueError):  # a name too long, or one that holds a NUL
        found = False
    if not found:
        raise CohortError(
            f"case {case_id}: {column} is '{cell}', no such file below {folder}; mend the path or empty the cell"
        )
    return path.resolve()


def _read_age(case_id: str, cell: str) -> float | None:
    if not cell:
        return None
    age = _number(cell)
    if age is None or not 0 <= age <= _MAX_AGE_YEARS:
        raise CohortError(
            f"case {case_id}: age is '{cell}'; expected years between 0 and {_MAX_AGE_YEARS:g}, "
            "or an empty cell when unknown"
        )
    return age


def _read_sex(case_id: str, cell: str) -> Sex | None:
    if not cell:
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
