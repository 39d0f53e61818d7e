"""A cohort sheet: one row per case, with our headings or those of other tools.

Required are ``case_id`` and ``patient_id`` (one stands for both when the other is absent from a sheet with GaNDLF's
``SubjectID`` or BIDS' ``participant_id``), one column of NIfTI paths for each sequence, and optionally ``mask``,
``age`` (years, or DICOM's ``045Y``), ``sex`` (M or F) and any number of label columns (``idh``, ``ki67``, …). Paths are
relative to the sheet; an empty cell means unknown or missing.

GaNDLF sheets (https://docs.mlcommons.org/GaNDLF/setup) call the sequences ``Channel_0``, ``Channel_1`` … and the mask
``Label``. Which channel is which sequence is taken from ``columns``, else from the file names when they agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from glioma_nas.cohort.column_names import (
    channel_number,
    common_sequence,
    known_column,
    sequence_of,
)
from glioma_nas.cohort.records import NIFTI_SUFFIXES, CohortTable, Row
from glioma_nas.cohort.spreadsheet import read_spreadsheet
from glioma_nas.errors import CohortError, did_you_mean

REQUIRED = ("case_id", "patient_id")

Lines = Sequence[tuple[int, Mapping[str, str]]]


def read_sheet(path: Path, *, columns: Mapping[str, str], wanted: Sequence[str]) -> CohortTable:
    """Read a sheet into our column names.

    Args:
        path: CSV, TSV or XLSX.
        columns: Our name → heading in the sheet, for headings that are not recognised.
        wanted: Names the configuration uses for sequences; a heading of that name is left alone.

    Raises:
        CohortError: The file cannot be read, or a heading is missing or stands for the same thing as another.
    """
    header, lines = read_spreadsheet(path)
    names, notes = _our_names(path, header, lines, columns, wanted)
    ours = list(names.values())
    for name in sorted(set(ours)):
        if ours.count(name) > 1:
            twins = " and ".join(f"'{heading}'" for heading, our in names.items() if our == name)
            raise CohortError(
                f"{path}: columns {twins} both mean {name}; delete one, or name the right one in cohort.columns"
            )
    stand_in = None
    for name, other in (REQUIRED, REQUIRED[::-1]):
        if name in ours:
            continue
        # A subject of GaNDLF or BIDS is a patient and a case at once; of our own headings both are asked for.
        if other in ours and other not in header:
            stand_in = (name, other)
            notes.append(f"{path.name}: no column '{name}'; every {other} counts as one {name.removesuffix('_id')}")
            continue
        raise CohortError(
            f"{path}: no column '{name}' (columns: {', '.join(header) or 'none'}); add it, separated by commas"
        )
    rows = []
    for line, cells in lines:
        row = {names[heading]: cell for heading, cell in cells.items()}
        if stand_in:
            row[stand_in[0]] = row[stand_in[1]]
        rows.append(Row(f"{path}: line {line}", row))
    known = [*ours, *([stand_in[0]] if stand_in else [])]
    return CohortTable(path, path.parent, tuple(known), tuple(rows), notes=tuple(notes))


def _our_names(
    path: Path, header: Sequence[str], lines: Lines, columns: Mapping[str, str], wanted: Sequence[str]
) -> tuple[dict[str, str], list[str]]:
    for name, heading in columns.items():
        if heading not in header:
            raise CohortError(
                f"{path}: cohort.columns calls '{heading}' {name}, but there is no such column: "
                f"{did_you_mean(heading, header)}"
            )
    given = {heading: name for name, heading in columns.items()}
    is_gandlf = any(channel_number(heading) is not None for heading in header)
    names: dict[str, str] = {}
    notes: list[str] = []
    for heading in header:
        if heading in given:
            names[heading] = given[heading]
            continue
        names[heading] = heading
        if heading in wanted or heading in REQUIRED:
            continue
        paths = [cells[heading] for _, cells in lines if cells[heading].lower().endswith(NIFTI_SUFFIXES)]
        known = known_column(heading)
        if known in (*REQUIRED, "age", "sex") or (known == "mask" and paths):
            names[heading] = known
        elif is_gandlf and heading.lower() == "label" and paths:
            names[heading] = "mask"
        elif channel_number(heading) is not None and paths:
            names[heading] = _channel(path, heading, paths)
            notes.append(f"{path.name}: column {heading} is read as {names[heading]}, as its file names say")
        elif paths and sequence_of(heading) is not None:
            names[heading] = sequence_of(heading) or heading
    return names, notes


def _channel(path: Path, heading: str, files: Sequence[str]) -> str:
    sequence = common_sequence(Path(name).name for name in files)
    if sequence is None:
        raise CohortError(
            f"{path}: the file names in column '{heading}' do not agree on a sequence (such as {Path(files[0]).name}); "
            f"say which it is in the configuration, for example cohort.columns: {{flair: {heading}}}"
        )
    return sequence
