"""Import a folder or archive of DICOM: list, recognise, let a person correct, convert, write ``cohort.csv``.

Running it again is how corrections are applied: the review sheet's choices are followed, what is converted already is
kept, and columns that were added to ``cohort.csv`` by hand stay.
"""

from __future__ import annotations

import csv
import io
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from glioma_nas.archives import is_archive, unpack
from glioma_nas.cohort.cells import sanitised_case_id
from glioma_nas.cohort.column_names import CANONICAL_SEQUENCES
from glioma_nas.cohort.spreadsheet import read_spreadsheet
from glioma_nas.dicom.clinical_sheet import read_clinical_sheet, shown_age
from glioma_nas.dicom.conversion import ConversionTask, convert_series
from glioma_nas.dicom.review_sheet import REVIEW_SHEET, Entry, with_choices, with_corrections, write_review
from glioma_nas.dicom.sequence_rules import recognise
from glioma_nas.dicom.series import Listing, Series, list_series
from glioma_nas.errors import CohortError, ImageError
from glioma_nas.files import read_json, sha256_file, sha256_text, write_json, write_text
from glioma_nas.privacy.nifti_header import scrub_nifti
from glioma_nas.privacy.pseudonyms import Pseudonyms
from glioma_nas.progress import Progress, Silent
from glioma_nas.worker_pool import KILLED, outcomes

COHORT_SHEET = "cohort.csv"
RECORD = "import.json"
_SHORT_SHARE = 0.75


@dataclass(frozen=True)
class ImportResult:
    """What an import did.

    Attributes:
        entries: Every series, with what it was used as.
        problems: What a person should look at, one line each, without identifiers.
        n_cases: Cases in ``cohort.csv``.
        n_converted: Series converted in this run.
    """

    entries: tuple[Entry, ...]
    problems: tuple[str, ...]
    n_cases: int
    n_converted: int


def import_dicom(
    source: Path,
    out: Path,
    pseudonyms: Pseudonyms | None,
    *,
    clinical: Path | None = None,
    review_only: bool = False,
    workers: int = 1,
    progress: Progress | None = None,
) -> ImportResult:
    """Import DICOM below ``source`` into ``out``.

    Args:
        source: Folder, or a .zip or .tar archive.
        out: Gets ``series.csv``, ``cohort.csv``, ``import.json`` and ``CASE/SEQUENCE.nii.gz``.
        pseudonyms: Makes the case and patient ids; None keeps PatientID, made harmless as a folder name.
        clinical: Sheet of labels whose ``patient_id`` is the PatientID in the headers; a column ``mask`` may name a
            NIfTI mask for each patient, relative to the sheet, which is copied with a clean header. Columns that would
            tell who somebody is stay behind, and are told.
        review_only: Write ``series.csv`` and stop before converting.
        workers: Processes that convert.
        progress: Where to report.

    Raises:
        CohortError: There is no DICOM, or the review or clinical sheet cannot be followed.
        StorageError: The archive is damaged or hostile, or ``out`` cannot be written.
    """
    progress = progress or Silent()
    with _opened(source) as folder:
        listing = list_series(folder, progress)
        if not listing.series:
            raise CohortError(
                f"{source}: no DICOM series among {listing.n_files} files ({listing.n_other} of another kind, "
                f"{listing.n_empty} empty, {listing.n_archives} archives); give the folder of the export, unpacked"
            )
        entries = with_choices(_entries(listing, pseudonyms))
        if (out / REVIEW_SHEET).is_file():
            entries = with_corrections(out / REVIEW_SHEET, entries)
        write_review(out / REVIEW_SHEET, entries)
        problems = [*_oddities(listing), *_doubts(entries)]
        if review_only:
            return ImportResult(tuple(entries), tuple(problems), 0, 0)
        labels: dict[str, dict[str, str]] = {}
        masks: dict[str, Path] = {}
        if clinical is not None:
            labels, masks, left_out = read_clinical_sheet(clinical)
            problems += left_out
        failed, n_converted = _convert(entries, out, workers, progress)
    problems += [f"case {case_id}: {name}: {text}" for (case_id, name), text in failed.items()]
    copied, mask_problems = _copy_masks(out, entries, masks)
    problems += mask_problems
    n_cases = _write_cohort(out, entries, set(failed), labels, copied)
    if labels:
        known = {entry.series.patient_id for entry in entries}
        if absent := len(known - set(labels)):
            problems.append(f"{absent} of {len(known)} patients are not in {clinical.name if clinical else ''}")
    return ImportResult(tuple(entries), tuple(problems), n_cases, n_converted)


@contextmanager
def _opened(source: Path) -> Iterator[Path]:
    if source.is_dir():
        yield source
        return
    if not source.is_file() or not is_archive(source):
        raise CohortError(f"{source}: neither a folder nor a .zip or .tar archive; give where the DICOM export lies")
    with tempfile.TemporaryDirectory(prefix="glioma_nas_archive_") as scratch:
        unpack(source, Path(scratch))
        yield Path(scratch)


def _entries(listing: Listing, pseudonyms: Pseudonyms | None) -> list[Entry]:
    studies: dict[str, list[str]] = {}
    for series in listing.series:
        known = studies.setdefault(series.patient_id, [])
        if series.study_uid not in known:
            known.append(series.study_uid)
    entries = []
    for series in listing.series:
        # Without a PatientID nobody can tell whether two studies are of one person, so each is its own.
        patient = series.patient_id or f"unnamed {series.study_uid}"
        if pseudonyms is not None:
            patient_id = pseudonyms.patient(patient)
            mark = pseudonyms.digest("study", series.study_uid, digits=4)
            key = pseudonyms.digest("series", series.study_uid, series.uid)
        else:
            patient_id = sanitised_case_id(patient)
            mark = sha256_text(series.study_uid)[:4]
            key = sha256_text(f"{series.study_uid} {series.uid}")[:10]
        # By the study's hash and not by its date: an examination that is added later renames none.
        entries.append(Entry(key, f"{patient_id}-{mark}", patient_id, "", recognise(series), series))
    return entries


def _oddities(listing: Listing) -> Iterator[str]:
    for count, what in (
        (listing.n_empty, "empty files were left out"),
        (listing.n_links, "links were not followed"),
        (listing.n_archives, "archives inside the folder were not opened"),
        (listing.n_other, "files are not DICOM, or cannot be read as such"),
    ):
        if count:
            yield f"{count} {what}"


def _doubts(entries: Sequence[Entry]) -> Iterator[str]:
    for entry in entries:
        series = entry.series
        name = f"case {entry.case_id}: series {series.number}"
        if series.burned_in:
            yield f"{name} has text burned into its pixels; look at it before anybody else does"
        if series.n_truncated:
            yield f"{name}: {series.n_truncated} of {len(series.files)} files are truncated; export it again"
        if entry.guess.kind == "empty":
            yield f"{name} holds no images"
        if entry.use and (doubt := series.incomplete):
            yield f"{name} may lack slices: {doubt}; compare it with the scanner's, and export it again"
        if entry.use and entry.guess.confidence == "low":
            yield f"{name} is used as {entry.use}, which is a doubtful guess ({entry.guess.reason})"
        elif not entry.use and entry.guess.kind == "unknown":
            yield f"{name} is not recognised ({entry.guess.reason}); say what it is in {REVIEW_SHEET}"
    for case_id in dict.fromkeys(entry.case_id for entry in entries):
        used = {entry.use: entry.series for entry in entries if entry.case_id == case_id and entry.use}
        yield from _short_series(case_id, used)
        if missing := [name for name in CANONICAL_SEQUENCES if name not in used]:
            yield f"case {case_id} has no {', '.join(missing)}"


def _short_series(case_id: str, used: Mapping[str, Series]) -> Iterator[str]:
    # Slices that are missing at an end leave no gap. The patient's other sequences say how far the head was covered.
    covered = {name: series.covered_mm for name, series in used.items() if series.covered_mm > 0}
    longest = max(covered.values(), default=0.0)
    for name, length in covered.items():
        if length < _SHORT_SHARE * longest:
            yield (
                f"case {case_id}: {name} covers {length:.0f} mm across its slices, another sequence {longest:.0f} mm; "
                "slices at an end may be missing"
            )


def _convert(
    entries: Sequence[Entry], out: Path, workers: int, progress: Progress
) -> tuple[dict[tuple[str, str], str], int]:
    record: dict[str, str] = read_json(out / RECORD) if (out / RECORD).is_file() else {}
    wanted: dict[str, tuple[Entry, str]] = {}
    failed: dict[tuple[str, str], str] = {}
    for entry in entries:
        if entry.use and (uneven := entry.series.uneven):
            failed[entry.case_id, entry.use] = (
                f"slices are uneven, as where one is missing ({uneven}); export the series again"
            )
        elif entry.use:
            # By content: an export of the same examination, made again, has the same names and often the same sizes.
            contents = [sha256_file(path) for path in entry.series.files]
            wanted[f"{entry.case_id}/{entry.use}.nii.gz"] = (entry, sha256_text(f"{entry.key} {contents}"))
    for name in set(record) - set(wanted):
        # A corrected choice must not leave the scan of the old one behind. The record may come from anywhere, though,
        # and must not make us remove a file elsewhere.
        for old in (out / name, out / name.replace(".nii.gz", ".json")):
            if old.is_file() and old.resolve().is_relative_to(out.resolve()):
                old.unlink()
        del record[name]
    todo = [name for name, (_, state) in wanted.items() if record.get(name) != state or not (out / name).is_file()]
    tasks = [ConversionTask(tuple(wanted[name][0].series.files), out / name) for name in todo]
    n_converted = 0
    with progress.task("convert series", len(tasks)) as task:
        for index, problem in outcomes(convert_series, tasks, workers=workers, killed=_killed):
            entry, state = wanted[todo[index]]
            if problem is None:
                n_converted += 1
                record[todo[index]] = state
            else:
                record.pop(todo[index], None)
                (out / todo[index]).unlink(missing_ok=True)
                failed[entry.case_id, entry.use] = problem
            write_json(out / RECORD, record)
            task.advance()
    write_json(out / RECORD, record)
    return failed, n_converted


def _killed(task: ConversionTask) -> str:
    return KILLED


def _copy_masks(out: Path, entries: Sequence[Entry], masks: Mapping[str, Path]) -> tuple[dict[str, str], list[str]]:
    """Copy each patient's mask beside its scans; return case id → path below ``out``, and what could not be done."""
    cases: dict[str, set[str]] = {}
    for entry in entries:
        if entry.use:
            cases.setdefault(entry.series.patient_id, set()).add(entry.case_id)
    copied: dict[str, str] = {}
    problems = []
    for patient in sorted(set(masks) & set(cases)):
        case_id, *others = sorted(cases[patient])
        if others:
            problems.append(f"case {case_id}: its patient has {len(others) + 1} cases, so the mask is nobody's; add it")
            continue
        try:
            scrub_nifti(masks[patient], out / case_id / "mask.nii.gz")
        except ImageError as err:
            problems.append(f"case {case_id}: mask: {str(err).replace(f'{masks[patient]}: ', '')}")
            continue
        copied[case_id] = f"{case_id}/mask.nii.gz"
    return copied, problems


def _write_cohort(
    out: Path,
    entries: Sequence[Entry],
    failed: set[tuple[str, str]],
    labels: Mapping[str, Mapping[str, str]],
    masks: Mapping[str, str],
) -> int:
    before = _columns_added_by_hand(out / COHORT_SHEET)
    rows: dict[str, dict[str, str]] = {}
    for entry in entries:
        if not entry.use or (entry.case_id, entry.use) in failed:
            continue
        row = rows.setdefault(entry.case_id, {"case_id": entry.case_id, "patient_id": entry.patient_id})
        row[entry.use] = f"{entry.case_id}/{entry.use}.nii.gz"
        row.setdefault("age", shown_age(entry.series.age))
        row.setdefault("sex", entry.series.sex)
        row["mask"] = masks.get(entry.case_id, "")
        # The clinical sheet last: what it corrects must not be undone by what an earlier import wrote.
        for name, value in {**before.get(entry.case_id, {}), **labels.get(entry.series.patient_id, {})}.items():
            row[name] = value
    if not rows:
        raise CohortError(
            f"{out}: no series could be used; look through {out / REVIEW_SHEET} and fill the column 'use'"
        )
    named = dict.fromkeys(name for row in rows.values() for name in row)
    sequences = sorted({entry.use for entry in entries if entry.use}, key=_sequence_order)
    first = ["case_id", "patient_id", *(name for name in sequences if name in named), "mask", "age", "sex"]
    columns = [*first, *(name for name in named if name not in first)]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows[case_id] for case_id in sorted(rows))
    write_text(out / COHORT_SHEET, buffer.getvalue())
    return len(rows)


def _columns_added_by_hand(path: Path) -> dict[str, dict[str, str]]:
    if not path.is_file():
        return {}
    _, lines = read_spreadsheet(path)
    ours = ("case_id", "patient_id", "age", "sex")
    return {
        cells["case_id"]: {
            name: cell
            for name, cell in cells.items()
            if cell and name not in ours and (name == "mask" or not cell.lower().endswith((".nii", ".nii.gz")))
        }
        for _, cells in lines
        if "case_id" in cells
    }


def _sequence_order(name: str) -> tuple[int, str]:
    is_known = name in CANONICAL_SEQUENCES
    return (CANONICAL_SEQUENCES.index(name) if is_known else len(CANONICAL_SEQUENCES), name)
