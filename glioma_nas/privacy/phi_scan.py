"""Look through an output folder for what may identify a patient, before it is shared.

Every file is opened: text as text, NIfTI and DICOM by header, pictures by their text chunks, workbooks and other files
that are ZIP archives inside by what they hold, everything else by the readable strings in it. What is found is told by
place and kind, never repeated.
"""

from __future__ import annotations

import datetime
import gzip
import os
import re
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from glioma_nas.archives import is_archive
from glioma_nas.errors import ImageError
from glioma_nas.images import open_nifti
from glioma_nas.privacy.nifti_header import header_texts, hidden_bytes
from glioma_nas.privacy.pseudonyms import is_pseudonym
from glioma_nas.privacy.text_patterns import (
    DATE_KEYWORDS,
    PERSON_KEYWORDS,
    Hit,
    KnownIdentifiers,
    Severity,
    Span,
    distinct,
    find_identifiers,
    masked,
)
from glioma_nas.progress import Progress, Silent

_TEXT_SUFFIXES = frozenset(
    [
        ".json",
        ".jsonl",
        ".csv",
        ".tsv",
        ".txt",
        ".log",
        ".html",
        ".htm",
        ".yaml",
        ".yml",
        ".md",
        ".xml",
        ".svg",
        ".sh",
        ".py",
        ".js",
        ".css",
        ".toml",
        ".ini",
        ".cfg",
    ]
) | {".stderr", ".stdout", ".err", ".out", ""}
_PICTURES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp"})
_MAX_TEXT_BYTES = 64_000_000
# As long as the shortest identifier that is looked for.
_STRINGS = re.compile(rb"[\x20-\x7e]{4,}")
# A file of nothing but the hexadecimal digits that `pseudonyms.load_salt` writes.
_SALT = re.compile(rb"[0-9a-f]{64}\s*")
_ZIP_MAGIC = b"PK\x03\x04"
_WIDE_MARKS = (b"\xff\xfe", b"\xfe\xff")
_HIT_CAP = 50
# DICOM's kinds of text that people type: comments, descriptions, histories.
_FREE_TEXT = frozenset({"LO", "LT", "SH", "ST", "UC", "UT"})
# A date in a scan's header is never the software's own.
_NEVER = Span(datetime.date.max, datetime.date.min)


@dataclass(frozen=True)
class Leak:
    """One finding.

    Attributes:
        severity: ``error`` for an identifier, ``warning`` for what may be one, ``note`` for what could not be
            looked at.
        kind: What it looks like.
        file: Path below the folder.
        where: In which part of the file.
        shown: Masked text.
        times: How often.
    """

    severity: Severity
    kind: str
    file: str
    where: str
    shown: str
    times: int = 1

    def as_row(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


@dataclass(frozen=True)
class PhiScan:
    """The outcome: how many files were looked at, and the findings, the worst first."""

    n_files: int
    leaks: tuple[Leak, ...]

    @property
    def n_errors(self) -> int:
        """Number of identifiers found."""
        return sum(leak.severity == "error" for leak in self.leaks)


def scan_folder(folder: Path, known: KnownIdentifiers | None = None, *, progress: Progress | None = None) -> PhiScan:
    """Look through all files below ``folder``; links are told and not followed.

    Args:
        folder: Output of a run, an experiment, an import.
        known: Identifiers that must not appear.
        progress: Where to report.
    """
    known = known or KnownIdentifiers({})
    paths = sorted(_files_and_links(folder))
    leaks: list[Leak] = []
    folders: set[Path] = set()
    with (progress or Silent()).task("look for identifiers", len(paths)) as task:
        for path in paths:
            relative, own_days = path.relative_to(folder), _own_days(path)
            names = [relative, *(parent for parent in relative.parents if parent.name and parent not in folders)]
            folders.update(names[1:])
            for name in names:
                shown = _safe(name, known)
                leaks += _leaks("name", shown, find_identifiers(name.name, known, own_days))
            leaks += _scan_file(path, _safe(relative, known), known, own_days)
            task.advance()
    order = ("error", "warning", "note")
    leaks.sort(key=lambda leak: (order.index(leak.severity), leak.file))
    return PhiScan(len(paths), tuple(leaks))


def _files_and_links(folder: Path) -> Iterator[Path]:
    for root, folders, names in os.walk(folder):
        yield from (Path(root) / name for name in names)
        yield from (path for name in folders if (path := Path(root) / name).is_symlink())


def _scan_file(path: Path, shown: str, known: KnownIdentifiers, own_days: Span) -> list[Leak]:
    if path.is_symlink():
        return [Leak("note", "link, not followed", shown, "file", "")]
    if is_archive(path):
        return [Leak("note", "archive, not opened", shown, "file", "")]
    try:
        if path.name.lower().endswith((".nii", ".nii.gz")):
            return _leaks("NIfTI header", shown, _nifti_hits(path, known))
        if _is_dicom(path):
            return _leaks("DICOM header", shown, _dicom_hits(path, known))
        if path.suffix.lower() in _PICTURES:
            return _leaks("picture's text", shown, find_identifiers(_picture_text(path), known, own_days))
        data, cut = _content(path)
        if _SALT.fullmatch(data):
            return [Leak("error", "secret that makes the pseudonyms", shown, "file", "")]
        if data.startswith(_ZIP_MAGIC):
            return _packed_leaks(path, shown, known, own_days)
        leaks = _content_leaks(path.suffix.lower(), data, shown, known, own_days)
        return [*leaks, _cut(shown)] if cut else leaks
    except (OSError, ImageError, EOFError, zlib.error, ValueError, zipfile.BadZipFile, RuntimeError) as err:
        # zipfile raises RuntimeError for a password, and a child of it for a compression it does not know.
        return [Leak("note", f"cannot be looked into ({type(err).__name__})", shown, "file", "")]


def _content_leaks(suffix: str, data: bytes, shown: str, known: KnownIdentifiers, own_days: Span) -> list[Leak]:
    wide = data.startswith(_WIDE_MARKS)
    if suffix in _TEXT_SUFFIXES and (wide or b"\0" not in data[:4096]):
        text = data.decode("utf-16" if wide else "utf-8", "replace")
        return _leaks("text", shown, find_identifiers(text, known, own_days))
    strings = "\n".join(match.decode("ascii") for match in _STRINGS.findall(data))
    # Patterns would find dates and numbers everywhere in binary data; known identifiers are worth looking for.
    return _leaks("strings", shown, known.find(strings))


def _packed_leaks(path: Path, shown: str, known: KnownIdentifiers, own_days: Span) -> list[Leak]:
    # Workbooks, documents, .npz and PyTorch's files are ZIP archives, whose text shows only when unpacked.
    leaks: list[Leak] = []
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            leaks += _leaks("name inside", shown, find_identifiers(info.filename, known, own_days))
            with archive.open(info) as stream:
                data = stream.read(_MAX_TEXT_BYTES)
            leaks += _content_leaks(PurePosixPath(info.filename).suffix.lower(), data, shown, known, own_days)
            if info.file_size > len(data):
                leaks.append(_cut(shown))
    return leaks


def _cut(shown: str) -> Leak:
    return Leak("note", f"only the first {_MAX_TEXT_BYTES // 1_000_000} MB were looked through", shown, "file", "")


def _leaks(where: str, shown: str, hits: Iterator[Hit]) -> list[Leak]:
    counted = distinct(hits)
    leaks = [Leak(hit.severity, hit.kind, shown, where, hit.shown, times) for hit, times in counted[:_HIT_CAP]]
    if len(counted) > _HIT_CAP:
        leaks.append(Leak("note", f"{len(counted) - _HIT_CAP} more kinds of findings", shown, where, ""))
    return leaks


def _nifti_hits(path: Path, known: KnownIdentifiers) -> Iterator[Hit]:
    image, _ = open_nifti(path)
    for name, text in header_texts(image.header).items():
        found = list(find_identifiers(text, known, _NEVER))
        yield from found
        if not found:
            yield Hit("warning", f"free text in {name}", masked(text))
    for extension in image.header.extensions:
        yield Hit("error", f"header extension of code {extension.get_code()}", f"{extension.get_sizeondisk()} bytes")
    if rest := hidden_bytes(image):
        text = "\n".join(match.decode("ascii") for match in _STRINGS.findall(rest))
        yield from find_identifiers(text, known, _NEVER)
        yield Hit("warning", "bytes that belong to no voxel", f"{len(rest)} bytes")


def _is_dicom(path: Path) -> bool:
    with path.open("rb") as handle:
        handle.seek(128)
        return handle.read(4) == b"DICM"


def _dicom_hits(path: Path, known: KnownIdentifiers) -> Iterator[Hit]:
    import pydicom
    from pydicom.errors import InvalidDicomError

    try:
        header = pydicom.dcmread(path, stop_before_pixels=True)
    except InvalidDicomError as err:
        raise ValueError(str(err)) from err
    for element in header.iterall():
        text = str(element.value) if element.value is not None else ""
        if not text:
            continue
        if element.tag.is_private:
            yield Hit("error", "private DICOM element", masked(text))
        elif element.keyword in PERSON_KEYWORDS and not is_pseudonym(text):
            yield Hit("error", f"DICOM field {element.keyword}", masked(text))
        elif element.VR in ("DA", "DT", "TM") or element.keyword in DATE_KEYWORDS:
            yield Hit("error", f"DICOM date or time {element.keyword}", masked(text))
        elif element.VR == "PN" and not is_pseudonym(text):
            yield Hit("error", f"name in {element.keyword}", masked(text))
        elif element.VR in _FREE_TEXT:
            yield from find_identifiers(text, known, _NEVER)
        else:
            yield from known.find(text)
    if str(header.get("BurnedInAnnotation", "")).upper() == "YES":
        yield Hit("error", "text burned into the pixels", "")


def _picture_text(path: Path) -> str:
    from PIL import Image

    with Image.open(path) as picture:
        texts = [f"{name}: {value}" for name, value in picture.info.items() if isinstance(value, str)]
        texts += [f"{tag}: {value}" for tag, value in picture.getexif().items() if isinstance(value, str)]
    return "\n".join(texts)


def _content(path: Path) -> tuple[bytes, bool]:
    """Return the beginning of a file, unpacked, and whether there is more."""
    with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as stream:
        data = stream.read(_MAX_TEXT_BYTES)
        return data, bool(stream.read(1))


def _own_days(path: Path) -> Span:
    written = datetime.datetime.fromtimestamp(path.lstat().st_mtime, datetime.UTC).date()
    day = datetime.timedelta(days=1)  # clocks and time zones differ
    return Span(written - day, written + day, started=written - 7 * day)


def _safe(path: Path, known: KnownIdentifiers) -> str:
    # A path that holds an identifier must not repeat it in the report.
    return "/".join(masked(part) if any(known.find(part)) else part for part in path.parts)
