"""One trial in this process, from hyper-parameters to result: who trains it, who measures it, what it shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from nni.runtime import trial_command_channel

from glioma_nas.config import load_config
from glioma_nas.nni_experiments.experiment_folder import ExperimentOptions, write_experiment
from glioma_nas.nni_experiments.trial_channel import TrialChannel
from glioma_nas.nni_experiments.trial_metrics import FINAL_KEYS
from glioma_nas.nni_experiments.trial_run import run_trial
from glioma_nas.prepared import PreparedCohort
from glioma_nas.progress import Silent
from tests.nni_runs import tensorboard_tags
from tests.tiny_run import write_run

pytestmark = pytest.mark.slow


class OneTrial(trial_command_channel.TrialCommandChannel):
    """The manager's side: gives out hyper-parameters, keeps what is sent."""

    def __init__(self, parameters: dict[str, Any]) -> None:
        self.parameters = parameters
        self.sent: list[tuple[str, dict[str, Any]]] = []

    def receive_parameter(self) -> Any:
        return {"parameter_id": 0, "parameters": self.parameters}

    def send_metric(self, type: Any, parameter_id: Any, trial_job_id: str, sequence: int, value: Any) -> None:
        self.sent.append((type, value))


def test_distilled_trial_is_measured_on_patients_that_no_weight_of_it_has_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "experiment"
    options = ExperimentOptions(trials=1, distil=True)
    write_experiment(load_config(write_run(tmp_path)), options, folder, progress=Silent())
    halves = []
    for seed in (7, 8):
        output = tmp_path / f"output{seed}"
        output.mkdir()
        monkeypatch.setenv("NNI_OUTPUT_DIR", str(output))
        nni_side = OneTrial({"seed": seed, "search.pretrain_epochs": 0, "search.search_epochs": 1, "train.epochs": 1})
        monkeypatch.setattr(trial_command_channel, "_channel", nni_side)
        run_trial(folder / "code" / "trial.yaml", TrialChannel())
        work = max(folder.glob("trials/*"), key=lambda path: path.stat().st_mtime_ns)
        trained_the_supernet = json.loads((work / "search" / "weight_patients.json").read_text())
        patients = json.loads((work / "patients.json").read_text())
        assert patients["measured"] and not set(patients["measured"]) & {*trained_the_supernet, *patients["trained"]}
        halves.append(patients)
        *epochs, (kind, final) = nni_side.sent
        assert [(epoch["stage"], epoch["epoch"]) for _, epoch in epochs] == [(0, 0), (1, 0), (2, 0)]
        assert kind == "FINAL" and tuple(final) == FINAL_KEYS and final["seed"] == seed
    assert halves[0] == halves[1]  # other seeds, the same patients
    folds = PreparedCohort.load(folder / "run" / "preprocess").folds
    cases = PreparedCohort.load(folder / "run" / "preprocess").cases
    assert not {cases[name].patient_id for name in folds.test(0)} & {*halves[0]["trained"], *halves[0]["measured"]}
    assert tensorboard_tags(output / "tensorboard") >= {
        "search/loss_weights",
        "teacher/loss",
        "train/loss",
        "architecture",
    }
