"""Progress and tables as a person, a log file and a program see them."""

from __future__ import annotations

import io
import json
import logging
import re

import pytest

from glioma_nas.console import (
    LogHandler,
    Pace,
    PlainProgress,
    RichProgress,
    duration,
    format_figures,
    make_progress,
    one_line,
    print_table,
    say,
)

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "140")


def test_make_progress_draws_bars_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(make_progress(Terminal()), RichProgress)
    assert isinstance(make_progress(io.StringIO()), PlainProgress)
    assert isinstance(make_progress(Terminal(), force_plain=True), PlainProgress)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(make_progress(Terminal()), PlainProgress)


def test_plain_progress_writes_start_interval_and_end_lines() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = PlainProgress(stream, interval_s=10, clock=clock)
    with progress.task("train student", 10) as task:
        for step in range(10):
            clock.now += 4
            task.advance(loss=1.0 / (step + 1))
    # Steps end at 4, 8, … 40 s; lines are due at 12, 24 and 36 s, where 7, 4 and 1 steps of 4 s remain.
    assert stream.getvalue().splitlines() == [
        "train student: started, 10 steps",
        "train student: 3/10 (30 %), 0:12 elapsed, 0:28 left, loss 0.333",
        "train student: 6/10 (60 %), 0:24 elapsed, 0:16 left, loss 0.167",
        "train student: 9/10 (90 %), 0:36 elapsed, 0:04 left, loss 0.111",
        "train student: 10/10 (100 %), done in 0:40, loss 0.100",
    ]


def test_plain_progress_keeps_short_nested_tasks_silent() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = PlainProgress(stream, interval_s=10, clock=clock)
    with progress.task("folds", 2) as folds:
        with progress.task("short", 3) as task:
            task.advance(3)
        folds.advance()
        with progress.task("long", 2) as task:
            clock.now += 11
            task.advance()
            task.advance()
        folds.advance()
    lines = stream.getvalue().splitlines()
    assert not any("short" in line for line in lines)
    assert [line for line in lines if "long" in line] == [
        "  long: 1/2 (50 %), 0:11 elapsed, 0:11 left",
        "  long: 2/2 (100 %), done in 0:11",
    ]


def test_plain_progress_says_where_a_task_stopped_when_it_raises() -> None:
    stream = io.StringIO()
    with pytest.raises(KeyboardInterrupt), PlainProgress(stream).task("search", 5) as task:  # noqa: PT012
        task.advance()
        raise KeyboardInterrupt
    assert "search: 1/5 (20 %), stopped (KeyboardInterrupt) in 0:00" in stream.getvalue()


def test_plain_progress_writes_no_control_characters() -> None:
    stream = io.StringIO()
    progress = PlainProgress(stream)
    progress.note("case \x1b[31mred\x07\nnext\r")
    with progress.task("bad \x1b]0;title\x07", 1) as task:
        task.advance(loss=0.5)
    assert not CONTROL.search(stream.getvalue())
    assert stream.getvalue().splitlines()[0] == "case ?[31mred? next"


def test_pace_recovers_when_a_resumed_task_reports_old_steps_at_once() -> None:
    clock = Clock()
    pace = Pace(100, clock)
    assert pace.left_s is None
    pace.advance(50)
    clock.now += 10
    pace.advance(1)
    assert pace.left_s == pytest.approx(490)
    clock.now += 5
    assert pace.left_s == pytest.approx(485)


def test_rich_progress_shows_nested_bars_with_counts_and_figures() -> None:
    stream = Terminal()
    progress = RichProgress(stream)
    with progress.task("train [fold] 1", 2) as outer:
        with progress.task("epochs", 30) as inner:
            inner.advance(12, loss=0.1234, dice=0.81)
            progress._bars.refresh()
        progress.note("fold 1: [bold]done[/bold]")
        outer.advance()
        outer.advance()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert "└ epochs" in text
    assert "12/30" in text
    assert "loss 0.123  dice 0.810" in text
    assert "fold 1: [bold]done[/bold]" in text
    assert "done train [fold] 1  2/2 in 0:00" in text


def test_rich_progress_uses_no_colour_when_no_color_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def shown() -> str:
        stream = Terminal()
        progress = RichProgress(stream)
        with progress.task("search", 1) as task:
            task.advance(loss=1.0)
        return stream.getvalue()

    colour = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-7]|9[0-7]|38;5;\d+)(?:;\d+)*m")
    assert colour.search(shown())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not colour.search(shown())


def test_rich_progress_restores_the_terminal_when_a_task_raises() -> None:
    stream = Terminal()
    progress = RichProgress(stream)
    with pytest.raises(ValueError, match="boom"), progress.task("outer", 1), progress.task("inner", 1):
        raise ValueError("boom")
    assert progress._bars is None
    assert stream.getvalue().rindex("\x1b[?25h") > stream.getvalue().rindex("\x1b[?25l")
    assert "stopped (ValueError)" in stream.getvalue()


def test_progress_leaves_no_bar_behind_when_its_block_ends() -> None:
    stream = Terminal()
    with make_progress(stream) as progress:
        abandoned = progress.task("never closed", 3)
        abandoned.__enter__().advance()
    assert progress._bars is None
    assert stream.getvalue().rindex("\x1b[?25h") > stream.getvalue().rindex("\x1b[?25l")


def test_say_prints_one_plain_line() -> None:
    stream = io.StringIO()
    say("runs/demo/\x1b[31mreport.html", stream=stream)
    assert stream.getvalue() == "runs/demo/?[31mreport.html\n"


def test_log_handler_sends_records_through_the_progress() -> None:
    stream = io.StringIO()
    logger = logging.getLogger("glioma_nas.tests.console")
    logger.propagate = False
    handler = LogHandler(PlainProgress(stream))
    logger.addHandler(handler)
    try:
        logger.warning("epoch %d\nloss %s", 3, 0.5)
    finally:
        logger.removeHandler(handler)
    assert stream.getvalue() == "epoch 3\nloss 0.5\n"


def test_print_table_aligns_numbers_to_the_right_when_not_a_terminal() -> None:
    stream = io.StringIO()
    rows = [("student", 9.25, 12, True), ("u_net", 130.5, None, False)]
    print_table("Latency", ["network", "ms", "n", "passed"], rows, as_json=False, stream=stream)
    assert stream.getvalue().splitlines() == [
        "Latency",
        "network     ms   n  passed",
        "-------  -----  --  ------",
        "student  9.250  12  yes",
        "u_net    130.5      no",
    ]


def test_print_table_gives_json_records() -> None:
    stream = io.StringIO()
    print_table("x", ["name", "ms"], [("a", 1.5), ("b", float("nan"))], as_json=True, stream=stream)
    assert json.loads(stream.getvalue()) == [{"name": "a", "ms": 1.5}, {"name": "b", "ms": None}]


def test_print_table_shows_markup_as_text_on_a_terminal() -> None:
    stream = Terminal()
    print_table("Title", ["name"], [("[red]x[/red]\x1b[2J",)], as_json=False, stream=stream)
    assert "[red]x[/red]?[2J" in stream.getvalue()


def test_print_table_accepts_no_rows() -> None:
    stream = io.StringIO()
    print_table("Empty", ["name", "ms"], [], as_json=False, stream=stream)
    assert stream.getvalue().splitlines() == ["Empty", "name  ms", "----  --"]


def test_duration_rounds_to_seconds_and_carries() -> None:
    assert [duration(s) for s in (0, 59.6, 3599.7, 90061)] == ["0:00", "1:00", "1:00:00", "25:01:01"]


def test_format_figures_keeps_a_steady_width() -> None:
    assert format_figures({"loss": 1.5, "rate": 2e-5, "ms": 1234.4, "nan": float("nan")}) == (
        "loss 1.500  rate 2.0e-05  ms 1234  nan nan"
    )


def test_one_line_replaces_unprintable_characters() -> None:
    assert one_line("a\tb\u202ec\x85d") == "a b?c d"
