"""Say how far a long piece of work has come, without knowing who is watching.

Library code takes a `Progress` and reports to it; only the command line decides whether that becomes bars, plain lines
or nothing (`glioma_nas.console`).
"""

from __future__ import annotations

from typing import Protocol


class Task(Protocol):
    """One bar: a known number of steps that go by."""

    def advance(self, steps: int = 1, /, **figures: float) -> None:
        """Count ``steps`` as done and show ``figures`` (loss, Dice, …) beside the bar. Called after every step."""

    def row(self, **figures: float | str) -> None:
        """Add a row to the task's table, which a terminal shows live. Called after every epoch of a search."""


class Progress(Protocol):
    """Where work reports how far it has come."""

    def task(self, description: str, total: int) -> TaskContext:
        """Open a bar of ``total`` steps; use it in a ``with`` block. Called once for each piece of work."""

    def note(self, text: str) -> None:
        """Show one line that stays on the screen, such as the end of an epoch."""


class TaskContext(Protocol):
    """What `Progress.task` returns: a context manager over a `Task`."""

    def __enter__(self) -> Task: ...

    def __exit__(self, *exc: object) -> bool | None: ...


class _SilentTask:
    def advance(self, steps: int = 1, /, **figures: float) -> None:
        pass

    def row(self, **figures: float | str) -> None:
        pass

    def __enter__(self) -> Task:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


class Silent:
    """A `Progress` that shows nothing; the default everywhere."""

    def task(self, description: str, total: int) -> TaskContext:
        """See `Progress.task`."""
        return _SilentTask()

    def note(self, text: str) -> None:
        """See `Progress.note`."""
