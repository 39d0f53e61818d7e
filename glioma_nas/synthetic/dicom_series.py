"""Write a synthetic sequence as a DICOM series of MR images that says plainly that nobody was scanned."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from glioma_nas.files import atomic_path
from glioma_nas.synthetic.acquisitions import FIELD_STRENGTH_T, MANUFACTURER, PROTOCOLS
from glioma_nas.synthetic.patients import SyntheticPatient
from glioma_nas.synthetic.scans import Scan

_TO_LPS = np.diag([-1.0, -1.0, 1.0])


def write_series(folder: Path, patient: SyntheticPatient, name: str, scan: Scan, seed: int) -> None:
    """Write one file for each slice: ``0001.dcm`` onwards, from the lowest slice to the highest.

    Identifiers are hashes of cohort, patient and series, so the same cohort is the same files. There are no dates.

    Args:
        folder: Created.
        patient: Whose scan it is.
        name: Its sequence.
        scan: Its voxels and grid.
        seed: Of the cohort.
    """
    from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

    def uid(*parts: str) -> str:
        return str(generate_uid(entropy_srcs=["glioma_nas", str(seed), patient.case_id, *parts]))

    protocol = PROTOCOLS[name]
    affine = scan.grid.affine
    x_mm, y_mm, z_mm = scan.grid.spacing_mm
    directions = _TO_LPS @ affine[:3, :3] / [x_mm, y_mm, z_mm]
    window = float(np.percentile(scan.data[scan.data > 0], 99.5))
    for k in range(scan.grid.shape[2]):
        instance = uid(name, str(k))
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = MRImageStorage
        meta.MediaStorageSOPInstanceUID = instance
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        path = folder / f"{k + 1:04d}.dcm"
        image: Dataset = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
        image.SOPClassUID, image.SOPInstanceUID = MRImageStorage, instance
        image.StudyInstanceUID, image.SeriesInstanceUID = uid("study"), uid(name)
        image.FrameOfReferenceUID = uid("frame")
        image.PatientName = f"Synthetic^Patient {patient.case_id.removeprefix('SYN-')}"
        image.PatientID, image.PatientSex = patient.case_id, patient.sex
        image.PatientAge, image.PatientBirthDate = f"{patient.age_years:03.0f}Y", ""
        image.PatientIdentityRemoved, image.DeidentificationMethod = "YES", "Synthetic: nobody was scanned"
        image.StudyDate = image.StudyTime = image.StudyID = image.AccessionNumber = image.ReferringPhysicianName = ""
        image.Modality, image.Manufacturer = "MR", MANUFACTURER
        image.InstitutionName = f"Synthetic site {patient.site}"
        image.StudyDescription, image.SeriesDescription = "MR BRAIN (SYNTHETIC)", protocol.description
        image.ProtocolName, image.BodyPartExamined = protocol.description, "BRAIN"
        image.SeriesNumber, image.InstanceNumber = protocol.number, k + 1
        image.ImageType = ["ORIGINAL", "PRIMARY", "M", "NORM"]
        image.ScanningSequence = ["SE", "IR"] if protocol.inversion_ms is not None else "SE"
        image.SequenceVariant, image.ScanOptions, image.MRAcquisitionType = "SK", "", "2D"
        image.RepetitionTime, image.EchoTime = protocol.repetition_ms, protocol.echo_ms
        image.EchoTrainLength, image.MagneticFieldStrength = 1, FIELD_STRENGTH_T
        if protocol.inversion_ms is not None:
            image.InversionTime = protocol.inversion_ms
        if protocol.contrast:
            image.ContrastBolusAgent = protocol.contrast
        image.PatientPosition, image.PositionReferenceIndicator, image.Laterality = "HFS", "", ""
        image.SliceThickness = image.SpacingBetweenSlices = _decimal(z_mm)
        image.PixelSpacing = [_decimal(y_mm), _decimal(x_mm)]
        image.ImageOrientationPatient = [_decimal(value) for value in directions[:, :2].T.ravel()]
        corner = _TO_LPS @ (affine @ [0, 0, k, 1])[:3]
        image.ImagePositionPatient = [_decimal(value) for value in corner]
        image.SliceLocation = _decimal(float(np.cross(directions[:, 0], directions[:, 1]) @ corner))
        image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
        image.Columns, image.Rows = scan.grid.shape[0], scan.grid.shape[1]
        image.BitsAllocated, image.BitsStored, image.HighBit, image.PixelRepresentation = 16, 16, 15, 0
        image.WindowCenter, image.WindowWidth = _decimal(window / 2), _decimal(window)
        # Rows run along the second axis of the volume.
        image.PixelData = np.ascontiguousarray(scan.data[:, :, k].T.astype("<u2")).tobytes()
        with atomic_path(path) as temporary:
            image.save_as(temporary, enforce_file_format=True)


def _decimal(value: float) -> str:
    # DICOM allows 16 characters for a decimal number.
    return f"{value:.9g}"
