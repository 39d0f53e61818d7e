"""A small table beneath the progress bars of a terminal: one row for each epoch of a search, the latest ones only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.progress import Progress as RichBars
from rich.table import Table
from rich.text import Text

Row = Mapping[str, "float | str"]

SHOWN_ROWS = 8


class BarsWithTable(RichBars):
    """Rich's bars with a table below them.

    Args:
        columns: See `rich.progress.Progress`.
        rows: Returns the rows to show now; none shows no table.
        cell: Renders one value.
        options: See `rich.progress.Progress`.
    """

    def __init__(
        self, *columns: Any, rows: Callable[[], Sequence[Row]], cell: Callable[[object], str], **options: Any
    ) -> None:
        self._rows = rows
        self._cell = cell
        super().__init__(*columns, **options)

    def get_renderables(self) -> Iterable[RenderableType]:
        """Yield the bars, then the table; called by rich for every refresh."""
        yield from super().get_renderables()
        rows = self._rows()
        if rows:
            yield row_table(rows, self._cell)


def row_table(rows: Sequence[Row], cell: Callable[[object], str]) -> Table:
    """Return the last rows as a table, with the columns of the newest one.

    Args:
        rows: Column → value, oldest row first.
        cell: Renders one value.
    """
    table = Table(box=SIMPLE_HEAD, header_style="bold", padding=(0, 1))
    for name in rows[-1]:
        table.add_column(Text(name.replace("_", " ")), justify="right")
    for row in rows[-SHOWN_ROWS:]:
        table.add_row(*(Text(cell(row[name])) if name in row else Text("") for name in rows[-1]))
    return table
