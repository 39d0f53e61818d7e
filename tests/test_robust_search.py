"""The options that make a one-shot search more robust: what each does, and that nothing of it is lost by a restart."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from test_one_shot import SizeProfiler, make_evaluator, make_space
from test_search_stage import make_config

from glioma_nas.component_checks import check_components
from glioma_nas.errors import ConfigError, SearchError
from glioma_nas.evaluators.segmentation_module import SegmentationModule
from glioma_nas.nni_bridge import explore
from glioma_nas.relaxation import add_auxiliary_skip
from glioma_nas.strategies.architecture_parameters import ArchitectureParameters
from glioma_nas.strategies.early_stop import EarlyStop
from glioma_nas.strategies.one_shot import LatencyDarts
from glioma_nas.strategies.search_settings import SearchSettings
from glioma_nas.testing.prepared_phantoms import prepare_phantom_cohort

EVERYTHING: dict[str, Any] = {
    "latency_weight": 0.01,
    "latency_window_ms": (0.1, 0.2),
    "auxiliary_skip": 1.0,
    "beta_decay": 5.0,
    "max_skip_fraction": 1.0,
    "min_entropy": 0.01,
    "gumbel_temperature": (2.0, 0.5),
    "operator_relaxation": "gumbel",
    "evolution_generations": 1,
    "evolution_population": 4,
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_phantom_cohort(tmp_path_factory.mktemp("phantom"), n_patients=8, image_size_px=32)


def parameters(n_operators: int = 2) -> ArchitectureParameters:
    choices = {f"op{index}": ["skip", "conv", "zoom"] for index in range(n_operators)}
    groups = {"operator": list(choices), "scale": [], "width": []}
    return ArchitectureParameters("student", choices=choices, groups=groups, fixed={}, search_widths=True)


def darts(space: Any, **options: Any) -> LatencyDarts:
    settings: dict[str, Any] = {
        "pretrain_epochs": 1,
        "pretrain_widths": ("min",),
        "search_widths": ("sampled",),
        "finetune_steps": 0,
        "recalibration_batches": 1,
        "architecture_learning_rate": 0.05,
        "seed": 2,
    }
    return LatencyDarts(profiler=SizeProfiler(space), **{**settings, **options})


def run(prepared: Path, folder: Path, *, epochs: int = 3, **options: Any) -> LatencyDarts:
    space = make_space()
    strategy: LatencyDarts = explore(space, make_evaluator(prepared, folder, epochs=epochs), darts(space, **options))
    return strategy


# The auxiliary skip ---------------------------------------------------------------------------------------------------


def test_auxiliary_skip_adds_the_input_where_shapes_agree() -> None:
    x, mixture = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4)
    assert torch.allclose(add_auxiliary_skip(mixture, x, 0.5), mixture + 0.5 * x)


def test_auxiliary_skip_averages_pads_and_cuts_where_they_do_not() -> None:
    x = torch.rand(1, 3, 4, 4)
    wider = add_auxiliary_skip(torch.zeros(1, 5, 2, 2), x, 1.0)
    assert torch.allclose(wider[:, :3], torch.nn.functional.avg_pool2d(x, 2))
    assert not wider[:, 3:].any()
    assert torch.allclose(add_auxiliary_skip(torch.zeros(1, 2, 4, 4), x, 1.0), x[:, :2])


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (1, 3)])
def test_auxiliary_skip_leaves_alone_what_it_does_not_fit(shape: tuple[int, ...]) -> None:
    mixture = torch.rand(shape)
    assert add_auxiliary_skip(mixture, torch.rand(1, 3, 4, 4), 1.0) is mixture


# Schedules ------------------------------------------------------------------------------------------------------------


def test_schedules_begin_and_end_where_they_are_told_to() -> None:
    settings = SearchSettings(auxiliary_skip=1.0, beta_decay=50.0, gumbel_temperature=(5, 0.5))
    assert [settings.auxiliary_skip_at(x) for x in (0, 0.25, 1)] == [1.0, 0.75, 0.0]
    assert [settings.beta_decay_at(x) for x in (0, 0.5, 1)] == [0.0, 25.0, 50.0]
    assert [settings.temperature_at(x) for x in (0, 1)] == pytest.approx([5.0, 0.5])


def test_everything_is_off_by_default() -> None:
    settings = SearchSettings()
    assert all(settings.auxiliary_skip_at(x) == settings.beta_decay_at(x) == 0 for x in (0, 0.5, 1))
    assert all(settings.temperature_at(x) == 1 for x in (0, 0.5, 1))
    assert settings.next_latency_weight(0.3, 1e6) == 0.3
    assert not EarlyStop(None, None, skips=["skip"]).should_stop(torch.nn.ModuleDict(), parameters())


@pytest.mark.parametrize(
    ("latency_ms", "factor"),
    [(6.0, 1.0), (5.0, 1.0), (8.1, 1.25), (12.0, 2.25), (80.0, 4.0), (4.9, 1 / 1.25), (1, 0.25)],
)
def test_latency_weight_follows_the_window(latency_ms: float, factor: float) -> None:
    settings = SearchSettings(latency_weight=0.1, latency_window_ms=(5, 8))
    assert settings.next_latency_weight(0.2, latency_ms) == pytest.approx(0.2 * factor)


def test_latency_weight_does_not_run_away_when_the_window_cannot_be_reached() -> None:
    settings = SearchSettings(latency_weight=0.1, latency_window_ms=(5, 8))
    weight = 0.1
    for _ in range(100):
        weight = settings.next_latency_weight(weight, 1000.0)
    assert weight == pytest.approx(1000.0)


# Penalty and early stop -----------------------------------------------------------------------------------------------


def test_beta_decay_draws_large_logits_down_most() -> None:
    item = parameters(1)
    item.logits["op0"].data = torch.tensor([2.0, 0.0, -1.0])
    penalty = item.concentration()
    assert float(penalty) == pytest.approx(math.log(math.exp(2) + 1 + math.exp(-1)))
    penalty.backward()
    gradient = item.logits["op0"].grad
    assert gradient is not None and torch.allclose(gradient, item.logits["op0"].detach().softmax(0))


def test_too_many_skips_stop_the_search_and_bring_back_the_epoch_before() -> None:
    item, stop = parameters(2), EarlyStop(0.5, None, skips=["skip"])
    modules = torch.nn.ModuleDict({"student": item})
    item.logits["op0"].data = torch.tensor([1.0, 0.0, 0.0])
    item.logits["op1"].data = torch.tensor([0.0, 1.0, 0.0])
    assert stop.skip_fraction(item) == 0.5
    assert not stop.should_stop(modules, item)
    item.logits["op1"].data = torch.tensor([2.0, 1.0, 0.0])
    restored = EarlyStop(0.5, None, skips=["skip"])
    restored.load_state_dict(stop.state_dict())
    assert restored.should_stop(modules, item)
    assert "100 % of the operator choices preferred a skip" in str(restored.reason)
    assert item.logits["op1"].tolist() == [0.0, 1.0, 0.0]


def test_a_decided_search_stops() -> None:
    item, stop = parameters(1), EarlyStop(None, 0.2, skips=[])
    modules = torch.nn.ModuleDict({"student": item})
    assert not stop.should_stop(modules, item)
    item.logits["op0"].data = torch.tensor([9.0, 0.0, 0.0])
    assert stop.should_stop(modules, item)
    assert "the operator choices were decided" in str(stop.reason)


# Gumbel relaxation ----------------------------------------------------------------------------------------------------


def test_gumbel_mixture_nears_one_path_as_the_temperature_falls() -> None:
    torch.manual_seed(0)
    item = parameters(200)

    def sharpness(temperature: float) -> float:
        weights = item.relaxation("max", differentiable=True, temperature=temperature, gumbel=True).weights
        return sum(float(weight.detach().max()) for weight in weights.values()) / len(weights)

    assert sharpness(10.0) < 0.5 < 0.95 < sharpness(0.05)


def test_gumbel_mixture_carries_gradient_only_when_asked() -> None:
    item = parameters(1)
    assert item.relaxation("max", differentiable=True, gumbel=True).weights["op0"].requires_grad
    assert not item.relaxation("max", differentiable=False, gumbel=True).weights["op0"].requires_grad


# Whole searches -------------------------------------------------------------------------------------------------------


class _PowerCut(Exception):
    pass


@pytest.mark.slow
def test_search_with_every_option_survives_an_interruption_unchanged(
    prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = run(prepared, tmp_path / "whole", epochs=4, **EVERYTHING)
    step = SegmentationModule.training_step

    def fail_in_epoch_3(self: Any, batch: Any, batch_idx: int) -> Any:
        if self.trainer.current_epoch == 3 and batch_idx == 1:
            raise _PowerCut
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patched:
        patched.setattr(SegmentationModule, "training_step", fail_in_epoch_3)
        with pytest.raises(_PowerCut):
            run(prepared, tmp_path / "cut", epochs=4, **EVERYTHING)
    resumed = run(prepared, tmp_path / "cut", epochs=4, **EVERYTHING)
    histories = [pd.read_csv(tmp_path / name / "history.csv") for name in ("whole", "cut")]
    pd.testing.assert_frame_equal(*histories)
    assert resumed.found == whole.found and resumed.candidates == whole.candidates
    weights = histories[0].latency_weight
    assert weights.iloc[1] == 0.01 and weights.iloc[3] > weights.iloc[2] > weights.iloc[1]


@pytest.mark.slow
def test_early_stop_ends_the_search_and_is_noted_also_after_a_restart(prepared: Path, tmp_path: Path) -> None:
    first = run(prepared, tmp_path, epochs=6, max_skip_fraction=0.0, latency_weight=0.0)
    again = run(prepared, tmp_path, epochs=6, max_skip_fraction=0.0, latency_weight=0.0)
    assert any("preferred a skip" in note for note in first.notes)
    assert again.notes == first.notes and again.found == first.found
    assert len(pd.read_csv(tmp_path / "history.csv")) < 6
    course = pd.read_csv(tmp_path / "architecture_history.csv", keep_default_na=False)
    kept = [row["logit"] for row in first.oneshot_module.architecture_rows()]
    assert course[course.epoch == course.epoch.max()].logit.tolist() == pytest.approx(kept)


@pytest.mark.slow
def test_hard_latency_limit_is_kept_by_evolution_and_refused_without(prepared: Path, tmp_path: Path) -> None:
    free = run(prepared, tmp_path / "free", latency_weight=0.0)
    slowest = max(float(item.latency_ms or 0) for item in free.candidates["student"])
    fastest = min(float(item.latency_ms or 0) for item in free.candidates["student"])
    limit = 0.7 * fastest
    with pytest.raises(SearchError, match=r"no network of the student keeps latency_limit_ms .* raise the limit"):
        run(prepared, tmp_path / "refused", latency_weight=0.0, latency_limit_ms=limit)
    refined = run(
        prepared,
        tmp_path / "refined",
        latency_weight=0.0,
        latency_limit_ms=limit,
        evolution_generations=2,
        evolution_population=4,
    )
    assert slowest > limit
    assert all(float(item.latency_ms or 0) <= limit for item in refined.candidates["student"])


@pytest.mark.slow
def test_gradients_that_are_not_finite_are_skipped_and_counted(
    prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step = SegmentationModule.step_loss

    def steep_at_first(self: Any, batch: Any) -> Any:
        loss = step(self, batch)
        if self.trainer.current_epoch == 0 and not getattr(self, "was_steep", False):
            self.was_steep = True
            loss = loss + 0 * (loss - loss.detach()).abs().sqrt()  # finite, with an infinite slope
        return loss

    monkeypatch.setattr(SegmentationModule, "step_loss", steep_at_first)
    strategy = run(prepared, tmp_path, latency_weight=0.0)
    history = pd.read_csv(tmp_path / "history.csv")
    assert list(history.skipped_steps) == [1, 0, 0]
    network = strategy.supernet
    assert all(bool(torch.isfinite(value).all()) for value in network.parameters())


@pytest.mark.slow
def test_missed_window_is_noted(prepared: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        strategy = run(prepared, tmp_path, latency_window_ms=(1e-6, 1e-5))
    assert any("outside latency_window_ms 1e-06 to 1e-05" in note for note in strategy.notes)
    assert "outside latency_window_ms" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"auxiliary_skip": -1}, "auxiliary_skip is -1; give a number of at least 0"),
        ({"beta_decay": "much"}, "beta_decay is 'much'; give a number"),
        ({"beta_decay": math.nan}, "beta_decay is nan; give a number"),
        ({"max_skip_fraction": 1.5}, "max_skip_fraction is 1.5; give a number of at least 0 and at most 1"),
        ({"min_entropy": True}, "min_entropy is True; give a number"),
        ({"gumbel_temperature": (0.5, 1)}, r"gumbel_temperature is \(0.5, 1\); give \(first, last\), positive"),
        ({"gumbel_temperature": 0}, "gumbel_temperature is 0; give"),
        ({"gumbel_temperature": "hot"}, "gumbel_temperature is .*hot.*; give two numbers"),
        ({"operator_relaxation": "gumbl"}, r"unknown operator_relaxation 'gumbl': did you mean 'gumbel'\?"),
        ({"latency_window_ms": (8, 5)}, r"latency_window_ms is \(8, 5\); give \(lowest, highest\)"),
        ({"latency_window_ms": 8}, "latency_window_ms is 8; give two numbers"),
        ({"latency_window_ms": (5, 8), "latency_weight": 0}, "must start above 0"),
        ({"pretrain_epochs": -1}, "pretrain_epochs is -1; give a number"),
        ({"evolution_population": 1}, "evolution_population is 1; give at least 2"),
        ({"latency_limit_ms": -2}, "latency_limit_ms is -2; give a number"),
    ],
)
def test_impossible_option_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        darts(make_space(), **options)


def test_options_that_need_latencies_pass_the_check_before_there_are_any(tmp_path: Path) -> None:
    options = {"latency_window_ms": [5, 8], "latency_limit_ms": 9.0}
    check_components(make_config(tmp_path, "co_search", strategy_options=options), ["latency", "search"])
    with pytest.raises(ConfigError, match="must start above 0"):
        check_components(
            make_config(tmp_path, "co_search", strategy_options=options, latency_weight=0), ["latency", "search"]
        )


def test_latency_limit_without_a_profiler_is_refused() -> None:
    with pytest.raises(ConfigError, match="latency_limit_ms needs a profiler"):
        LatencyDarts(latency_weight=0, latency_limit_ms=3.0)
