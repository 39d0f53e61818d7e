"""How much each kind of choice can change a network's expected latency (METHOD table 4-2), and the weights from it.

Δ of a kind is the expected latency with the slowest value chosen in each place minus that with the fastest, all other
kinds uniform. Which value that is differs from place to place: an operator's zoomed form may pay at one scale only, and
the slowest input of a cell depends on the cells before it. The decoupled latency weighs its terms with the inverse of
Δ, so that none of them drowns the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from glioma_nas.errors import ConfigError

Expectation = Callable[[Mapping[str, Tensor]], Tensor]

# A variable whose choice hardly changes the latency would get an unbounded weight; the thesis' own ratio is 1:1000.
_FLOOR = 1e-3

# Relative gain below which one choice counts as no slower than another: expectations are sums in single precision.
_RESOLUTION = 1e-6


def latency_sensitivities(
    expectation: Expectation,
    *,
    groups: Mapping[str, Sequence[str]],
    constants: Mapping[str, Tensor],
    sizes: Mapping[str, int],
) -> dict[str, float]:
    """Return Δ of each kind of choice in milliseconds.

    Slowest and fastest choices are found by climbing: an expectation over independent choices is linear in the weights
    of each of them, so its gradient says what every other value would change. Exact where the choices of a kind do not
    interact; where they do, as positions of a path, what is found cannot be improved by changing one choice.

    Args:
        expectation: Expected latency in ms for weights of every label, differentiable in them.
        groups: Kind → searched labels.
        constants: Label → weights of labels that are not searched.
        sizes: Label → number of values.
    """
    uniform = {
        **constants,
        **{label: torch.full((sizes[label],), 1 / sizes[label]) for labels in groups.values() for label in labels},
    }
    return {
        kind: _extreme(expectation, uniform, labels, sign=1) - _extreme(expectation, uniform, labels, sign=-1)
        if labels
        else 0.0
        for kind, labels in groups.items()
    }


def _extreme(
    expectation: Expectation, uniform: Mapping[str, Tensor], labels: Sequence[str], *, sign: Literal[1, -1]
) -> float:
    """Return the largest (``sign`` 1) or smallest (-1) expectation over the values of ``labels``."""

    def value_and_gain(weights: Mapping[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
        leaves = [weights[label].clone().requires_grad_() for label in labels]
        value = sign * expectation({**uniform, **dict(zip(labels, leaves, strict=True))})
        if not value.requires_grad:
            return float(value), {label: torch.zeros_like(weights[label]) for label in labels}
        found = torch.autograd.grad(value, leaves, allow_unused=True)
        gains = {}
        for label, leaf, gradient in zip(labels, leaves, found, strict=True):
            slope = torch.zeros_like(leaf) if gradient is None else gradient
            gains[label] = slope - slope @ leaf.detach()
        return float(value.detach()), gains

    # What is slowest in one place with all others uniform, and one and the same value everywhere.
    best_alone = {label: _chosen(gain) for label, gain in value_and_gain(uniform)[1].items()}
    largest = max(len(uniform[label]) for label in labels)
    same = [
        {label: _one_hot(min(index, len(uniform[label]) - 1), uniform[label]) for label in labels}
        for index in range(largest)
    ]
    chosen = max([best_alone, *same], key=lambda weights: value_and_gain(weights)[0])
    value, gains = value_and_gain(chosen)
    while True:
        # All that would gain by itself at once; if they get in each other's way, the one that gains most.
        worth = {label: gain for label, gain in gains.items() if float(gain.max()) > _RESOLUTION * abs(value)}
        if not worth:
            return sign * value
        label = max(worth, key=lambda name: float(worth[name].max()))
        for changed in (worth, {label: worth[label]}):
            proposed = {**chosen, **{name: _chosen(gain) for name, gain in changed.items()}}
            reached, further = value_and_gain(proposed)
            if reached > value:
                break
        else:
            return sign * value  # the gain was rounding
        chosen, value, gains = proposed, reached, further


def _chosen(gain: Tensor) -> Tensor:
    return _one_hot(int(gain.argmax()), gain)


def _one_hot(index: int, like: Tensor) -> Tensor:
    weights = torch.zeros_like(like)
    weights[index] = 1.0
    return weights


def inverse_weights(sensitivities: Mapping[str, float], groups: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Return w of each kind: (1/Δ) normalised to the sum 1; 0 for a kind without labels.

    Raises:
        ConfigError: No choice changes the latency.
    """
    floor = _FLOOR * max(sensitivities.values())
    if floor <= 0:
        raise ConfigError("no choice changes the latency, so it cannot steer the search; set latency_weight: 0")
    inverse = {kind: 1 / max(value, floor) if groups[kind] else 0.0 for kind, value in sensitivities.items()}
    total = sum(inverse.values())
    return {kind: value / total for kind, value in inverse.items()}
