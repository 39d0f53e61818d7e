"""Zero-cost proxies on networks whose order is known by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_one_shot import SizeProfiler, make_evaluator, make_space
from torch import nn

from glioma_nas.errors import ConfigError
from glioma_nas.nni_bridge import explore
from glioma_nas.strategies.nni_multi_trial import NniEvolution, NniGrid, NniRandom, NniTpe
from glioma_nas.strategies.random_paths import RandomWithSharedWeights
from glioma_nas.strategies.zero_cost import PROXIES, gradient_norm, naswot, synflow
from glioma_nas.testing.prepared_phantoms import prepare_phantom_cohort

IMAGE, MASK = torch.ones(4, 1, 4, 4), torch.zeros(4, 4, 4, dtype=torch.int64)


def linear(weight: float) -> nn.Module:
    network = nn.Conv2d(1, 2, 1, bias=False)
    nn.init.constant_(network.weight, weight)
    return network


def test_synflow_of_a_linear_layer_is_its_flow_whatever_the_signs() -> None:
    # Two outputs on 16 pixels, each |w|: R = 32·|w|, and w·∂R/∂w sums to R.
    assert synflow(linear(-3.0), IMAGE, MASK, F.cross_entropy) == pytest.approx(math.log(96.0))


def test_synflow_is_lost_where_a_network_is_cut() -> None:
    cut = nn.Sequential(linear(1.0), nn.Conv2d(2, 2, 1, bias=False))
    nn.init.zeros_(cut[1].weight)
    assert synflow(cut, IMAGE, MASK, F.cross_entropy) == -math.inf


def test_naswot_prefers_networks_that_tell_images_apart() -> None:
    torch.manual_seed(0)
    image = torch.randn(4, 1, 8, 8)
    blind = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU())
    nn.init.zeros_(blind[0].weight)
    nn.init.ones_(blind[0].bias)
    seeing = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU())
    assert naswot(seeing, image, MASK, F.cross_entropy) > naswot(blind, image, MASK, F.cross_entropy)


def test_naswot_of_two_opposite_images_equals_the_determinant_by_hand() -> None:
    # Four pixels: the images agree nowhere, so K = 4·I and log det K = 2·log 4.
    image = torch.stack([torch.ones(1, 2, 2), -torch.ones(1, 2, 2)])
    assert naswot(nn.Sequential(nn.ReLU()), image, MASK, F.cross_entropy) == pytest.approx(2 * math.log(4))


def test_gradient_norm_equals_the_derivative_by_hand() -> None:
    # Equal logits: CE gradient is ±1/2 of the input, which is one everywhere, for each of the two weights.
    assert gradient_norm(linear(0.7), IMAGE, MASK, F.cross_entropy) == pytest.approx(math.sqrt(0.5))


@pytest.mark.parametrize("name", PROXIES)
def test_proxy_leaves_the_network_as_it_was(name: str) -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU()).eval()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    assert math.isfinite(PROXIES[name](network, torch.randn(4, 1, 4, 4), MASK, F.cross_entropy))
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert not network.training and all(item.grad is None for item in network.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", PROXIES)
def test_prefilter_scores_only_the_most_promising_draws(name: str, tmp_path: Path) -> None:
    prepared = prepare_phantom_cohort(tmp_path / "phantom", n_patients=4, image_size_px=32)
    space = make_space()
    options: dict[str, Any] = {"n_candidates": 2, "paths": 1, "prefilter": name, "prefilter_draws": 4}
    strategy = RandomWithSharedWeights(profiler=SizeProfiler(space), recalibration_batches=1, seed=2, **options)
    explore(space, make_evaluator(prepared, tmp_path / "run", epochs=1), strategy)
    assert len(strategy.candidates["student"]) == 2
    assert f"{name} chose the 2 networks that were scored among 8 draws" in strategy.notes


def test_unknown_prefilter_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown prefilter 'sinflow': did you mean 'synflow'\?"):
        RandomWithSharedWeights(prefilter="sinflow")
    with pytest.raises(ConfigError, match="prefilter_draws is 0; give at least 1"):
        RandomWithSharedWeights(prefilter="synflow", prefilter_draws=0)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [NniRandom, NniEvolution])
def test_proxy_chooses_the_trials_of_nnis_random_draws(tmp_path: Path, strategy: Any) -> None:
    prepared = prepare_phantom_cohort(tmp_path / "phantom", n_patients=8, image_size_px=32)
    ids = {}
    for prefilter, draws in ((None, 1), ("synflow", 4), ("synflow", 1)):
        space = make_space()
        search = strategy(profiler=SizeProfiler(space), trials=2, seed=4, prefilter=prefilter, prefilter_draws=draws)
        explore(space, make_evaluator(prepared, tmp_path / f"{prefilter}{draws}", epochs=1), search)
        ids[prefilter, draws] = [model.sample for model in search.list_models(sort=False)]
        assert any("synflow chose" in note for note in search.notes) == (prefilter is not None)
    assert ids["synflow", 1] == ids[None, 1]  # of one draw the proxy cannot choose
    assert ids["synflow", 4] != ids[None, 1]
    assert len(ids["synflow", 4]) == 2


@pytest.mark.parametrize("strategy", [NniGrid, NniTpe])
def test_prefilter_is_refused_where_nni_lets_none_in(strategy: Any) -> None:
    with pytest.raises(ConfigError, match="NNI lets no filter between its proposals and the trials; prefilter works"):
        strategy(prefilter="synflow")


def test_wrong_prefilter_of_trials_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown prefilter 'synflo'"):
        NniRandom(prefilter="synflo")
    with pytest.raises(ConfigError, match="prefilter_draws is 0"):
        NniRandom(prefilter="synflow", prefilter_draws=0)
