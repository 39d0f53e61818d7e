"""The finished trials of an experiment, read from NNI's records, so that stopped experiments can be compared too."""

from __future__ import annotations

import json
import sqlite3
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from glioma_nas.errors import ConfigError, StorageError, did_you_mean
from glioma_nas.files import canonical_json

COMPARED = (
    "default",
    "dice",
    "hd95_mm",
    "latency_ms",
    "latency_p95_ms",
    "macs_g",
    "params_m",
    "auc_idh",
    "auc_ki67",
)
"""Figures that `compare` shows, where some trial has measured them: all but fold and seed, which are no results."""


def finished_trials(record: Mapping[str, Any]) -> list[tuple[dict[str, Any], dict[str, float | None]]]:
    """Return hyper-parameters and final metrics of every trial that succeeded, in NNI's order.

    Trials with the same hyper-parameters share one result and are listed once: a tuner may propose them again.

    Args:
        record: Of `glioma_nas.nni_experiments.manager.find`.

    Raises:
        StorageError: NNI's records are missing or damaged.
    """
    database = Path(record["logDir"]) / str(record["id"]) / "db" / "nni.sqlite"
    try:
        with closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True, timeout=30)) as records:
            events = records.execute("select trialJobId, event, data from TrialJobEvent").fetchall()
            metrics = records.execute("select trialJobId, data from MetricData where type = 'FINAL'").fetchall()
    except sqlite3.Error as err:
        raise StorageError(f"{database}: NNI's records of the experiment cannot be read ({err})") from err
    succeeded = {trial for trial, event, _ in events if event == "SUCCEEDED"}
    results = {trial: json.loads(json.loads(data)) for trial, data in metrics}
    found: dict[str, tuple[dict[str, Any], dict[str, float | None]]] = {}
    for trial, _, data in events:
        if data and trial in succeeded and isinstance(results.get(trial), dict):
            parameters = json.loads(data)["parameters"]
            found.setdefault(canonical_json(parameters), (parameters, results[trial]))
    return list(found.values())


def compare(
    trials: Sequence[tuple[Mapping[str, Any], Mapping[str, float | None]]], by: str
) -> list[dict[str, str | int | float | None]]:
    """Put the results of trials side by side, grouped by one hyper-parameter; the best group first,
    last those of which no trial has a ``default``.

    Args:
        trials: Of `finished_trials`.
        by: A hyper-parameter.

    Returns:
        For each of its values a row: the value, ``n`` trials, and of each figure ``_median``, ``_min`` and ``_max``
        over the trials that have measured it, none where no trial of the group has.

    Raises:
        ConfigError: No trial has finished, or none has such a hyper-parameter.
    """
    known = sorted({name for parameters, _ in trials for name in parameters})
    if by not in known:
        raise ConfigError(f"no finished trial has a hyper-parameter '{by}': {did_you_mean(by, known)}")
    groups: dict[str, list[Mapping[str, float | None]]] = defaultdict(list)
    for parameters, metrics in trials:
        if by in parameters:
            groups[str(parameters[by])].append(metrics)
    shown = [name for name in COMPARED if any(metrics.get(name) is not None for _, metrics in trials)]
    rows: list[dict[str, str | int | float | None]] = []
    for value, members in groups.items():
        row: dict[str, str | int | float | None] = {by: value, "n": len(members)}
        for name in shown:
            measured = [figure for item in members if (figure := item.get(name)) is not None]
            row[f"{name}_median"] = statistics.median(measured) if measured else None
            row[f"{name}_min"] = min(measured, default=None)
            row[f"{name}_max"] = max(measured, default=None)
        rows.append(row)
    return sorted(rows, key=_best_first)


def _best_first(row: Mapping[str, str | int | float | None]) -> tuple[bool, float]:
    default = row.get("default_median")
    return default is None, -float(default or 0)


def for_people(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Join the three columns of each figure into one: ``0.81 (0.79 to 0.84)``."""
    joined = []
    for row in rows:
        cells = {name: value for name, value in row.items() if not name.endswith(("_median", "_min", "_max"))}
        for name in (key.removesuffix("_median") for key in row if key.endswith("_median")):
            low, middle, high = (row[f"{name}_{part}"] for part in ("min", "median", "max"))
            cells[name] = "not measured" if middle is None else f"{middle:.4g} ({low:.4g} to {high:.4g})"
        joined.append(cells)
    return joined
