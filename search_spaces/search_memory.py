"""How much memory a step of a one-shot search will take, before anything is allocated.

A supernet of the same options is built and run on the meta device: tensors there have shapes but no numbers. What
autograd would keep for the backward pass is counted, not guessed, for the largest pass of a step. Each pass is
back-propagated at once, so passes do not add up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import nni.nas.strategy  # noqa: F401  # first: nni.nas.oneshot before it leaves NNI's one-shot strategies unusable
import torch
from nni.nas.oneshot.pytorch.strategy import OneShotStrategy, no_default_hook
from torch import nn

from glioma_nas.errors import ResourceError
from glioma_nas.relaxation import Relaxation, RelaxationSlot, relaxation_hooks
from glioma_nas.search_spaces.layout import Layout
from glioma_nas.search_spaces.network_figures import saved_bytes

_WORKING_SHARE = 0.3
"""Memory of a backward pass beyond what was kept: gradients in flight and buffers of convolutions; an allowance, not a
measurement."""


@dataclass(frozen=True)
class SearchMemory:
    """Memory of one search step in bytes, float32.

    Attributes:
        weight_bytes: The supernet's parameters and statistics.
        gradient_bytes: Gradients of the parameters.
        optimizer_bytes: Momentum of the parameters (SGD).
        activation_bytes: What the largest pass keeps for its backward pass.
        working_bytes: Gradients in flight and buffers of convolutions during that backward pass, estimated.
        batch_size: Slices in a batch.
    """

    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    working_bytes: int
    batch_size: int

    @property
    def fixed_bytes(self) -> int:
        """What does not grow with the batch."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.fixed_bytes + self.activation_bytes + self.working_bytes

    def largest_batch(self, available_bytes: int) -> int:
        """Return the largest batch that fits, 0 if none does."""
        per_slice = (self.activation_bytes + self.working_bytes) / self.batch_size
        return max(0, int((available_bytes - self.fixed_bytes) // per_slice))

    def require(self, available_bytes: int) -> None:
        """Refuse a search that does not fit.

        Raises:
            ResourceError: It does not; the message says what would.
        """
        if self.total_bytes <= available_bytes:
            return
        fitting = self.largest_batch(available_bytes)
        advice = (
            f"set search.batch_size to {fitting} or less"
            if fitting
            else "not even one slice fits: choose a smaller preset, fewer n_layers, narrower widths or smaller images"
        )
        raise ResourceError(
            f"a search step with batches of {self.batch_size} needs about {_gb(self.total_bytes)} "
            f"({_gb(self.activation_bytes)} of it activations), {_gb(available_bytes)} are available; {advice}"
        )


class _Probe(OneShotStrategy):
    def __init__(self, architectures: Sequence[str]) -> None:
        super().__init__()
        self.relaxation_slot = RelaxationSlot()
        self.architectures = tuple(architectures)

    def default_mutation_hooks(self) -> list[Any]:
        return [*relaxation_hooks(self.relaxation_slot), no_default_hook]


def estimate_search_memory(
    make_space: Callable[[], Any], layout: Layout, *, batch_size: int, architectures: Sequence[str]
) -> SearchMemory:
    """Estimate the memory of one search step.

    Args:
        make_space: Builds the space anew.
        layout: Its options.
        batch_size: Slices in a batch.
        architectures: Names of the architectures that are searched together.
    """
    probe = _Probe(architectures)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        space = make_space()
        probe.mutate_model(space)
        image = torch.empty(batch_size, layout.in_channels, layout.image_size_px, layout.image_size_px)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in (*space.parameters(), *space.buffers()))
    gradients = sum(parameter.numel() * parameter.element_size() for parameter in space.parameters())
    activations = max(
        _pass_bytes(space, probe.relaxation_slot, layout, image, name, train_weights)
        for name in architectures
        for train_weights in (True, False)
    )
    return SearchMemory(
        weight_bytes=weights,
        gradient_bytes=gradients,
        optimizer_bytes=gradients,
        activation_bytes=activations,
        working_bytes=int(_WORKING_SHARE * activations),
        batch_size=batch_size,
    )


def _pass_bytes(
    space: nn.Module, slot: RelaxationSlot, layout: Layout, image: torch.Tensor, architecture: str, train_weights: bool
) -> int:
    weights = {
        label: torch.full((len(values),), 1 / len(values), requires_grad=not train_weights)
        for label, values in layout.choices.items()
        if not label.startswith("width")
    }
    values = {label: allowed[-1] for label, allowed in layout.choices.items() if label.startswith("width")}
    # Widths are searched in architecture steps only; their gates keep each node's input once more.
    gates = {} if train_weights else {label: _widest(layout, label, image.device) for label in values}
    for parameter in space.parameters():
        parameter.requires_grad_(train_weights)
    with slot.using(Relaxation(architecture, weights, values, gates)), saved_bytes(space) as saved:
        outputs = space.train()(image)
        # Losses keep a few tensors of the logits' size as well.
        losses = [logits.log_softmax(1).square().mean() for logits in outputs.values()]
    del losses
    return saved.total


def _widest(layout: Layout, label: str, device: torch.device) -> torch.Tensor:
    n_widths = len(layout.choices[label])
    return torch.tensor([0.0] * (n_widths - 1) + [1.0], device=device, requires_grad=True)


def _gb(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.2f} GB"
