"""Copy a file or a folder of scans with clean headers."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from glioma_nas.errors import ImageError, StorageError
from glioma_nas.privacy.dicom_header import scrub_dicom
from glioma_nas.privacy.nifti_header import scrub_nifti
from glioma_nas.privacy.pseudonyms import Pseudonyms
from glioma_nas.progress import Progress, Silent


@dataclass(frozen=True)
class Scrubbed:
    """How many files were written, and why others were not: one line each, by number and not by name."""

    n_nifti: int
    n_dicom: int
    left_out: tuple[str, ...]


def scrub(source: Path, target: Path, pseudonyms: Pseudonyms, *, progress: Progress | None = None) -> Scrubbed:
    """Copy the scans below ``source`` to ``target`` with clean headers.

    NIfTI files keep their place and name below ``target``; DICOM files get new names, since theirs may tell who it is.
    Everything else, links too, is left out.

    Raises:
        StorageError: ``target`` lies inside ``source``, or the other way round, or cannot be written.
    """
    first, second = source.resolve(), target.resolve()
    if first == second or first.is_relative_to(second) or second.is_relative_to(first):
        raise StorageError(f"{target}: lies inside {source} or holds it; give a folder of its own with --out")
    paths = (
        [source] if source.is_file() else sorted(Path(r) / name for r, _, names in os.walk(source) for name in names)
    )
    if not paths:
        raise StorageError(f"{source}: no such file or folder, or nothing in it; give scans")
    root = source.parent if source.is_file() else source
    n_nifti = n_dicom = 0
    left_out: list[str] = []
    with (progress or Silent()).task("scrub headers", len(paths)) as task:
        for number, path in enumerate(paths, start=1):
            task.advance()
            try:
                if path.is_symlink():
                    raise ImageError("a link; leave it out")
                if path.name.lower().endswith((".nii", ".nii.gz")):
                    scrub_nifti(path, target / path.relative_to(root))
                    n_nifti += 1
                else:
                    scrub_dicom(path, target / f"IM{n_dicom + 1:06d}.dcm", pseudonyms)
                    n_dicom += 1
            except ImageError as err:
                left_out.append(f"file {number}: {str(err).replace(f'{path}: ', '')}")
    return Scrubbed(n_nifti, n_dicom, tuple(left_out))
