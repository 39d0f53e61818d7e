"""The loops that take inference times: repeat one engine until its median stands still, or let several take turns.

Every backend is timed here, so that between two numbers only the engine differs.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from glioma_nas.errors import BackendError
from glioma_nas.latency_devices import run_queue_wait_ms
from glioma_nas.latency_records import LatencyRecord, Shape
from glioma_nas.progress import Progress, Silent

TOLERANCE = 0.02
"""Relative half-width of the median's 95 % interval at which repeating stops."""

FEWEST_CALLS = 6
"""Calls from which there is a 95 % interval of the median: the range of five covers it in 94 % of cases only."""

DISTURBED_SHARE = 0.05
"""Share of a call that threads may stand waiting for a processor before the call counts as disturbed."""


@dataclass(frozen=True)
class Times:
    """What `time_until_stable` took.

    Attributes:
        times_ms: Calls that count, in the order taken.
        disturbed: Share of the timed calls, in [0, 1], during which other processes held the processors, of those that
            the system tells of; none where it tells of none. These calls are left out as long as enough others remain.
    """

    times_ms: list[float]
    disturbed: float | None

    def record(
        self, *, warmup_runs: int, input_shapes: Sequence[Shape], clock_mhz: float | None = None
    ) -> LatencyRecord:
        """Reduce the times, with the share of disturbed calls; see `summarise`."""
        return summarise(
            self.times_ms,
            warmup_runs=warmup_runs,
            input_shapes=input_shapes,
            clock_mhz=clock_mhz,
            disturbed=self.disturbed,
        )


class Timed(Protocol):
    """What can be timed."""

    def time_ms(self) -> float:
        """Run once and return how long it took, in milliseconds."""


def time_until_stable(
    engine: Timed, *, warmup_runs: int, runs: int, max_runs: int | None = None, tolerance: float = TOLERANCE
) -> Times:
    """Time one engine ``runs`` times, and on until the median is known to ``tolerance`` or ``max_runs`` are done.

    Calls that other processes disturbed count only if fewer than ``runs`` others were got in ``max_runs`` calls.

    Args:
        engine: What to time.
        warmup_runs: Untimed calls before.
        runs: Timed calls at least.
        max_runs: Timed calls at most; none, or fewer than ``runs``: exactly ``runs``.
        tolerance: See `TOLERANCE`.

    Raises:
        BackendError: ``runs`` is not positive or ``warmup_runs`` is negative.
    """
    taken = time_in_turns(
        {"": engine}, warmup_runs=warmup_runs, runs=runs, max_runs=max_runs, tolerance=tolerance, progress=Silent()
    )
    return taken[""]


def stands_still(times_ms: Sequence[float], tolerance: float = TOLERANCE) -> bool:
    """Tell whether the median is known to ``tolerance``; fewer than `FEWEST_CALLS` calls never say so.

    >>> stands_still([5.0] * 5), stands_still([5.0] * 6)
    (False, True)
    """
    if len(times_ms) < FEWEST_CALLS:
        return False
    low, high = median_interval(times_ms)
    return high - low <= 2 * tolerance * float(np.median(times_ms))


def median_interval(times_ms: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of the median, free of any assumption on how times are distributed.

    The ranks are those of the binomial(n, ½) distribution in its normal approximation, n/2 ∓ 0.98·√n, within the data.

    >>> median_interval(range(1, 102))
    (41.0, 61.0)
    """
    ordered, n = sorted(times_ms), len(times_ms)
    reach = 0.98 * math.sqrt(n)
    low, high = math.floor((n - 1) / 2 - reach), math.ceil((n - 1) / 2 + reach)
    return float(ordered[max(low, 0)]), float(ordered[min(high, n - 1)])


def time_in_turns(
    engines: Mapping[str, Timed],
    *,
    warmup_runs: int,
    runs: int,
    max_runs: int | None = None,
    tolerance: float = TOLERANCE,
    progress: Progress | None = None,
    description: str = "timing",
) -> dict[str, Times]:
    """Time several engines in turn, one call each a round, until the median of each stands still.

    A slow spell of the machine hits all of them. The order turns by one place every round: no engine always runs behind
    the same neighbour, whose data fill the cache. Rounds in which a call of some engine was disturbed are left out for
    all of them, as long as ``runs`` others remain, so that the times of two engines can be compared round by round.

    Args:
        engines: Name → what to time.
        warmup_runs: Untimed calls of each before.
        runs: Rounds at least.
        max_runs: Rounds at most, until every median is known to ``tolerance``; none, or fewer than ``runs``: exactly
            ``runs``.
        tolerance: See `TOLERANCE`.
        progress: Where to report.
        description: What to call it there.

    Returns:
        Name → times of the rounds that count, as many for each engine, and the share of its own calls that were
        disturbed.

    Raises:
        BackendError: ``runs`` is not positive or ``warmup_runs`` is negative.
    """
    check_runs(warmup_runs, runs)
    names, most = list(engines), max(runs, max_runs or runs)
    every: dict[str, list[float]] = {name: [] for name in names}
    disturbed: dict[str, list[bool | None]] = {name: [] for name in names}
    quiet: list[int] = []
    for name in names:
        for _ in range(warmup_runs):
            engines[name].time_ms()
    with _no_collection(), (progress or Silent()).task(description, most) as task:
        for turn in range(most if names else 0):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                before = run_queue_wait_ms()
                time_ms = engines[name].time_ms()
                after = run_queue_wait_ms()
                waited_ms = None if before is None or after is None else after - before
                every[name].append(time_ms)
                disturbed[name].append(None if waited_ms is None else waited_ms > DISTURBED_SHARE * time_ms)
            task.advance()
            if not any(disturbed[name][turn] for name in names):
                quiet.append(turn)
            enough = len(quiet) >= runs and len(quiet) % runs == 0
            if enough and all(stands_still([every[name][index] for index in quiet], tolerance) for name in names):
                break
    counted = quiet if len(quiet) >= runs else range(len(every[names[0]]) if names else 0)
    return {name: Times([every[name][index] for index in counted], _share(disturbed[name])) for name in names}


def _share(disturbed: Sequence[bool | None]) -> float | None:
    """Return the share of the calls that the system tells of; one that a thread ended in is told nothing of."""
    told = [call for call in disturbed if call is not None]
    return sum(told) / len(told) if told else None


def time_engines(
    engines: Mapping[str, Timed],
    *,
    warmup_runs: int,
    runs: int,
    progress: Progress | None = None,
    description: str = "timing",
) -> dict[str, list[float]]:
    """Time several engines in turn for exactly ``runs`` rounds, all of which count; see `time_in_turns`.

    Returns:
        Name → times of its ``runs`` calls in milliseconds, in the order taken.
    """
    taken = time_in_turns(engines, warmup_runs=warmup_runs, runs=runs, progress=progress, description=description)
    return {name: times.times_ms for name, times in taken.items()}


def summarise(
    times_ms: Sequence[float],
    *,
    warmup_runs: int,
    input_shapes: Sequence[Shape],
    clock_mhz: float | None = None,
    disturbed: float | None = None,
) -> LatencyRecord:
    """Reduce the times of repeated calls to median, its interval, and 95th percentile (linear interpolation).

    Fewer than `FEWEST_CALLS` calls have no interval.
    """
    low, high = median_interval(times_ms) if len(times_ms) >= FEWEST_CALLS else (None, None)
    return LatencyRecord(
        median_ms=float(np.median(times_ms)),
        p95_ms=float(np.percentile(times_ms, 95)),
        n=len(times_ms),
        warmup_runs=warmup_runs,
        input_shapes=tuple(tuple(shape) for shape in input_shapes),
        median_low_ms=low,
        median_high_ms=high,
        clock_mhz=clock_mhz,
        disturbed=disturbed,
    )


@dataclass(frozen=True)
class Ratio:
    """How many times as long one engine takes as another, over the rounds they ran side by side.

    Attributes:
        median: Median of the rounds' ratios.
        p5: 5th percentile.
        p95: 95th percentile.
    """

    median: float
    p5: float
    p95: float


def ratio(times_ms: Sequence[float], reference_ms: Sequence[float]) -> Ratio:
    """Compare two engines timed by one `time_engines` call round by round, so that slow spells cancel."""
    rounds = np.asarray(times_ms, dtype=np.float64) / np.asarray(reference_ms, dtype=np.float64)
    return Ratio(float(np.median(rounds)), float(np.percentile(rounds, 5)), float(np.percentile(rounds, 95)))


def check_runs(warmup_runs: int, runs: int) -> None:
    """Make sure that something is timed.

    Raises:
        BackendError: ``runs`` is not positive or ``warmup_runs`` is negative.
    """
    if runs < 1:
        raise BackendError(f"runs is {runs}; give 1 or more timed runs (latency.runs)")
    if warmup_runs < 0:
        raise BackendError(f"warmup_runs is {warmup_runs}; give 0 or more (latency.warmup_runs)")


@contextmanager
def _no_collection() -> Iterator[None]:
    # A collection inside a timed call would be charged to the engine.
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
