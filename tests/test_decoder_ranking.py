"""The n best architectures, and the decoder's properties over random parameters."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from glioma_nas.errors import ArchitectureError
from glioma_nas.search_spaces.decoder import DOWN_SKIPS, decode, rank
from glioma_nas.search_spaces.layout import FROM_FINER, Layout
from glioma_nas.search_spaces.nasbranet import NASBraNet
from glioma_nas.search_spaces.parameter_arrays import arrays_from_weights, weights_from_arrays
from glioma_nas.search_spaces.path_decoder import METHODS
from glioma_nas.search_spaces.plan import make_plan

SKIPS = frozenset({"skip"})
LAYOUT = Layout.from_options("tiny", n_layers=10, scales=(2, 4, 8))
SHAPE = (len(LAYOUT.scales), LAYOUT.n_layers)


def random_weights(layout: Layout, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {label: rng.dirichlet(np.ones(len(values))) for label, values in layout.choices.items()}


def identity(layout: Layout, sample: dict[str, Any]) -> tuple[Any, ...]:
    plan = make_plan(layout, sample, SKIPS)
    return plan.end_width, plan.steps, tuple(plan.outputs.items())


def brute_force(layout: Layout, weights: dict[str, Any], branches: str, method: str) -> list[float]:
    """Score every sample by the definition; keep the best score of each network."""
    finals = layout.branch_sets[branches]
    searched = {label: values for label, values in layout.choices.items() if label not in ("branches", "width_ends")}
    best: dict[Any, float] = {}
    for values in itertools.product(*searched.values()):
        sample = {label: [v] if label.startswith("in_") else v for label, v in zip(searched, values, strict=True)} | {
            "branches": branches,
            **layout.fixed_choices["student"],
        }
        plan = make_plan(layout, sample, SKIPS)
        score = 0.0
        for path in plan.paths.values():
            for source, cell in itertools.pairwise(path):
                down = source.scale < cell.scale
                if layout.has_input_choice(cell):
                    if down or method == "viterbi":
                        score += math.log(weights[f"in_{cell.name}"][0 if down else 1])
                elif down and method == "joint":
                    score -= 1e9
        for label, value in sample.items():
            if label.startswith(("op_", "width_s")):
                probabilities = weights[label]
                score += math.log(probabilities[layout.choices[label].index(value)] / probabilities.max())
        key = (plan.end_width, plan.steps, tuple(plan.outputs.items()))
        best[key] = max(score, best.get(key, -math.inf))
    assert set(finals) == set(plan.outputs)
    return sorted(best.values(), reverse=True)


@pytest.mark.parametrize("method", ["joint", "viterbi"])
@pytest.mark.parametrize(
    "options",
    [
        {"n_layers": 4, "operators": ("conv3x3", "zoomed_conv"), "widths": (4,)},
        {"n_layers": 3, "operators": ("conv3x3", "zoomed_conv"), "widths": (2, 4)},
        {"n_layers": 4, "operators": ("skip", "conv3x3"), "widths": (4,), "skip_policy": "conv"},
    ],
)
def test_ranking_equals_brute_force(options: dict[str, Any], method: str) -> None:
    layout = Layout.from_options("tiny", **{"scales": (2, 4), "end_widths": (4,), "n_branches": 2, **options})
    for seed in range(3):
        weights = random_weights(layout, seed)
        expected = brute_force(layout, weights, "2_4", method)
        n = min(40, len(expected))
        found = rank(layout, weights, n, skips=SKIPS, branches="2_4", method=method)
        assert [item.log_score for item in found] == pytest.approx(expected[:n], abs=1e-6)
        assert len({identity(layout, item.sample) for item in found}) == n


def test_ranking_ends_where_the_space_does() -> None:
    layout = Layout.from_options(
        "tiny", scales=(2, 4), n_layers=3, operators=("conv3x3",), widths=(4,), end_widths=(4,), n_branches=1
    )
    # To scale 4 there are two ways down; nothing else is left to choose.
    assert len(rank(layout, random_weights(layout, 0), 50, skips=SKIPS, branches="4", method="viterbi")) == 2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("architecture", ["student", "teacher"])
def test_ranking_starts_with_what_decode_gives_and_is_ordered(method: str, architecture: str) -> None:
    weights = random_weights(LAYOUT, 3)
    arguments: dict[str, Any] = {"skips": SKIPS, "architecture": architecture, "branches": "4_8", "method": method}
    found = rank(LAYOUT, weights, 12, **arguments)
    assert found[0].sample == decode(LAYOUT, weights, **arguments)
    scores = [item.log_score for item in found]
    assert scores == sorted(scores, reverse=True)
    assert len({identity(LAYOUT, item.sample) for item in found}) == 12


def test_ranking_of_the_thesis_space_leaves_the_teacher_its_widths() -> None:
    space = NASBraNet("thesis")
    weights = random_weights(space.layout, 0)
    for architecture, score in space.decode_best(weights, 5, architecture="teacher", branches="2_8"):
        assert math.isfinite(score)
        assert {v for k, v in architecture.choices.items() if k.startswith("width")} == {48}
        assert "skip" not in architecture.choices.values()


def logits_of(n_values: int) -> st.SearchStrategy[Any]:
    return arrays(np.float64, (*SHAPE, n_values), elements=st.floats(-8, 8, width=32))


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    alpha=logits_of(5),
    beta=logits_of(2),
    gamma=logits_of(2),
    branches=st.sampled_from(sorted(LAYOUT.branch_sets)),
    architecture=st.sampled_from(["student", "teacher"]),
    method=st.sampled_from(METHODS),
    down_skips=st.sampled_from(DOWN_SKIPS),
)
def test_decoding_is_legal_and_deterministic_for_any_parameters(
    alpha: Any, beta: Any, gamma: Any, branches: str, architecture: str, method: str, down_skips: str
) -> None:
    weights = weights_from_arrays(LAYOUT, alpha, beta, gamma)
    choices: dict[str, Any] = {
        "skips": SKIPS,
        "branches": branches,
        "architecture": architecture,
        "method": method,
        "down_skips": down_skips,
    }
    sample = decode(LAYOUT, weights, **choices)
    LAYOUT.check_sample(sample)
    assert sample == decode(LAYOUT, {label: weights[label].copy() for label in reversed(weights)}, **choices)
    plan = make_plan(LAYOUT, sample, SKIPS)
    assert tuple(plan.outputs) == LAYOUT.branch_sets[branches]
    for scale, path in plan.paths.items():
        assert [cell.layer for cell in path] == list(range(1, LAYOUT.n_layers + 1))
        assert path[-1].scale == scale
        assert all(after.scale in (before.scale, 2 * before.scale) for before, after in itertools.pairwise(path))
        assert any(
            plan.steps[index].cell.scale * plan.steps[index].stride == scale for index in plan.branch_steps(scale)
        )
    if architecture == "teacher":
        assert "skip" not in [step.operator for step in plan.steps]


def test_arrays_and_labels_say_the_same() -> None:
    space = NASBraNet("tiny")
    weights = random_weights(space.layout, 1)
    alpha, beta, gamma = arrays_from_weights(space.layout, weights)
    assert (alpha.shape, beta.shape, gamma.shape) == ((3, 4, 5), (3, 4, 2), (3, 4, 2))
    assert beta[1, 2, FROM_FINER] == weights["in_s4_l3"][0]
    expected = space.decode(weights, branches="2_8")
    assert space.decode_arrays(alpha, beta, gamma, branches="2_8", logits=False) == expected
    with np.errstate(divide="ignore"):
        assert space.decode_arrays(np.log(alpha), np.log(beta), np.log(gamma), branches="2_8") == expected
    assert space.decode_arrays(alpha, beta, branches="2_8", architecture="teacher", logits=False) == space.decode(
        weights, branches="2_8", architecture="teacher"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": np.zeros((3, 4, 4))}, r"alpha has shape \(3, 4, 4\); expected \(3, 4, 5\)"),
        ({"beta": np.zeros((4, 3, 2))}, r"beta has shape \(4, 3, 2\); expected \(3, 4, 2\)"),
        ({"gamma": np.full((3, 4, 2), np.nan)}, r"gamma\[0, 1\], the cell at scale 2 in layer 2"),
        ({"gamma": None}, "the weights lack 'width_s2_l2'"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    values: dict[str, Any] = {
        "alpha": np.zeros((3, 4, 5)),
        "beta": np.zeros((3, 4, 2)),
        "gamma": np.zeros((3, 4, 2)),
        **change,
    }
    with pytest.raises(ArchitectureError, match=message):
        NASBraNet("tiny").decode_arrays(**values, branches="2_4")


def test_ranking_of_none_is_refused() -> None:
    with pytest.raises(ArchitectureError, match="at least one"):
        rank(LAYOUT, random_weights(LAYOUT, 0), 0, skips=SKIPS, branches="2_4")
