"""Write a synthetic cohort: scans, masks and sheet of patients who never lived.

It looks and correlates enough like the real thing for every stage to have something to learn, needs no download, and is
the same to the last byte for the same seed.
"""

from __future__ import annotations

import csv
import gzip
import io
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt

from glioma_nas.errors import CohortError
from glioma_nas.files import read_json, write_bytes, write_json, write_text
from glioma_nas.images import Affine
from glioma_nas.progress import Progress, Silent
from glioma_nas.seeding import numpy_generator
from glioma_nas.synthetic_images import SEQUENCES, draw_scan
from glioma_nas.synthetic_patients import SyntheticPatient, draw_patient

SHEET_FILE = "cohort.csv"
RECORD_FILE = "synthetic.json"

_VERSION = 1
"""Raised whenever the same seed gives other voxels than before."""

_COLUMNS = ("case_id", "patient_id", *SEQUENCES, "mask", "age", "sex", "idh", "codel_1p19q", "mgmt", "grade", "ki67")
_GZIP_LEVEL = 3


def write_synthetic_cohort(
    folder: Path, n_patients: int, seed: int, *, progress: Progress | None = None, missing_t1ce_fraction: float = 0.0
) -> Path:
    """Write ``n_patients`` with four sequences and a mask each, and at last their sheet.

    Patient number k is the same whatever ``n_patients`` is. A folder that already holds this very cohort is left alone.
    Grade is ``G2`` to ``G4``, ``ki67`` in per cent, mask labels are 1 (necrosis or non-enhancing core), 2 (oedema) and
    4 (enhancing).

    Args:
        folder: Where to write; created.
        n_patients: At least 1.
        seed: Same seed, same bytes.
        progress: Where to report.
        missing_t1ce_fraction: Share of patients without contrast agent, in [0, 1].

    Returns:
        Path of the sheet, with the same columns as a real cohort's.

    Raises:
        CohortError: ``n_patients`` or ``missing_t1ce_fraction`` is out of range.
    """
    if n_patients < 1:
        raise CohortError(f"a synthetic cohort of {n_patients} patients cannot be drawn; ask for at least 1")
    if not 0 <= missing_t1ce_fraction <= 1:
        raise CohortError(f"missing_t1ce_fraction is {missing_t1ce_fraction}; expected a share between 0 and 1")
    record = {
        "version": _VERSION,
        "n_patients": n_patients,
        "seed": seed,
        "missing_t1ce_fraction": missing_t1ce_fraction,
    }
    sheet, record_file = folder / SHEET_FILE, folder / RECORD_FILE
    if sheet.is_file() and record_file.is_file() and read_json(record_file) == record:
        return sheet
    record_file.unlink(missing_ok=True)
    rows = []
    with (progress or Silent()).task("synthetic cohort", n_patients) as task:
        for number in range(1, n_patients + 1):
            patient = draw_patient(number, seed)
            lacks_t1ce = numpy_generator(seed, "synthetic", "missing", number).random() < missing_t1ce_fraction
            rows.append(_write_patient(folder, patient, number, seed, skip=("t1ce",) if lacks_t1ce else ()))
            task.advance()
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(sheet, text.getvalue())
    write_json(record_file, record)
    return sheet


def _write_patient(
    folder: Path, patient: SyntheticPatient, number: int, seed: int, *, skip: tuple[str, ...]
) -> dict[str, str]:
    scan = draw_scan(patient, numpy_generator(seed, "synthetic", "scan", number))
    row = {
        "case_id": patient.case_id,
        "patient_id": patient.case_id,
        "age": f"{patient.age_years:.0f}",
        "sex": patient.sex,
        "idh": patient.idh,
        "codel_1p19q": patient.codel_1p19q,
        "mgmt": patient.mgmt,
        "grade": f"G{patient.grade}",
        "ki67": f"{patient.ki67_percent:.1f}",
    }
    volumes: dict[str, npt.NDArray[np.generic]] = {**scan.images, "mask": scan.mask}
    for name, data in volumes.items():
        if name not in skip:
            row[name] = f"{patient.case_id}/{name}.nii.gz"
            write_bytes(folder / row[name], _nifti_bytes(data, scan.affine))
    return row


def _nifti_bytes(data: npt.NDArray[np.generic], affine: Affine) -> bytes:
    image = nib.Nifti1Image(data, affine)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    image.header.set_xyzt_units("mm")
    # No time stamp in the gzip header, so that equal scans are equal files.
    return gzip.compress(image.to_bytes(), _GZIP_LEVEL, mtime=0)
