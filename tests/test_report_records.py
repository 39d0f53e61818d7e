"""Records of a run that are broken or impossible are refused by name."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from report_run import context, make_config, make_run, metrics, write

from glioma_nas.errors import StorageError
from glioma_nas.stages import report


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("segment/dice.csv", "network,case_id,patient_id,fold\nstudent,a,b,0\n", "dice.csv: column dice missing"),
        ("segment/dice.csv", "network,case_id,patient_id,fold,dice\nstudent,a,b,0,high\n", "column dice holds text"),
        ("segment/dice.csv", "network,case_id,patient_id,fold,dice\nstudent,a,b,0,1.5\n", "Dice of case a is outside"),
        ("export/latency.json", "[]", "latency.json: expected an object"),
        ("export/latency.json", '{"networks": {"student": {}}}', "'student' of 'networks' lacks median_ms"),
        ("search/student_cells.json", "{}", "student_cells.json: expected a list"),
        ("search/history.csv", "epoch\n1\n", "history.csv: column phase missing"),
        ("classify/idh/metrics.json", '{"auc": {"value": 1}}', "metric 'auc' lacks low"),
        ("classify/idh/metrics.json", "{", "not readable as JSON"),
    ],
)
def test_report_refuses_broken_inputs(tmp_path: Path, name: str, content: str, message: str) -> None:
    inputs = make_run(tmp_path)
    write(tmp_path / name, content)
    with pytest.raises(StorageError, match=re.escape(message)):
        report.run(context(make_config(tmp_path), tmp_path / "report", inputs))
    assert not (tmp_path / "report" / "report.html").exists()


@pytest.mark.slow
def test_report_refuses_accuracy_outside_sensitivity_and_specificity(tmp_path: Path) -> None:
    inputs = make_run(tmp_path)
    wrong = metrics(0.9)
    wrong["accuracy"]["value"] = 0.8
    write(inputs["classify"] / "idh" / "metrics.json", wrong)
    with pytest.raises(StorageError, match=r"accuracy 0\.8 lies outside"):
        report.run(context(make_config(tmp_path), tmp_path / "report", inputs))


@pytest.mark.slow
def test_report_refuses_a_mask_of_another_shape(tmp_path: Path) -> None:
    inputs = make_run(tmp_path)
    np.save(inputs["segment"] / "masks_prepared" / "student" / "case_00.npy", np.zeros((1, 2, 3), np.uint8))
    with pytest.raises(StorageError, match=r"shape \(1, 2, 3\) is not \(5, 48, 48\)"):
        report.run(context(make_config(tmp_path), tmp_path / "report", inputs))
