"""A minimal one-shot strategy and relaxations of known content, for tests of the search space."""

from __future__ import annotations

from typing import Any

import nni.nas.strategy  # noqa: F401  # first: nni.nas.oneshot before it leaves NNI's one-shot strategies unusable
import torch
from nni.nas.oneshot.pytorch.strategy import OneShotStrategy, no_default_hook
from torch import Tensor, nn

from glioma_nas.relaxation import Relaxation, RelaxationSlot, relaxation_hooks
from glioma_nas.search_spaces.layout import Layout
from glioma_nas.search_spaces.nasbranet import NASBraNet


class SlotStrategy(OneShotStrategy):
    """What a strategy of ours has in common: a slot and the names of its architectures."""

    def __init__(self, architectures: tuple[str, ...] = ("student", "teacher")) -> None:
        super().__init__()
        self.relaxation_slot = RelaxationSlot()
        self.architectures = architectures

    def default_mutation_hooks(self) -> list[Any]:
        return [*relaxation_hooks(self.relaxation_slot), no_default_hook]


def tiny_supernet(**options: Any) -> tuple[NASBraNet, RelaxationSlot]:
    """Return a tiny supernet whose weights and statistics are all random, so that no layer is near the identity."""
    torch.manual_seed(0)
    space = NASBraNet("tiny", **options)
    strategy = SlotStrategy()
    strategy.mutate_model(space)
    for module in space.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.5)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.2, 0.6)
    return space, strategy.relaxation_slot


def one_hot(layout: Layout, sample: dict[str, Any], architecture: str) -> Relaxation:
    """Return the relaxation that selects exactly one sample."""
    weights: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for label, allowed in layout.choices.items():
        chosen = sample[label]
        if label.startswith("width"):
            values[label] = chosen
        else:
            position = allowed.index(chosen[0] if label.startswith("in_") else chosen)
            weights[label] = torch.nn.functional.one_hot(torch.tensor(position), len(allowed)).float()
    return Relaxation(architecture, weights, values)


def soft(
    layout: Layout, architecture: str, width_index: int = 0
) -> tuple[Relaxation, dict[str, Tensor], dict[str, Tensor]]:
    """Return a uniform relaxation with gradient, its parameters and its gates."""
    parameters = {
        label: torch.zeros(len(values), requires_grad=True)
        for label, values in layout.choices.items()
        if not label.startswith("width")
    }
    weights = {label: torch.softmax(parameter, 0) for label, parameter in parameters.items()}
    widths = {label: values for label, values in layout.choices.items() if label.startswith("width_s")}
    gates = {label: torch.zeros(len(allowed)) for label, allowed in widths.items()}
    for gate in gates.values():
        gate[width_index] = 1.0
        gate.requires_grad_()
    values = {label: allowed[width_index] for label, allowed in widths.items()}
    return Relaxation(architecture, weights, values, gates), parameters, gates


def random_sample(space: NASBraNet, seed: int) -> dict[str, Any]:
    """Return a random sample of the space."""
    from numpy.random import RandomState

    state, sample = RandomState(seed), {}
    for mutable in space.simplify().values():
        mutable.random(sample, state)
    return sample
