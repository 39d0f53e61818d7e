"""The review sheet ``series.csv``: one line for each series, with our guess and a column where a person decides.

``use`` says what a series becomes: the name of a sequence, or nothing. It, ``case_id`` and ``patient_id`` may be
edited; running the import again follows them. The other columns are there to decide by.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from glioma_nas.cohort.cells import check_case_id
from glioma_nas.cohort.spreadsheet import read_spreadsheet
from glioma_nas.dicom.sequence_rules import Guess
from glioma_nas.dicom.series import Series
from glioma_nas.errors import CohortError
from glioma_nas.files import write_text

REVIEW_SHEET = "series.csv"

_COLUMNS = (
    "case_id", "patient_id", "number", "description", "use", "guess", "confidence", "reason", "images", "pixels",
    "spacing_mm", "thickness_mm", "tr_ms", "te_ms", "ti_ms", "series",
)  # fmt: skip
_SEQUENCE_NAME = re.compile(r"^[a-z0-9][a-z0-9_]*$")
_CONFIDENCE = {"high": 2, "medium": 1, "low": 0}
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


@dataclass(frozen=True)
class Entry:
    """One line of the sheet.

    Attributes:
        key: Keyed hash of the series' identifier; the same in every import of a project.
        case_id: Pseudonym of the examination.
        patient_id: Pseudonym of the patient.
        use: Name of a sequence, or empty.
        guess: What the headers say.
        series: The series itself.
    """

    key: str
    case_id: str
    patient_id: str
    use: str
    guess: Guess
    series: Series


def with_choices(entries: Sequence[Entry]) -> list[Entry]:
    """Fill ``use``: for each sequence of a case the best of its series.

    Original images come before derived ones, sure guesses before unsure ones, and of equals the series with more
    images.
    """
    best: dict[tuple[str, str], Entry] = {}
    for entry in entries:
        place = (entry.case_id, entry.guess.kind)
        if entry.guess.is_wanted and (place not in best or _rank(entry) > _rank(best[place])):
            best[place] = entry
    chosen = {entry.key for entry in best.values()}
    return [replace(entry, use=entry.guess.kind if entry.key in chosen else "") for entry in entries]


def _rank(entry: Entry) -> tuple[int, int, int, int]:
    series = entry.series
    original = int("ORIGINAL" in series.image_type and not series.n_truncated)
    return original, _CONFIDENCE[entry.guess.confidence], series.n_images, -series.number


def write_review(path: Path, entries: Sequence[Entry]) -> None:
    """Write the sheet."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for entry in entries:
        series = entry.series
        times = (series.tr_ms, series.te_ms, series.ti_ms)
        row = [
            entry.case_id,
            entry.patient_id,
            series.number,
            series.description,
            entry.use,
            entry.guess.kind,
            entry.guess.confidence,
            entry.guess.reason,
            series.n_images,
            f"{series.columns}x{series.rows}",
            *(f"{value:g}" if value is not None else "" for value in (series.spacing_mm, series.thickness_mm, *times)),
            entry.key,
        ]
        writer.writerow([_harmless(str(cell)) for cell in row])
    write_text(path, buffer.getvalue())


def with_corrections(path: Path, entries: Sequence[Entry]) -> list[Entry]:
    """Apply what a person changed in an earlier sheet; series that are new keep our choice.

    Raises:
        CohortError: A line cannot be followed; the message gives the line.
    """
    header, lines = read_spreadsheet(path)
    for name in ("series", "use", "case_id", "patient_id"):
        if name not in header:
            raise CohortError(f"{path}: no column '{name}'; restore it, or delete the sheet to begin again")
    edited: dict[str, Mapping[str, str]] = {}
    for line, cells in lines:
        use = cells["use"].lower()
        try:
            if use and not _SEQUENCE_NAME.match(use):
                raise CohortError(f"use is '{use}'; write t1, t1ce, t2, flair or another plain name, or nothing")
            check_case_id(cells["case_id"])
            if not cells["patient_id"]:
                raise CohortError("patient_id is empty; every series belongs to a patient")
        except CohortError as err:
            raise CohortError(f"{path}: line {line}: {err}") from err
        edited[cells["series"]] = {**cells, "use": use}
    corrected = []
    for entry in entries:
        if entry.key in edited:
            line_of = edited[entry.key]
            entry = replace(entry, use=line_of["use"], case_id=line_of["case_id"], patient_id=line_of["patient_id"])
        corrected.append(entry)
    taken: set[tuple[str, str]] = set()
    result = []
    for entry in corrected:
        place = (entry.case_id, entry.use)
        if entry.use and place in taken:
            if entry.key in edited:
                raise CohortError(
                    f"{path}: case {entry.case_id} uses two series as {entry.use}; empty one of the cells"
                )
            entry = replace(entry, use="")  # a new series does not push out what a person chose
        taken.add(place)
        result.append(entry)
    owners: dict[str, str] = {}
    for entry in result:
        if owners.setdefault(entry.case_id, entry.patient_id) != entry.patient_id:
            # One row of the cohort has one patient, and folds are drawn by it.
            raise CohortError(
                f"{path}: case {entry.case_id} belongs to patients {owners[entry.case_id]} and {entry.patient_id}; "
                "write one of them into all its lines"
            )
    return result


def _harmless(cell: str) -> str:
    # A spreadsheet runs a cell that begins like a formula, and descriptions are typed by anybody.
    return f"'{cell}" if cell.startswith(_FORMULA) else cell
