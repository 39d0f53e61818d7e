"""Read NIfTI scans and masks completely and check them; write masks on a scan's own grid.

Files are decompressed as a whole, so that a truncated one is an error and never a volume filled up with zeros.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import struct
import zlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
from nibabel.filebasedimages import ImageFileError
from nibabel.imageglobals import LoggingOutputSuppressor
from nibabel.spatialimages import HeaderDataError

from glioma_nas.errors import ImageError
from glioma_nas.files import write_bytes

FloatVolume = npt.NDArray[np.float32]
MaskVolume = npt.NDArray[np.uint8]
Affine = npt.NDArray[np.float64]

HEADER_TEXTS = ("descrip", "aux_file", "intent_name", "db_name", "data_type")
"""Fields of free text in a NIfTI header; the last two are left from ANALYZE 7.5, and NIfTI-2 lacks them."""

_GZIP_MAGIC = b"\x1f\x8b"
_HEADER_SIZES = {348: nib.Nifti1Image, 540: nib.Nifti2Image}
_COPY_AGAIN = "copy or export the file again"
_MAX_SHIFT_VOXELS = 0.1
_GZIP_LEVEL = 6
_MAX_UNPACKED_BYTES = 4_000_000_000


@dataclass(frozen=True)
class Volume:
    """A scan on its own grid.

    Attributes:
        data: (X, Y, Z) float32, finite, in the file's own axis order and units.
        affine: (4, 4) float64, voxel index → millimetres in RAS+ scanner space.
    """

    data: FloatVolume
    affine: Affine

    def voxel_hash(self) -> str:
        """Hash shape and values, whatever the header says; see `voxel_hash`."""
        return voxel_hash(self.data)


@dataclass(frozen=True)
class MaskImage:
    """A binary mask on its own grid: ``data`` (X, Y, Z) uint8 0/1 and ``affine`` as in `Volume`."""

    data: MaskVolume
    affine: Affine


def voxel_hash(data: npt.NDArray[Any]) -> str:
    """Hash a volume's values so that a copy is found whatever header it got and however its axes are stored.

    The axes are turned by what the volume itself shows: each so that its sums over the other two begin with the smaller
    end, and sorted by length, then by those sums. Only a volume whose sums are symmetric to six digits can be missed.

    Args:
        data: (X, Y, Z), any real type.

    Returns:
        64 hexadecimal digits.
    """
    profiles = []
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        profile = data.sum(axis=others, dtype=np.float64)
        # Sums of the same numbers in another order differ in their last digits.
        apart = profile - profile[::-1]
        clear = np.flatnonzero(np.abs(apart) > 1e-6 * max(float(np.abs(profile).max()), 1e-30))
        if clear.size and apart[clear[0]] > 0:
            data, profile = np.flip(data, axis), profile[::-1]
        profiles.append(profile)
    scale = max(float(np.abs(profile).max()) for profile in profiles) or 1.0
    order = sorted(range(3), key=lambda axis: (data.shape[axis], np.round(profiles[axis] / scale, 6).tolist()))
    turned = np.ascontiguousarray(data.transpose(order), dtype=np.float32)
    digest = hashlib.sha256(str(turned.shape).encode())
    digest.update(turned.tobytes())
    return digest.hexdigest()


def read_volume(path: Path) -> Volume:
    """Read a whole scan.

    Raises:
        ImageError: The file is missing, truncated or not NIfTI, not three-dimensional, constant, holds NaN or
            infinity, or its affine is singular.
    """
    data, affine = _read_checked(path)
    n_bad = int(np.count_nonzero(~np.isfinite(data)))
    if n_bad:
        raise ImageError(f"{path}: {n_bad} voxels are NaN or infinite; {_COPY_AGAIN} or replace them by 0")
    low, high = data.min(), data.max()
    if low == high:
        raise ImageError(f"{path}: every voxel is {low:g}; a scan must show something: {_COPY_AGAIN} or empty the cell")
    return Volume(np.ascontiguousarray(data, dtype=np.float32), affine)


def read_mask(path: Path, allowed: Collection[int]) -> MaskImage:
    """Read a label mask as whole tumour: 1 where the label is in ``allowed``, 0 where it is 0.

    Raises:
        ImageError: As `read_volume` (an empty mask is fine), or a voxel is neither 0 nor in ``allowed``.
    """
    data, affine = _read_checked(path)
    found = np.unique(data)
    unknown = [float(value) for value in found if value != 0 and value not in set(allowed)]
    if unknown:
        values = ", ".join(f"{value:g}" for value in unknown[:5]) + (", …" if len(unknown) > 5 else "")
        raise ImageError(
            f"{path}: mask holds the unknown label{'s' if len(unknown) > 1 else ''} {values}; allowed are 0 and "
            f"{', '.join(str(value) for value in sorted(allowed))}: correct the mask, or extend cohort.mask_labels"
        )
    return MaskImage(np.ascontiguousarray(data != 0, dtype=np.uint8), affine)


def check_same_grid(
    path: Path,
    shape: tuple[int, ...],
    affine: Affine,
    *,
    other: Path,
    other_shape: tuple[int, ...],
    other_affine: Affine,
) -> None:
    """Make sure that two images of a case lie on one grid.

    Corners may differ by a tenth of the smallest voxel side, which headers rounded by other software stay within.

    Raises:
        ImageError: Shapes or positions differ.
    """
    if shape != other_shape:
        raise ImageError(
            f"{path}: shape {_by(shape)} differs from {_by(other_shape)} of {other.name} in the same case; "
            "co-register and resample the case's images to one grid"
        )
    corners = np.array([[x, y, z, 1] for x in (0, shape[0]) for y in (0, shape[1]) for z in (0, shape[2])], dtype=float)
    shift_mm = float(np.abs(corners @ (affine - other_affine).T).max())
    smallest_mm = float(np.linalg.norm(affine[:3, :3], axis=0).min())
    if shift_mm > _MAX_SHIFT_VOXELS * smallest_mm:
        raise ImageError(
            f"{path}: affine differs from that of {other.name} in the same case by up to {shift_mm:.2f} mm; "
            "co-register and resample the case's images to one grid"
        )


def write_mask(path: Path, mask: MaskVolume, *, like: Path) -> None:
    """Write a mask as NIfTI on the grid of another scan: same shape, affine, and qform and sform codes.

    Free text and extensions of the scan's header are left behind, because they may hold names.

    Args:
        path: Ends in .nii or .nii.gz; replaced atomically.
        mask: (X, Y, Z) uint8.
        like: The reference scan.

    Raises:
        ImageError: ``mask`` has another shape than the scan.
    """
    image, _ = open_nifti(like)
    shape = _three_dimensional(like, image.shape)
    if mask.shape != shape:
        raise ImageError(f"{path}: a mask of shape {_by(mask.shape)} does not fit {like.name} of shape {_by(shape)}")
    header = image.header.copy()
    header.extensions.clear()
    for text in HEADER_TEXTS:
        if text in header:
            header[text] = b""
    for number in ("cal_min", "cal_max", "intent_code", "intent_p1", "intent_p2", "intent_p3"):
        header[number] = 0
    header.set_data_shape(shape)
    header.set_data_dtype(np.uint8)
    header.set_slope_inter(1, 0)
    # Without an affine argument the header's own qform, sform and codes are kept to the last bit.
    data = type(image)(np.ascontiguousarray(mask, dtype=np.uint8), None, header).to_bytes()
    write_bytes(path, gzip.compress(data, _GZIP_LEVEL, mtime=0) if path.name.endswith(".gz") else data)


def _read_checked(path: Path) -> tuple[npt.NDArray[Any], Affine]:
    image, n_bytes = open_nifti(path)
    shape = _three_dimensional(path, image.shape)
    dtype = image.get_data_dtype()
    if dtype.kind not in "iuf":
        raise ImageError(f"{path}: voxels are of type {dtype}; expected integers or real numbers: convert the file")
    # Compared before reading, because a damaged header can promise more voxels than memory holds.
    needed = int(image.dataobj.offset) + int(np.prod(image.shape, dtype=object)) * dtype.itemsize
    if n_bytes < needed:
        raise ImageError(f"{path}: truncated, {n_bytes} of {needed} bytes are there; {_COPY_AGAIN}")
    data = np.asarray(image.dataobj).reshape(shape)
    affine = np.asarray(image.affine, dtype=np.float64)
    if not np.isfinite(affine).all() or abs(float(np.linalg.det(affine[:3, :3]))) < 1e-9:
        raise ImageError(
            f"{path}: the affine is singular or not finite, so voxels have no place in space; {_COPY_AGAIN}"
        )
    return data, affine


def open_nifti(path: Path) -> tuple[Any, int]:
    """Read a whole file, which checks gzip's length and checksum too, and parse its header.

    Returns:
        The nibabel image, and the bytes that are there once unpacked.

    Raises:
        ImageError: The file is missing, damaged, not NIfTI, or unpacks to more than any scan holds.
    """
    try:
        raw = path.read_bytes()
    except OSError as err:
        raise ImageError(f"{path}: {err.strerror or err}; mend the path in the sheet or restore the file") from err
    if raw[:2] == _GZIP_MAGIC:
        try:
            # A few kilobytes can unpack to terabytes of zeros, so reading stops where no scan goes.
            with gzip.GzipFile(fileobj=io.BytesIO(raw)) as stream:
                raw = stream.read(_MAX_UNPACKED_BYTES + 1)
        except (EOFError, zlib.error, gzip.BadGzipFile) as err:
            raise ImageError(f"{path}: truncated or damaged ({' '.join(str(err).split())}); {_COPY_AGAIN}") from err
    if len(raw) > _MAX_UNPACKED_BYTES:
        raise ImageError(
            f"{path}: unpacks to over {_MAX_UNPACKED_BYTES / 1e9:.0f} GB, more than one scan; {_COPY_AGAIN}"
        )
    size = {struct.unpack(order, raw[:4])[0] for order in ("<i", ">i")} & set(_HEADER_SIZES) if len(raw) >= 4 else set()
    if not size:
        raise ImageError(f"{path}: not a NIfTI file ({len(raw)} bytes); convert it, for example with dcm2niix")
    try:
        # nibabel writes to the terminal what it mends in a header; what matters of it is checked by whoever reads.
        with LoggingOutputSuppressor():
            return _HEADER_SIZES[size.pop()].from_bytes(raw), len(raw)
    except (ImageFileError, HeaderDataError, ValueError, OSError) as err:
        raise ImageError(f"{path}: not readable as NIfTI ({' '.join(str(err).split())}); {_COPY_AGAIN}") from err


def _three_dimensional(path: Path, shape: tuple[int, ...]) -> tuple[int, int, int]:
    # (X, Y, Z, 1) is how some converters write one volume; anything longer is a series.
    trimmed = shape
    while len(trimmed) > 3 and trimmed[-1] == 1:
        trimmed = trimmed[:-1]
    if len(trimmed) != 3 or min(trimmed) < 1:
        raise ImageError(
            f"{path}: shape {_by(shape)} is {len(shape)}-dimensional; expected one volume (X, Y, Z): split the file"
        )
    return trimmed[0], trimmed[1], trimmed[2]


def _by(shape: tuple[int, ...]) -> str:
    return "×".join(str(side) for side in shape)
