"""NNI experiments without a manager: the loopback check, a trial's settings, figures and channel."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from nni.algorithms.hpo.evolution_tuner import EvolutionTuner
from nni.algorithms.hpo.gridsearch_tuner import GridSearchTuner
from nni.algorithms.hpo.tpe_tuner import TpeTuner
from nni.runtime import trial_command_channel

from glioma_nas.architecture import Architecture
from glioma_nas.config import RunConfig, parse_config
from glioma_nas.errors import ConfigError, DivergedError, ExperimentError, GliomaNasError, StorageError
from glioma_nas.nni_experiments import manager
from glioma_nas.nni_experiments.experiment_folder import (
    TUNERS,
    ExperimentOptions,
    _nni_config,
    architecture_space,
    hyper_parameters,
    shareable,
)
from glioma_nas.nni_experiments.loopback import (
    PRELOAD,
    checked_host,
    exposed_addresses,
    guard_state,
    guarded_environment,
    install_guard,
    remove_guard,
)
from glioma_nas.nni_experiments.trial_channel import TrialChannel
from glioma_nas.nni_experiments.trial_metrics import FINAL_KEYS, TrialResult, intermediate_metrics
from glioma_nas.nni_experiments.trial_pages import TrialBoard
from glioma_nas.nni_experiments.trial_run import sampled_architecture
from glioma_nas.nni_experiments.trial_settings import TrialSettings, load_trial_settings
from glioma_nas.registry import search_spaces

RUN = {
    "cohort": {"sheet": "cohort.csv"},
    "preprocess": {"image_size_px": 32},
    "search": {"space_options": {"preset": "tiny"}},
}
RESULT = TrialResult(
    dice=0.8,
    hd95_mm=4.0,
    latency_ms=4.0,
    latency_p95_ms=5.0,
    macs_g=0.1,
    params_m=0.2,
    auc_idh=None,
    auc_ki67=None,
    fold=0,
    seed=3,
)


def config(**changes: Any) -> RunConfig:
    return parse_config({**RUN, **changes}, source="test", folder=Path("/nowhere"))


def settings(**changes: Any) -> TrialSettings:
    return TrialSettings(
        **{
            "kind": "co-search",
            "run_folder": "run",
            "trials_folder": "trials",
            "inputs": {"preprocess": "a", "latency": "b"},
            "target_latency_ms": 8.0,
            "target_exponents": (-0.07, -0.07),
            "config": config().model_dump(mode="json"),
            **changes,
        }
    )


# The door


@pytest.mark.parametrize(("host", "exposed"), [("127.0.0.1", False), ("0.0.0.0", True)])
def test_sockets_of_a_process_and_its_children_are_seen(host: str, exposed: bool) -> None:
    with socket.socket() as server:
        server.bind((host, 0))
        server.listen()
        port = server.getsockname()[1]
        found = exposed_addresses(os.getpid())
    assert (f"{host}:{port}" in found) == exposed


def test_process_that_may_not_be_looked_at_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(self: psutil.Process, kind: str) -> None:
        raise psutil.AccessDenied(self.pid)

    monkeypatch.setattr(psutil.Process, "net_connections", denied)
    with pytest.raises(ExperimentError, match=f"refused: NNI's process {os.getpid()} does not show where it listens"):
        exposed_addresses(os.getpid())


def test_environment_keeps_the_users_node_options_and_is_idempotent() -> None:
    once = guarded_environment({"NODE_OPTIONS": "--trace-warnings"})
    assert once["NODE_OPTIONS"].endswith("loopback.js --trace-warnings")
    assert guarded_environment(once) == once
    with pytest.raises(ConfigError, match="host 'everywhere': give an IP address"):
        guarded_environment({}, host="everywhere")


def test_guard_reaches_every_python_process_and_can_be_removed(tmp_path: Path) -> None:
    install_guard(tmp_path)
    code = f"import site, os; site.addsitedir({str(tmp_path)!r}); print(os.environ['NODE_OPTIONS'])"
    plain = {name: value for name, value in os.environ.items() if name != "NODE_OPTIONS"}
    for options, expected in (({}, 1), ({"NODE_OPTIONS": "--trace-warnings"}, 2)):
        done = subprocess.run([sys.executable, "-c", code], env={**plain, **options}, capture_output=True, text=True)
        assert len(done.stdout.replace("--require ", "").split()) == expected, done.stderr
        assert "loopback.js" in done.stdout
    assert guard_state(tmp_path)[0] == "ok"
    assert remove_guard(tmp_path)
    assert not remove_guard(tmp_path)
    assert guard_state(tmp_path)[0] == "absent"


def test_guard_that_outlives_the_package_does_nothing(tmp_path: Path) -> None:
    guard = install_guard(tmp_path)
    guard.write_text(guard.read_text().replace(str(PRELOAD), str(tmp_path / "gone" / PRELOAD.name)))
    assert guard_state(tmp_path)[0] == "stale"
    code = f"import site, os; site.addsitedir({str(tmp_path)!r}); print(os.environ.get('NODE_OPTIONS'))"
    plain = {name: value for name, value in os.environ.items() if name != "NODE_OPTIONS"}
    done = subprocess.run([sys.executable, "-S", "-c", code], env=plain, capture_output=True, text=True, check=True)
    assert done.stdout == "None\n"


@pytest.mark.parametrize("host", ["::1", "127.0.0.2"])
def test_other_loopback_addresses_are_refused(host: str) -> None:
    with pytest.raises(ConfigError, match=r"this machine reaches NNI at 127\.0\.0\.1 without --expose"):
        checked_host(host)


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8080"),
        ("2001:DB8:0::1", "http://[2001:db8::1]:8080"),
        ("::", "http://127.0.0.1:8080"),
    ],
)
def test_address_of_the_web_ui_can_be_clicked(host: str, url: str) -> None:
    assert manager.RunningExperiment("abc", 8080, 1, checked_host(host)).url == url


# Figures


def test_final_metrics_are_flat_fixed_and_ranked_by_target() -> None:
    metrics = RESULT.final_metrics(target_latency_ms=8.0, target_exponents=(-0.5, -1.0))
    assert tuple(metrics) == FINAL_KEYS
    assert metrics["default"] == pytest.approx(0.8 * 2**0.5)
    slow = RESULT.final_metrics(target_latency_ms=2.0, target_exponents=(-0.5, -1.0))
    assert slow["default"] == pytest.approx(0.4)
    assert metrics["auc_idh"] is None


@pytest.mark.parametrize("name", ["dice", "latency_ms", "auc_idh"])
def test_result_that_is_no_number_fails_the_trial(name: str) -> None:
    broken = TrialResult(**{**vars(RESULT), name: float("nan")})
    with pytest.raises(DivergedError, match=f"'{name}' is nan|'default' is nan"):
        broken.final_metrics(target_latency_ms=8.0, target_exponents=(-0.07, -0.07))


def test_result_of_zero_is_not_shown_as_no_result() -> None:
    zero = TrialResult(**{**vars(RESULT), "dice": 0.0})
    default = zero.final_metrics(target_latency_ms=8.0, target_exponents=(-0.07, -0.07))["default"]
    assert default is not None and 0 < default < 1e-5


@given(st.floats(0, 1e6), st.floats(0, 1e6))
def test_intermediate_default_falls_with_the_loss(first: float, second: float) -> None:
    low, high = sorted((first, second))
    better, worse = (intermediate_metrics(0, 0, {"loss": loss})["default"] for loss in (low, high))
    assert 0 < worse <= better <= 1


def test_epoch_without_a_loss_fails_the_trial() -> None:
    with pytest.raises(DivergedError, match="epoch 3: no finite loss"):
        intermediate_metrics(1, 2, {"learning_rate": 0.1})


# Settings


def test_hyper_parameters_become_configuration(tmp_path: Path) -> None:
    found = settings(strategy_options={"latency_darts": {"finetune_steps": 7}}).run_config(
        {
            "seed": 5,
            "latency_weight": 0.5,
            "strategy": "latency_darts",
            "operators": "skip+conv3x3",
            "target_latency_ms": 2.0,
            "search.batch_size": 3,
        },
        folder=tmp_path,
    )
    assert (found.seed, found.search.latency_weight, found.search.batch_size) == (5, 0.5, 3)
    assert found.search.space_options["operators"] == ["skip", "conv3x3"]
    assert found.search.strategy_options == {"finetune_steps": 7, "target_latency_ms": 2.0}


def test_target_latency_reaches_only_strategies_that_have_one(tmp_path: Path) -> None:
    found = settings().run_config({"strategy": "nni.darts", "target_latency_ms": 2.0}, folder=tmp_path)
    assert found.search.strategy_options == {}


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"sead": 1}, "hyper-parameter 'sead': did you mean 'seed'"),
        ({"search.epochz": 1}, "unknown key 'search.epochz'"),
        ({"seed": -1}, "'seed' is -1"),
    ],
)
def test_wrong_hyper_parameter_is_one_line(parameters: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        settings().run_config(parameters, folder=tmp_path)


def test_same_parameters_find_the_same_folder_wherever_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    first = settings().work_folder({"seed": 1, "latency_weight": 0.1})
    assert settings().work_folder({"latency_weight": 0.1, "seed": 1}) == first
    assert settings().work_folder({"latency_weight": 0.1, "seed": 2}) != first
    assert settings(target_latency_ms=1.0).work_folder({"latency_weight": 0.1, "seed": 1}) != first
    monkeypatch.setenv("GLIOMA_NAS_NNI_TRIALS", "/scratch/trials")
    assert settings().work_folder({"seed": 1, "latency_weight": 0.1}) == Path("/scratch/trials") / first.name


def test_inputs_must_be_those_of_the_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageError, match="no finished 'preprocess' stage; mount the shared folder"):
        settings(run_folder=tmp_path).stage_folder("preprocess")
    (tmp_path / "staged" / "preprocess").mkdir(parents=True)
    (tmp_path / "staged" / "preprocess" / "manifest.json").write_text("{}")
    monkeypatch.setenv("GLIOMA_NAS_NNI_RUN", str(tmp_path / "staged"))
    with pytest.raises(StorageError, match="not the 'preprocess' stage that this experiment was written for"):
        settings(run_folder=tmp_path).stage_folder("preprocess")


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [", "not valid YAML"), ("kind: co-search", "'run_folder': Field required"), (None, "No such")],
)
def test_unusable_trial_settings_are_one_line(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "trial.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_trial_settings(tmp_path / "trial.yaml")


# Experiment files


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "cosearch"}, "unknown kind 'cosearch': did you mean 'co-search'"),
        ({"tuner": "Evolutoin"}, "unknown tuner 'Evolutoin': did you mean 'Evolution'"),
        ({"assessor": "Median"}, "unknown assessor 'Median'"),
        ({"assessor": "Curvefitting"}, "a co-search trial has one for each of its stages.* take Medianstop"),
        ({"trials": 0}, "trials is 0; give at least 1"),
        ({"target_latency_ms": 0.0}, "target_latency_ms is 0; give a time above 0 ms"),
        ({"markers": ("idh",)}, "marker 'idh': .* it holds: none"),
        ({"kind": "architecture", "strategies": ("co_search",)}, "leave them out here"),
        ({"kind": "architecture", "distil": True}, "leave --distil out"),
    ],
)
def test_wrong_option_is_found_before_anything_is_written(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ExperimentOptions(**options).check(config())


def test_trials_are_not_told_where_the_files_about_patients_are() -> None:
    private = {"sheet": "jane.csv", "clinical": "jane.xlsx", "salt_file": "jane.salt"}
    told = shareable(config(cohort=private, folds={"file": "jane.json"}, classify={"mask_provenance": "jane.json"}), [])
    assert "jane" not in json.dumps(told)
    parse_config(told, source="trial", folder=Path())


def test_space_for_tuners_gives_samples_that_trials_understand() -> None:
    space = search_spaces.get("nasbranet")("tiny", image_size_px=32, in_channels=2, n_classes=2)
    rendered = architecture_space(space)
    assert set(rendered) == set(space.simplify())
    assert not any("/" in label for label in rendered)
    sample = {label: choice["_value"][0] for label, choice in json.loads(json.dumps(rendered)).items()}
    architecture = sampled_architecture(space, sample)
    assert Architecture.from_json(architecture.to_json()) == architecture
    assert space.derive(architecture) is not None
    with pytest.raises(ConfigError, match="choice 'op_s2_l1' = 'conv9x9'"):
        sampled_architecture(space, {**sample, "op_s2_l1": "conv9x9"})
    del sample["branches"]
    with pytest.raises(ConfigError, match=r"the sample does not fit .* branches is in one of them only"):
        sampled_architecture(space, sample)


@pytest.mark.parametrize(
    ("tuner", "name"), [(TpeTuner, "TPE"), (EvolutionTuner, "Evolution"), (GridSearchTuner, "GridSearch")]
)
def test_tuners_sample_architectures_and_take_their_results(tuner: Any, name: str) -> None:
    space = search_spaces.get("nasbranet")("tiny", image_size_px=32, in_channels=2, n_classes=2)
    found = tuner(**TUNERS[name])
    found.update_search_space(json.loads(json.dumps(architecture_space(space))))
    for number in range(3):
        sample = found.generate_parameters(number)
        architecture = sampled_architecture(space, sample)
        assert Architecture.from_json(architecture.to_json()) == architecture
        found.receive_trial_result(number, sample, {"default": 0.1 * number})
        found.trial_end(number, True)


def test_curve_fitting_knows_how_many_epochs_a_trial_has(tmp_path: Path) -> None:
    options = ExperimentOptions(assessor="Curvefitting", kind="architecture")
    content = _nni_config(config(train={"epochs": 5}), options, tmp_path)
    assert content["assessor"]["classArgs"]["epoch_num"] == 5


def test_search_can_be_narrowed_to_a_comparison() -> None:
    sets = (("skip", "conv3x3"), ("skip", "zoomed_conv"))
    options = ExperimentOptions(operator_sets=sets, seeds=2, searched=("operators", "seed"))
    assert hyper_parameters(config(), options) == {
        "seed": {"_type": "choice", "_value": [0, 1]},
        "operators": {"_type": "choice", "_value": ["skip+conv3x3", "skip+zoomed_conv"]},
    }
    with pytest.raises(ConfigError, match="hyper-parameter 'operaters': did you mean 'operators'"):
        hyper_parameters(config(), ExperimentOptions(operator_sets=sets, searched=("operaters",)))


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"seed": {"_type": "chioce", "_value": [1]}}, "malformed: .*unsupported type"),
        ({"seed": [1, 2]}, "malformed: .*expect a dict"),
        ({"seed": {"_type": "choice", "_value": []}}, "malformed: 'seed' has nothing to choose from"),
        ({"w": {"_type": "uniform", "_value": [1]}}, "malformed"),
        ({}, "it holds no hyper-parameter"),
        ("{", "NNI cannot use it"),
    ],
)
def test_malformed_search_space_is_refused_before_the_start(tmp_path: Path, space: Any, message: str) -> None:
    (tmp_path / "search_space.json").write_text(space if isinstance(space, str) else json.dumps(space))
    (tmp_path / "config.yml").write_text(
        yaml.safe_dump(
            {
                "searchSpaceFile": "search_space.json",
                "trialCommand": "true",
                "trialConcurrency": 1,
                "tuner": {"name": "Random"},
                "trainingService": {"platform": "local"},
            }
        )
    )
    with pytest.raises(ConfigError, match=message):
        manager.load_nni_config(tmp_path)


def test_missing_experiment_and_configuration_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nni.tools.nnictl.config_utils import Experiments

    monkeypatch.setattr(Experiments.__init__, "__defaults__", (str(tmp_path / "nni-experiments"),))
    with pytest.raises(ExperimentError, match="no NNI experiment 'abc'; the latest are: none"):
        manager.find("abc")
    with pytest.raises(ConfigError, match="no such file; write one with"):
        manager.load_nni_config(tmp_path)


# The channel


class RecordingChannel(trial_command_channel.TrialCommandChannel):
    """What NNI offers for other training services: a channel of one's own."""

    parameters: ClassVar[dict[str, Any] | None] = {"parameter_id": 4, "parameters": {"seed": 1}}

    def __init__(self) -> None:
        self.sent: list[tuple[str, int, Any]] = []

    def receive_parameter(self) -> Any:
        return self.parameters

    def send_metric(self, type: Any, parameter_id: Any, trial_job_id: str, sequence: int, value: Any) -> None:
        assert parameter_id == 4
        self.sent.append((type, sequence, value))


@pytest.fixture
def nni_side(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> RecordingChannel:
    recorder = RecordingChannel()
    monkeypatch.setattr(trial_command_channel, "_channel", recorder)
    monkeypatch.setenv("NNI_OUTPUT_DIR", str(tmp_path / "output"))
    (tmp_path / "output").mkdir()
    return recorder


def test_epochs_are_shown_once_across_interruptions(nni_side: RecordingChannel, tmp_path: Path) -> None:
    rows = [intermediate_metrics(0, epoch, {"loss": 1.0 / (1 + epoch)}) for epoch in range(4)]
    first = TrialChannel()
    first.open(tmp_path / "work")
    for row in rows[:2]:
        first.report_epoch(row)
    again = TrialChannel()
    again.open(tmp_path / "work")
    again.report_epoch({**rows[1], "loss": 0.5001})  # cut off before its checkpoint: done again, on a GPU nearly equal
    for row in rows[2:]:
        again.report_epoch(row)
    again.report_final({"default": 1.0})
    assert nni_side.sent == [("PERIODICAL", n, row) for n, row in enumerate(rows)] + [("FINAL", 0, {"default": 1.0})]


def test_trial_that_finds_itself_done_shows_its_whole_curve(
    nni_side: RecordingChannel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [intermediate_metrics(0, epoch, {"loss": 1.0}) for epoch in range(3)]
    first = TrialChannel()
    first.open(tmp_path / "work")
    for row in rows:
        first.report_epoch(row)
    (tmp_path / "other").mkdir()
    monkeypatch.setenv("NNI_OUTPUT_DIR", str(tmp_path / "other"))
    nni_side.sent.clear()
    TrialChannel().open(tmp_path / "work")
    assert [row for _, _, row in nni_side.sent] == rows


def test_trial_without_parameters_says_so(nni_side: RecordingChannel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RecordingChannel, "parameters", None)
    with pytest.raises(GliomaNasError, match="NNI gave this trial no hyper-parameters"):
        TrialChannel()


@pytest.mark.slow
def test_tensorboard_keeps_what_an_interrupted_trial_wrote(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = TrialBoard(tmp_path)
    assert first.is_new
    first.add_epoch("search", 0, {"loss": 1.0})
    first.__exit__()
    with TrialBoard(tmp_path) as again:
        assert not again.is_new
        again.add_epoch("search", 1, {"loss": 0.5})
        again.add_epoch("train", 2, {"loss": 0.7})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(item.step, item.value) for item in events.Scalars("search/loss")] == [(0, 1.0), (1, 0.5)]
    assert [item.step for item in events.Scalars("train/loss")] == [2]
