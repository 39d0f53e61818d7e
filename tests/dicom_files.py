"""DICOM series made in the tests, with the identifiers that a hospital's export holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

NAME, PATIENT, BIRTH, STUDY_DATE, HOSPITAL = "Smith^John", "00412345", "19700503", "20150617", "St Elsewhere"
SECRETS = ("Smith", "John", PATIENT, BIRTH, "1970-05-03", STUDY_DATE, "2015-06-17", HOSPITAL, "Dr^Jones", "ACC77")

SERIES: dict[str, dict[str, Any]] = {
    "t1": {"SeriesDescription": "AX T1 SE PRE", "RepetitionTime": 550, "EchoTime": 12},
    "t1ce": {"SeriesDescription": "AX T1 SE +C", "RepetitionTime": 550, "EchoTime": 12, "ContrastBolusAgent": "Gd"},
    "t2": {"SeriesDescription": "AX T2 TSE", "RepetitionTime": 4500, "EchoTime": 98},
    "flair": {"SeriesDescription": "AX FLAIR", "RepetitionTime": 9000, "EchoTime": 120, "InversionTime": 2500},
}


def write_series(
    folder: Path,
    *,
    study: str,
    number: int,
    patient: str = PATIENT,
    n_slices: int = 8,
    size: int = 32,
    three_planes: bool = False,
    **fields: Any,
) -> str:
    """Write one series into ``folder`` and return its uid."""
    folder.mkdir(parents=True, exist_ok=True)
    uid = generate_uid()
    generator = np.random.default_rng(number)
    for index in range(n_slices):
        data = Dataset()
        data.file_meta = FileMetaDataset()
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.file_meta.MediaStorageSOPClassUID = MRImageStorage
        data.SOPClassUID, data.SOPInstanceUID = MRImageStorage, generate_uid()
        data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
        data.PatientName, data.PatientID, data.PatientBirthDate = NAME, patient, BIRTH
        data.PatientSex, data.PatientAge = "M", "045Y"
        data.StudyDate = data.SeriesDate = data.AcquisitionDate = data.ContentDate = STUDY_DATE
        data.StudyTime = data.AcquisitionTime = "101112"
        data.AccessionNumber, data.InstitutionName, data.ReferringPhysicianName = "ACC77", HOSPITAL, "Dr^Jones"
        data.StudyInstanceUID, data.SeriesInstanceUID, data.FrameOfReferenceUID = study, uid, f"{study[:60]}.1"
        data.SeriesNumber, data.InstanceNumber = number, index + 1
        data.Modality, data.ImageType = "MR", ["ORIGINAL", "PRIMARY", "M"]
        data.ScanningSequence, data.MRAcquisitionType, data.MagneticFieldStrength = "SE", "2D", 1.5
        data.Manufacturer = "SIEMENS"
        data.SliceThickness, data.SpacingBetweenSlices, data.PixelSpacing = 5.0, 6.0, [6.5, 6.5]
        planes = [[1, 0, 0, 0, 1, 0], [1, 0, 0, 0, 0, -1], [0, 1, 0, 0, 0, -1]]
        data.ImageOrientationPatient = planes[index % 3] if three_planes else planes[0]
        data.ImagePositionPatient = [-100.0, -110.0, -20.0 + 6.0 * index]
        data.Rows = data.Columns = size
        data.BitsAllocated = data.BitsStored = 16
        data.HighBit, data.PixelRepresentation, data.SamplesPerPixel = 15, 0, 1
        data.PhotometricInterpretation = "MONOCHROME2"
        data.add_new((0x0029, 0x1010), "LO", f"private {NAME}")
        for name, value in fields.items():
            setattr(data, name, value)
        if data.Rows:
            pixels = generator.integers(0, 900, (size, size)).astype(np.uint16)
            pixels[index, 2 * index + 1] = 900 + index  # a landmark that differs from slice to slice
            data.PixelData = pixels.tobytes()
        data.save_as(folder / f"IM{number:02d}{index:03d}", enforce_file_format=True)
    return uid


def write_patient(folder: Path, *, patient: str = PATIENT, study: str | None = None) -> str:
    """Write an examination with the four sequences and what else such exports hold; return its StudyInstanceUID."""
    study = study or generate_uid()
    common = {"study": study, "patient": patient}
    write_series(
        folder / "loc", number=1, n_slices=9, three_planes=True, SeriesDescription="Survey", RepetitionTime=15,
        EchoTime=5, **common,
    )  # fmt: skip
    for number, (name, fields) in enumerate(SERIES.items(), start=2):
        write_series(folder / name, number=number, **fields, **common)
    write_series(
        folder / "dwi", number=6, SeriesDescription="ep2d_diff_b1000", RepetitionTime=5200, EchoTime=90,
        DiffusionBValue=1000.0, **common,
    )  # fmt: skip
    write_series(
        folder / "adc", number=7, SeriesDescription="ep2d_diff_b1000_ADC", ImageType=["DERIVED", "PRIMARY", "ADC"],
        **common,
    )  # fmt: skip
    write_series(folder / "sr", number=8, n_slices=1, Modality="SR", Rows=0, SeriesDescription="Report", **common)
    write_series(folder / "hollow", number=9, n_slices=2, Rows=0, SeriesDescription="AX T1", **common)
    write_series(
        folder / "swi", number=10, SeriesDescription="t2star swi mip", RepetitionTime=28, EchoTime=20, **common
    )
    (folder / "empty").mkdir()
    (folder / "notes.txt").write_text("Dear colleague")
    (folder / "zero").write_bytes(b"")
    (folder / "DICOMDIR").write_bytes(b"index")
    return study
