"""Remove what a NIfTI header may tell about a person, and leave every voxel and the grid as they are."""

from __future__ import annotations

import gzip
import math
from pathlib import Path
from typing import Any

from glioma_nas.errors import ImageError
from glioma_nas.files import write_bytes
from glioma_nas.images import HEADER_TEXTS, open_nifti

_GZIP_LEVEL = 6


def scrub_nifti(source: Path, target: Path) -> bool:
    """Copy a NIfTI file without free text, extensions and bytes that belong to no voxel; return whether there were any.

    The voxels' bytes and all other header fields are kept as they are. The gzip wrapper, which can hold the original
    file's name and a time, is made anew without either.

    Raises:
        ImageError: ``source`` is not a readable NIfTI file, or is truncated.
    """
    image, n_bytes = open_nifti(source)
    raw = image.file_map["image"].fileobj.getvalue()
    first, last = voxel_span(image)
    if n_bytes < last:
        raise ImageError(f"{source}: truncated, {n_bytes} of {last} bytes are there; copy or export the file again")
    voxels = raw[first:last]
    had_text = bool(header_texts(image.header) or len(image.header.extensions) or hidden_bytes(image))
    # Parsed again from the bytes: nibabel takes the intensity scaling out of the header of an image it has read.
    header = type(image.header)(raw[: int(image.header["sizeof_hdr"])], check=False)
    for name in HEADER_TEXTS:
        if name in header:
            header[name] = b""
    size = int(header["sizeof_hdr"])
    header["vox_offset"] = size + 4
    content = header.binaryblock + bytes(4) + voxels
    packed = target.name.lower().endswith(".gz")
    write_bytes(target, gzip.compress(content, _GZIP_LEVEL, mtime=0) if packed else content)
    return had_text


def header_texts(header: object) -> dict[str, str]:
    """Return the header's free text by field, only where there is some."""
    found = {}
    for name in HEADER_TEXTS:
        if name in header:  # type: ignore[operator]  # nibabel ships no types
            # A short text written over a longer one leaves the end of that behind its own final zero.
            raw = bytes(header[name].tobytes())  # type: ignore[index]
            text = " ".join(raw.replace(b"\0", b" ").decode("latin-1").split())
            if text:
                found[name] = text
    return found


def voxel_span(image: Any) -> tuple[int, int]:  # nibabel ships no types
    """Return where the voxels of an image from `open_nifti` begin and end in the unpacked file."""
    first = int(image.dataobj.offset)
    return first, first + math.prod(map(int, image.shape)) * int(image.get_data_dtype().itemsize)


def hidden_bytes(image: Any) -> bytes:
    """Return what an image from `open_nifti` holds between header and voxels, extensions aside, and after the voxels.

    No program shows it. Zeros, as padding, do not count.
    """
    raw = image.file_map["image"].fileobj.getvalue()
    first, last = voxel_span(image)
    listed = int(image.header["sizeof_hdr"]) + 4 + sum(part.get_sizeondisk() for part in image.header.extensions)
    return bytes(raw[listed:first] + raw[last:]).strip(b"\0")
