"""Evolution over a trained supernet, on a toy space whose best network is known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from glioma_nas.architecture import Architecture
from glioma_nas.strategies.evolution import evolve

CHOICES = {f"op{index}": ["skip", "small", "large"] for index in range(6)} | {"in": [0, 1], "end": [8]}
GAIN = {"skip": 0.0, "small": 2.0, "large": 3.0}
COST_MS = {"skip": 0.0, "small": 1.0, "large": 3.0}


def build(sample: Mapping[str, Any]) -> Architecture:
    return Architecture("toy", {}, sample)


def of(architecture: Architecture, table: Mapping[str, float]) -> float:
    return sum(table[value] for label, value in architecture.choices.items() if label.startswith("op"))


def start(operator: str) -> Architecture:
    return build({**dict.fromkeys(CHOICES, operator), "in": [0], "end": 8, "kept_skips": [1]})


def run(initial: Architecture, **options: Any) -> tuple[list[Architecture], list[Architecture]]:
    scored: list[Architecture] = []

    def score(architecture: Architecture) -> float:
        scored.append(architecture)
        return of(architecture, GAIN)

    settings: dict[str, Any] = {"limit_ms": 6.0, "generations": 6, "population": 12, **options}
    best = evolve(
        [initial],
        choices=CHOICES,
        fixed={"end"},
        build=build,
        identity=lambda architecture: str([architecture.choices[f"op{index}"] for index in range(6)]),
        score=score,
        latency_ms=lambda architecture: of(architecture, COST_MS),
        generator=np.random.default_rng(0),
        **settings,
    )
    return best, scored


def test_best_network_within_the_limit_is_found_from_one_that_is_far_too_slow() -> None:
    best, scored = run(start("large"))
    assert of(best[0], GAIN) == 12.0  # six small ones: 6 ms; no other mix within 6 ms gains as much
    assert all(of(architecture, COST_MS) <= 6.0 for architecture in scored)


def test_networks_come_best_first_and_are_scored_once() -> None:
    best, scored = run(start("skip"))
    gains = [of(architecture, GAIN) for architecture in best]
    assert gains == sorted(gains, reverse=True)
    assert len(scored) == len(best)
    paths = {tuple(architecture.choices[f"op{index}"] for index in range(6)) for architecture in scored}
    assert len(paths) == len(scored)


def test_fixed_choices_stay_and_inputs_keep_their_form() -> None:
    best, _ = run(start("skip"))
    assert all(architecture.sample()["end"] == 8 for architecture in best)
    assert all(architecture.sample()["in"] in ([0], [1]) for architecture in best)
    assert any(architecture.sample()["in"] == [1] for architecture in best)


def test_nothing_is_found_when_nothing_keeps_the_limit() -> None:
    best, scored = run(start("large"), limit_ms=-1.0)
    assert best == scored == []


@pytest.mark.parametrize("population", [2, 7])
def test_a_space_smaller_than_the_population_ends(population: int) -> None:
    best, _ = run(start("skip"), limit_ms=0.0, population=population)
    assert [of(architecture, COST_MS) for architecture in best] == [0.0]


def test_same_generator_same_networks() -> None:
    first, _ = run(start("small"))
    second, _ = run(start("small"))
    assert first == second
