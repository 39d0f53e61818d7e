"""Recognise what may identify a person in text: dates, DICOM identifiers, names as DICOM writes them, known ids."""

from __future__ import annotations

import calendar
import datetime
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from glioma_nas.privacy.pseudonyms import is_pseudonym

Severity = Literal["error", "warning", "note"]

PERSON_KEYWORDS = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientAddress", "PatientTelephoneNumbers", "OtherPatientIDs",
    "InstitutionName", "InstitutionAddress", "InstitutionalDepartmentName", "ReferringPhysicianName",
    "PerformingPhysicianName", "OperatorsName", "PhysiciansOfRecord", "AccessionNumber", "StudyID", "StationName",
    "DeviceSerialNumber",
)  # fmt: skip
DATE_KEYWORDS = (
    "StudyDate", "SeriesDate", "AcquisitionDate", "ContentDate", "AcquisitionDateTime", "StudyTime", "SeriesTime",
    "AcquisitionTime", "ContentTime", "InstanceCreationDate", "PerformedProcedureStepStartDate",
)  # fmt: skip

_MONTHS = list(calendar.month_name)[1:]
_ALONE = r"(?<![0-9A-Za-z.])", r"(?![0-9A-Za-z])(?!\.\d)"
_DATES = (
    (re.compile(rf"{_ALONE[0]}((?:19|20)\d\d)-(\d\d)-(\d\d)(?!\d)(?!\.\d)"), "ymd"),
    (re.compile(rf"{_ALONE[0]}((?:19|20)\d\d)([01]\d)([0-3]\d){_ALONE[1]}"), "ymd"),
    (re.compile(rf"{_ALONE[0]}(\d\d?)\.(\d\d?)\.((?:19|20)\d\d){_ALONE[1]}"), "dmy"),
    (re.compile(rf"{_ALONE[0]}(\d\d?)/(\d\d?)/((?:19|20)\d\d){_ALONE[1]}"), "mdy"),
    (re.compile(rf"{_ALONE[0]}(\d\d?) ({'|'.join(_MONTHS)}) ((?:19|20)\d\d){_ALONE[1]}"), "dMy"),
)
_KEYED = re.compile(rf"\b({'|'.join((*PERSON_KEYWORDS, *DATE_KEYWORDS))})\b[\"']?\s*[:=]\s*[\"']?([^\s\"',}}\]]+)")
_UID = re.compile(r"(?<![\d.])(?:1\.2\.(?!840\.10008\.)\d+|1\.3\.\d+|2\.16\.\d+)(?:\.\d+){5,}")
# Bounded, because a long run of letters without the sign looked for would be gone through once for each of its letters.
_PERSON = re.compile(r"\b[A-Z][A-Za-z'\-]{1,64}\^[A-Z][A-Za-z'\-]*")
_NUMBERED = re.compile(r"\b(?:MRN|Pat(?:ient)?[ _-]?(?:ID|No|Nr))\b[\s.:#=\"'_-]*\d{5,}", re.IGNORECASE)
_EMAIL = re.compile(r"\b[\w.+-]{1,64}@[\w-]+(?:\.[\w-]+)+\b")
_DATA_URI = re.compile(r"data:[\w/+.-]+;base64,[A-Za-z0-9+/=\s]+")
# The one that every exported bundle names, with the day of a file format in it. `monai_bundle` imports torch.
_PUBLIC_ADDRESS = (
    "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20220324.json"
)
_TIME = re.compile(r"[T ]\d\d:\d\d")
_MIN_KNOWN = 4


@dataclass(frozen=True)
class Hit:
    """Something in a text that may identify a person; the text itself is not kept.

    Attributes:
        severity: ``error`` for an identifier, ``warning`` for what may be one.
        kind: What it looks like.
        shown: The finding, masked: its first character and its length.
    """

    severity: Severity
    kind: str
    shown: str


class KnownIdentifiers:
    """Identifiers that must not appear anywhere, such as the patient ids of a sheet.

    Args:
        identifiers: What they are (``patient id``) by identifier. Those of fewer than four characters are left out,
            since they would be found everywhere.
    """

    def __init__(self, identifiers: Mapping[str, str]) -> None:
        self.kinds = {name.lower(): kind for name, kind in identifiers.items() if len(name.strip()) >= _MIN_KNOWN}
        self.n_too_short = len(identifiers) - len(self.kinds)

    def find(self, text: str) -> Iterator[Hit]:
        """Yield the identifiers that stand in a text as whole words."""
        low = text.lower()
        for name, kind in self.kinds.items():
            # Looking for each of them plainly is far quicker than one pattern of hundreds of alternatives.
            if name in low:
                for _ in re.finditer(rf"(?<![0-9a-z]){re.escape(name)}(?![0-9a-z])", low):
                    yield Hit("error", kind, masked(name))


@dataclass(frozen=True)
class Span:
    """Days on which a file itself was written, whose dates tell nothing about a patient.

    Attributes:
        first: The first of these days.
        last: The last of them.
        started: The first day that counts where a time stands behind the date, as software writes it: a run may have
            begun days before it wrote the file. An examination of the same week has no such time.
    """

    first: datetime.date
    last: datetime.date
    started: datetime.date | None = None

    def holds(self, day: datetime.date, *, stamped: bool) -> bool:
        """Tell whether a date is the software's own."""
        return (self.started or self.first if stamped else self.first) <= day <= self.last


def find_identifiers(text: str, known: KnownIdentifiers, own_days: Span) -> Iterator[Hit]:
    """Yield everything in a text that may identify a person.

    Args:
        text: Any text; pictures inside HTML are left out, and the address of MONAI's schema but for known identifiers.
        known: Identifiers that must not appear.
        own_days: Dates in it are the software's own.
    """
    text = _DATA_URI.sub("", text)
    yield from known.find(text)
    text = text.replace(_PUBLIC_ADDRESS, "")
    for match in _KEYED.finditer(text):
        if match.group(2).lower() in ("null", "none") or is_pseudonym(match.group(2)):
            continue
        yield Hit("error", f"DICOM field {match.group(1)}", masked(match.group(2)))
    for pattern, severity, kind in _PATTERNS:
        for match in pattern.finditer(text):
            yield Hit(severity, kind, masked(match.group()))
    for day, shown, stamped in find_dates(text):
        if not own_days.holds(day, stamped=stamped):
            yield Hit("warning", "date", shown)


def find_dates(text: str) -> Iterator[tuple[datetime.date, str, bool]]:
    """Yield the dates in a text, as (date, masked text, whether a time of day stands behind it)."""
    for pattern, order in _DATES:
        for match in pattern.finditer(text):
            if (day := _date(match.groups(), order)) is not None:
                yield day, masked(match.group()), bool(_TIME.match(text, match.end()))


def masked(text: str) -> str:
    """Return the first character and the length, which is enough to find the place and too little to leak it.

    >>> masked("Smith^John")
    'S… (10 characters)'
    """
    return f"{text[:1]}… ({len(text)} characters)"


def distinct(hits: Iterable[Hit]) -> list[tuple[Hit, int]]:
    """Count equal hits, in the order of their first appearance."""
    counts: dict[Hit, int] = {}
    for hit in hits:
        counts[hit] = counts.get(hit, 0) + 1
    return list(counts.items())


_PATTERNS: tuple[tuple[re.Pattern[str], Severity, str], ...] = (
    (_UID, "error", "DICOM UID"),
    (_PERSON, "error", "name in DICOM's form"),
    (_NUMBERED, "error", "hospital number"),
    (_EMAIL, "warning", "e-mail address"),
)


def _date(parts: tuple[str, ...], order: str) -> datetime.date | None:
    fields = dict(zip(order.lower(), parts, strict=True))
    month = _MONTHS.index(fields["m"]) + 1 if fields["m"] in _MONTHS else int(fields["m"])
    try:
        return datetime.date(int(fields["y"]), month, int(fields["d"]))
    except ValueError:
        return None
