"""Sum up the runs of a comparison: means with intervals over seeds, and the hypervolume of each seed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import t as student_t

from glioma_nas.pareto import hypervolume

MEASURED = ("dice", "latency_ms", "macs_g", "params_m", "search_s", "search_peak_mb", "search_peak_gpu_mb")
"""Columns that differ from seed to seed: each gets an interval."""

SPENT = ("steps", "scoring_steps", "scored_networks")
"""Columns that say what a strategy was given."""

REFERENCE_FACTOR = 1.1
"""Reference latency of the hypervolume over the slowest run's: that run counts for something too."""


def reference_ms(runs: pd.DataFrame) -> float:
    """Return the latency in ms up to which the hypervolume counts: 1.1 times the slowest run's."""
    return REFERENCE_FACTOR * float(runs.latency_ms.max())


def summarise_contest(runs: pd.DataFrame) -> pd.DataFrame:
    """Return one row a strategy: mean over seeds and, from two seeds on, the 95 % interval of the mean (Student's t).

    ``hypervolume`` is taken of each seed's runs alone, see `hypervolume`, up to `reference_ms` of all runs, and then
    summed up like the other figures: a seed whose search failed is missing from it as from them.

    Args:
        runs: One row a search, with the columns `MEASURED`, `SPENT`, ``strategy`` and ``seed``.
    """
    slowest_ms = reference_ms(runs)
    rows = []
    for strategy, group in runs.groupby("strategy", sort=False):
        row: dict[str, Any] = {"strategy": strategy, "seeds": group.seed.nunique()}
        figures = {column: group[column].to_numpy(dtype=np.float64) for column in MEASURED}
        figures["hypervolume"] = np.array(
            [
                hypervolume(list(zip(own.latency_ms, own.dice, strict=True)), slowest_ms=slowest_ms)
                for _, own in group.groupby("seed")
            ]
        )
        for column, values in figures.items():
            row[column] = float(values.mean())
            row[f"{column}_low"], row[f"{column}_high"] = mean_interval(values)
        row.update({column: float(group[column].mean()) for column in SPENT})
        rows.append(row)
    return pd.DataFrame(rows)


def mean_interval(values: NDArray[np.float64], *, confidence: float = 0.95) -> tuple[float | None, float | None]:
    """Return the interval of the mean by Student's t; none for one value, or where one is not there."""
    if len(values) < 2 or not np.isfinite(values).all():
        return None, None
    half = float(student_t.ppf(0.5 + confidence / 2, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
    return float(values.mean()) - half, float(values.mean()) + half
