"""Recognise the names that sheets, data sets and scanners give to sequences and to identifiers."""

from __future__ import annotations

import re
from collections.abc import Iterable

CANONICAL_SEQUENCES = ("t1", "t1ce", "t2", "flair")

_SEQUENCE_NAMES = {
    "t1": ("t1", "t1w", "t1n", "t1pre", "pret1", "t1weighted", "t1native"),
    "t1ce": ("t1ce", "t1c", "t1gd", "t1post", "postt1", "t1cw", "t1km", "t1wce", "t1contrast", "cet1", "t1wgd", "ct1"),
    "t2": ("t2", "t2w", "t2weighted"),
    "flair": ("flair", "t2flair", "t2f", "fl", "flairw", "t2wflair"),
}
_SEQUENCES = {name: sequence for sequence, names in _SEQUENCE_NAMES.items() for name in names}
_CASE_COLUMNS = ("case_id", "subjectid", "subject_id", "participant_id", "caseid")
_PATIENT_COLUMNS = ("patient_id", "patientid")
_MASK_NAMES = ("mask", "seg", "segmentation", "tumormask", "tumourmask")
_CHANNEL = re.compile(r"^(?:channel|image|modality)_?(\d+)$", re.IGNORECASE)


def sequence_of(name: str) -> str | None:
    """Return our name of a sequence, or None when it is none we know.

    >>> sequence_of("T1-Gd"), sequence_of("T2 FLAIR"), sequence_of("swi")
    ('t1ce', 'flair', None)
    """
    return _SEQUENCES.get(re.sub(r"[^a-z0-9]", "", name.lower()))


def sequence_of_file(name: str) -> str | None:
    """Return the sequence that the last word of a file name stands for.

    >>> sequence_of_file("BraTS-GLI-00005-000-t1c.nii.gz"), sequence_of_file("sub-01_T2_FLAIR.nii")
    ('t1ce', 'flair')
    """
    stem = re.sub(r"\.nii(\.gz)?$", "", name, flags=re.IGNORECASE)
    words = [word for word in re.split(r"[^A-Za-z0-9]+", stem) if word]
    two = sequence_of("".join(words[-2:])) if len(words) > 1 else None
    return two or (sequence_of(words[-1]) if words else None)


def is_mask_file(name: str) -> bool:
    """Tell whether the last word of a file name says mask or segmentation."""
    stem = re.sub(r"\.nii(\.gz)?$", "", name, flags=re.IGNORECASE)
    words = [word.lower() for word in re.split(r"[^A-Za-z0-9]+", stem) if word]
    return bool(words) and words[-1] in _MASK_NAMES


def known_column(name: str) -> str | None:
    """Return ``case_id``, ``patient_id``, ``mask``, ``age`` or ``sex`` where a heading means one of them."""
    low = name.strip().lower()
    if low in _CASE_COLUMNS:
        return "case_id"
    if low in _PATIENT_COLUMNS:
        return "patient_id"
    if low in _MASK_NAMES:
        return "mask"
    if low in ("age", "age_years", "age_at_scan"):
        return "age"
    if low in ("sex", "gender"):
        return "sex"
    return None


def channel_number(name: str) -> int | None:
    """Return the number in headings such as ``Channel_0`` of GaNDLF sheets, else None."""
    match = _CHANNEL.match(name.strip())
    return int(match.group(1)) if match else None


def common_sequence(files: Iterable[str]) -> str | None:
    """Return the one sequence that all these file names stand for, or None when they do not agree."""
    found = {sequence_of_file(name) for name in files}
    return found.pop() if len(found) == 1 else None
