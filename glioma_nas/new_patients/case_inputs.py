"""Find the scans of new patients: one folder, a cohort of them, or DICOM as it left the scanner."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from glioma_nas.cohort import Case, Sex, examine_cohort
from glioma_nas.cohort.cells import sanitised_case_id
from glioma_nas.cohort.column_names import is_mask_file, sequence_of_file
from glioma_nas.cohort.reading import holds_dicom
from glioma_nas.cohort.records import NIFTI_SUFFIXES
from glioma_nas.config import CohortConfig
from glioma_nas.errors import CohortError
from glioma_nas.new_patients.frozen_run import FrozenRun
from glioma_nas.progress import Progress

SCANS_FOLDER = "scans"
SALT_FILE = "pseudonyms.salt"


def find_cases(source: Path, run: FrozenRun, out: Path, progress: Progress) -> tuple[tuple[Case, ...], tuple[str, ...]]:
    """Return the cases that ``source`` holds, in order, and what is wrong with those it holds besides.

    Args:
        source: A folder with one patient's NIfTI files, each named after its sequence; or anything that
            `glioma_nas.cohort.examine_cohort` reads: a sheet, a BIDS, BraTS or nnU-Net folder; or a folder or archive
            of DICOM, which is converted below ``out``.
        run: The run that shall serve them.
        out: Where converted scans may go.
        progress: Where to report.

    Raises:
        CohortError: There is nothing there, or it cannot be told which file is which sequence.
    """
    if not source.exists():
        raise CohortError(f"{source}: no such file or folder; give a patient's folder, a sheet or a DICOM export")
    if source.is_dir() and (own := _scans_in(source)):
        return (_one_case(source, own),), ()
    if _is_dicom(source):
        source = _converted(source, out, progress)
    config = CohortConfig(
        sheet=source.resolve(), columns=run.config.cohort.columns, sequences=run.config.cohort.sequences
    )
    # Not strict: which sequences a case needs depends on the run, and is said for each case.
    reading = examine_cohort(config, strict=False)
    if not reading.cohort.cases and not reading.problems:
        raise CohortError(f"{source}: holds no case")
    return reading.cohort.cases, tuple(str(problem) for problem in reading.problems)


def with_patient(case: Case, *, case_id: str | None, age: float | None, sex: Sex | None) -> Case:
    """Return a case with what the command line knows about its patient.

    Raises:
        CohortError: The case id cannot name a folder, or the age is no age.
    """
    if age is not None and not 0 <= age <= 120:
        raise CohortError(f"--age {age:g}: expected years, 0 to 120")
    if case_id is not None and sanitised_case_id(case_id) != case_id:
        raise CohortError(f"--case-id '{case_id}' cannot name a folder; use letters, digits, '-' and '_'")
    return replace(
        case,
        case_id=case_id or case.case_id,
        age=case.age if age is None else age,
        sex=case.sex if sex is None else sex,
    )


def _scans_in(folder: Path) -> dict[str, Path]:
    """Return the NIfTI files of a folder by sequence; empty when it holds none that is recognised."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if not path.is_file() or not path.name.lower().endswith(NIFTI_SUFFIXES) or is_mask_file(path.name):
            continue
        sequence = sequence_of_file(path.name)
        if sequence is None:
            continue
        if sequence in found:
            raise CohortError(
                f"{folder}: {found[sequence].name} and {path.name} both look like {sequence}; leave one of them"
            )
        found[sequence] = path.resolve()
    return found


def _one_case(folder: Path, scans: dict[str, Path]) -> Case:
    name = sanitised_case_id(folder.resolve().name)
    return Case(case_id=name, patient_id=name, images=scans)


def _is_dicom(source: Path) -> bool:
    from glioma_nas.archives import is_archive

    return holds_dicom(source) if source.is_dir() else is_archive(source)


def _converted(source: Path, out: Path, progress: Progress) -> Path:
    from glioma_nas.dicom import import_dicom
    from glioma_nas.privacy.pseudonyms import Pseudonyms, load_salt

    # Names in DICOM headers are people's; what leaves this folder is a keyed hash of them.
    pseudonyms = Pseudonyms(load_salt(out / SALT_FILE, create=True))
    result = import_dicom(source, out / SCANS_FOLDER, pseudonyms, progress=progress)
    for problem in result.problems:
        progress.note(f"DICOM: {problem}")
    if not result.n_cases:
        raise CohortError(
            f"{source}: no series was recognised as one of the sequences; correct the column 'use_as' in "
            f"{out / SCANS_FOLDER / 'series.csv'} and run again"
        )
    return out / SCANS_FOLDER
