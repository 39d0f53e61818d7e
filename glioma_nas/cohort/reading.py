"""Find out what a cohort is written as, read it, and check every row before any image is opened.

The rules, in order, for the path in ``cohort.sheet``: a .csv, .tsv or .xlsx file is a sheet; a folder that holds
``cohort.csv``, ``cohort.tsv`` or ``cohort.xlsx`` stands for that sheet; ``dataset.json`` beside ``imagesTr`` is an
nnU-Net data set; ``participants.tsv`` or ``sub-*/anat`` is BIDS; folders of files named as in BraTS are BraTS; a folder
with DICOM files must be imported first. ``cohort.format`` names one of these and ends the guessing.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from glioma_nas.cohort.bids import is_bids, read_bids
from glioma_nas.cohort.brats import is_brats, read_brats
from glioma_nas.cohort.cells import case_of_row, sanitised_case_id
from glioma_nas.cohort.column_names import CANONICAL_SEQUENCES, known_column
from glioma_nas.cohort.nnunet import is_nnunet, read_nnunet
from glioma_nas.cohort.records import NIFTI_SUFFIXES, Case, Cohort, CohortTable, Exclusion, Problem, Row
from glioma_nas.cohort.sheet import read_sheet
from glioma_nas.cohort.spreadsheet import SHEET_SUFFIXES, read_spreadsheet
from glioma_nas.config import CohortConfig
from glioma_nas.errors import CohortError, did_you_mean
from glioma_nas.files import canonical_json, sha256_text
from glioma_nas.privacy.label_columns import telling_columns
from glioma_nas.privacy.pseudonyms import Pseudonyms, load_salt
from glioma_nas.privacy.text_patterns import KnownIdentifiers

_logger = logging.getLogger(__name__)

_KNOWN = ("case_id", "patient_id", "mask", "age", "sex")
_DICOM_MAGIC = b"DICM"
_DICOM_PROBES = 200

_FOLDER_READERS: Mapping[str, tuple[Callable[[Path], bool], Callable[[Path], CohortTable]]] = {
    "nnunet": (is_nnunet, read_nnunet),
    "bids": (is_bids, read_bids),
    "brats": (is_brats, read_brats),
}


@dataclass(frozen=True)
class Reading:
    """A cohort with everything that is wrong with it.

    Attributes:
        cohort: The cases that can be used.
        problems: What stops the others.
        notes: What a reader had to decide.
        format: ``sheet``, ``bids``, ``brats`` or ``nnunet``.
    """

    cohort: Cohort
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]
    format: str


def read_cohort(config: CohortConfig) -> Cohort:
    """Read and check the cohort; no image is opened, but every file named must exist.

    A column holds images when ``config.sequences`` names it or one of its cells ends in .nii or .nii.gz.

    Raises:
        CohortError: The sheet or folder cannot be read, a column is missing, or a row is not usable. The message is the
            first finding with its place and value, and how many more there are.
    """
    reading = examine_cohort(config)
    if reading.problems:
        raise CohortError(first_of([str(problem) for problem in reading.problems]))
    if not reading.cohort.cases:
        raise CohortError(f"{config.sheet}: holds no rows below the header; add one line for each case")
    return reading.cohort


def examine_cohort(config: CohortConfig, *, strict: bool = True) -> Reading:
    """Read the cohort like `read_cohort`, but collect what is wrong with single cases instead of stopping.

    Args:
        config: Where the cohort is and how it is read.
        strict: Refuse a cohort without a column for one of ``config.sequences``.

    Raises:
        CohortError: The sheet or folder as a whole cannot be read.
    """
    form, table = _read_table(config)
    sequences = _image_columns(table, config.sequences, strict=strict)
    if config.hash_ids:
        table = _without_telling_columns(table, sequences)
    labels = tuple(name for name in table.columns if name not in _KNOWN and name not in sequences)
    problems = list(table.problems)
    notes = list(table.notes)
    spoilt = {problem.case_id for problem in problems}
    first_place: dict[str, Row] = {}
    cases: list[Case] = []
    for row in table.rows:
        try:
            case = case_of_row(table.folder, row.cells, sequences, labels, follow_links=config.follow_links)
            # Some file systems do not tell 'a' from 'A', nor the two ways Unicode writes 'é'.
            key = unicodedata.normalize("NFC", case.case_id).casefold()
            if key in first_place:
                twin = first_place[key]
                same = "the same as" if twin.cells["case_id"] == case.case_id else "hardly different from that"
                raise CohortError(
                    f"case_id '{case.case_id}' is {same} in {_short(twin.place)}; every case needs its own"
                )
        except CohortError as err:
            problems.append(Problem(row.place, str(err), row.cells["case_id"] or None))
            continue
        first_place[key] = row
        if case.case_id not in spoilt:
            cases.append(case)
    cohort = Cohort(table.source.resolve(), tuple(cases), sequences, labels)
    reading = Reading(cohort, tuple(problems), tuple(notes), form)
    return _with_pseudonyms(reading, table, config.salt_file) if config.hash_ids else reading


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
                "cohort.missing_sequence to 'exclude', 'zero', 'indicator' or 'drop'"
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


def cohort_fingerprint(config: CohortConfig) -> dict[str, Any]:
    """Return what a run depends on: the table by content, scans by size and time of change.

    Hashing gigabytes at every command would take longer than most stages.
    """
    try:
        form, table = _read_table(config)
    except CohortError:
        return {"sheet": None, "scans": {}}  # whoever reads the cohort next says what is wrong with it
    scans: dict[str, list[int]] = {}
    for cell in sorted({cell for row in table.rows for cell in row.cells.values()}):
        if not cell.lower().endswith(NIFTI_SUFFIXES):
            continue
        try:
            status = (table.folder / cell).stat()
        except (OSError, ValueError):
            continue  # absent, or no possible name: a finding of whoever reads the cohort
        scans[cell] = [status.st_size, status.st_mtime_ns]
    content = [form, list(table.columns), [dict(row.cells) for row in table.rows]]
    fingerprint: dict[str, Any] = {"sheet": sha256_text(canonical_json(content)), "scans": scans}
    if config.hash_ids:
        # Another salt gives other case ids; the salt itself, 256 random bits, cannot be found from its hash.
        fingerprint["salt"] = sha256_text(load_salt(config.salt_file, create=True).hex())
    return fingerprint


def first_of(problems: Sequence[str]) -> str:
    """Return the first finding and how many more there are, as one line."""
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{problems[0]}{more}"


def _with_pseudonyms(reading: Reading, table: CohortTable, salt_file: Path) -> Reading:
    pseudonyms = Pseudonyms(load_salt(salt_file, create=True))
    hidden = {row.cells["case_id"]: pseudonyms.case(row.cells["case_id"]) for row in table.rows}
    people = {row.cells["patient_id"]: pseudonyms.patient(row.cells["patient_id"]) for row in table.rows}
    # Paths are told in messages too, and folders are named after patients. Longest first, so that a shorter id inside a
    # longer one leaves nothing of it behind; ids of one or two characters only where the word "case" stands before.
    words = sorted({**people, **hidden}.items(), key=lambda item: -len(item[0]))

    def clean(text: str) -> str:
        for identifier, pseudonym in words:
            before = r"(?<![0-9A-Za-z])" if len(identifier) > 2 else r"(?<=case )"
            if identifier:
                text = re.sub(rf"{before}{re.escape(identifier)}(?![0-9A-Za-z])", pseudonym, text)
        return text

    for given, name in ((hidden, "case_id"), (people, "patient_id")):
        if len(set(given.values())) != len(given):  # chance does that once in a million cohorts of 1000 patients
            raise CohortError(f"two {name}s have one pseudonym; use another cohort.salt_file")
    cases = tuple(
        replace(case, case_id=hidden[case.case_id], patient_id=people[case.patient_id], pseudonyms=pseudonyms)
        for case in reading.cohort.cases
    )
    return replace(
        reading,
        cohort=replace(reading.cohort, cases=cases),
        problems=tuple(
            Problem(clean(item.place), clean(item.message), hidden.get(item.case_id or "")) for item in reading.problems
        ),
        notes=tuple(map(clean, reading.notes)),
    )


def _without_telling_columns(table: CohortTable, sequences: Sequence[str]) -> CohortTable:
    # Labels are written into prepared cases as they are, so hidden ids must not stand in another column of the sheet.
    free = [name for name in table.columns if name not in (*_KNOWN, *sequences)]
    ids = {row.cells[name]: "case or patient id" for row in table.rows for name in ("case_id", "patient_id")}
    cells = {name: [row.cells.get(name, "") for row in table.rows] for name in free}
    telling = telling_columns(cells, KnownIdentifiers(ids))
    for name, why in telling.items():
        _logger.warning("cohort.hash_ids: column '%s' is left out (%s)", name, why)
    return replace(
        table,
        columns=tuple(name for name in table.columns if name not in telling),
        rows=tuple(
            Row(row.place, {name: cell for name, cell in row.cells.items() if name not in telling})
            for row in table.rows
        ),
        notes=(*table.notes, *(f"column '{name}' is left out ({why})" for name, why in telling.items())),
    )


def _read_table(config: CohortConfig) -> tuple[str, CohortTable]:
    source = config.sheet
    form, path = _detect(source, config.format)
    if form == "sheet":
        table = read_sheet(path, columns=config.columns, wanted=config.sequences)
    else:
        table = _sanitised(_FOLDER_READERS[form][1](path))
    if config.clinical is not None:
        table = _with_clinical(table, config.clinical)
    return form, table


def _detect(source: Path, wanted: str) -> tuple[str, Path]:
    if not source.is_dir():
        if source.is_file() and source.suffix.lower() not in SHEET_SUFFIXES:
            raise CohortError(
                f"{source}: not a sheet ({', '.join(SHEET_SUFFIXES)}) and not a folder; an archive must be unpacked, "
                "or imported with `glioma-nas cohort import-dicom` when it holds DICOM"
            )
        return "sheet", source
    if wanted in _FOLDER_READERS:
        return wanted, source
    for suffix in SHEET_SUFFIXES:
        if (source / f"cohort{suffix}").is_file():
            return "sheet", source / f"cohort{suffix}"
    if wanted == "auto":
        for name, (fits, _) in _FOLDER_READERS.items():
            if fits(source):
                return name, source
        if holds_dicom(source):
            raise CohortError(
                f"{source}: holds DICOM files; run `glioma-nas cohort import-dicom {source} --out FOLDER`, look "
                "through FOLDER/series.csv, and give FOLDER as cohort.sheet"
            )
    raise CohortError(
        f"{source}: none of the layouts that are read: cohort.csv, cohort.tsv or cohort.xlsx in it; BIDS "
        "(participants.tsv, sub-*/anat); nnU-Net (dataset.json, imagesTr); BraTS (CASE/CASE_flair.nii.gz)"
    )


def holds_dicom(folder: Path) -> bool:
    """Tell whether one of the first files below ``folder`` is DICOM."""
    for path in _first_files(folder, _DICOM_PROBES):
        try:
            with path.open("rb") as handle:
                handle.seek(128)
                if handle.read(4) == _DICOM_MAGIC:
                    return True
        except OSError:
            continue  # a file that cannot be opened says nothing about the others
    return False


def _first_files(folder: Path, count: int) -> Iterator[Path]:
    for path in folder.rglob("*"):
        if count <= 0:
            return
        if path.is_file() and not path.is_symlink():
            count -= 1
            yield path


def _sanitised(table: CohortTable) -> CohortTable:
    """Rename cases whose folders or files have names that cannot be case ids, and say so."""
    rows = []
    notes = list(table.notes)
    for row in table.rows:
        name = sanitised_case_id(row.cells["case_id"])
        if name != row.cells["case_id"]:
            notes.append(f"a case was renamed to {name}, because its name cannot be a case id")
            row = Row(row.place, {**row.cells, "case_id": name})
        rows.append(row)
    return replace(table, rows=tuple(rows), notes=tuple(notes))


def _with_clinical(table: CohortTable, path: Path) -> CohortTable:
    """Add the columns of a clinical sheet to the cases, by case id or else by patient id."""
    header, lines = read_spreadsheet(path)
    names = {heading: known_column(heading) or heading for heading in header}
    ours = list(names.values())
    keys = [name for name in ("case_id", "patient_id") if name in ours]
    if not keys:
        raise CohortError(f"{path}: no column 'case_id' or 'patient_id' (columns: {', '.join(header)}); add one")
    if taken := [name for name in ours if name in (*CANONICAL_SEQUENCES, "mask")]:
        raise CohortError(f"{path}: cohort.clinical has a column '{taken[0]}' of files; files belong in cohort.sheet")
    key = keys[0]
    found: dict[str, dict[str, str]] = {}
    for line, cells in lines:
        person = {names[heading]: cell for heading, cell in cells.items()}
        if person[key] in found:
            raise CohortError(f"{path}: line {line}: {key} stands there for the second time; keep one line")
        found[person[key]] = person
    rows = tuple(
        Row(row.place, {**row.cells, **{k: v for k, v in found.get(row.cells[key], {}).items() if v}})
        for row in table.rows
    )
    _check_one_patient_each(path, table.rows, rows)
    present = {row.cells[key] for row in table.rows}
    notes = list(table.notes)
    if lacking := sum(row.cells[key] not in found for row in table.rows):
        notes.append(
            f"{path.name}: {lacking} of {len(rows)} cases are not in it; their labels are unknown"
            + (", and so is whose they are" if key == "case_id" and "patient_id" in ours else "")
        )
    if spare := len(set(found) - present):
        notes.append(f"{path.name}: {spare} lines belong to no case of the cohort")
    columns = tuple(dict.fromkeys([*table.columns, *ours]))
    return replace(table, columns=columns, rows=rows, notes=tuple(notes))


def _check_one_patient_each(path: Path, before: Sequence[Row], after: Sequence[Row]) -> None:
    """Make sure that the patient ids of a clinical sheet take no patient apart, as a line that is missing would."""
    given: dict[str, str] = {}
    for old, new in zip(before, after, strict=True):
        patient = new.cells["patient_id"]
        if given.setdefault(old.cells["patient_id"], patient) != patient:
            raise CohortError(
                f"{path}: gives cases of one patient of the data set different patient_ids, or only some of them; "
                f"folds would part them: write the same patient_id into the lines of all their cases ({old.place})"
            )


def _image_columns(table: CohortTable, wanted: Sequence[str], *, strict: bool) -> tuple[str, ...]:
    free = [name for name in table.columns if name not in _KNOWN]
    images = tuple(
        name
        for name in free
        if name in wanted or any(row.cells.get(name, "").lower().endswith(NIFTI_SUFFIXES) for row in table.rows)
    )
    for name in wanted if strict else ():
        if name not in images:
            raise CohortError(f"{table.source}: no column for sequence '{name}': {did_you_mean(name, free)}")
    return images


def _short(place: str) -> str:
    return place.rsplit(": ", 1)[-1]
