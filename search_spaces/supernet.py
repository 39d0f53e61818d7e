"""The parts of a NASBraNet that exist only while it is a search space: cells with choices, heads of several architectures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from nni.nas.nn.pytorch import InputChoice, LayerChoice
from torch import Tensor, nn

from glioma_nas.registry import operators
from glioma_nas.search_spaces.layout import Cell, Layout
from glioma_nas.search_spaces.super_kernel import ActiveWidths, SilentSuperNetModule


class SearchCell(nn.Module):
    """One grid position: mix of inputs, then one operator choice with a keep and a down output.

    Args:
        layout: The space.
        cell: Its position.
        width_of: Node → its width, an int or an NNI choice.
    """

    def __init__(self, layout: Layout, cell: Cell, width_of: Callable[[Cell | None], Any]) -> None:
        super().__init__()
        self.input = None
        if layout.has_input_choice(cell):
            self.input = InputChoice(2, n_chosen=1, reduction="sum", label=f"in_{cell.name}")
        incoming = width_of(cell) * cell.scale
        label = f"op_{cell.name}"
        following = layout.successor(cell, 1)
        self.keep = LayerChoice(_candidates(layout, incoming, width_of(following) * cell.scale, 1), label=label)
        self.down = None
        below = layout.successor(cell, 2) if layout.has_down(cell) else None
        if below is not None:
            self.down = LayerChoice(_candidates(layout, incoming, width_of(below) * below.scale, 2), label=label)

    def forward(self, finer: Tensor | None, same: Tensor | None, gate: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return keep output (N, C, H, W) and, where the cell has one, down output (N, C', H/2, W/2).

        Args:
            finer: Down output of the finer neighbour in the layer before, if there is one.
            same: Keep output of the same scale in the layer before, if there is one.
            gate: Scalar 1 that carries the gradient of the node's width choice.
        """
        if self.input is not None:
            x = self.input([finer, same])
        else:
            x = same if finer is None else finer
        if gate is not None:
            x = x * gate
        return self.keep(x), None if self.down is None else self.down(x)


def _candidates(layout: Layout, incoming: Any, outgoing: Any, stride: int) -> dict[str, nn.Module]:
    return {name: operators.get(name)(incoming, outgoing, stride) for name in layout.operators}


class PerArchitecture(SilentSuperNetModule):
    """A module that every architecture has a copy of; the active architecture's name picks.

    Args:
        copies: Architecture name → its module.
        active: Widths (and slot) of the pass that runs now.
    """

    def __init__(self, copies: Mapping[str, nn.Module], active: ActiveWidths) -> None:
        super().__init__()
        self.copies = nn.ModuleDict(dict(copies))
        self._active = active

    def forward(self, x: Any) -> Any:
        """Run the active architecture's copy."""
        return self.copies[self._active.slot.current.architecture](x)


class EveryHead(SilentSuperNetModule):
    """All heads of one architecture: logits for every set of branches."""

    def __init__(self, heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.heads = nn.ModuleDict(dict(heads))

    def forward(self, features: Mapping[int, Tensor]) -> dict[str, Tensor]:
        """Return ``pair_<scales>`` → logits (N, K, H, W)."""
        return {f"pair_{name}": head(features) for name, head in self.heads.items()}
