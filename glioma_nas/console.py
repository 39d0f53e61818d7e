"""Show progress and tables to a person: bars and ruled tables on a terminal, plain lines everywhere else.

Progress goes to standard error and tables to standard output, so that ``glioma-nas list --json | jq`` sees only the
table. Everything shown is stripped of control characters first: a description or a case id cannot move the cursor.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn
from rich.progress import Progress as RichBars
from rich.progress import Task as RichBar
from rich.table import Table
from rich.text import Text

from glioma_nas.live_table import BarsWithTable, Row
from glioma_nas.progress import Progress, Task, TaskContext

PLAIN_INTERVAL_S = 10.0
_MAX_FIGURES = 4


def make_progress(stream: TextIO | None = None, *, force_plain: bool = False) -> PlainProgress | RichProgress:
    """Choose how to show progress: bars when ``stream`` is a terminal that can draw them, plain lines otherwise.

    Use it in a ``with`` block: however the block ends, no bar stays behind.

    Args:
        stream: Where to show it; standard error when not given.
        force_plain: Plain lines even on a terminal.
    """
    stream = sys.stderr if stream is None else stream
    if force_plain or not stream.isatty() or os.environ.get("TERM") == "dumb":
        return PlainProgress(stream)
    return RichProgress(stream)


class Pace:
    """Estimate the time left of a task from the steps it has done.

    The rate is measured from the first report on, so that neither a slow first step nor a resumed task, which reports
    all its earlier steps at once, spoils the estimate for long.

    Args:
        total: Steps of the whole task.
        clock: Seconds; any origin.
    """

    def __init__(self, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.total = total
        self.done = 0
        self._clock = clock
        self._started = clock()
        self._first: tuple[float, int] | None = None
        self._last = self._started

    @property
    def elapsed_s(self) -> float:
        """Seconds since the task was opened."""
        return self._clock() - self._started

    @property
    def left_s(self) -> float | None:
        """Seconds that remain at the present rate; none as long as no step is done."""
        if self._first is None or self.done == 0:
            return None
        first_time, first_done = self._first
        steps, seconds = self.done - first_done, self._last - first_time
        if steps <= 0 or seconds <= 0:
            steps, seconds = self.done, self._last - self._started
        remaining = (self.total - self.done) * seconds / steps - (self._clock() - self._last)
        return max(remaining, 0.0)

    def advance(self, steps: int) -> None:
        """Count ``steps`` as done now."""
        self.done += steps
        self._last = self._clock()
        if self._first is None:
            self._first = (self._last, self.done)


class PlainProgress:
    """A `Progress` of plain lines without control characters, for log files and pipes.

    A task shows a line when it opens, at most one every ``interval_s`` seconds, and one when it ends. A task inside
    another one stays silent until it has lasted ``interval_s``, so that hundreds of short ones do not flood a log.
    """

    def __init__(
        self,
        stream: TextIO,
        *,
        interval_s: float = PLAIN_INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream
        self._interval_s = interval_s
        self._clock = clock
        self._lock = threading.Lock()
        self._depth = 0

    def __enter__(self) -> PlainProgress:
        return self

    def __exit__(self, *exc: object) -> None:
        self._depth = 0

    def task(self, description: str, total: int) -> TaskContext:
        """See `Progress.task`."""
        return _PlainTask(self, one_line(description), total)

    def note(self, text: str) -> None:
        """See `Progress.note`."""
        self.write(one_line(text))

    def write(self, line: str) -> None:
        """Show one finished line."""
        with self._lock:
            self._stream.write(line + "\n")
            self._stream.flush()


class _PlainTask:
    def __init__(self, owner: PlainProgress, description: str, total: int) -> None:
        self._owner = owner
        self._description = description
        self._total = total
        self._figures: dict[str, float] = {}

    def __enter__(self) -> Task:
        self._pace = Pace(self._total, self._owner._clock)
        self._shown_at = self._owner._clock()
        self._depth = self._owner._depth
        self._owner._depth += 1
        self._announced = self._depth == 0
        if self._announced:
            self._owner.write(f"{self._description}: started, {_count(self._total, 'step')}")
        return self

    def advance(self, steps: int = 1, /, **figures: float) -> None:
        self._pace.advance(steps)
        self._figures.update(figures)
        now = self._owner._clock()
        if self._pace.done < self._total and now - self._shown_at >= self._owner._interval_s:
            self._shown_at = now
            self._announced = True
            left = self._pace.left_s
            parts = [self._position(), f"{duration(self._pace.elapsed_s)} elapsed"]
            parts += [] if left is None else [f"{duration(left)} left"]
            self._show(parts)

    def row(self, **figures: float | str) -> None:
        self._announced = True
        left = self._pace.left_s
        parts = [f"{one_line(name).replace('_', ' ')} {_cell(value)}" for name, value in figures.items()]
        self._show([*parts, *([] if left is None else [f"{duration(left)} left"])])

    def __exit__(self, *exc: object) -> None:
        failure = _failure(exc)
        self._owner._depth = self._depth
        if self._announced or failure:
            verb = f"stopped ({failure})" if failure else "done"
            self._show([self._position(), f"{verb} in {duration(self._pace.elapsed_s)}"])

    def _position(self) -> str:
        share = f" ({100 * self._pace.done / self._total:.0f} %)" if self._total else ""
        return f"{self._pace.done}/{self._total}{share}"

    def _show(self, parts: list[str]) -> None:
        figures = format_figures(self._figures)
        parts = [*parts, figures] if figures else parts
        self._owner.write(f"{'  ' * self._depth}{self._description}: {', '.join(parts)}")


class RichProgress:
    """A `Progress` of live bars on a terminal, one for each open task, nested tasks indented below their parents.

    Bars vanish when their task ends; an outermost task leaves one line. Colours are left out when NO_COLOR is set.
    """

    def __init__(self, stream: TextIO) -> None:
        self.console = Console(file=stream, highlight=False)
        self._open: list[_RichTask] = []
        self._bars: RichBars | None = None

    def __enter__(self) -> RichProgress:
        return self

    def __exit__(self, *exc: object) -> None:
        self._open.clear()
        self._stop()

    def task(self, description: str, total: int) -> TaskContext:
        """See `Progress.task`."""
        return _RichTask(self, one_line(description), total)

    def note(self, text: str) -> None:
        """See `Progress.note`."""
        self.console.print(Text(one_line(text)))

    def _enter(self, task: _RichTask) -> RichBars:
        if self._bars is None:
            # Standard output is left alone: sent through the bars it would arrive on standard error.
            self._bars = BarsWithTable(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                _TimesColumn(),
                TextColumn("{task.fields[figures]}", style="cyan", markup=False),
                console=self.console,
                transient=True,
                redirect_stdout=False,
                refresh_per_second=8,
                rows=self._rows,
                cell=_cell,
            )
            self._bars.start()
        self._open.append(task)
        return self._bars

    def _rows(self) -> Sequence[Row]:
        return next((task.rows for task in reversed(self._open) if task.rows), ())

    def _exit(self, task: _RichTask) -> None:
        self._open.remove(task)
        if not self._open:
            self._stop()

    def _stop(self) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None


class _RichTask:
    def __init__(self, owner: RichProgress, description: str, total: int) -> None:
        self._owner = owner
        self._description = description
        self._total = total
        self._figures: dict[str, float] = {}
        self.rows: list[Row] = []

    def __enter__(self) -> Task:
        depth = len(self._owner._open)
        self._outermost = depth == 0
        self._pace = Pace(self._total)
        self._bars = self._owner._enter(self)
        name = f"{'  ' * (depth - 1)}└ {self._description}" if depth else self._description
        self._id = self._bars.add_task(name, total=self._total, figures="", pace=self._pace)
        return self

    def advance(self, steps: int = 1, /, **figures: float) -> None:
        self._pace.advance(steps)
        self._figures.update(figures)
        self._bars.update(self._id, advance=steps, figures=format_figures(self._figures))

    def row(self, **figures: float | str) -> None:
        self.rows.append(figures)

    def __exit__(self, *exc: object) -> None:
        failure = _failure(exc)
        self._bars.remove_task(self._id)
        self._owner._exit(self)
        if self._outermost:
            verb, style = (f"stopped ({failure})", "red") if failure else ("done", "green")
            line = Text.assemble(
                (f"{verb} ", style),
                self._description,
                (f"  {self._pace.done}/{self._total} in {duration(self._pace.elapsed_s)}", "dim"),
                (f"  {format_figures(self._figures)}", "cyan"),
            )
            line.rstrip()
            self._owner.console.print(line)


class _TimesColumn(ProgressColumn):
    """Elapsed time and time left, as in ``0:42, 3:10 left``."""

    def render(self, task: RichBar) -> Text:
        pace: Pace = task.fields["pace"]
        left = pace.left_s
        tail = "" if left is None else f", {duration(left)} left"
        return Text(f"{duration(pace.elapsed_s)}{tail}", style="dim")


class LogHandler(logging.Handler):
    """Send log records through a `Progress`, so that they appear above its bars and not across them."""

    def __init__(self, progress: Progress, level: int = logging.NOTSET) -> None:
        super().__init__(level)
        self._progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler.emit`; called for every record, each line of which becomes one note."""
        for line in self.format(record).splitlines():
            self._progress.note(line)


def say(text: str, *, stream: TextIO | None = None) -> None:
    """Print one line of a result, to standard output when ``stream`` is not given."""
    stream = sys.stdout if stream is None else stream
    stream.write(one_line(text) + "\n")


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    as_json: bool,
    stream: TextIO | None = None,
) -> None:
    """Print a table: ruled on a terminal, aligned plain text otherwise, a JSON list of objects with ``as_json``.

    Columns that hold only numbers and empty cells are aligned to the right. ``None`` is an empty cell, null in JSON;
    so is a number that is not finite in JSON, which has no word for it.

    Args:
        title: Heading; not part of the JSON.
        columns: Headings of the columns, the keys of the JSON objects.
        rows: One sequence of as many values as there are columns for each row.
        as_json: JSON instead of a table.
        stream: Where to print; standard output when not given.
    """
    stream = sys.stdout if stream is None else stream
    if as_json:
        records = [dict(zip(columns, map(_plain_value, row), strict=True)) for row in rows]
        stream.write(json.dumps(records, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        return
    cells = [[_cell(value) for value in row] for row in rows]
    right = [_is_numeric_column([row[index] for row in rows]) for index in range(len(columns))]
    if stream.isatty() and os.environ.get("TERM") != "dumb":
        table = Table(
            title=Text(one_line(title), style="bold"), title_justify="left", header_style="bold", box=SIMPLE_HEAD
        )
        for name, is_right in zip(columns, right, strict=True):
            table.add_column(Text(one_line(name)), justify="right" if is_right else "left", overflow="fold")
        for row in cells:
            table.add_row(*(Text(cell) for cell in row))
        Console(file=stream, highlight=False).print(table)
        return
    stream.write("\n".join([one_line(title), *_aligned([one_line(name) for name in columns], cells, right)]) + "\n")


def format_figures(figures: Mapping[str, float]) -> str:
    """Render the latest figures of a task, such as ``loss 0.123  dice 0.810``.

    >>> format_figures({"loss": 0.1234, "latency_ms": 18.25, "epoch": 3})
    'loss 0.123  latency ms 18.2  epoch 3'
    """
    shown = list(figures.items())[:_MAX_FIGURES]
    return "  ".join(f"{one_line(name).replace('_', ' ')} {_number(value)}" for name, value in shown)


def duration(seconds: float) -> str:
    """Render a time span as minutes and seconds, with hours when there are any.

    >>> duration(65.2), duration(3725)
    ('1:05', '1:02:05')
    """
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def one_line(text: str) -> str:
    """Replace line breaks by spaces and every other unprintable character, escape sequences included, by ``?``."""
    return "".join(char if char.isprintable() else "?" for char in " ".join(text.split()))


def _failure(exc: tuple[object, ...]) -> str:
    kind = exc[0] if exc else None
    return kind.__name__ if isinstance(kind, type) else ""


def _number(value: float) -> str:
    if isinstance(value, int) or not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size >= 1000:
        return f"{value:.0f}"
    if size >= 10:
        return f"{value:.1f}"
    if size >= 0.001 or size == 0:
        return f"{value:.3f}"
    return f"{value:.1e}"


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return _number(value)
    return one_line(str(value))


def _plain_value(value: object) -> Any:  # JSON values have no narrower common type
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)


def _is_numeric_column(values: Sequence[object]) -> bool:
    filled = [value for value in values if value is not None]
    return bool(filled) and all(isinstance(value, int | float) and not isinstance(value, bool) for value in filled)


def _aligned(columns: Sequence[str], cells: Sequence[Sequence[str]], right: Sequence[bool]) -> list[str]:
    widths = [max(len(row[index]) for row in [columns, *cells]) for index in range(len(columns))]
    lines = []
    for row in [columns, ["-" * width for width in widths], *cells]:
        padded = [
            cell.rjust(width) if is_right else cell.ljust(width)
            for cell, width, is_right in zip(row, widths, right, strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
    return lines


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
