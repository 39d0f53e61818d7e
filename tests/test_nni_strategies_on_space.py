"""NNI's own strategies search the space as it is."""

from __future__ import annotations

import importlib.util
import itertools
from typing import Any

import nni
import nni.nas.strategy as nni_strategies
import pytest
import torch
from nni.nas.evaluator import FunctionalEvaluator
from nni.nas.execution import SequentialExecutionEngine
from nni.nas.oneshot.pytorch.supermodule.base import BaseSuperNetModule
from nni.nas.space import RawFormatModelSpace

from glioma_nas.search_spaces.derived_network import DerivedNetwork
from glioma_nas.search_spaces.nasbranet import NASBraNet

IMAGE = torch.randn(1, 2, 32, 32, generator=torch.Generator().manual_seed(1))
SMALL: dict[str, Any] = {
    "scales": (2, 4),
    "n_layers": 3,
    "operators": ("conv3x3", "zoomed_conv"),
    "widths": (4,),
    "end_widths": (4,),
    "n_branches": 1,
}


def explore(space: NASBraNet, strategy: Any, n_trials: int) -> list[DerivedNetwork]:
    """Run a multi-trial strategy that scores a network by its number of cells; return every network it tried."""
    tried: list[DerivedNetwork] = []

    def evaluate(model: Any) -> None:
        with torch.no_grad():
            assert model.eval()(IMAGE).shape == (1, 2, 32, 32)
        tried.append(model)
        nni.report_final_result(float(len(model.plan.steps)))

    before = nni.trial._params
    try:
        strategy(
            RawFormatModelSpace.from_model(space, FunctionalEvaluator(evaluate)),
            SequentialExecutionEngine(max_model_count=n_trials),
        )
    finally:
        nni.trial._params = before
    return tried


STRATEGIES = {
    "Random": lambda: nni_strategies.Random(seed=1),
    "RegularizedEvolution": lambda: nni_strategies.RegularizedEvolution(
        population_size=4, sample_size=2, mutation_prob=0.2, seed=1
    ),
    "TPE": lambda: nni_strategies.TPE(seed=1),
    "GridSearch": lambda: nni_strategies.GridSearch(shuffle=False, seed=1),
}


# NNI's TPE waits a second for every trial.
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in STRATEGIES])
def test_multi_trial_strategy_freezes_samples_into_networks(name: str) -> None:
    tried = explore(NASBraNet("tiny"), STRATEGIES[name](), 6)
    assert len(tried) == 6
    assert all(isinstance(network, DerivedNetwork) for network in tried)
    assert len({network.plan.steps for network in tried}) > 1


@pytest.mark.parametrize("name", ["Random", "RegularizedEvolution"])
def test_best_model_of_a_strategy_is_a_sample_of_the_space(name: str) -> None:
    space, strategy = NASBraNet("tiny"), STRATEGIES[name]()
    tried = explore(space, strategy, 8)
    (best,) = strategy.list_models(limit=1)
    assert best.metric == max(len(network.plan.steps) for network in tried)
    assert len(space.derive(space.architecture(best.sample)).plan.steps) == best.metric


def test_grid_search_visits_every_network_of_a_small_space() -> None:
    space = NASBraNet("tiny", **SMALL)
    tried = explore(space, nni_strategies.GridSearch(shuffle=False), 10_000)
    assert len(tried) == 2**5 * 2 * 2  # operators of five cells, one input choice, two branches
    layout = space.layout
    expected = {space.plan(sample).steps for sample in all_samples(layout)}
    assert {network.plan.steps for network in tried} == expected


def all_samples(layout: Any) -> list[dict[str, Any]]:
    return [
        {k: [v] if k.startswith("in_") else v for k, v in zip(layout.choices, values, strict=True)}
        for values in itertools.product(*layout.choices.values())
    ]


def test_evolution_improves_on_its_first_population() -> None:
    tried = explore(NASBraNet("tiny"), STRATEGIES["RegularizedEvolution"](), 30)
    depths = [len(network.plan.steps) for network in tried]
    assert sum(depths[-10:]) > sum(depths[:4]) / 4 * 10


def test_proxyless_samples_one_path_of_a_space_without_width_choices() -> None:
    space = NASBraNet("tiny", widths=[4], end_widths=[4])
    nni_strategies.Proxyless().mutate_model(space)
    resample(space)
    space(IMAGE.repeat(2, 1, 1, 1)).square().mean().backward()
    gradients = [p.grad for name, p in space.named_parameters() if "_arch_alpha" in name]
    assert gradients and all(gradient is not None for gradient in gradients)


def resample(space: NASBraNet) -> dict[str, Any]:
    drawn: dict[str, Any] = {}
    for module in space.modules():
        if isinstance(module, BaseSuperNetModule):
            drawn.update(module.resample(drawn))
    return drawn


def test_supernet_of_enas_runs_every_sampled_path() -> None:
    space = NASBraNet("tiny")
    nni_strategies.ENAS().mutate_model(space)
    for _ in range(3):
        assert set(resample(space)) == set(NASBraNet("tiny").simplify())
        assert space(IMAGE.repeat(2, 1, 1, 1)).shape == (2, 2, 32, 32)


@pytest.mark.skipif(importlib.util.find_spec("tianshou") is not None, reason="tianshou is installed")
def test_policy_based_rl_names_the_package_it_lacks() -> None:
    with pytest.raises(ImportError, match="pip install tianshou"):
        nni_strategies.PolicyBasedRL()


def test_proxyless_says_that_it_cannot_search_widths() -> None:
    with pytest.raises(TypeError, match="MutableConv2d` has dangling mutables and is not supported"):
        nni_strategies.Proxyless().mutate_model(NASBraNet("tiny"))
