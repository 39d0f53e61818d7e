"""Write a predicted outline as a DICOM segmentation that refers to the series it was drawn on.

The file carries the patient's name and number from that series, as a PACS needs them; everything else `predict` writes
does not. It is read back before it counts: every voxel must lie where the NIfTI mask has it.

Reference: DICOM PS3.3 A.51, Segmentation IOD; Bridge et al., highdicom, J Digit Imaging 35 (2022).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glioma_nas import __version__
from glioma_nas.errors import ImageError, ResourceError
from glioma_nas.files import atomic_path

_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
_MAY_BE_EMPTY = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyID", "StudyDate", "StudyTime",
    "AccessionNumber", "ReferringPhysicianName",
)  # fmt: skip
_MAX_OFF_GRID = 0.2  # voxels; headers of both formats are rounded


def require_highdicom() -> Any:
    """Return the module.

    Raises:
        ResourceError: It is not installed.
    """
    try:
        import highdicom
    except ImportError as err:
        raise ResourceError("--dicom-seg needs highdicom: pip install 'glioma-nas[dicom-seg]'") from err
    return highdicom


def write_dicom_seg(
    path: Path, mask: NDArray[np.uint8], affine: NDArray[np.float64], *, series: Sequence[Path], network: str, key: str
) -> None:
    """Write a mask as DICOM SEG, read it back, and keep it only if it lies where the mask lies.

    Args:
        path: The file, replaced atomically.
        mask: uint8 (X, Y, Z), 0 or 1, on the grid of the series as converted.
        affine: (4, 4) voxel index → millimetres, RAS+.
        series: Files of the series, one for each slice.
        network: Name of the network, for the header.
        key: What the UIDs are derived from, so that the same prediction gives the same file name and UIDs.

    Raises:
        ImageError: The series is not one of single slices, does not fit the mask, or the file does not read back.
        ResourceError: highdicom is not installed.
    """
    highdicom = require_highdicom()
    import pydicom
    from pydicom.sr.codedict import codes
    from pydicom.uid import generate_uid

    images = [_completed(pydicom.dcmread(file)) for file in series]
    if any(int(image.get("NumberOfFrames", 1) or 1) > 1 for image in images):
        raise ImageError(
            f"{path.name}: the series is one multi-frame file; DICOM SEG is written for single slices only"
        )
    images.sort(key=lambda image: float(_slice_affine(image)[:3, 3] @ _normal(image)))
    planes = np.stack([_plane(image, mask, affine, path) for image in images])
    algorithm = highdicom.AlgorithmIdentificationSequence(
        name=f"glioma_nas {network}", family=codes.DCM.ArtificialIntelligence, version=__version__
    )
    segment = highdicom.seg.SegmentDescription(
        segment_number=1,
        segment_label="Whole tumour, predicted, research use only",
        segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,
        segmented_property_type=codes.SCT.Neoplasm,
        algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=algorithm,
    )
    try:
        segmentation = highdicom.seg.Segmentation(
            source_images=images,
            pixel_array=planes,
            segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
            segment_descriptions=[segment],
            series_instance_uid=str(generate_uid(entropy_srcs=["glioma_nas", "series", key])),
            series_number=900,
            sop_instance_uid=str(generate_uid(entropy_srcs=["glioma_nas", "instance", key])),
            instance_number=1,
            manufacturer="glioma_nas",
            manufacturer_model_name=f"glioma_nas {network}",
            software_versions=__version__,
            device_serial_number="none",
            content_description="Predicted glioma, research use only",
            omit_empty_frames=False,  # an empty outline is a result, and every slice can be paged through
        )
    except (AttributeError, KeyError, TypeError, ValueError) as err:
        raise ImageError(
            f"{path.name}: the headers of the series do not allow a DICOM SEG ({' '.join(str(err).split())[:200]}); go "
            "without --dicom-seg"
        ) from err
    with atomic_path(path) as temporary:
        segmentation.save_as(temporary)
        _check(temporary, mask, affine, path)


def seg_voxels(path: Path) -> NDArray[np.float64]:
    """Return where the voxels of a DICOM SEG's outline lie: float64 (n, 3), millimetres, RAS+."""
    highdicom = require_highdicom()
    volume = highdicom.seg.segread(path).get_volume(segment_numbers=[1], combine_segments=True)
    inside = np.argwhere(np.asarray(volume.array) > 0)
    homogeneous = np.column_stack([inside, np.ones(len(inside))])
    return np.asarray((homogeneous @ (_LPS @ np.asarray(volume.affine)).T)[:, :3], dtype=np.float64)


def _check(file: Path, mask: NDArray[np.uint8], affine: NDArray[np.float64], path: Path) -> None:
    found = _indices(seg_voxels(file), affine)
    kept = {tuple(index) for index in np.rint(found).astype(int)}
    if kept != {tuple(index) for index in np.argwhere(mask)}:
        raise ImageError(
            f"{path.name}: the segmentation does not read back as the mask; use mask.nii.gz, and report it"
        )


def _plane(image: Any, mask: NDArray[np.uint8], affine: NDArray[np.float64], path: Path) -> NDArray[np.uint8]:
    """Return the mask on one slice, uint8 (rows, columns)."""
    rows, columns = np.mgrid[: image.Rows, : image.Columns]
    pixels = np.column_stack([columns.ravel(), rows.ravel(), np.zeros(rows.size), np.ones(rows.size)])
    voxels = _indices((pixels @ (_LPS @ _slice_affine(image)).T)[:, :3], affine)
    nearest = np.rint(voxels).astype(int)
    off_grid = float(np.abs(voxels - nearest).max())
    if off_grid > _MAX_OFF_GRID or nearest.min() < 0 or (nearest >= mask.shape).any():
        raise ImageError(
            f"{path.name}: the slices of the series do not lie on the grid of the mask (off by {off_grid:.2f} voxels); "
            "no DICOM SEG is written"
        )
    plane: NDArray[np.uint8] = mask[tuple(nearest.T)].reshape(rows.shape).astype(np.uint8)
    return plane


def _completed(image: Any) -> Any:
    """Fill with nothing what the standard wants to be there even when it is not known; exports leave it out."""
    for name in _MAY_BE_EMPTY:
        if name not in image:
            setattr(image, name, "")
    return image


def _indices(points_mm: NDArray[np.float64], affine: NDArray[np.float64]) -> NDArray[np.float64]:
    homogeneous = np.column_stack([points_mm, np.ones(len(points_mm))])
    return np.asarray((homogeneous @ np.linalg.inv(affine).T)[:, :3], dtype=np.float64)


def _normal(image: Any) -> NDArray[np.float64]:
    vectors = np.asarray(image.ImageOrientationPatient, dtype=np.float64)
    return np.asarray(np.cross(vectors[:3], vectors[3:]), dtype=np.float64)


def _slice_affine(image: Any) -> NDArray[np.float64]:
    """Return (4, 4): (column, row, 0) → millimetres in DICOM's LPS+ space (PS3.3 C.7.6.2.1.1)."""
    vectors = np.asarray(image.ImageOrientationPatient, dtype=np.float64)
    row_mm, column_mm = (float(side) for side in image.PixelSpacing)
    affine = np.eye(4)
    affine[:3, 0] = vectors[:3] * column_mm
    affine[:3, 1] = vectors[3:] * row_mm
    affine[:3, 2] = _normal(image)
    affine[:3, 3] = np.asarray(image.ImagePositionPatient, dtype=np.float64)
    return affine
