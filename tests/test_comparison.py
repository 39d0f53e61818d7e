"""Strategies are compared at one budget, on one split, with one clock."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from finished_run import CONFIG
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from glioma_nas import training
from glioma_nas.cli import app
from glioma_nas.comparison.budget import epoch_seconds, search_steps, used_steps, with_budget, without_limit
from glioma_nas.comparison.cells import made_from, plan
from glioma_nas.comparison.contest import scoring_steps
from glioma_nas.comparison.ranking import rank_correlation
from glioma_nas.comparison.searching import search_apart
from glioma_nas.comparison.summary import mean_interval, summarise_contest
from glioma_nas.config import RunConfig, parse_config
from glioma_nas.errors import ConfigError, PluginError, ResourceError, SearchError, UnknownNameError
from glioma_nas.pareto import hypervolume, pareto_front
from glioma_nas.pipeline import Pipeline, StageContext
from glioma_nas.progress import Silent
from glioma_nas.registry import strategies as registered
from glioma_nas.space_building import build_strategy
from glioma_nas.stages.search import run as search_stage
from glioma_nas.strategies import nni_faults
from glioma_nas.strategies.random_paths import RandomWithSharedWeights
from glioma_nas.testing.phantoms import write_phantom_cohort

SMALL: dict[str, Any] = {
    **CONFIG,
    "search": {**CONFIG["search"], "search_epochs": 4, "steps_per_epoch": 1},
    "train": {"epochs": 1, "steps_per_epoch": 2, "batch_size": 4},
    "classify": {},
}


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return parse_config(SMALL, source="test", folder=tmp_path)


def test_every_strategy_gets_the_same_steps(config: RunConfig) -> None:
    for strategy in ("co_search", "nni.darts", "nni.random", "nni.evolution"):
        own = with_budget(config, strategy, seed=5, trials=2)
        assert used_steps(own) == search_steps(config) == 4
        assert own.seed == 5 and own.search.strategy == strategy and own.train.kd_weight == 0


def test_options_belong_to_the_configured_strategy_alone(config: RunConfig) -> None:
    assert with_budget(config, "random_with_shared_weights", seed=0).search.strategy_options["n_candidates"] == 2
    assert "n_candidates" not in with_budget(config, "co_search", seed=0).search.strategy_options


def test_all_strategies_look_for_the_same(config: RunConfig) -> None:
    options = {"n_candidates": 2, "target_latency_ms": 3.0, "target_exponents": (0.0, -0.5), "finetune_steps": 7}
    given = config.model_copy(update={"search": config.search.model_copy(update={"strategy_options": options})})
    objective = {"target_latency_ms": 3.0, "target_exponents": (0.0, -0.5)}
    assert with_budget(given, "nni.random", seed=0, trials=2).search.strategy_options == {**objective, "trials": 2}
    scoring = {"finetune_steps": 7, "recalibration_batches": 8}
    assert with_budget(given, "co_search", seed=0).search.strategy_options == {**objective, **scoring}


@pytest.mark.parametrize("strategy", ["co_search", "latency_darts", "random_with_shared_weights"])
def test_candidates_of_all_strategies_are_scored_alike_when_nothing_is_said(config: RunConfig, strategy: str) -> None:
    given = config.model_copy(update={"search": config.search.model_copy(update={"strategy_options": {}})})
    built = build_strategy(
        with_budget(given, strategy, seed=0), profiler=Unmeasured(), seed=0
    )  # their own defaults are 100, 100 and 0 steps
    assert (built.finetune_steps, built.recalibration_batches) == (0, 8)


@pytest.mark.parametrize(
    "strategy", ["co_search", "random_with_shared_weights", "nni.random", "nni.evolution", "nni.tpe"]
)
def test_hard_limit_binds_every_strategy_that_ranks_networks(config: RunConfig, strategy: str) -> None:
    limited = config.search.model_copy(update={"strategy_options": {"latency_limit_ms": 2.5}})
    given = config.model_copy(update={"search": limited})
    own = with_budget(given, strategy, seed=0, trials=2)
    assert build_strategy(own, profiler=Unmeasured(), seed=0).latency_limit_ms == 2.5
    filtered = with_budget(given, "nni.random_one_shot", seed=0).search.strategy_options
    assert filtered == {"filter": {"max": 2.5}}
    for filters, bound in (({"min": 1.0, "max": 9.0}, {"min": 1.0, "max": 2.5}), ({"max": 2.0}, {"max": 2.0})):
        update = {"strategy": "nni.random_one_shot", "strategy_options": {"latency_limit_ms": 2.5, "filter": filters}}
        of_user = given.model_copy(update={"search": given.search.model_copy(update=update)})
        assert with_budget(of_user, "nni.random_one_shot", seed=0).search.strategy_options["filter"] == bound
    assert without_limit(given, [strategy, "nni.darts", "nni.random_one_shot"]) == ["nni.darts"]
    assert without_limit(config, ["nni.darts"]) == []


class Unmeasured:
    """Where a profiler will stand."""

    def profile(self, sample: Any) -> float:
        raise AssertionError("asked for a latency before there is one")


def test_wall_time_is_shared_evenly_by_all_epochs_of_a_search(config: RunConfig, tmp_path: Path) -> None:
    for strategy, trials in (("co_search", 1), ("nni.random", 2)):
        own = with_budget(config, strategy, seed=0, trials=2, minutes=2.0)
        epochs = own.search.pretrain_epochs + own.search.search_epochs
        assert epoch_seconds(own, 2.0) * epochs * trials == pytest.approx(120.0)
        assert own.search.steps_per_epoch is not None and own.search.steps_per_epoch > 1000
    (cell,) = plan(config, ["co_search"], n_seeds=1, trials=1, out=tmp_path, minutes=2.0)
    assert cell.epoch_s == pytest.approx(30.0)
    assert plan(config, ["co_search"], n_seeds=1, trials=1, out=tmp_path)[0].epoch_s is None
    with pytest.raises(ConfigError, match=r"--minutes is 0; give the wall time of a search, above 0"):
        plan(config, ["co_search"], n_seeds=1, trials=1, out=tmp_path, minutes=0.0)


def test_what_cannot_run_is_found_before_anything_does(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def planned(name: str, **changes: Any) -> None:
        sections = {
            key: getattr(config, key).model_copy(update=value) if isinstance(value, dict) else value
            for key, value in changes.items()
        }
        plan(config.model_copy(update=sections), [name], n_seeds=1, trials=2, out=tmp_path)

    with pytest.raises(ConfigError, match=r"nni.proxyless cannot search values inside layers"):
        planned("nni.proxyless")
    with pytest.raises(ConfigError, match=r"marker_weight: 'nni.darts' ranks no single networks"):
        planned("nni.darts", search={"marker_weight": 0.5})
    with pytest.raises(ConfigError, match=r"one device; set train.devices: 1"):
        planned("co_search", train={"devices": 2})
    with pytest.raises(UnknownNameError, match=r"unknown loss 'focl'"):
        planned("co_search", search={"loss": "focl"})
    monkeypatch.setattr(nni_faults.importlib.util, "find_spec", lambda package: None)
    with pytest.raises(PluginError, match=r"nni.policy_rl needs tianshou"):
        planned("nni.policy_rl")


def test_supernets_score_networks_for_the_rank_correlation_when_asked(config: RunConfig) -> None:
    assert with_budget(config, "co_search", seed=0, ranked=9).search.strategy_options["sampled_networks"] == 9
    assert "sampled_networks" not in with_budget(config, "co_search", seed=0).search.strategy_options
    assert "sampled_networks" not in with_budget(config, "nni.darts", seed=0, ranked=9).search.strategy_options


def test_rank_correlation_is_kendalls_and_none_where_it_is_not_defined() -> None:
    alone = {"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.4}
    assert rank_correlation({"a": 1.0, "b": 3.0, "c": 2.0, "d": 4.0}, alone)["tau"] == pytest.approx(4 / 6)
    assert rank_correlation(dict.fromkeys(alone, 0.0), alone) == {"n": 4, "tau": None, "p": None}
    assert rank_correlation({"a": 1.0, "b": 3.0}, alone) == {"n": 2, "tau": None, "p": None}


def test_nothing_is_taken_over_from_another_cohort(config: RunConfig, tmp_path: Path) -> None:
    cells = plan(config, ["co_search"], n_seeds=1, trials=1, out=tmp_path)
    inputs = {stage: tmp_path / "shared" / stage for stage in ("preprocess", "latency")}

    def folder(cohort: str) -> Path:
        for path in inputs.values():
            path.mkdir(parents=True, exist_ok=True)
            (path / "manifest.json").write_text(json.dumps({"key": cohort}))
        return made_from(inputs, cells)[0].folder

    first = folder("a")
    assert folder("a") == first != folder("b")


def test_steps_on_candidates_are_counted_beside_the_budget() -> None:
    found = {"finetune_steps": 100, "student": {"candidates": [{}, {}, {}]}, "teacher": {"candidates": [{}]}}
    assert scoring_steps(found) == 400


def test_budget_that_does_not_suffice_is_refused(config: RunConfig) -> None:
    with pytest.raises(ConfigError, match=r"nni.random: 4 epochs cannot be shared by 5 trials; lower --trials"):
        with_budget(config, "nni.random", seed=0, trials=5)
    open_ended = config.model_copy(update={"search": config.search.model_copy(update={"steps_per_epoch": None})})
    with pytest.raises(ConfigError, match=r"compare needs search.steps_per_epoch"):
        plan(open_ended, ["co_search"], n_seeds=1, trials=1, out=Path())


@pytest.mark.parametrize(
    ("names", "error"), [(["co_search"] * 2, ConfigError), ([], ConfigError), (["cosearch"], UnknownNameError)]
)
def test_impossible_strategies_are_refused(config: RunConfig, names: list[str], error: type[Exception]) -> None:
    with pytest.raises(error):
        plan(config, names, n_seeds=1, trials=2, out=Path())


def test_hypervolume_is_the_dominated_share() -> None:
    assert hypervolume([(2.0, 0.5)], slowest_ms=4.0) == pytest.approx(0.25)
    assert hypervolume([(2.0, 0.5), (3.0, 0.4)], slowest_ms=4.0) == pytest.approx(0.25)
    assert hypervolume([(0.0, 1.0)], slowest_ms=4.0) == pytest.approx(1.0)


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 10)), min_size=1, max_size=8))
def test_hypervolume_equals_counting_cells(points: list[tuple[int, int]]) -> None:
    # Cell (i, j) of the grid is dominated when some point is at most at i and at least at j + 1.
    cells = sum(
        any(latency <= i and dice >= j + 1 for latency, dice in points)
        for i, j in itertools.product(range(20), range(10))
    )
    found = hypervolume([(float(latency), dice / 10) for latency, dice in points], slowest_ms=20.0)
    assert found == pytest.approx(cells / 200)


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), min_size=1, max_size=10))
def test_front_holds_exactly_what_nobody_beats(points: list[tuple[int, int]]) -> None:
    runs = pd.DataFrame(points, columns=["latency_ms", "dice"]).astype(float)
    front = set(pareto_front(runs.latency_ms, runs.dice))
    for index, (latency, dice) in enumerate(points):
        beaten = any(
            other_latency <= latency and other_dice >= dice and (other_latency, other_dice) != (latency, dice)
            for other_latency, other_dice in points
        )
        assert (index in front) != beaten


def test_interval_of_the_mean_is_students() -> None:
    low, high = mean_interval(np.array([1.0, 2.0, 3.0]))
    assert (low, high) == (pytest.approx(2 - 4.302653 / 3**0.5), pytest.approx(2 + 4.302653 / 3**0.5))
    assert mean_interval(np.array([1.0])) == (None, None)


def runs_of(**columns: Any) -> pd.DataFrame:
    plain = {"steps": 4, "scoring_steps": 0, "scored_networks": 1, "macs_g": 1.0, "params_m": 1.0, "search_s": 1.0}
    return pd.DataFrame({**columns, **{**plain, "search_peak_mb": 5.0, "search_peak_gpu_mb": None, **columns}})


def test_summary_keeps_strategies_apart() -> None:
    runs = runs_of(
        strategy=["a", "a", "b"],
        seed=[0, 1, 0],
        scoring_steps=[0, 2, 0],
        dice=[0.5, 0.7, 0.9],
        latency_ms=[1.0, 3.0, 4.0],
        search_s=[1.0, 2.0, 3.0],
    )
    summary = summarise_contest(runs).set_index("strategy")
    assert summary.dice.tolist() == pytest.approx([0.6, 0.9]) and summary.seeds.tolist() == [2, 1]
    assert summary.scoring_steps.tolist() == [1, 0]
    low, high = mean_interval(np.array([1.0, 2.0]))
    assert (summary.search_s_low["a"], summary.search_s_high["a"]) == (pytest.approx(low), pytest.approx(high))
    assert summary.macs_g_low["a"] == summary.params_m_low["a"] == 1.0 and np.isnan(summary.search_s_low["b"])


def test_hypervolume_is_the_mean_over_seeds_and_the_slowest_run_counts() -> None:
    runs = runs_of(strategy=["a", "a", "b"], seed=[0, 1, 0], dice=[0.5, 0.7, 0.9], latency_ms=[1.0, 3.0, 4.0])
    summary = summarise_contest(runs).set_index("strategy")
    of_seeds = np.array([0.5 * (4.4 - 1) / 4.4, 0.7 * (4.4 - 3) / 4.4])  # up to 1.1 times the slowest
    assert summary.hypervolume["a"] == pytest.approx(of_seeds.mean())
    assert (summary.hypervolume_low["a"], summary.hypervolume_high["a"]) == pytest.approx(mean_interval(of_seeds))
    assert summary.hypervolume["b"] == pytest.approx(0.9 * 0.4 / 4.4)
    # A seed more that finds the same changes nothing; pooled runs would have.
    more = runs_of(strategy=["a"] * 2 + ["b"], seed=[0, 1, 0], dice=[0.5, 0.5, 0.9], latency_ms=[1.0, 1.0, 4.0])
    assert summarise_contest(more).set_index("strategy").hypervolume["a"] == pytest.approx(of_seeds[0])


class Broken(RandomWithSharedWeights):
    """A baseline that cannot choose."""

    def _choose(self) -> None:
        raise SearchError("nothing pleases")


BROKEN_PLUGIN = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from glioma_nas.registry import strategies
from test_comparison import Broken
strategies.register("broken")(Broken)
"""


@pytest.fixture
def broken_strategy() -> Iterator[str]:
    yield BROKEN_PLUGIN
    registered._entries.pop("broken", None)


@pytest.mark.slow
def test_comparison_survives_a_failed_search_and_continues(tmp_path: Path, broken_strategy: str) -> None:
    write_phantom_cohort(tmp_path / "cohort", 8, 0)
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    (tmp_path / "broken.py").write_text(broken_strategy)
    command = [
        *("compare", str(path), "--strategies", "broken,random_with_shared_weights,nni.random"),
        *("--seeds", "1", "--trials", "2", "--trainings", "2", "--rank-networks", "4"),
        *("--plugin", str(tmp_path / "broken.py")),
        *("--out", str(tmp_path / "out"), "--json"),
    ]
    done = CliRunner().invoke(app, command)
    assert isinstance(done.exception, SystemExit) and done.exit_code == 1, done.output
    assert "failed: broken, seed 3: the search ended with status 1" in done.stderr and "nothing pleases" in done.stderr
    rows = json.loads(done.stdout)
    assert [row["strategy"] for row in rows] == ["random_with_shared_weights", "nni.random"]
    assert all(0 <= row["dice"] <= 1 and row["latency_ms"] > 0 and row["search_s"] > 0 for row in rows)
    assert all(row["params_m"] > 0 and row["search_peak_mb"] > 100 and row["hypervolume"] >= 0 for row in rows)
    assert {"macs_g_low", "params_m_high", "search_s_low", "search_peak_mb_high", "hypervolume_low"} <= set(rows[0])
    out = tmp_path / "out"
    runs = pd.read_csv(out / "runs.csv")
    assert (runs.steps == 4).all() and (runs.scoring_steps == 0).all() and (runs.search_peak_mb > 100).all()
    assert {"latency_low_ms", "latency_high_ms", "disturbed"} <= set(runs)
    assert runs.disturbed.dropna().between(0, 1).all()
    assert runs.scored_networks.tolist() == [2, 0] and (runs.trainings == 2).all()
    assert len({path.read_bytes() for path in out.rglob("random_with*/**/student/weights.safetensors")}) == 2
    front = pd.read_csv(out / "pareto.csv")
    assert front.dice.tolist() == runs.iloc[pareto_front(runs.latency_ms, runs.dice)].dice.tolist() and len(front) >= 1
    ranking = pd.read_csv(out / "ranking.csv")
    assert ranking.strategy.tolist() == ["random_with_shared_weights"] and ranking.n.tolist() == [4]
    facts = json.loads((out / "comparison.json").read_text())
    assert [(row["strategy"], row["seed"]) for row in facts["failed"]] == [("broken", 3)]
    page = (out / "report.html").read_text()
    assert "Searches that failed, n = 1" in page and "nothing pleases" in page and "Kendall" in page
    assert "1.1 times the slowest run" in page and "finetune_steps 0, recalibration_batches 1." in page
    assert facts["scoring"] == {"finetune_steps": 0, "recalibration_batches": 1}
    assert facts["reference_ms"] == pytest.approx(1.1 * runs.latency_ms.max())
    costs = {path: path.stat().st_mtime_ns for path in out.rglob("cost.json")}
    scores = {path: path.stat().st_mtime_ns for path in out.rglob("scores.json")}
    assert len(costs) == 2 and len(scores) == 4
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 1, again.output
    assert {path: path.stat().st_mtime_ns for path in (*costs, *scores)} == {**costs, **scores}
    assert pd.read_csv(out / "runs.csv").dice.tolist() == runs.dice.tolist()


def test_too_few_networks_for_a_rank_correlation_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    done = CliRunner().invoke(app, ["compare", str(path), "--rank-networks", "3"])
    assert isinstance(done.exception, ConfigError) and "give at least 4" in str(done.exception)


@pytest.mark.slow
def test_search_that_fails_says_why(config: RunConfig, tmp_path: Path) -> None:
    own = with_budget(config, "nni.random", seed=1, trials=2)
    half_done = tmp_path / "cell" / "supernet"
    half_done.mkdir(parents=True)
    with pytest.raises(ResourceError, match=r"nni.random, seed 1: the search ended with status 1: .*no such file"):
        search_apart(own, {"preprocess": tmp_path / "a", "latency": tmp_path / "b"}, tmp_path / "cell")
    assert not half_done.exists()  # what remained of a search that was cut off; its time is not known


@pytest.mark.slow
def test_search_by_time_ends_its_epochs_by_the_clock_and_counts_its_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_phantom_cohort(tmp_path / "cohort", 8, 0)
    config = parse_config(SMALL, source="test", folder=tmp_path)
    Pipeline(config, tmp_path / "run", Silent()).run(["preprocess", "latency"])
    inputs = {stage: tmp_path / "run" / stage for stage in ("preprocess", "latency")}
    seconds = itertools.count()  # a clock by which every step takes one second
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: float(next(seconds))))
    for strategy in ("nni.darts", "random_with_shared_weights", "nni.random"):
        (cell,) = plan(config, [strategy], n_seeds=1, trials=2, out=tmp_path / "out", minutes=4 * 3 / 60)
        context = StageContext(cell.config, tmp_path / strategy, inputs, Silent())
        context.folder.mkdir()
        assert search_stage(context, epoch_s=cell.epoch_s)["steps"] == 4 * 3
        if strategy == "nni.darts":
            # The learning rate falls with the epochs, although none of them reached its last batch.
            rates = pd.read_csv(context.folder / "history.csv").learning_rate.tolist()
            assert rates == pytest.approx([0.02 * 0.978**epoch for epoch in range(4)])
