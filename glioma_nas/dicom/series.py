"""Find the DICOM series below a folder and read from their headers what tells them apart.

Only headers are read, never pixels. Links are not followed, so nothing outside the folder is read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from glioma_nas.progress import Progress

_TAGS = (
    "PatientID", "PatientAge", "PatientSex", "PatientBirthDate", "StudyInstanceUID", "StudyDate", "SeriesInstanceUID",
    "SeriesNumber", "SeriesDescription", "ProtocolName", "SequenceName", "Modality", "ImageType", "ScanningSequence",
    "RepetitionTime", "EchoTime", "InversionTime", "FlipAngle", "ContrastBolusAgent", "ContrastBolusVolume", "Rows",
    "Columns", "BitsAllocated", "SamplesPerPixel", "NumberOfFrames", "PixelSpacing", "SliceThickness",
    "ImageOrientationPatient", "ImagePositionPatient", "DiffusionBValue", "BurnedInAnnotation", "SOPClassUID",
    "SharedFunctionalGroupsSequence", "AcquisitionContrast", "InstanceNumber", "ImagesInAcquisition",
)  # fmt: skip
_UNCOMPRESSED = frozenset({"1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"})
_MAX_TEXT = 64
_UNEVEN_SHARE, _UNEVEN_MM = 0.1, 0.05  # positions are rounded to hundredths of a millimetre


@dataclass
class Series:
    """One series, as its headers describe it.

    Attributes:
        uid: SeriesInstanceUID; an identifier, never written out.
        study_uid: StudyInstanceUID; an identifier, never written out.
        patient_id: PatientID; an identifier, never written out.
        files: Its files.
        number: SeriesNumber.
        description: SeriesDescription and ProtocolName, printable characters only.
        modality: MR, CT, SR …
        image_type: Words of ImageType, upper case.
        scanning: Words of ScanningSequence: SE, GR, IR, EP …
        tr_ms: RepetitionTime.
        te_ms: EchoTime.
        ti_ms: InversionTime.
        has_agent: Whether the header names a contrast agent.
        b_values: DiffusionBValue of its images, s/mm².
        rows: Rows of an image.
        columns: Columns of an image.
        thickness_mm: SliceThickness.
        spacing_mm: PixelSpacing, the first of the two.
        orientations: Different ImageOrientationPatient, rounded.
        positions: Different ImagePositionPatient, rounded.
        n_images: Files, or frames of multi-frame files.
        age: PatientAge as written, or derived from dates as years.
        sex: M, F or empty.
        burned_in: Whether the header says that text is burned into the pixels.
        n_truncated: Files shorter than their pixels need.
        numbers: Different InstanceNumber.
        n_stated: Images that the header says the acquisition has, or None.
    """

    uid: str
    study_uid: str
    patient_id: str
    files: list[Path] = field(default_factory=list)
    number: int = 0
    description: str = ""
    modality: str = ""
    image_type: tuple[str, ...] = ()
    scanning: tuple[str, ...] = ()
    tr_ms: float | None = None
    te_ms: float | None = None
    ti_ms: float | None = None
    has_agent: bool = False
    b_values: set[float] = field(default_factory=set)
    rows: int = 0
    columns: int = 0
    thickness_mm: float | None = None
    spacing_mm: float | None = None
    orientations: set[tuple[float, ...]] = field(default_factory=set)
    positions: set[tuple[float, ...]] = field(default_factory=set)
    n_images: int = 0
    age: str = ""
    sex: str = ""
    burned_in: bool = False
    n_truncated: int = 0
    numbers: set[int] = field(default_factory=set)
    n_stated: int | None = None

    @property
    def incomplete(self) -> str:
        """Why the headers make one think that images are missing, as one line; empty where they do not.

        Scanners number images in their own ways, so this is a reason to look, and no proof.
        """
        if self.n_stated is not None and self.n_images < self.n_stated:
            return f"it has {self.n_images} of {self.n_stated} images"
        if len(self.numbers) == len(self.files) > 1:
            first, last = min(self.numbers), max(self.numbers)
            absent = last - first + 1 - len(self.numbers)
            # Numbers with steps, or counted on over a whole examination, say nothing.
            if 0 < absent < len(self.numbers) / 2:
                return f"image numbers from {first} to {last} lack {absent}"
            if 1 < first <= 1 + len(self.numbers) / 2 and not absent:
                return f"image numbers begin with {first}"
        return ""

    @property
    def covered_mm(self) -> float:
        """Distance of the first and the last slice, or 0 where positions are not known."""
        along = self._along()
        return float(along[-1] - along[0]) if len(along) > 1 else 0.0

    def _along(self) -> npt.NDArray[np.float64]:
        """Return the places of the slices along their normal, in order; none where positions are not known."""
        if len(self.orientations) != 1 or any(len(position) != 3 for position in self.positions):
            return np.zeros(0)
        (vectors,) = self.orientations
        if len(vectors) != 6:
            return np.zeros(0)
        normal = np.cross(vectors[:3], vectors[3:])
        return np.sort([float(normal @ np.array(position)) for position in self.positions])

    @property
    def uneven(self) -> str:
        """How the distances between slices differ, as one line; empty where they do not, or positions are not known.

        Converters close a gap: everything beyond a slice that is missing would move towards it.
        """
        steps = np.diff(self._along())
        if len(steps) < 2:
            return ""
        usual = float(np.median(steps))
        odd = steps[np.abs(steps - usual) > max(_UNEVEN_SHARE * usual, _UNEVEN_MM)]
        return f"{len(odd)} of {len(steps)} gaps are not of {usual:.4g} mm, such as {odd[0]:.4g} mm" if len(odd) else ""


@dataclass(frozen=True)
class Listing:
    """What a folder holds: its series, and how many files were not DICOM, empty, links or archives."""

    series: tuple[Series, ...]
    n_files: int
    n_other: int
    n_empty: int
    n_links: int
    n_archives: int


def list_series(folder: Path, progress: Progress) -> Listing:
    """Read the headers of all files below ``folder``, in the order of their names."""
    import pydicom
    from pydicom.errors import InvalidDicomError

    from glioma_nas.archives import is_archive

    paths = list(_files(folder))
    found: dict[tuple[str, str], Series] = {}
    n_other = n_empty = n_links = n_archives = 0
    with progress.task("read DICOM headers", len(paths)) as task:
        for path in paths:
            task.advance()
            if path.is_symlink():
                n_links += 1
            elif path.stat().st_size == 0:
                n_empty += 1
            elif is_archive(path):
                n_archives += 1
            elif path.name.upper() != "DICOMDIR":
                try:
                    header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(_TAGS))
                    _add(found, path, header)
                except (InvalidDicomError, OSError, ValueError, TypeError, AttributeError, KeyError, EOFError):
                    n_other += 1  # not DICOM, or so damaged that pydicom gives up: counted and told
    series = sorted(found.values(), key=lambda item: (item.patient_id, item.study_uid, item.number, item.uid))
    return Listing(tuple(series), len(paths), n_other, n_empty, n_links, n_archives)


def _files(folder: Path) -> Iterator[Path]:
    for root, folders, names in os.walk(folder):
        folders.sort()
        yield from (Path(root) / name for name in sorted(names))
        # Folders behind links are not gone into; the links are told like those of files.
        yield from (path for name in folders if (path := Path(root) / name).is_symlink())


def _add(found: dict[tuple[str, str], Series], path: Path, header: Any) -> None:  # pydicom ships no types we use
    study, uid = str(header.get("StudyInstanceUID", "")), str(header.get("SeriesInstanceUID", ""))
    series = found.get((study, uid))
    if series is None:
        series = _described(uid, study, header)
    # All of the header is read before the file is taken up: one that cannot be read must not be half of a series.
    frames = int(header.get("NumberOfFrames", 1) or 1)
    b_value = header.get("DiffusionBValue")
    b_values = set() if b_value is None else {float(b_value)}
    orientation, position = (
        {tuple(round(float(cell), 2) for cell in vector)}
        if (vector := header.get(name)) is not None and vector
        else set()
        for name in ("ImageOrientationPatient", "ImagePositionPatient")
    )
    bits = int(header.get("BitsAllocated", 0) or 0) * int(header.get("SamplesPerPixel", 1) or 1)
    needed = series.rows * series.columns * frames * bits // 8
    is_truncated = str(header.file_meta.get("TransferSyntaxUID", "")) in _UNCOMPRESSED and path.stat().st_size < needed
    found[study, uid] = series
    series.files.append(path)
    series.n_images += frames if series.rows else 0
    series.n_truncated += is_truncated
    series.b_values |= b_values
    if (number := _whole(header.get("InstanceNumber"))) is not None:
        series.numbers.add(number)
    if stated := _whole(header.get("ImagesInAcquisition")):
        series.n_stated = max(series.n_stated or 0, stated)
    series.orientations |= orientation
    series.positions |= position
    if str(header.get("BurnedInAnnotation", "")).upper() == "YES":
        series.burned_in = True


def _described(uid: str, study: str, header: Any) -> Series:
    words = [str(header.get(name, "") or "") for name in ("SeriesDescription", "ProtocolName", "SequenceName")]
    agent = str(header.get("ContrastBolusAgent", "") or "").strip().lower()
    return Series(
        uid=uid,
        study_uid=study,
        patient_id=str(header.get("PatientID", "") or "").strip(),
        number=int(header.get("SeriesNumber", 0) or 0),
        description=" | ".join(dict.fromkeys(filter(None, map(_printable, words)))),
        modality=str(header.get("Modality", "") or ""),
        image_type=_words(header.get("ImageType")),
        scanning=_words(header.get("ScanningSequence")),
        tr_ms=_time_ms(header, "RepetitionTime"),
        te_ms=_time_ms(header, "EchoTime"),
        ti_ms=_time_ms(header, "InversionTime"),
        has_agent=bool(agent) and agent not in ("no", "none", "n", "0"),
        rows=int(header.get("Rows", 0) or 0),
        columns=int(header.get("Columns", 0) or 0),
        thickness_mm=_number(header.get("SliceThickness")),
        spacing_mm=_number((header.get("PixelSpacing") or [None])[0]),
        age=_age(header),
        sex=sex if (sex := str(header.get("PatientSex", "") or "").upper()) in ("M", "F") else "",
    )


def _time_ms(header: Any, name: str) -> float | None:
    value = _number(header.get(name))
    if value is None:
        # Enhanced MR keeps times in sequences shared by all frames.
        names = {"EchoTime": ("MREchoSequence", "EffectiveEchoTime")}.get(
            name, ("MRTimingAndRelatedParametersSequence", name)
        )
        for group in header.get("SharedFunctionalGroupsSequence", []) or []:
            for item in group.get(names[0], []) or []:
                value = _number(item.get(names[1]))
    return value


def _age(header: Any) -> str:
    if written := str(header.get("PatientAge", "") or "").strip():
        return written
    birth, study = (str(header.get(name, "") or "") for name in ("PatientBirthDate", "StudyDate"))
    if len(birth) != 8 or len(study) != 8 or not (birth + study).isdigit():
        return ""
    years = int(study[:4]) - int(birth[:4]) - (study[4:] < birth[4:])
    return f"{years:03d}Y" if 0 <= years < 130 else ""


def _words(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    items: Sequence[Any] = [value] if isinstance(value, str) else value
    return tuple(str(item).upper() for item in items)


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _whole(value: Any) -> int | None:
    number = _number(value)
    return None if number is None else int(number)


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in text.strip())[:_MAX_TEXT]
