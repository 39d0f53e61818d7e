"""Results of trials side by side, from records as NNI's manager writes them."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from glioma_nas.errors import ConfigError, StorageError
from glioma_nas.nni_experiments.trial_metrics import FINAL_KEYS
from glioma_nas.nni_experiments.trial_results import COMPARED, compare, finished_trials, for_people

# (trial, hyper-parameters, result, how it ended)
TRIALS: list[tuple[str, dict[str, Any], dict[str, float | None] | None, str]] = [
    ("a", {"operators": "skip+conv3x3", "seed": 1}, {"default": 0.5, "dice": 0.6, "auc_idh": None}, "SUCCEEDED"),
    ("b", {"operators": "skip+conv3x3", "seed": 2}, {"default": 0.7, "dice": 0.8, "auc_idh": None}, "SUCCEEDED"),
    ("c", {"operators": "skip+zoomed_conv", "seed": 1}, {"default": 0.9, "dice": 0.9, "auc_idh": 0.75}, "SUCCEEDED"),
    ("d", {"operators": "skip+zoomed_conv", "seed": 2}, None, "FAILED"),
    # Proposed again: its result is that of the first.
    ("e", {"seed": 2, "operators": "skip+conv3x3"}, {"default": 0.7, "dice": 0.8, "auc_idh": None}, "SUCCEEDED"),
]


def write_records(folder: Path) -> dict[str, Any]:
    database = folder / "abc" / "db" / "nni.sqlite"
    database.parent.mkdir(parents=True)
    with closing(sqlite3.connect(database)) as records, records:
        records.execute("create table TrialJobEvent (timestamp integer, trialJobId text, event text, data text)")
        records.execute("create table MetricData (timestamp integer, trialJobId text, type text, data text)")
        for trial, parameters, metrics, ended in TRIALS:
            submitted = json.dumps({"parameter_id": 0, "parameters": parameters})
            for event, data in (("WAITING", submitted), ("RUNNING", None), (ended, None)):
                records.execute("insert into TrialJobEvent values (0, ?, ?, ?)", (trial, event, data))
            if metrics is not None:
                twice = json.dumps(json.dumps(metrics))
                records.execute("insert into MetricData values (0, ?, 'FINAL', ?)", (trial, twice))
    return {"id": "abc", "logDir": str(folder)}


def test_trials_are_compared_by_a_hyper_parameter_best_first(tmp_path: Path) -> None:
    trials = finished_trials(write_records(tmp_path))
    assert [parameters["seed"] for parameters, _ in trials] == [1, 2, 1]
    first, second = compare(trials, "operators")
    assert first == {
        **{"operators": "skip+zoomed_conv", "n": 1},
        **{f"{name}_{part}": 0.9 for name in ("default", "dice") for part in ("median", "min", "max")},
        **{f"auc_idh_{part}": 0.75 for part in ("median", "min", "max")},
    }
    assert (second["n"], second["dice_min"], second["dice_max"], second["auc_idh_median"]) == (2, 0.6, 0.8, None)
    assert second["dice_median"] == pytest.approx(0.7)
    assert for_people([second]) == [
        {
            "operators": "skip+conv3x3",
            "n": 2,
            "default": "0.6 (0.5 to 0.7)",
            "dice": "0.7 (0.6 to 0.8)",
            "auc_idh": "not measured",
        }
    ]


def test_every_figure_of_a_trial_is_compared_but_its_fold_and_seed() -> None:
    assert sorted(COMPARED) == sorted(set(FINAL_KEYS) - {"fold", "seed"})
    (row,) = compare([({"seed": 1}, dict.fromkeys(FINAL_KEYS, 1.0))], "seed")
    assert row == {
        "seed": "1",
        "n": 1,
        **{f"{name}_{part}": 1.0 for name in COMPARED for part in ("median", "min", "max")},
    }


def test_trials_without_a_default_are_compared_last() -> None:
    low, none, lower = ({"default": -0.5, "dice": 0.1}, {"dice": 0.9}, {"default": -0.7, "dice": 0.2})
    rows = compare([({"mode": "none"}, none), ({"mode": "lower"}, lower), ({"mode": "low"}, low)], "mode")
    assert [row["mode"] for row in rows] == ["low", "lower", "none"]
    assert compare([({"mode": "a"}, none)], "mode") == [
        {"mode": "a", "n": 1, "dice_median": 0.9, "dice_min": 0.9, "dice_max": 0.9}
    ]


def test_what_cannot_be_compared_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="no finished trial has a hyper-parameter 'operaters': did you mean 'operators'"
    ):
        compare(finished_trials(write_records(tmp_path)), "operaters")
    with pytest.raises(ConfigError, match=r"no finished trial has a hyper-parameter 'seed': Allowed: \(none\)"):
        compare([], "seed")
    with pytest.raises(StorageError, match="records of the experiment cannot be read"):
        finished_trials({"id": "other", "logDir": str(tmp_path)})
