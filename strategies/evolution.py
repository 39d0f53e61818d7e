"""Refine decoded networks by evolution over the trained supernet, under a hard latency limit.

A one-shot search ends with an argmax over mixtures, which need not be the best single network. Networks near it are
scored with the supernet's own weights, so a generation costs forward passes only, and none slower than the limit is
ever scored.

Reference: Guo et al., Single Path One-Shot Neural Architecture Search with Uniform Sampling, ECCV 2020, algorithm 1;
Cai et al., Once-for-All, ICLR 2020, sec. 3.4.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from glioma_nas.architecture import Architecture
from glioma_nas.progress import Progress, Silent, Task

MUTATION_PROBABILITY = 0.1
EXPECTED_MUTATIONS = 2.0

_TRIES = 200
"""Draws for each network wanted: a small space may hold no more, and a hard limit may leave few."""

_logger = logging.getLogger(__name__)


def evolve(
    initial: Sequence[Architecture],
    *,
    choices: Mapping[str, Sequence[Any]],
    fixed: Collection[str],
    build: Callable[[Mapping[str, Any]], Architecture],
    identity: Callable[[Architecture], str],
    score: Callable[[Architecture], float],
    latency_ms: Callable[[Architecture], float],
    limit_ms: float,
    generations: int,
    population: int,
    generator: np.random.Generator,
    progress: Progress | None = None,
) -> list[Architecture]:
    """Return every network that was scored, best first; empty when nothing within the limit was found.

    The first generation holds the given networks, made faster by mutation where they exceed the limit, and mutations of
    them. Each later one is bred from the better half of all so far, half of it by crossover, all of it by mutation.

    Args:
        initial: Decoded networks of one space.
        choices: Label → values, of every choice.
        fixed: Labels that never change.
        build: Makes a record of a sample.
        identity: What two samples that give the same network have in common; choices off its path do not count.
        score: Figure to maximise; called once for every network.
        latency_ms: Latency of a network, in ms.
        limit_ms: Hard limit; infinity for none.
        generations: How many, the first one included.
        population: Networks of one generation.
        generator: Source of every draw.
        progress: Where to report.
    """
    free = [label for label, values in choices.items() if len(values) > 1 and label not in fixed]
    probability = max(MUTATION_PROBABILITY, EXPECTED_MUTATIONS / max(len(free), 1))

    def mutated(parent: Architecture) -> Architecture:
        # Choices only: what a decoder adds to a sample holds for that very network.
        sample = {label: value for label, value in parent.sample().items() if label in choices}
        for label in free:
            if generator.random() < probability:
                value = choices[label][int(generator.integers(len(choices[label])))]
                sample[label] = [value] if isinstance(sample[label], list) else value
        return build(sample)

    def crossed(first: Architecture, second: Architecture) -> Architecture:
        sample, other = first.sample(), second.sample()
        for label in free:
            if generator.random() < 0.5:
                sample[label] = other[label]
        return build(sample)

    def hastened(network: Architecture) -> Architecture:
        now_ms = latency_ms(network)
        for _ in range(10 * _TRIES):
            if now_ms <= limit_ms:
                break
            child = mutated(network)
            child_ms = latency_ms(child)
            if child_ms < now_ms:
                network, now_ms = child, child_ms
        return network

    def child_of_one(parents: Sequence[Architecture]) -> Architecture:
        return mutated(parents[int(generator.integers(len(parents)))])

    def child_of_two(parents: Sequence[Architecture]) -> Architecture:
        first, second = (parents[int(index)] for index in generator.integers(len(parents), size=2))
        return mutated(crossed(first, second))

    scores: dict[str, tuple[float, Architecture]] = {}

    def breed(wanted: int, propose: Callable[[], Architecture], task: Task) -> None:
        found = 0
        for _ in range(wanted * _TRIES):
            if found == wanted:
                break
            child = propose()
            key = identity(child)
            if key in scores or latency_ms(child) > limit_ms:
                continue
            scores[key] = (score(child), child)
            found += 1
            task.advance(1, best=max(value for value, _ in scores.values()))

    seeds = [hastened(network) for network in initial]
    with (progress or Silent()).task("evolution", generations * population) as task:
        given = iter(seeds)
        breed(len(seeds), lambda: next(given, seeds[0]), task)
        for generation in range(generations):
            ranked = [network for _, network in sorted(scores.values(), key=lambda item: -item[0])]
            parents = ranked[: max(2, population // 2)] or seeds
            missing = population - len(scores) if generation == 0 else population
            breed(missing // 2, partial(child_of_two, parents), task)
            breed(missing - missing // 2, partial(child_of_one, parents), task)
    if scores:
        _logger.info("evolution scored %d networks, best target %.4f", len(scores), max(v for v, _ in scores.values()))
    return [network for _, network in sorted(scores.values(), key=lambda item: -item[0])]
