"""Write DICOM files that hold the image, its place and how it was acquired, and nothing about the person.

Elements are kept only when they are on a list, since vendors add new ones and put names into any of them. The list is
that of the Basic Application Level Confidentiality Profile turned round (DICOM PS3.15, annex E): pixels, geometry,
acquisition. UIDs become keyed hashes, so that series still belong together; sex and age stay, ages above 89 become 90.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from glioma_nas.errors import ImageError
from glioma_nas.files import write_bytes
from glioma_nas.privacy.pseudonyms import Pseudonyms

KEPT = frozenset(
    [
        "ImageType", "SOPClassUID", "Modality", "Manufacturer", "MagneticFieldStrength", "ScanningSequence",
        "SequenceVariant", "ScanOptions", "MRAcquisitionType", "RepetitionTime", "EchoTime", "InversionTime",
        "FlipAngle", "EchoTrainLength", "EchoNumbers", "NumberOfAverages", "ImagingFrequency", "ImagedNucleus",
        "PixelBandwidth", "SliceThickness", "SpacingBetweenSlices", "AcquisitionMatrix",
        "InPlanePhaseEncodingDirection", "PatientPosition", "SeriesNumber", "InstanceNumber", "AcquisitionNumber",
        "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceLocation", "NumberOfFrames",
        "SamplesPerPixel", "PhotometricInterpretation", "Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit",
        "PixelRepresentation", "PlanarConfiguration", "SmallestImagePixelValue", "LargestImagePixelValue",
        "RescaleIntercept", "RescaleSlope", "RescaleType", "WindowCenter", "WindowWidth", "PixelData",
        "LossyImageCompression", "PatientSex", "PatientAge", "DiffusionBValue", "SharedFunctionalGroupsSequence",
        "PerFrameFunctionalGroupsSequence", "PlanePositionSequence", "PlaneOrientationSequence",
        "PixelMeasuresSequence", "FrameContentSequence", "MREchoSequence", "EffectiveEchoTime",
        "MRTimingAndRelatedParametersSequence", "PixelValueTransformationSequence", "FrameVOILUTSequence",
        "DimensionIndexValues", "InStackPositionNumber", "StackID", "MRImageFrameTypeSequence", "FrameType",
    ]
)  # fmt: skip

# Without these there is no DICOM file to write, or none that anybody could place.
_NEEDED = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")

_UIDS = ("SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")
# Type 2 of the modules that every image has: they must be present and may be empty.
_EMPTY = ("PatientBirthDate", "StudyDate", "StudyTime", "StudyID", "AccessionNumber", "ReferringPhysicianName")


def scrub_dicom(source: Path, target: Path, pseudonyms: Pseudonyms) -> None:
    """Write a copy of a DICOM file without anything that tells who it is.

    Raises:
        ImageError: It is not DICOM, is damaged, or its header says that text is burned into the pixels, which no header
            can mend.
    """
    import pydicom
    from pydicom.errors import InvalidDicomError

    try:
        data = pydicom.dcmread(source)
        clean = _cleaned(source, data, pseudonyms)
        content = io.BytesIO()
        clean.save_as(content, enforce_file_format=True)
    except (InvalidDicomError, OSError, EOFError, ValueError, TypeError, LookupError, AttributeError) as err:
        # pydicom reads elements when they are asked for, and raises whatever a damaged one leads to.
        raise ImageError(f"{source}: not a readable DICOM file ({type(err).__name__}); leave it out") from err
    write_bytes(target, content.getvalue())


def _cleaned(source: Path, data: Any, pseudonyms: Pseudonyms) -> Any:  # pydicom ships no types we use
    from pydicom.dataset import Dataset, FileMetaDataset

    if str(data.get("BurnedInAnnotation", "")).upper() == "YES":
        raise ImageError(f"{source}: text is burned into the pixels; leave the file out")
    transfer_syntax = data.file_meta.get("TransferSyntaxUID")
    if "Rows" not in data:
        raise ImageError(f"{source}: holds no image but a report or an index; leave the file out")
    if lacking := [name for name in _NEEDED if not data.get(name)] + ([] if transfer_syntax else ["TransferSyntaxUID"]):
        raise ImageError(f"{source}: its header lacks {', '.join(lacking)}; leave the file out")
    clean = Dataset()
    clean.update(_kept(data))
    for name in _EMPTY:
        setattr(clean, name, "")
    for name in _UIDS:
        if name in data:
            setattr(clean, name, _hashed_uid(str(data[name].value), pseudonyms))
    pseudonym = pseudonyms.patient(str(data.get("PatientID", "") or f"unnamed {data.get('StudyInstanceUID', '')}"))
    clean.PatientID = clean.PatientName = pseudonym
    age = str(data.get("PatientAge", "") or "")
    if age.endswith("Y") and age[:-1].isdigit() and int(age[:-1]) > 89:
        clean.PatientAge = "090Y"
    clean.PatientIdentityRemoved = "YES"
    clean.DeidentificationMethod = "glioma_nas: elements kept by list, UIDs hashed"
    clean.file_meta = FileMetaDataset()
    clean.file_meta.TransferSyntaxUID = transfer_syntax
    clean.file_meta.MediaStorageSOPClassUID = data.SOPClassUID
    clean.file_meta.MediaStorageSOPInstanceUID = clean.SOPInstanceUID
    return clean


def _kept(data: Any) -> Any:  # pydicom ships no types we use
    from pydicom.dataset import Dataset

    kept = Dataset()
    for element in data:
        if element.keyword not in KEPT:
            continue
        if element.VR == "SQ":
            setattr(kept, element.keyword, [_kept(item) for item in element.value])
        else:
            kept.add(element)
    return kept


def _hashed_uid(uid: str, pseudonyms: Pseudonyms) -> str:
    # 2.25 is the root for UIDs made of a number of 128 bits, so no registration is needed.
    return f"2.25.{int(pseudonyms.digest('uid', uid, digits=32), 16)}"
