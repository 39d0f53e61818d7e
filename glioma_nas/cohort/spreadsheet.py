"""Read a CSV, TSV or XLSX file into headings and rows of text."""

from __future__ import annotations

import csv
import datetime
import io
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from glioma_nas.errors import CohortError

SHEET_SUFFIXES = (".csv", ".tsv", ".xlsx")

_DELIMITERS = (",", ";", "\t")
_MAX_XLSX_BYTES = 200_000_000

Lines = list[tuple[int, list[str]]]


def read_spreadsheet(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """Return the headings, and for each row that is not blank its line number and heading → cell.

    CSV files are UTF-8, with or without a byte order mark, separated by commas, semicolons or tabs, whichever the first
    line holds most of. Of a workbook the first sheet counts, and numbers are read as Excel shows them: 54, not 54.0.

    Raises:
        CohortError: The file is missing, not of its kind, or its rows do not fit its headings.
    """
    header, lines = _read_workbook(path) if path.suffix.lower() == ".xlsx" else _read_text(path)
    while header and not header[-1] and all(not any(cells[len(header) - 1 :]) for _, cells in lines):
        header.pop()  # spreadsheets like to save columns that nobody filled
        lines = [(line, cells[: len(header)]) for line, cells in lines]
    named = [name for name in header if name]
    repeated = sorted({name for name in named if header.count(name) > 1})
    if repeated:
        raise CohortError(f"{path}: column '{repeated[0]}' stands {header.count(repeated[0])} times; keep one")
    if len(named) < len(header):
        raise CohortError(f"{path}: column {header.index('') + 1} has no heading; name it or delete it")
    for line, cells in lines:
        if len(cells) != len(header):
            raise CohortError(
                f"{path}: line {line}: {len(cells)} cells, but the header has {len(header)} columns; "
                "quote cells that hold commas"
            )
    return header, [(line, dict(zip(header, cells, strict=True))) for line, cells in lines]


def _read_text(path: Path) -> tuple[list[str], Lines]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(text), strict=True)
        header = [name.strip() for name in next(reader, [])]
        lines = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader if any(map(str.strip, cells))]
    except OSError as err:
        raise CohortError(f"{path}: {err.strerror or err}; give the path of a sheet in cohort.sheet") from err
    except (UnicodeDecodeError, csv.Error) as err:
        raise CohortError(f"{path}: not a comma-separated text file in UTF-8 ({err}); save it as CSV UTF-8") from err
    return header, lines


def _delimiter(text: str) -> str:
    first = text.split("\n", 1)[0]
    return max(_DELIMITERS, key=first.count)


def _read_workbook(path: Path) -> tuple[list[str], Lines]:
    import openpyxl
    from openpyxl.utils.exceptions import InvalidFileException

    remedy = "save it again as .xlsx, or as CSV UTF-8"
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > _MAX_XLSX_BYTES:
            raise CohortError(f"{path}: unpacks to {size / 1e6:.0f} MB, too much for a cohort sheet; {remedy}")
        values = _cells(openpyxl.load_workbook(path, read_only=True, data_only=True))
        formulas = _cells(openpyxl.load_workbook(path, read_only=True))
    except OSError as err:
        raise CohortError(f"{path}: {err.strerror or err}; give the path of a sheet in cohort.sheet") from err
    except (zipfile.BadZipFile, InvalidFileException, KeyError, ValueError) as err:
        raise CohortError(f"{path}: not an Excel workbook ({' '.join(str(err).split())}); {remedy}") from err
    for line, (row, sources) in enumerate(zip(values, formulas, strict=True), start=1):
        for value, source in zip(row, sources, strict=True):
            if value is None and isinstance(source, str) and source.startswith("="):
                # Excel stores results beside formulas, other programs may not: an empty cell would be a wrong value.
                raise CohortError(
                    f"{path}: line {line}: the formula {source} has no stored result; replace formulas by values"
                )
    filled = [(line, [_text(path, line, value) for value in row]) for line, row in enumerate(values, start=1)]
    filled = [(line, cells) for line, cells in filled if any(cells)]
    if not filled:
        return [], []
    return filled[0][1], filled[1:]


def _cells(book: Any) -> list[Sequence[Any]]:  # openpyxl ships no types
    sheet = book.worksheets[0]
    rows = [list(row) for row in sheet.iter_rows(values_only=True)]
    book.close()
    width = max((_filled_width(row) for row in rows), default=0)
    return [(row + [None] * width)[:width] for row in rows]


def _filled_width(row: Iterable[Any]) -> int:
    return max((index for index, value in enumerate(row, start=1) if value is not None), default=0)


def _text(path: Path, line: int, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, datetime.date | datetime.time):
        raise CohortError(
            f"{path}: line {line}: a cell holds a date or time; dates of patients do not belong in a cohort sheet, and "
            "Excel turns text such as 3-4 into dates: format the column as text, or delete it"
        )
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()
