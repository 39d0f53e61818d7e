"""A BIDS folder: ``participants.tsv`` and ``sub-*/[ses-*/]anat/`` (https://bids-specification.readthedocs.io).

Each session is a case, each participant a patient. ``T1w``, ``T2w`` and ``FLAIR`` are the sequences; a ``T1w`` with a
``ce-`` entity is T1 with contrast. The tumour mask is a ``mask`` or ``dseg`` file of the same subject and session,
under ``derivatives`` or beside the scans, whose ``label``, ``desc`` or ``seg`` entity says tumour or lesion.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from glioma_nas.cohort.column_names import known_column
from glioma_nas.cohort.records import CohortTable, Problem, Row
from glioma_nas.cohort.spreadsheet import read_spreadsheet
from glioma_nas.errors import CohortError

PARTICIPANTS = "participants.tsv"

_SUFFIXES = {"T1w": "t1", "T2w": "t2", "FLAIR": "flair"}
_TUMOUR = re.compile(r"tumou?r|lesion|glioma|wholetumou?r|^wt$", re.IGNORECASE)
_MASK_ENTITIES = ("label", "desc", "seg")
_ORDER = ("t1", "t1ce", "t2", "flair")


def is_bids(folder: Path) -> bool:
    """Tell whether the folder looks like BIDS."""
    return (folder / PARTICIPANTS).is_file() or any(folder.glob("sub-*/anat")) or any(folder.glob("sub-*/ses-*/anat"))


def read_bids(folder: Path) -> CohortTable:
    """Read a BIDS folder.

    Raises:
        CohortError: It holds no subject, or ``participants.tsv`` is damaged.
    """
    people, columns = _participants(folder / PARTICIPANTS)
    derived = _masks_by_session(folder)
    rows: list[Row] = []
    problems: list[Problem] = []
    notes: list[str] = []
    sequences: set[str] = set()
    for subject in sorted(path for path in folder.glob("sub-*") if path.is_dir()):
        for session in _sessions(subject):
            case_id = subject.name if session == subject else f"{subject.name}_{session.name}"
            images, several = _scans(session / "anat")
            notes += [f"{case_id}: {text}" for text in several]
            masks = derived.get(case_id, [])
            if len(masks) > 1:
                names = ", ".join(sorted(path.name for path in masks))
                problems.append(
                    Problem(str(session), f"case {case_id} has several tumour masks ({names}); keep one", case_id)
                )
            sequences |= set(images)
            files = {name: str(path.relative_to(folder)) for name, path in images.items()}
            mask = {"mask": str(masks[0].relative_to(folder))} if masks else {}
            known = people.get(subject.name, {})
            rows.append(
                Row(str(session), {**known, **files, **mask, "case_id": case_id, "patient_id": subject.name}),
            )
        if people and subject.name not in people:
            notes.append(f"{subject.name} is not in {PARTICIPANTS}: age, sex and labels are unknown")
    if not rows:
        raise CohortError(f"{folder}: holds no sub-* folder; give the root of the BIDS data set")
    found = [name for name in _ORDER if name in sequences]
    has_mask = ["mask"] if any("mask" in row.cells for row in rows) else []
    ours = ("case_id", "patient_id", *found, *has_mask, *columns)
    return CohortTable(folder, folder, ours, tuple(rows), tuple(problems), tuple(notes))


def _participants(path: Path) -> tuple[dict[str, dict[str, str]], tuple[str, ...]]:
    if not path.is_file():
        return {}, ()
    header, lines = read_spreadsheet(path)
    if "participant_id" not in header:
        raise CohortError(f"{path}: no column 'participant_id' (columns: {', '.join(header)}); add it")
    names = {
        heading: known if (known := known_column(heading)) in ("age", "sex") else heading
        for heading in header
        if heading not in ("participant_id", "case_id", "patient_id", "mask", *_ORDER)
    }
    people = {
        cells["participant_id"]: {names[heading]: cell for heading, cell in cells.items() if heading in names}
        for _, cells in lines
    }
    return people, tuple(names.values())


def _sessions(subject: Path) -> Iterator[Path]:
    sessions = sorted(path for path in subject.glob("ses-*") if path.is_dir())
    yield from sessions or [subject]


def _scans(folder: Path) -> tuple[dict[str, Path], list[str]]:
    candidates: dict[str, list[Path]] = {}
    for path in sorted([*folder.glob("sub-*.nii"), *folder.glob("sub-*.nii.gz")]):
        entities, suffix = _parse(path)
        sequence = _SUFFIXES.get(suffix)
        if sequence is not None and "part" not in entities:
            sequence = "t1ce" if sequence == "t1" and "ce" in entities else sequence
            candidates.setdefault(sequence, []).append(path)
    chosen: dict[str, Path] = {}
    notes = []
    for sequence, paths in candidates.items():
        # The fewest entities: a plain scan before a special acquisition, the first run before repeats.
        chosen[sequence] = min(paths, key=lambda path: (len(_parse(path)[0]), path.name))
        if len(paths) > 1:
            notes.append(f"{len(paths)} scans for {sequence}; {chosen[sequence].name} is used")
    return chosen, notes


def _masks_by_session(folder: Path) -> dict[str, list[Path]]:
    masks: dict[str, list[Path]] = {}
    for pattern in ("derivatives/**/sub-*.nii*", "sub-*/anat/sub-*.nii*", "sub-*/ses-*/anat/sub-*.nii*"):
        for path in sorted(folder.glob(pattern)):
            entities, suffix = _parse(path)
            words = [entities[name] for name in _MASK_ENTITIES if name in entities]
            if suffix in ("mask", "dseg") and any(_TUMOUR.search(word) for word in words):
                session = f"_ses-{entities['ses']}" if "ses" in entities else ""
                masks.setdefault(f"sub-{entities['sub']}{session}", []).append(path)
    return masks


def _parse(path: Path) -> tuple[Mapping[str, str], str]:
    *pairs, suffix = path.name.split(".nii")[0].split("_")
    return {key: value for key, _, value in (pair.partition("-") for pair in pairs)}, suffix
