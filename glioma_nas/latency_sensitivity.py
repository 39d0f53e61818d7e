"""How much each kind of choice can change a network's expected latency (METHOD table 4-2), and the weights from it.

Δ of a kind is the expected latency with the slowest value chosen everywhere minus that with the fastest, all other
kinds uniform. The decoupled latency weighs its terms with the inverse, so that none of them drowns the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from glioma_nas.errors import ConfigError

Expectation = Callable[[Mapping[str, Tensor]], Tensor]

# A variable whose choice hardly changes the latency would get an unbounded weight; the thesis' own ratio is 1:1000.
_FLOOR = 1e-3


def latency_sensitivities(
    expectation: Expectation,
    *,
    groups: Mapping[str, Sequence[str]],
    constants: Mapping[str, Tensor],
    sizes: Mapping[str, int],
) -> dict[str, float]:
    """Return Δ of each kind of choice in milliseconds.

    Args:
        expectation: Expected latency in ms for weights of every label.
        groups: Kind → searched labels.
        constants: Label → weights of labels that are not searched.
        sizes: Label → number of values.
    """
    uniform = {
        **constants,
        **{label: torch.full((sizes[label],), 1 / sizes[label]) for labels in groups.values() for label in labels},
    }
    sensitivities = {}
    for kind, labels in groups.items():
        latencies = []
        for index in range(max((sizes[label] for label in labels), default=0)):
            chosen = {}
            for label in labels:
                chosen[label] = torch.zeros(sizes[label])
                chosen[label][min(index, sizes[label] - 1)] = 1.0
            latencies.append(float(expectation({**uniform, **chosen})))
        sensitivities[kind] = max(latencies) - min(latencies) if latencies else 0.0
    return sensitivities


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
