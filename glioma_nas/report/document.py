"""What a report consists of: sections of text, facts, tables and figures, independent of how they are set."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from glioma_nas.report.figures import Figure

Row = Mapping[str, Any]
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Column:
    """One column of a table on the page.

    Attributes:
        heading: What stands above it.
        show: Row → text; none shows as "not measured".
        numeric: Aligned to the right, digits of equal width.
    """

    heading: str
    show: Callable[[Row], str | None]
    numeric: bool = False


@dataclass(frozen=True)
class Table:
    """A table, on the page and as ``tables/<name>.csv``.

    Attributes:
        name: File name without suffix.
        caption: What it shows, with n, split and how intervals were made.
        columns: What the page shows of the rows.
        rows: One mapping for each row; the CSV file holds every key, unrounded.
    """

    kind: ClassVar[str] = "table"
    name: str
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Row]

    def to_csv(self) -> str:
        """Render every key of the rows as CSV; what is not known is an empty cell."""
        keys = list(dict.fromkeys(key for row in self.rows for key in row))
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(keys)
        writer.writerows([_csv_cell(row.get(key)) for key in keys] for row in self.rows)
        return buffer.getvalue()


@dataclass(frozen=True)
class Picture:
    """A figure with the words below it; empty when the common caption says all."""

    figure: Figure
    caption: str = ""


@dataclass(frozen=True)
class Figures:
    """Pictures side by side under one caption and number."""

    kind: ClassVar[str] = "figures"
    caption: str
    pictures: Sequence[Picture]
    legend: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Paragraph:
    """Running text."""

    kind: ClassVar[str] = "paragraph"
    text: str


@dataclass(frozen=True)
class Caution:
    """A sentence the reader must not miss."""

    kind: ClassVar[str] = "caution"
    text: str


@dataclass(frozen=True)
class Facts:
    """Short terms with their values."""

    kind: ClassVar[str] = "facts"
    items: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Bullets:
    """A list of sentences."""

    kind: ClassVar[str] = "bullets"
    items: Sequence[str]


@dataclass(frozen=True)
class Subheading:
    """A heading inside a section."""

    kind: ClassVar[str] = "subheading"
    text: str


Block = Table | Figures | Paragraph | Caution | Facts | Bullets | Subheading


@dataclass
class Section:
    """One chapter of the report.

    Attributes:
        anchor: Name in the page's own links.
        title: Heading.
        blocks: Its content, in order.
        missing: What this chapter would show but nobody measured; repeated among the limits.
    """

    anchor: str
    title: str
    blocks: list[Block] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def add(self, *blocks: Block) -> None:
        """Append blocks."""
        self.blocks.extend(blocks)

    def add_missing(self, what: str) -> None:
        """Say that ``what`` was not measured, here and among the limits."""
        self.blocks.append(Paragraph(f"{what}: {NOT_MEASURED}."))
        self.missing.append(what)


@dataclass(frozen=True)
class Headline:
    """One of the figures at the top of the page."""

    label: str
    value: str
    detail: str


def text(key: str, heading: str) -> Column:
    """Return a column of words."""
    return Column(heading, lambda row: None if row.get(key) is None else str(row[key]))


def number(key: str, heading: str, digits: int = 0) -> Column:
    """Return a column of numbers with a fixed count of decimals."""
    return Column(heading, lambda row: show_number(row.get(key), digits), numeric=True)


def p_value(key: str, heading: str) -> Column:
    """Return a column of p-values, see `show_p`."""
    return Column(heading, lambda row: show_p(row.get(key)), numeric=True)


def interval(low: str, high: str, digits: int, heading: str = "95 % interval") -> Column:
    """Return a column of intervals."""
    return Column(heading, lambda row: show_interval(row.get(low), row.get(high), digits), numeric=True)


def show_number(value: Any, digits: int) -> str | None:
    """Render a number with a typographic minus; none when it is absent or not finite."""
    if value is None or not math.isfinite(float(value)):
        return None
    shown = f"{float(value):.{digits}f}"
    return shown.replace("-", "−") if float(shown) != 0 else shown.removeprefix("-")


def show_p(value: Any, *, equals: str = "") -> str | None:
    """Render a p-value with three decimals, below them as ``< 0.001``; none when it is absent or not finite.

    >>> show_p(0.00004), show_p(0.0314, equals="= ")
    ('< 0.001', '= 0.031')
    """
    shown = show_number(value, 3)
    return "< 0.001" if shown is not None and float(value) < 0.001 else None if shown is None else equals + shown


def show_interval(low: Any, high: Any, digits: int) -> str | None:
    """Render both ends of an interval; none when one is absent."""
    first, second = show_number(low, digits), show_number(high, digits)
    return None if first is None or second is None else f"{first} to {second}"


def plural(count: int, noun: str) -> str:
    """Render a count with its noun.

    >>> plural(1, "patient"), plural(3, "patient")
    ('1 patient', '3 patients')
    """
    return f"{count} {noun}{'' if count == 1 else 's'}"


def sentence(words: str) -> str:
    """Begin with a capital and end with a full stop.

    >>> sentence("the networks are old")
    'The networks are old.'
    """
    return f"{words[:1].upper()}{words[1:]}."


def _csv_cell(value: Any) -> Any:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    return value
