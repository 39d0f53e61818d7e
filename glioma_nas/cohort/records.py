"""What a cohort consists of, however it was written down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from glioma_nas.files import canonical_json, sha256_text
from glioma_nas.privacy.pseudonyms import Pseudonyms

Sex = Literal["M", "F"]

UNKNOWN_VALUES = frozenset({"", "unknown", "na", "n/a", "nan", "none", "not tested", "not available", "indeterminate"})
"""Contents of a label cell, in lower case, that mean that the value is not known."""

NIFTI_SUFFIXES = (".nii", ".nii.gz")


@dataclass(frozen=True)
class Case:
    """One examination of one patient.

    Attributes:
        case_id: Unique in the cohort; becomes a folder name.
        patient_id: Cases with one patient id never stand on both sides of a split.
        images: Sequence name → scan, only for the sequences the case has.
        mask: Expert tumour mask, or None.
        age: Years, or None when unknown.
        sex: ``M``, ``F`` or None when unknown.
        labels: Every other column whose value is known, as text.
        pseudonyms: What made its ids where they are hidden, else None.
    """

    case_id: str
    patient_id: str
    images: Mapping[str, Path]
    mask: Path | None = None
    age: float | None = None
    sex: Sex | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    pseudonyms: Pseudonyms | None = field(default=None, repr=False, compare=False)

    def digest(self, content: Any) -> str:
        """Hash plain data about the case, such as paths of its files; 64 hexadecimal digits.

        Where ids are hidden the hash is keyed with the project's secret, because names can be guessed and tried out.
        """
        text = canonical_json(content)
        return sha256_text(text) if self.pseudonyms is None else self.pseudonyms.digest("content", text, digits=64)


@dataclass(frozen=True)
class Exclusion:
    """A case that takes no part in the run, and why."""

    case_id: str
    reason: str


@dataclass(frozen=True)
class Cohort:
    """The cases of a sheet or data set, in its order.

    Attributes:
        sheet: Absolute path of the sheet or data set folder.
        cases: One for each row.
        sequences: Names of the image columns.
        label_columns: Names of the other columns, known or not for any one case.
    """

    sheet: Path
    cases: tuple[Case, ...]
    sequences: tuple[str, ...] = ()
    label_columns: tuple[str, ...] = ()


class Labelled(Protocol):
    """What a case with labels has; `Case` and a prepared case both do."""

    @property
    def case_id(self) -> str: ...  # noqa: D102 - see Case

    @property
    def labels(self) -> Mapping[str, str]: ...  # noqa: D102 - see Case


@dataclass(frozen=True)
class Problem:
    """Something in a sheet or data set that stops a case, or all of them.

    Attributes:
        place: File, and line where there is one.
        message: What is wrong and what to do, as one line.
        case_id: The case concerned, or None.
    """

    place: str
    message: str
    case_id: str | None = None

    def __str__(self) -> str:
        return f"{self.place}: {self.message}"


@dataclass(frozen=True)
class Row:
    """One case as text, before any check.

    Attributes:
        place: Where it stands, for messages.
        cells: Column → content without surrounding blanks; an empty text is unknown or missing.
    """

    place: str
    cells: Mapping[str, str]


@dataclass(frozen=True)
class CohortTable:
    """What every reader returns: a table of text in our column names.

    Attributes:
        source: The sheet or the data set folder.
        folder: Relative paths in the cells start here.
        columns: Our names: ``case_id``, ``patient_id``, sequences, ``mask``, ``age``, ``sex``, labels.
        rows: The cases.
        problems: What could not be read.
        notes: What a reader had to decide, as one line each.
    """

    source: Path
    folder: Path
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()
