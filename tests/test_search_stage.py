"""The search stage end to end with every registered strategy."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from glioma_nas.architecture import Architecture
from glioma_nas.config import RunConfig, parse_config
from glioma_nas.errors import ConfigError, PluginError, ResourceError
from glioma_nas.files import read_json
from glioma_nas.pipeline import Pipeline
from glioma_nas.progress import Silent
from glioma_nas.registry import strategies
from glioma_nas.report.records import read_records
from glioma_nas.space_building import build_space
from glioma_nas.testing.phantoms import write_phantom_cohort

pytestmark = pytest.mark.slow

HAS_TIANSHOU = all(importlib.util.find_spec(name) is not None for name in ("tianshou", "gym"))

OPTIONS: dict[str, dict[str, Any]] = {
    "co_search": {"recalibration_batches": 1, "finetune_steps": 1},
    "latency_darts": {"recalibration_batches": 1, "finetune_steps": 1},
    "random_with_shared_weights": {"recalibration_batches": 1, "n_candidates": 3},
    "nni.darts": {},
    "nni.gumbel_darts": {"temperature": [1, 0.5]},
    "nni.proxyless": {},
    "nni.random_one_shot": {},
    "nni.enas": {"batches_per_update": 2},
    "nni.random": {"trials": 2},
    "nni.grid": {"trials": 2},
    "nni.evolution": {"trials": 3, "population_size": 2},
    "nni.tpe": {"trials": 3},
    "nni.policy_rl": {"trials": 2},
}
MULTI_TRIAL = [name for name, options in OPTIONS.items() if "trials" in options]
NEEDS_TIANSHOU = ("nni.enas", "nni.policy_rl")


def make_config(folder: Path, strategy: str, **search: Any) -> RunConfig:
    space_options: dict[str, Any] = {"preset": "tiny", "operators": ["skip", "conv3x3"]}
    if strategy == "nni.proxyless":
        space_options |= {"widths": [2], "end_widths": [2]}
    return parse_config(
        {
            "cohort": {"sheet": str(folder / "cohort" / "cohort.csv"), "sequences": ["t1ce", "flair"]},
            "preprocess": {"crop_size_px": 48, "image_size_px": 32, "workers": 1},
            "folds": {"n_folds": 2},
            "latency": {"backend": "torch", "threads": 1, "warmup_runs": 0, "runs": 1},
            "search": {
                "strategy": strategy,
                "strategy_options": OPTIONS.get(strategy, {}),
                "space_options": space_options,
                "pretrain_epochs": 1,
                "search_epochs": 1,
                "steps_per_epoch": 2,
                "batch_size": 4,
                **search,
            },
        },
        source="test",
        folder=folder,
    )


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("search")
    write_phantom_cohort(folder / "cohort", 8, 0)
    return folder


def run_search(folder: Path, strategy: str, **search: Any) -> Path:
    # One run folder for all: the earlier stages are made once for each space, the search anew for each strategy.
    Pipeline(make_config(folder, strategy, **search), folder / "run", Silent()).run(["preprocess", "latency", "search"])
    return folder / "run" / "search"


def test_every_registered_strategy_is_tested() -> None:
    in_tree = [entry.name for entry in strategies.entries() if entry.origin == "in-tree"]
    assert sorted(OPTIONS) == in_tree


@pytest.mark.parametrize("strategy", OPTIONS)
def test_search_leaves_a_legal_student_that_can_be_built(run_folder: Path, strategy: str) -> None:
    if strategy in NEEDS_TIANSHOU and not HAS_TIANSHOU:
        with pytest.raises(PluginError, match="pip install"):
            run_search(run_folder, strategy)
        return
    search = run_search(run_folder, strategy)
    results = read_json(search / "manifest.json")["results"]
    space = build_space(make_config(run_folder, strategy))
    student = Architecture.load(search / "student.json")
    assert space.architecture(student.sample()) == student
    assert space.derive(student).eval()(torch.zeros(1, 2, 32, 32)).shape == (1, 2, 32, 32)
    assert results["student"]["id"] == student.id
    assert (search / "trials.csv").is_file() == (strategy in MULTI_TRIAL)
    assert (search / "history.csv").is_file() == (strategy not in MULTI_TRIAL)
    assert not (search / "supernet").exists()
    records = read_records({"preprocess": run_folder / "run" / "preprocess", "search": search}, [])
    assert (records.search_history is None) == (strategy in MULTI_TRIAL)
    followed = strategy in ("co_search", "latency_darts")
    assert any("latency_weight" in note for note in results["strategy_notes"]) != followed


def test_trials_are_listed_and_the_best_target_is_the_student(run_folder: Path) -> None:
    search = run_search(
        run_folder,
        "nni.random",
        strategy_options={"trials": 4, "target_latency_ms": 1e-3, "target_exponents": [-1, -1]},
    )
    trials = pd.read_csv(search / "trials.csv")
    assert len(trials) == 4 and trials["id"].is_unique and (trials["status"] == "trained").all()
    target = trials["dice"] / trials["table_latency_ms"]
    assert target.max() > 0
    assert trials["id"][target.idxmax()] == read_json(search / "student.json")["id"]


def test_search_cut_off_between_trials_repeats_no_finished_trial(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from glioma_nas.evaluators.segmentation import SegmentationEvaluator

    options = {"strategy_options": {"trials": 3}, "learning_rate": 0.03}
    evaluate = SegmentationEvaluator._evaluate_trial
    trained: list[str] = []

    def fail_in_the_third(self: Any, model: Any, sample: Any) -> Any:
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(str(sample))
        return evaluate(self, model, sample)

    with monkeypatch.context() as patched:
        patched.setattr(SegmentationEvaluator, "_evaluate_trial", fail_in_the_third)
        with pytest.raises(KeyboardInterrupt):
            run_search(run_folder, "nni.tpe", **options)
    partial = run_folder / "run" / ".search.partial" / "supernet" / "trials"
    finished = {path: path.stat().st_mtime_ns for path in partial.glob("*/result.json")}
    assert len(finished) == 2
    seen: dict[Path, int] = {}

    def watch(self: Any, model: Any, sample: Any) -> Any:
        outcome = evaluate(self, model, sample)
        seen.update({path: path.stat().st_mtime_ns for path in finished})
        return outcome

    monkeypatch.setattr(SegmentationEvaluator, "_evaluate_trial", watch)
    search = run_search(run_folder, "nni.tpe", **options)
    assert seen == finished
    assert len(pd.read_csv(search / "trials.csv")) == 3


def test_unknown_strategy_option_names_the_key(run_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"strategy_options of 'nni\.random': unknown option 'trails'"):
        run_search(run_folder, "nni.random", strategy_options={"trails": 3})


@pytest.mark.parametrize("strategy", ["co_search", "nni.darts", "nni.gumbel_darts"])
def test_search_that_cannot_fit_into_memory_is_refused_with_a_batch_size_that_can(
    run_folder: Path, strategy: str
) -> None:
    with pytest.raises(ResourceError, match=r"set search\.batch_size to \d+ or less"):
        run_search(run_folder, strategy, batch_size=10**7)


def test_loss_of_the_search_comes_from_the_configuration(run_folder: Path) -> None:
    named = {"loss": "dice_ce", "auxiliary_weight": 0.5, "weight_decay": 0.0, "logit_weights": {"scale_2": 2.0}}
    options = {"recalibration_batches": 1, "finetune_steps": 0}
    first = []
    for chosen in ({}, named):
        search = run_search(run_folder, "latency_darts", strategy_options=options, **chosen)
        first.append(float(pd.read_csv(search / "history.csv").loss_weights.iloc[0]))
    # An untrained network: focal CE of two classes is near 0.25·ln 2, cross-entropy alone near ln 2.
    assert first[0] < 0.5 < first[1]
    with pytest.raises(ConfigError, match=r"logit_weights.pair_2_16: no such map; allowed: pair_"):
        run_search(run_folder, "latency_darts", strategy_options=options, logit_weights={"pair_2_16": 1.0})
