"""Remove what a NIfTI header may tell about a person, and leave every voxel and the grid as they are."""

from __future__ import annotations

import gzip
from pathlib import Path

from glioma_nas.files import write_bytes
from glioma_nas.images import open_nifti

# Free text, and the fields of ANALYZE 7.5 that old converters filled with names.
TEXT_FIELDS = ("descrip", "aux_file", "intent_name", "db_name", "data_type")

_GZIP_LEVEL = 6


def scrub_nifti(source: Path, target: Path) -> bool:
    """Copy a NIfTI file without free text and extensions; return whether there was any.

    The voxels' bytes and all other header fields are kept as they are. The gzip wrapper, which can hold the original
    file's name and a time, is made anew without either.

    Raises:
        ImageError: ``source`` is not a readable NIfTI file.
    """
    image, _ = open_nifti(source)
    raw = image.file_map["image"].fileobj.getvalue()
    voxels = raw[int(image.dataobj.offset) :]
    had_text = bool(header_texts(image.header)) or bool(len(image.header.extensions))
    # Parsed again from the bytes: nibabel takes the intensity scaling out of the header of an image it has read.
    header = type(image.header)(raw[: int(image.header["sizeof_hdr"])], check=False)
    for name in TEXT_FIELDS:
        if name in header:
            header[name] = b""
    size = int(header["sizeof_hdr"])
    header["vox_offset"] = size + 4
    content = header.binaryblock + bytes(4) + voxels
    write_bytes(target, gzip.compress(content, _GZIP_LEVEL, mtime=0) if target.name.endswith(".gz") else content)
    return had_text


def header_texts(header: object) -> dict[str, str]:
    """Return the header's free text by field, only where there is some."""
    found = {}
    for name in TEXT_FIELDS:
        if name in header:  # type: ignore[operator]  # nibabel ships no types
            text = bytes(header[name].tobytes()).split(b"\0")[0].decode("latin-1").strip()  # type: ignore[index]
            if text:
                found[name] = text
    return found
