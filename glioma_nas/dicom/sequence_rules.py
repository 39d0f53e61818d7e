"""Recognise which sequence a series is, from its words and its physics.

Words (SeriesDescription, ProtocolName, SequenceName) and times (TR, TE, TI) are judged apart. Both agreeing gives
high confidence, one of them alone medium, and a contradiction low: a person should look at those.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from glioma_nas.cohort.column_names import CANONICAL_SEQUENCES
from glioma_nas.dicom.series import Series

Confidence = Literal["high", "medium", "low"]
_MIN_POSITIONS = 5


@dataclass(frozen=True)
class Guess:
    """What a series seems to be.

    Attributes:
        kind: ``t1``, ``t1ce``, ``t2``, ``flair``, or what else it is: ``localizer``, ``dwi``, ``unknown`` …
        confidence: How sure.
        reason: From what, as one line.
    """

    kind: str
    confidence: Confidence
    reason: str

    @property
    def is_wanted(self) -> bool:
        """Whether it is one of the four sequences."""
        return self.kind in CANONICAL_SEQUENCES


# In this order: a "t2 flair" is FLAIR, a "t2*" is no T2, an "ep2d diff" is diffusion although it is T2-weighted too.
_OTHER_WORDS = (
    ("localizer", r"\bloc(ali[sz]er)?\b|scout|survey|topogram|3.?plane|three.?plane|plan_?loc|smartbrain"),
    ("adc", r"\badc\b|apparent"),
    ("dwi", r"\bdwi\b|diff|trace|\bdti\b|\bdki\b|hardi|\bb ?1000\b"),
    ("perfusion", r"perf|\bdsc\b|\bdce\b|\basl\b|\bpcasl\b|\br?cb[vf]\b|\bmtt\b|\bttp\b|ktrans|dynamic"),
    ("swi", r"\bswi\b|\bswan\b|suscept|t2 ?\*|t2star|\bhemo|\bhaemo|\bmip\b|venobold|\bqsm\b"),
    ("angiography", r"\btof\b|\bmra\b|\bmrv\b|angio"),
    ("spectroscopy", r"spectro|\bmrs\b|\bcsi\b|\bsvs\b"),
    ("functional", r"\bbold\b|f-?mri|rest(ing)?.?state"),
    ("derived", r"\bsub(traction)?\b|screen ?save|report|fusion|\bfused\b|projection"),
)
_FLAIR = re.compile(r"flair|dark.?fluid|\btirm\b", re.IGNORECASE)
_T1 = re.compile(r"(?<![a-z0-9])t1(?!\d)|mp-?rage|mp2rage|spgr|bravo|\bvibe\b|\btfl\b|\bthrive\b|\bt1w", re.IGNORECASE)
_T2 = re.compile(r"(?<![a-z0-9])t2(?! ?\*|star|\d)", re.IGNORECASE)
_WITH = re.compile(
    r"\+ ?c\b|\bc\+|post|\bgd\b|gad|contrast|\bce\b|\bt1ce|\bt1c\b|\bkm\b|\+ ?gd|\+ ?km|magnevist|dotarem",
    re.IGNORECASE,
)
_WITHOUT = re.compile(r"\bpre\b|without|nativ|\bw/?o\b|non.?contrast|\bohne\b|precontrast|\bpre-", re.IGNORECASE)


def recognise(series: Series) -> Guess:
    """Guess what a series is; what cannot be used is told as such, with the reason."""
    if unusable := _unusable(series):
        return unusable
    # Underscores count as letters in regular expressions, and scanners use them as blanks.
    words = re.sub(r"[_\-]+", " ", series.description.lower())
    by_words = _by_words(series, words)
    by_times = _by_times(series)
    if by_words is not None and by_words[0] not in ("t1", "t2", "flair"):
        return Guess(by_words[0], "high", by_words[1])
    if by_words is None and by_times is None:
        return Guess("unknown", "low", "neither words nor times say what it is")
    kind, reason = by_words or by_times or ("unknown", "")
    confidence: Confidence = "medium"
    if by_words and by_times:
        agrees = by_words[0] == by_times[0]
        confidence = "high" if agrees else "low"
        reason = f"{by_words[1]}; {by_times[1]}" + ("" if agrees else f", which speaks for {by_times[0]}")
    if kind == "t1":
        return _with_contrast(series, words, confidence, reason)
    return Guess(kind, confidence, reason)


def _unusable(series: Series) -> Guess | None:
    if series.modality != "MR":
        return Guess("not-mr", "high", f"modality {series.modality or 'unknown'}")
    if series.rows == 0 or series.n_images == 0:
        return Guess("empty", "high", "holds no images")
    if "LOCALIZER" in series.image_type:
        return Guess("localizer", "high", "image type LOCALIZER")
    if len(series.orientations) > 1:
        return Guess("localizer", "medium", f"{len(series.orientations)} orientations in one series")
    if series.n_images < _MIN_POSITIONS or 0 < len(series.positions) < min(_MIN_POSITIONS, series.n_images):
        return Guess("localizer", "medium", f"only {max(len(series.positions), 1)} slice positions")
    if "DERIVED" in series.image_type and {"PROJECTION IMAGE", "MIP", "SUBTRACTION"} & set(series.image_type):
        return Guess("derived", "high", "a projection or subtraction")
    return None


def _by_words(series: Series, words: str) -> tuple[str, str] | None:
    types = set(series.image_type)
    if "ADC" in types:
        return "adc", "image type ADC"
    if types & {"DIFFUSION", "TRACEW", "FA"} or any(value > 0 for value in series.b_values):
        return "dwi", "diffusion in the header"
    for kind, pattern in _OTHER_WORDS:
        if match := re.search(pattern, words):
            return kind, f"'{match.group().strip()}' in the description"
    flair, t1, t2 = _FLAIR.search(words), _T1.search(words), _T2.search(words)
    if flair and not t1:
        return "flair", f"'{flair.group()}' in the description"
    if t1:
        return "t1", f"'{t1.group()}' in the description"
    if t2:
        return "t2", f"'{t2.group()}' in the description"
    return None


def _by_times(series: Series) -> tuple[str, str] | None:
    tr, te, ti = series.tr_ms, series.te_ms, series.ti_ms
    if te is None or tr is None:
        return None
    shown = f"TR {tr:.0f}, TE {te:.0f}" + ("" if not ti else f", TI {ti:.0f}") + " ms"
    if ti is not None and ti > 1500 and te > 60:
        return "flair", shown
    if te < 35 and (tr < 1200 or "GR" in series.scanning or (ti is not None and 300 < ti < 1300)):
        return "t1", shown
    if te > 60 and tr > 2000 and not ti:
        return "t2", shown
    return None


def _with_contrast(series: Series, words: str, confidence: Confidence, reason: str) -> Guess:
    after, before = _WITH.search(words), _WITHOUT.search(words)
    if before:
        return Guess("t1", confidence, f"{reason}; '{before.group()}' in the description")
    if after:
        return Guess("t1ce", confidence, f"{reason}; '{after.group()}' in the description")
    if series.has_agent:
        # Some scanners name the agent in every series of an examination that uses one, also in those before it.
        sure: Confidence = "medium" if confidence == "high" else "low"
        return Guess("t1ce", sure, f"{reason}; the header names a contrast agent")
    return Guess("t1", confidence, f"{reason}; no sign of contrast agent")
