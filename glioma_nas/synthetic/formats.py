"""Write one synthetic patient as plain NIfTI files, as a BIDS subject, or as DICOM series with NIfTI masks."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Literal

import nibabel as nib
import numpy as np
import numpy.typing as npt

from glioma_nas.files import write_bytes, write_json
from glioma_nas.images import Affine
from glioma_nas.synthetic.acquisitions import PROTOCOLS
from glioma_nas.synthetic.dicom_series import write_series
from glioma_nas.synthetic.patients import SyntheticPatient
from glioma_nas.synthetic.scans import PatientScans

Format = Literal["nifti", "dicom", "bids"]
FORMATS: tuple[Format, ...] = ("nifti", "dicom", "bids")

_GZIP_LEVEL = 3
_BIDS_NAMES = {"t1": "T1w", "t1ce": "ce-gadolinium_T1w", "t2": "T2w", "flair": "FLAIR"}
_BIDS_MASKS = "derivatives/tumour"


def subject_of(case_id: str) -> str:
    """Return the BIDS name of a patient, which may hold letters and digits only after ``sub-``."""
    return f"sub-{case_id.replace('-', '')}"


def patient_folders(root: Path, case_id: str, form: Format) -> tuple[Path, ...]:
    """Return the folders that hold a patient's files and nobody else's."""
    if form == "bids":
        return root / subject_of(case_id), root / _BIDS_MASKS / subject_of(case_id)
    return (root / case_id,)


def write_patient(
    root: Path, patient: SyntheticPatient, scans: PatientScans, seed: int, form: Format
) -> dict[str, str]:
    """Write the files of one patient.

    Args:
        root: Folder of the cohort.
        patient: Who it is.
        scans: The images.
        seed: Of the cohort; part of DICOM's identifiers.
        form: Which files.

    Returns:
        What a sheet says of them: sequence (NIfTI only) and ``mask`` → path relative to ``root``.
    """
    mask_grid = scans.scans[scans.reference].grid
    if form == "dicom":
        for name, scan in scans.scans.items():
            write_series(root / patient.case_id / PROTOCOLS[name].folder, patient, name, scan, seed)
        mask = f"{patient.case_id}/mask.nii.gz"
        write_nifti(root / mask, scans.mask, mask_grid.affine)
        return {"mask": mask}
    files = {}
    for name, scan in scans.scans.items():
        if form == "bids":
            subject = subject_of(patient.case_id)
            stem = f"{subject}/anat/{subject}_{_BIDS_NAMES[name]}"
            write_json(root / f"{stem}.json", PROTOCOLS[name].sidecar())
        else:
            stem = f"{patient.case_id}/{name}"
        files[name] = f"{stem}.nii.gz"
        write_nifti(root / files[name], scan.data, scan.grid.affine)
    if form == "bids":
        files["mask"] = f"{_BIDS_MASKS}/{subject}/anat/{subject}_label-tumour_dseg.nii.gz"
    else:
        files["mask"] = f"{patient.case_id}/mask.nii.gz"
    write_nifti(root / files["mask"], scans.mask, mask_grid.affine)
    return files


def write_bids_description(root: Path) -> None:
    """Write what BIDS wants at the root of a data set, and of its derivatives."""
    readme = (
        "Synthetic MRI of patients who never lived, drawn by glioma_nas (`glioma-nas cohort synth`). Masks are below "
        "derivatives/tumour: 1 core without enhancement, 2 oedema, 4 enhancing.\n"
    )
    write_bytes(root / "README", readme.encode())
    write_json(
        root / "dataset_description.json",
        {
            "Name": "Synthetic gliomas",
            "BIDSVersion": "1.9.0",
            "DatasetType": "raw",
            "License": "CC0",
            "GeneratedBy": [{"Name": "glioma_nas"}],
        },
    )
    write_json(
        root / _BIDS_MASKS / "dataset_description.json",
        {
            "Name": "Tumour masks of synthetic gliomas",
            "BIDSVersion": "1.9.0",
            "DatasetType": "derivative",
            "GeneratedBy": [{"Name": "glioma_nas"}],
        },
    )


def write_nifti(path: Path, data: npt.NDArray[np.generic], affine: Affine) -> None:
    """Write a volume with scanner coordinates; equal volumes are equal files."""
    image = nib.Nifti1Image(data, affine)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    image.header.set_xyzt_units("mm")
    # No time stamp in the gzip header.
    write_bytes(path, gzip.compress(image.to_bytes(), _GZIP_LEVEL, mtime=0))
