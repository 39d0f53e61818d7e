"""Write a synthetic cohort: scans, masks and sheet of patients who never lived.

It looks and correlates enough like the real thing for every stage to have something to learn, needs no download, and is
the same to the last byte for the same seed, whatever the number of workers. How it is made, and what it is not, is in
``docs/synthetic_cohort.md``.
"""

from __future__ import annotations

import csv
import io
import shutil
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from glioma_nas.errors import CohortError, did_you_mean
from glioma_nas.files import canonical_json, read_json, sha256_text, write_json, write_text
from glioma_nas.progress import Progress, Silent
from glioma_nas.seeding import derive_seed, numpy_generator
from glioma_nas.synthetic.contrasts import SEQUENCES
from glioma_nas.synthetic.formats import (
    FORMATS,
    Format,
    patient_folders,
    subject_of,
    write_bids_description,
    write_nifti,
    write_patient,
)
from glioma_nas.synthetic.patients import SyntheticPatient, draw_patient
from glioma_nas.synthetic.scans import draw_scans
from glioma_nas.worker_pool import outcomes

SHEET_FILES: dict[Format, str] = {"nifti": "cohort.csv", "bids": "participants.tsv", "dicom": "clinical.csv"}
RECORD_FILE = "synthetic.json"

Difficulty = Literal["easy", "standard", "hard"]
DIFFICULTIES: dict[Difficulty, tuple[float, float]] = {"easy": (0.5, 0.0), "standard": (1.0, 0.0), "hard": (2.0, 0.35)}
"""Factor on noise, and share of patients whose tumour looks like some other patient's."""

_VERSION = 3
"""Raised whenever the same seed gives other voxels or labels than before."""

_LABELS = ("idh", "codel_1p19q", "mgmt", "atrx", "tertp", "cdkn2a", "chr7_10", "egfr", "h3", "mvp", "necrosis")
_MIN_SIZE_PX, _MAX_SIZE_PX = 32, 512


@dataclass(frozen=True)
class _Request:
    # What decides the files of patient k, apart from k.
    version: int
    seed: int
    format: Format
    raw: bool
    size_px: int
    missing_t1ce_fraction: float
    difficulty: Difficulty

    def key(self, number: int) -> str:
        return sha256_text(canonical_json({**asdict(self), "number": number}))


def write_synthetic_cohort(
    folder: Path,
    n_patients: int,
    seed: int,
    *,
    format: Format = "nifti",
    raw: bool = False,
    size_px: int = 120,
    difficulty: Difficulty = "standard",
    missing_t1ce_fraction: float = 0.09,
    workers: int = 1,
    progress: Progress | None = None,
) -> Path:
    """Write ``n_patients`` with four sequences and a mask each, and at last their sheet.

    Patient number k is the same whatever ``n_patients`` is. Patients that the folder already holds are kept, so a run
    that was interrupted continues, and a cohort that is complete is left alone. Grade is ``G2`` to ``G4``, ``ki67`` in
    per cent, mask labels are 1 (necrosis or core without enhancement), 2 (oedema) and 4 (enhancing).

    Args:
        folder: Where to write; created.
        n_patients: At least 1.
        seed: Same seed, same bytes.
        format: ``nifti`` (one folder for each patient and ``cohort.csv``), ``bids`` (masks under derivatives, labels in
            ``participants.tsv``) or ``dicom`` (one folder for each series, NIfTI masks, masks and labels in
            ``clinical.csv``, which is what ``import_dicom`` takes).
        raw: Whole heads as they come from the scanner: not stripped, each sequence on a grid of its own, the head moved
            in between; the mask is on the grid of t1ce, or of flair where that is missing. Otherwise scans are
            registered and stripped.
        size_px: Pixels along each side of a slice, which is 204 mm wide (250 mm when raw).
        difficulty: How noisy the scans are and how typical the tumours: `DIFFICULTIES`.
        missing_t1ce_fraction: Share of patients without contrast agent, in [0, 1].
        workers: Processes that draw patients; the files do not depend on it.
        progress: Where to report.

    Returns:
        Path of the sheet.

    Raises:
        CohortError: An argument is out of range, or the folder holds a synthetic cohort of another format.
    """
    _check(n_patients, size_px, missing_t1ce_fraction, workers)
    if format not in FORMATS:
        raise CohortError(f"unknown format '{format}': {did_you_mean(format, FORMATS)}")
    if difficulty not in DIFFICULTIES:
        raise CohortError(f"unknown difficulty '{difficulty}': {did_you_mean(difficulty, DIFFICULTIES)}")
    request = _Request(_VERSION, seed, format, raw, size_px, missing_t1ce_fraction, difficulty)
    truth = _truth_folder(folder, format)
    record_file, record = truth / RECORD_FILE, {**asdict(request), "n_patients": n_patients}
    sheet = folder / SHEET_FILES[format]
    for other in FORMATS:
        if other != format and (folder / SHEET_FILES[other]).is_file() and _truth_folder(folder, other).is_dir():
            raise CohortError(f"{folder}: holds a synthetic cohort in format '{other}'; choose an empty folder")
    if sheet.is_file() and record_file.is_file() and read_json(record_file) == record:
        return sheet
    sheet.unlink(missing_ok=True)
    record_file.unlink(missing_ok=True)
    _drop_surplus(folder, truth, n_patients, format)
    rows: dict[int, dict[str, str]] = {}
    with (progress or Silent()).task("synthetic cohort", n_patients) as task:
        waiting = []
        for number in range(1, n_patients + 1):
            made = truth / f"{_case_id(number)}.json"
            known = read_json(made) if made.is_file() else {}
            if known.get("key") == request.key(number):
                rows[number] = known["row"]
            else:
                made.unlink(missing_ok=True)
                waiting.append(number)
        if rows:
            task.advance(len(rows))
        draw = partial(_draw, folder, request)
        for index, row in outcomes(draw, waiting, workers=workers):
            rows[waiting[index]] = row
            task.advance()
    ordered = [rows[number] for number in range(1, n_patients + 1)]
    if format == "bids":
        write_bids_description(folder)
    write_text(sheet, _sheet_text(ordered, format))
    write_json(record_file, record)
    return sheet


def _check(n_patients: int, size_px: int, missing_t1ce_fraction: float, workers: int) -> None:
    if n_patients < 1:
        raise CohortError(f"a synthetic cohort of {n_patients} patients cannot be drawn; ask for at least 1")
    if not _MIN_SIZE_PX <= size_px <= _MAX_SIZE_PX:
        raise CohortError(f"size_px is {size_px}; expected {_MIN_SIZE_PX} to {_MAX_SIZE_PX} pixels")
    if not 0 <= missing_t1ce_fraction <= 1:
        raise CohortError(f"missing_t1ce_fraction is {missing_t1ce_fraction}; expected a share between 0 and 1")
    if workers < 1:
        raise CohortError(f"workers is {workers}; expected at least 1")


def _case_id(number: int) -> str:
    return f"SYN-{number:04d}"


def _truth_folder(folder: Path, form: Format) -> Path:
    # BIDS leaves alone what lies under sourcedata.
    return folder / "sourcedata" / "synthetic" if form == "bids" else folder / "synthetic"


def _drop_surplus(folder: Path, truth: Path, n_patients: int, form: Format) -> None:
    # Patients of an earlier, larger cohort: a BIDS folder is read by its folders, not by its sheet.
    for record in truth.glob("SYN-*.json"):
        if int(record.stem.removeprefix("SYN-")) > n_patients:
            for place in patient_folders(folder, record.stem, form):
                shutil.rmtree(place, ignore_errors=True)
            record.unlink()


def _draw(folder: Path, request: _Request, number: int) -> dict[str, str]:
    from threadpoolctl import threadpool_limits

    patient = draw_patient(number, request.seed)
    chance = numpy_generator(request.seed, "synthetic", "missing", number).random()
    noise_factor, atypical_share = DIFFICULTIES[request.difficulty]
    for place in patient_folders(folder, patient.case_id, request.format):
        shutil.rmtree(place, ignore_errors=True)
    # One thread, because sums in another order are other bytes, and because workers share the cores.
    with threadpool_limits(1):
        scans = draw_scans(
            _looks_like(patient, number, request.seed, atypical_share),
            request.seed,
            size_px=request.size_px,
            raw=request.raw,
            noise_factor=noise_factor,
            missing=("t1ce",) if chance < request.missing_t1ce_fraction else (),
        )
    files = write_patient(folder, patient, scans, request.seed, request.format)
    truth = _truth_folder(folder, request.format)
    if request.raw:
        write_nifti(truth / f"{patient.case_id}_brain.nii.gz", scans.brain, scans.scans[scans.reference].grid.affine)
    row = _row(patient, files)
    record: dict[str, Any] = {"key": request.key(number), "row": row, "truth": scans.truth}
    # Last, because it says that everything else is there.
    write_json(truth / f"{patient.case_id}.json", record)
    return row


def _looks_like(patient: SyntheticPatient, number: int, seed: int, share: float) -> SyntheticPatient:
    # An atypical patient keeps labels, name and site, and has the images of a stranger.
    if numpy_generator(seed, "synthetic", "atypical", number).random() >= share:
        return patient
    stranger = draw_patient(number, derive_seed(seed, "synthetic", "stranger"))
    return SyntheticPatient(**{**asdict(stranger), "case_id": patient.case_id, "site": patient.site})


def _row(patient: SyntheticPatient, files: dict[str, str]) -> dict[str, str]:
    known = asdict(patient)
    return {
        "case_id": patient.case_id,
        "patient_id": patient.case_id,
        **files,
        "age": f"{patient.age_years:.0f}",
        "sex": patient.sex,
        "site": patient.site,
        **{name: str(known[name]) for name in _LABELS},
        "grade": f"G{patient.grade}",
        "ki67": f"{patient.ki67_percent:.1f}",
    }


def _sheet_text(rows: list[dict[str, str]], form: Format) -> str:
    described = ("age", "sex", "site", *_LABELS, "grade", "ki67")
    text = io.StringIO()
    if form == "bids":
        writer = csv.DictWriter(
            text, ("participant_id", *described), delimiter="\t", lineterminator="\n", extrasaction="ignore"
        )
        rows = [{**row, "participant_id": subject_of(row["case_id"])} for row in rows]
    else:
        # DICOM's sheet is what an import joins by patient: scans it finds by itself, masks it copies from here.
        files = (*SEQUENCES, "mask") if form == "nifti" else ("mask",)
        writer = csv.DictWriter(
            text, ("case_id", "patient_id", *files, *described), lineterminator="\n", extrasaction="ignore"
        )
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
