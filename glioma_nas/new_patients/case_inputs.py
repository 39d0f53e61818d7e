"""Find the scans of new patients: one folder, a cohort of them, or DICOM as it left the scanner."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from glioma_nas.cohort import Case, Sex, examine_cohort
from glioma_nas.cohort.cells import sanitised_case_id
from glioma_nas.cohort.column_names import is_mask_file, sequence_of_file
from glioma_nas.cohort.reading import holds_dicom
from glioma_nas.cohort.records import NIFTI_SUFFIXES
from glioma_nas.config import CohortConfig
from glioma_nas.errors import CohortError
from glioma_nas.new_patients.frozen_run import FrozenRun
from glioma_nas.new_patients.input_checks import require_sequences
from glioma_nas.privacy.hidden_paths import without_paths
from glioma_nas.privacy.pseudonyms import Pseudonyms, load_salt
from glioma_nas.progress import Progress

SCANS_FOLDER = "scans"


@dataclass(frozen=True)
class FoundCases:
    """What a source holds.

    Attributes:
        cases: The cases, in order.
        problems: What is wrong with those it holds besides.
        series: Case id → sequence → files of the DICOM series its scan was converted from; empty for other sources, and
            for archives, whose files are gone once they are converted.
        comparable: Whether patient ids mean the same as the run's: not where both are hashed with different salts.
    """

    cases: tuple[Case, ...]
    problems: tuple[str, ...] = ()
    series: Mapping[str, Mapping[str, tuple[Path, ...]]] = field(default_factory=dict)
    comparable: bool = True


def find_cases(source: Path, run: FrozenRun, out: Path, progress: Progress) -> FoundCases:
    """Find the cases that ``source`` holds; where the run hides ids (``cohort.hash_ids``), theirs are hidden alike.

    Args:
        source: A folder with one patient's NIfTI files, each named after its sequence; or anything that
            `glioma_nas.cohort.examine_cohort` reads: a sheet, a BIDS or nnU-Net folder, or a folder of such patients'
            folders; or a folder or archive of DICOM, which is converted below ``out``.
        run: The run that shall serve them.
        out: Where converted scans may go; a salt that has to be made goes beside it, into ``OUT.salt``.
        progress: Where to report.

    Raises:
        CohortError: There is nothing there, or it cannot be told which file is which sequence.
    """
    if not source.exists():
        raise CohortError(f"{source}: no such file or folder; give a patient's folder, a sheet or a DICOM export")
    # Beside the folder and not in it: the folder is what people hand on, and the secret would undo its pseudonyms.
    cohort, salt_file = run.config.cohort, out.resolve().with_name(f"{out.resolve().name}.salt")
    # The run's own salt where it is at hand, so that ids can be compared; whoever got the run alone has another one.
    comparable = not cohort.hash_ids or cohort.salt_file.is_file()
    if cohort.hash_ids and comparable:
        salt_file = cohort.salt_file
    if source.is_dir() and (own := _scans_in(source)):
        return FoundCases((_one_case(source, own, salt_file if cohort.hash_ids else None),), comparable=comparable)
    if _is_dicom(source):
        folder, series = _converted(source, run, out, salt_file, progress)
        # Ids are pseudonyms already.
        read = _read(folder, run)
        return FoundCases(read.cases, read.problems, series, comparable)
    read = _read(source, run, salt_file=salt_file if cohort.hash_ids else None)
    return FoundCases(read.cases, read.problems, comparable=comparable)


def _read(source: Path, run: FrozenRun, *, salt_file: Path | None = None) -> FoundCases:
    hidden = {} if salt_file is None else {"hash_ids": True, "salt_file": salt_file}
    config = CohortConfig(
        sheet=source.resolve(), columns=run.config.cohort.columns, sequences=run.config.cohort.sequences, **hidden
    )
    # Not strict: which sequences a case needs depends on the run, and is said for each case.
    reading = examine_cohort(config, strict=False)
    if not reading.cohort.cases and not reading.problems:
        raise CohortError(f"{source}: holds no case")
    return FoundCases(reading.cohort.cases, tuple(str(problem) for problem in reading.problems))


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


def told(text: str, case: Case, run: FrozenRun) -> str:
    """Return what went wrong with a case; where the run hides ids, files are named by case and sequence alone."""
    return without_paths(text, case) if run.config.cohort.hash_ids else text


def _scans_in(folder: Path) -> dict[str, Path]:
    """Return the NIfTI files of a folder by sequence; empty when it holds none that is recognised."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        sequence = sequence_of_file(path.name)
        if sequence is None or not _is_scan(path):
            continue
        if sequence in found:
            raise CohortError(
                f"{folder}: {found[sequence].name} and {path.name} both look like {sequence}; leave one of them"
            )
        found[sequence] = path.resolve()
    return found


def _one_case(folder: Path, scans: dict[str, Path], salt_file: Path | None) -> Case:
    name = sanitised_case_id(folder.resolve().name)
    if salt_file is not None:
        pseudonyms = Pseudonyms(load_salt(salt_file, create=True))
        return Case(pseudonyms.case(name), pseudonyms.patient(name), scans, pseudonyms=pseudonyms)
    return Case(case_id=name, patient_id=name, images=scans)


def _is_scan(path: Path) -> bool:
    is_nifti = path.is_file() and path.name.lower().endswith(NIFTI_SUFFIXES)
    return is_nifti and not is_mask_file(path.name) and sequence_of_file(path.name) is not None


def _is_dicom(source: Path) -> bool:
    from glioma_nas.archives import is_archive

    return holds_dicom(source) if source.is_dir() else is_archive(source)


def _converted(
    source: Path, run: FrozenRun, out: Path, salt_file: Path, progress: Progress
) -> tuple[Path, dict[str, dict[str, tuple[Path, ...]]]]:
    """Convert DICOM; return the folder of the cohort, and case id → sequence → files of its series."""
    from glioma_nas.dicom import import_dicom

    # Names in DICOM headers are people's; what leaves this folder is a keyed hash of them.
    pseudonyms = Pseudonyms(load_salt(salt_file, create=True))
    folder = out / SCANS_FOLDER
    listed = import_dicom(source, folder, pseudonyms, review_only=True, progress=progress)
    modalities = sorted({entry.series.modality or "unknown" for entry in listed.entries})
    if "MR" not in modalities:
        raise CohortError(
            f"{source}: holds series of modality {', '.join(modalities)}; the run's networks read MR only"
        )
    uses: dict[str, dict[str, tuple[Path, ...]]] = {}
    for entry in listed.entries:
        if entry.use:
            uses.setdefault(entry.case_id, {})[entry.use] = tuple(entry.series.files)
    if len(uses) == 1:
        ((case_id, files),) = uses.items()
        require_sequences(Case(case_id, case_id, {name: paths[0] for name, paths in files.items()}), run)
    result = import_dicom(source, folder, pseudonyms, progress=progress)
    for problem in result.problems:
        progress.note(f"DICOM: {problem}")
    return folder, uses if source.is_dir() else {}
