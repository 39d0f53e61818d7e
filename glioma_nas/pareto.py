"""Which networks no other one beats in accuracy and latency at once, and how much of the plane they dominate."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike


def pareto_front(latency_ms: ArrayLike, dice: ArrayLike) -> list[int]:
    """Return the positions of the networks that no other one beats, fastest first.

    One beats another when it is at least as fast and as accurate, and better in one of both.

    Args:
        latency_ms: (n,), lower is better.
        dice: (n,), higher is better.

    >>> pareto_front([1.0, 2.0, 3.0], [0.7, 0.8, 0.75])
    [0, 1]
    """
    latencies, scores = np.asarray(latency_ms, dtype=np.float64), np.asarray(dice, dtype=np.float64)
    front = []
    for index, (own_ms, own) in enumerate(zip(latencies, scores, strict=True)):
        no_worse = (latencies <= own_ms) & (scores >= own)
        better = (latencies < own_ms) | (scores > own)
        if not (no_worse & better).any():
            front.append(index)
    return sorted(front, key=lambda index: float(latencies[index]))


def hypervolume(points: Sequence[tuple[float, float]], *, slowest_ms: float) -> float:
    """Return the share of the rectangle [0, slowest] × [0, 1] that points (latency in ms, Dice) dominate.

    >>> hypervolume([(2.0, 0.5), (4.0, 0.8)], slowest_ms=4.0)
    0.25
    """
    best, area, edge = 0.0, 0.0, slowest_ms
    ordered = sorted(points)
    for position, (latency_ms, dice) in enumerate(ordered):
        best = max(best, dice)
        edge = ordered[position + 1][0] if position + 1 < len(ordered) else slowest_ms
        area += best * max(edge - latency_ms, 0.0)
    return area / slowest_ms if slowest_ms > 0 else 0.0
