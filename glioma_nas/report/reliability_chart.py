"""The reliability curve of a marker: what predicted probabilities turned out to mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from glioma_nas.report.figures import MUTED, SERIES, Figure, chart


def reliability_chart(marker: str, bins: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw observed against predicted, one point a bin.

    Args:
        marker: Name of the marker.
        bins: ``predicted``, ``observed``, ``low``, ``high`` in [0, 1], and ``n``.
    """
    alt = f"Reliability of {marker}: " + "; ".join(
        f"predicted {item['predicted']:.2f}, observed {item['observed']:.2f}, n = {item['n']}" for item in bins
    )
    with chart(f"reliability_{marker}", alt, width_in=3.8, height_in=3.7) as drawing:
        axes = drawing.axes
        axes.plot([0, 1], [0, 1], color=MUTED, lw=0.8, ls=(0, (2, 3)))
        observed = [item["observed"] for item in bins]
        ends = [
            [max(0.0, item["observed"] - item["low"]) for item in bins],
            [max(0.0, item["high"] - item["observed"]) for item in bins],
        ]
        axes.errorbar(
            [item["predicted"] for item in bins],
            observed,
            yerr=ends,
            fmt="o-",
            ms=5,
            lw=1.2,
            capsize=3,
            color=SERIES[0],
        )
        for item in bins:
            axes.annotate(
                f"n = {item['n']}",
                (item["predicted"], item["observed"]),
                (6, -9),
                textcoords="offset points",
                fontsize=7,
                color=MUTED,
            )
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(-0.02, 1.02)
        axes.set_aspect("equal")
        axes.set_xlabel("predicted probability")
        axes.set_ylabel("observed share of positive patients")
    return drawing.figure
