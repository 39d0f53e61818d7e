"""How patients from elsewhere differ from those a run was made with: intensities, age, sex, missing sequences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glioma_nas.prepared import PreparedCase

PERCENTILES = (5, 50, 95)
LARGE = 0.5
"""Standardised mean difference from which a shift is pointed out: Cohen's medium effect."""

Floats = NDArray[np.float64]


def case_figures(case: PreparedCase, sequences: Sequence[str]) -> dict[str, float]:
    """Return the figures of a prepared case that are compared; what it lacks is left out.

    Args:
        case: The case.
        sequences: The run's sequences. Intensities are given twice: as scanned, in the scanner's own units, and as the
            networks see them, normalised, inside the brain.
    """
    images = case.images()
    figures = {
        "slice distance, mm": float(case.spacing_mm[2]),
        "pixel, mm": float(case.spacing_mm[0]),
        "brain, ml": float(case.quality["brain_ml"]),
    }
    if case.age is not None:
        figures["age, years"] = float(case.age)
    for name, channel in zip(sequences, case.channels(tuple(sequences)), strict=True):
        if name not in case.present:
            continue
        scanned = case.quality["sequences"].get(name, {})
        if scanned.get("intensity_p95") is not None:
            figures[f"{name} as scanned, percentile 95"] = float(scanned["intensity_p95"])
        values = np.asarray(images[:, channel])
        tissue = values[values != 0]
        for percentile in PERCENTILES if tissue.size else ():
            figures[f"{name} intensity, percentile {percentile}"] = float(np.percentile(tissue, percentile))
    return figures


def drift_rows(
    run: Sequence[PreparedCase], new: Sequence[PreparedCase], sequences: Sequence[str]
) -> list[dict[str, Any]]:
    """Compare two groups of cases, one row a figure, the largest shifts first.

    Returns:
        ``figure``, ``run`` and ``new`` (means, or shares), ``n_run``, ``n_new``, and ``shift``: the standardised mean
        difference (Cohen's d with pooled standard deviation); none for fewer than two cases or without spread.
    """
    before = [case_figures(case, sequences) for case in run]
    after = [case_figures(case, sequences) for case in new]
    rows = []
    for name in dict.fromkeys(key for figures in [*before, *after] for key in figures):
        first, second = _values(before, name), _values(after, name)
        rows.append(_row(name, first, second, standardised_difference(first, second)))
    for name in sequences:
        rows.append(
            _share(f"{name} missing", [name not in case.present for case in run], [name not in c.present for c in new])
        )
    for sex in ("F",):
        known_run = [case.sex == sex for case in run if case.sex is not None]
        known_new = [case.sex == sex for case in new if case.sex is not None]
        if known_run and known_new:
            rows.append(_share("share of women", known_run, known_new))
    return sorted(rows, key=lambda row: -abs(row["shift"] or 0.0))


def standardised_difference(first: Floats, second: Floats) -> float | None:
    """Return (mean of second - mean of first) / pooled standard deviation; none where it does not exist.

    >>> standardised_difference(np.array([1.0, 2.0, 3.0]), np.array([2.0, 3.0, 4.0]))
    1.0
    """
    if len(first) < 2 or len(second) < 2:
        return None
    spread = (len(first) - 1) * first.var(ddof=1) + (len(second) - 1) * second.var(ddof=1)
    pooled = math.sqrt(spread / (len(first) + len(second) - 2))
    if pooled < 1e-12:
        return None
    return float((second.mean() - first.mean()) / pooled)


def _values(figures: Sequence[Mapping[str, float]], name: str) -> Floats:
    return np.array([item[name] for item in figures if name in item], dtype=np.float64)


def _row(name: str, first: Floats, second: Floats, shift: float | None) -> dict[str, Any]:
    return {
        "figure": name,
        "run": float(first.mean()) if len(first) else None,
        "new": float(second.mean()) if len(second) else None,
        "n_run": len(first),
        "n_new": len(second),
        "shift": shift,
    }


def _share(name: str, first: Sequence[bool], second: Sequence[bool]) -> dict[str, Any]:
    ours, theirs = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    return _row(name, ours, theirs, standardised_difference(ours, theirs))
