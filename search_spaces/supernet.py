"""The parts of a NASBraNet that only its search has: cells with choices, stems and heads of several architectures."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from typing import Any

from nni.mutable import CategoricalMultiple
from nni.nas.nn.pytorch import InputChoice, LayerChoice
from torch import Tensor, nn

from glioma_nas.errors import ArchitectureError
from glioma_nas.registry import operators
from glioma_nas.relaxation import Relaxation, RelaxedLayer
from glioma_nas.search_spaces.fused_mix import fused_mix
from glioma_nas.search_spaces.layout import FROM_FINER, Cell, Layout
from glioma_nas.search_spaces.operators import sharing_halves
from glioma_nas.search_spaces.super_kernel import ActiveWidths, SilentSuperNetModule


class InputIndex(CategoricalMultiple):
    """The choice of one input; unlike NNI's own class it can say so to NNI's tuners (TPE)."""

    def as_legacy_dict(self) -> dict[str, Any]:
        """Return the form of NNI's experiments: a choice among lists of one index."""
        return {"_type": "choice", "_value": [[value] for value in self.values]}


class SearchCell(nn.Module):
    """One grid position: mix of inputs, then one operator choice with a keep and a down output.

    With ``merge="output"`` the operators run on each input by itself and their outputs are mixed, as FasterSeg's code
    does: twice the work for a node with two inputs. Networks derived from either supernet are the same.

    Args:
        layout: The space.
        cell: Its position.
        width_of: Node → its width, an int or an NNI choice.

    Attributes:
        fused: Whether our supernet mixes a cell's operators in one go. Without, each runs by itself: equal results,
            more time and memory; tests and the benchmark compare with it.
    """

    fused = True

    def __init__(self, layout: Layout, cell: Cell, width_of: Callable[[Cell | None], Any]) -> None:
        super().__init__()
        self.merge = layout.merge
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

    def forward(
        self,
        finer: Tensor | None,
        same: Tensor | None,
        width_mask: Tensor | None = None,
        strides: Collection[int] = (1, 2),
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return keep output (N, C, H, W) and down output (N, C', H/2, W/2); none where it is not needed or not there.

        Args:
            finer: Down output of the finer neighbour in the layer before, if there is one.
            same: Keep output of the same scale in the layer before, if there is one.
            width_mask: Shape (C,): turns the channels off that the node's sampled width has not, and carries the
                gradient of the choice; see `channel_mask`.
            strides: Which outputs are needed: 1 keep, 2 down.
        """
        if not strides:
            return None, None
        inputs = [source for source in (finer, same) if source is not None]
        if self.merge == "input" and len(inputs) == 2 and self.input is not None:
            inputs = [self.input(inputs)]
        if width_mask is not None:
            inputs = [x * width_mask.to(x.dtype)[:, None, None] for x in inputs]
        with sharing_halves() if self.fused else nullcontext():
            keep = self._output(self.keep, inputs) if 1 in strides else None
            down = self._output(self.down, inputs) if 2 in strides and self.down is not None else None
        return keep, down

    def _output(self, choice: nn.Module, inputs: list[Tensor]) -> Tensor:
        # Which sources there are was decided by `needed_strides`: with one, there is nothing to mix.
        if self.fused and isinstance(choice, RelaxedLayer):
            outputs = [fused_mix(choice, x) for x in inputs]
        else:
            outputs = [choice(x) for x in inputs]
        output: Tensor = outputs[0] if self.input is None or len(outputs) == 1 else self.input(outputs)
        return output


def needed_strides(layout: Layout, relaxation: Relaxation) -> dict[Cell, set[int]]:
    """Return which outputs of each cell can reach a head: not those that a constant one-hot input choice turns away.

    A pass with fixed choices then costs about what its network costs, instead of the whole grid.

    Args:
        layout: The space.
        relaxation: Choices of the pass.
    """
    needed: dict[Cell, set[int]] = {cell: set() for cell in layout.cells}
    for cell in reversed(layout.cells):
        if cell.layer == layout.n_layers:
            needed[cell].add(1)
        if not needed[cell]:
            continue
        chosen: int | None = None
        if layout.has_input_choice(cell):
            label = f"in_{cell.name}"
            shares = relaxation.shares[label]
            if not relaxation.weights[label].requires_grad and max(shares) == 1.0:
                chosen = shares.index(1.0)
        for index, source in layout.inputs(cell).items():
            if chosen in (None, index):
                needed[source].add(2 if index == FROM_FINER else 1)
    return needed


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
        return {f"pair_{name}": head(*features.values()) for name, head in self.heads.items()}


def owner_of(ends: Mapping[str, int], end_width: int, whose: bool | str) -> str:
    """Say whose stem and heads a network inherits.

    Args:
        ends: Architecture name → its end width.
        end_width: The network's.
        whose: A name, or ``True`` for the only one with that end width.

    Raises:
        ArchitectureError: There is no such architecture, or more than one.
    """
    if whose is True:
        fitting = [name for name, width in ends.items() if width == end_width]
        if len(fitting) != 1:
            raise ArchitectureError(f"say whose stem and heads to inherit: inherit= one of {', '.join(ends)}")
        return fitting[0]
    if whose not in ends:
        raise ArchitectureError(f"inherit={whose!r}: allowed are {', '.join(ends)}")
    return str(whose)
