"""Table 4-5 on any cohort: same folds and budget, patients paired, the source's figures beside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from finished_run import CONFIG
from scipy.stats import wilcoxon
from typer.testing import CliRunner

from glioma_nas.cli import app
from glioma_nas.config import parse_config
from glioma_nas.errors import ConfigError
from glioma_nas.progress import Silent
from glioma_nas.segmentation_studies.methods_study import methods_table, paired_p_value, per_patient, study_methods
from glioma_nas.testing.phantoms import write_phantom_cohort


def scores() -> pd.DataFrame:
    rows = []
    for seed in (0, 1):
        for patient in range(8):
            for case in range(2 if patient == 0 else 1):
                for network, shift in (("teacher", 0.05), ("student", 0.0), ("icnet", -0.1 - 0.01 * patient)):
                    dice = 0.6 + 0.02 * patient + shift + 0.1 * case + 0.02 * seed
                    rows.append(
                        {
                            "network": network,
                            "patient_id": f"P{patient}",
                            "case_id": f"P{patient}-{case}",
                            "seed": seed,
                            "dice": dice,
                            "hd95_mm": 4.0,
                        }
                    )
    return pd.DataFrame(rows)


def latency(**medians: float) -> dict[str, Any]:
    return {
        "networks": {
            name: {
                "median_ms": value,
                "macs_g": 1.0,
                "params_m": 2.0,
                "times_student": {"median": value / medians["student"]},
            }
            for name, value in medians.items()
        }
    }


def test_a_patients_cases_and_seeds_count_as_one_patient() -> None:
    patients = per_patient(scores())
    assert patients.shape == (8, 3)
    assert patients.loc["P0", "student"] == pytest.approx(0.6 + 0.05 + 0.01)
    assert patients.loc["P3", "icnet"] == pytest.approx(0.6 + 0.06 - 0.13 + 0.01)


def test_table_compares_every_method_with_the_student() -> None:
    table = methods_table(
        scores(),
        per_patient(scores()),
        [latency(student=2.0, teacher=4.0, icnet=5.0), latency(student=2.0, teacher=6.0, icnet=5.0)],
        seed=0,
    ).set_index("network")
    assert list(table.index) == ["student", "teacher", "icnet"]
    assert table.n_patients.tolist() == [8, 8, 8]
    assert (
        table.latency_ms["teacher"] == 5.0 and table.times_student["icnet"] == 2.5 and table.speed_hz["student"] == 500
    )
    assert table.dice_seeds_sd["student"] == pytest.approx(0.02 / 2**0.5)
    assert np.isnan(table.p_holm["student"])
    # All eight signs agree: the exact two-sided p is 2/2^8, and Holm doubles the smaller of two.
    assert table.p_holm["icnet"] == pytest.approx(2 * 2 / 2**8)
    assert table.source_dice["icnet"] == 0.888 and np.isnan(table.source_dice["teacher"])
    assert table.source_times_student["icnet"] == pytest.approx(3.16, abs=0.005)


def test_equal_networks_do_not_differ() -> None:
    same = np.array([0.5, 0.6])
    assert paired_p_value(same, same.copy()) == 1.0
    other = same + np.array([0.1, -0.2])
    assert paired_p_value(same, other) == wilcoxon(same, other).pvalue


def test_network_named_twice_is_refused(tmp_path: Path) -> None:
    config = parse_config(CONFIG, source="test", folder=tmp_path)
    with pytest.raises(ConfigError, match="give each network once"):
        study_methods(config, tmp_path, methods=["icnet", "icnet"], n_seeds=1, progress=Silent())


@pytest.mark.slow
def test_study_runs_from_the_command_line(tmp_path: Path) -> None:
    write_phantom_cohort(tmp_path / "cohort", 6, 0)
    data = {**CONFIG, "classify": {}, "train": {"epochs": 1, "steps_per_epoch": 2, "batch_size": 4}}
    data["train"]["baseline_options"] = {"icnet": {"width": 2, "blocks": [1, 1, 1, 1]}}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(data))
    command = ["study", "table-4-5", str(path), "--methods", "icnet", "--out", str(tmp_path / "out"), "--json"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    rows = {row["network"]: row for row in json.loads(done.stdout)}
    assert list(rows) == ["student", "teacher", "icnet"]
    assert rows["student"]["times_student"] == 1 and rows["icnet"]["source_dice"] == 0.888
    assert all(0 <= row["dice"] <= 1 and row["speed_hz"] > 0 for row in rows.values())
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Table 4-5" in page and "searched on the training patients of fold 0" in page
