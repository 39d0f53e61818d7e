"""Price a network, or the expectation over a relaxed search, as the sum over its operators.

The expectation is exact for independent choices and counts a cell shared by several branches once. Walking back from
the last layer, what matters is only which scales the branches occupy in a layer, so a Markov chain over sets of
scales (seven for three scales) gives the probability that each operator is used. It is differentiable in every weight.

Stem and heads cost nothing unless they are asked for: a bare sum over the searched operators is what METHOD eq. 4-9
speaks of, the latency of a whole network has them in it.

Reference: METHOD §3 (decoupled latency), eq. 4-9.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import product
from typing import Any

import torch
from torch import Tensor

from glioma_nas.costs import OperatorSpec
from glioma_nas.errors import ArchitectureError
from glioma_nas.search_spaces.fixed_parts import head_spec, stem_spec
from glioma_nas.search_spaces.layout import BRANCHES_LABEL, FROM_FINER, Cell, Layout
from glioma_nas.search_spaces.plan import NetworkPlan


def operator_specs(layout: Layout) -> list[OperatorSpec]:
    """Return every operator, with every pair of widths, stride and size, that a network of the space can contain."""
    return sorted(
        spec
        for scale in layout.scales
        for stride in (1, 2)
        if stride == 1 or scale != layout.scales[-1]
        for spec in _specs(layout, scale, stride)
    )


def _specs(layout: Layout, scale: int, stride: int) -> Iterator[OperatorSpec]:
    size = layout.size_px(scale)
    for operator, incoming, outgoing in product(layout.operators, layout.widths, layout.widths):
        yield OperatorSpec(operator, incoming * scale, outgoing * scale * stride, stride, size, size)


class CostModel:
    """Additive cost of the networks of one space.

    Args:
        layout: The space.
        cost: Price of one operator, for example its latency in ms; called once for each spec of `operator_specs`.
        plan: Reads a sample or an architecture.
        skips: Operators that are skip connections.
        fixed: Choices that are not searched, such as the end width, where the weights do not name them.
        fixed_parts: Add the price of the stem and of the head of the set of branches.
    """

    def __init__(
        self,
        layout: Layout,
        cost: Callable[[OperatorSpec], float],
        plan: Callable[[Any], NetworkPlan],
        skips: Collection[str],
        fixed: Mapping[str, int],
        *,
        fixed_parts: bool = False,
    ) -> None:
        self._layout = layout
        self._plan = plan
        self._fixed = fixed
        # Price of stem and head, by set of branches and width of the ends, over all widths of the space.
        self._ends = torch.zeros((len(layout.branch_sets), len(layout.widths)), dtype=torch.float64)
        if fixed_parts:
            for (row, name), end in product(enumerate(layout.branch_sets), layout.end_widths):
                price = float(cost(stem_spec(layout, end))) + float(cost(head_spec(layout, name, end)))
                self._ends[row, layout.widths.index(end)] = price
        self._costs = {spec: float(cost(spec)) for spec in operator_specs(layout)}
        self._tables: dict[tuple[int, int], Tensor] = {}
        shape = (len(layout.operators), len(layout.widths), len(layout.widths))
        for scale, stride in product(layout.scales, (1, 2)):
            if stride == 2 and scale == layout.scales[-1]:
                continue
            table = torch.tensor([self._costs[s] for s in _specs(layout, scale, stride)], dtype=torch.float64).view(
                shape
            )
            if stride == 1 and layout.skip_policy == "remove":
                table[[index for index, name in enumerate(layout.operators) if name in skips]] = 0.0
            self._tables[scale, stride] = table

    def of(self, architecture: Any) -> float:
        """Return the cost of one network (sample or `Architecture`): Σ over its operators, a shared one once.

        Raises:
            ArchitectureError: Not a network of this space.
        """
        plan, layout = self._plan(architecture), self._layout
        row, column = list(layout.branch_sets).index(plan.branch_set), layout.widths.index(plan.end_width)
        return sum(self._costs[spec] for spec in plan.specs(layout)) + float(self._ends[row, column])

    def expectation(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Return the expected cost when every choice is drawn independently.

        With skip policy ``remove`` a stride-1 skip costs 0, and the minimal depth, which the derived network keeps by
        not removing all of them, is not counted.

        Args:
            weights: Label → probabilities over the choice's values, shape (n,), non-negative, sum 1. ``branches`` may
            be
                absent (uniform); so may ``width_ends`` (the architecture's own).

        Returns:
            Scalar tensor, differentiable in every weight.

        Raises:
            ArchitectureError: A label is missing or has the wrong length.
        """
        reader = _Reader(self._layout, weights, self._fixed)
        occupied = self._last_layer(reader)
        total = reader.of(BRANCHES_LABEL) @ self._ends.to(reader.dtype) @ reader.width(None)
        # The last layer's cells are always used for their keep output.
        total = total + self._layer_cost(
            {Cell(s, self._layout.n_layers): 1 for s in self._layout.scales}, occupied, reader
        )
        for layer in range(self._layout.n_layers, 1, -1):
            occupied, used = self._step_back(layer, occupied, reader)
            total = total + self._edge_cost(used, reader)
        return total

    def _last_layer(self, reader: _Reader) -> dict[frozenset[int], Tensor]:
        branches = reader.of(BRANCHES_LABEL)
        return {frozenset(scales): branches[index] for index, scales in enumerate(self._layout.branch_sets.values())}

    def _layer_cost(
        self, cells: Mapping[Cell, int], occupied: Mapping[frozenset[int], Tensor], reader: _Reader
    ) -> Tensor:
        used = {
            (cell, stride): sum((p for scales, p in occupied.items() if cell.scale in scales), reader.zero())
            for cell, stride in cells.items()
        }
        return self._edge_cost(used, reader)

    def _step_back(
        self, layer: int, occupied: Mapping[frozenset[int], Tensor], reader: _Reader
    ) -> tuple[dict[frozenset[int], Tensor], dict[tuple[Cell, int], Tensor]]:
        before: dict[frozenset[int], Tensor] = {}
        used: dict[tuple[Cell, int], Tensor] = {}
        for scales, probability in occupied.items():
            options = [
                [(source, 2 if index == FROM_FINER else 1, weight) for index, source, weight in reader.inputs(cell)]
                for cell in (Cell(scale, layer) for scale in sorted(scales))
            ]
            for combination in product(*options):
                weight = probability
                for *_, factor in combination:
                    weight = weight if factor is None else weight * factor
                reached = frozenset(source.scale for source, *_ in combination)
                before[reached] = before[reached] + weight if reached in before else weight
                for source, stride, _ in combination:
                    key = (source, stride)
                    used[key] = used[key] + weight if key in used else weight
        return before, used

    def _edge_cost(self, used: Mapping[tuple[Cell, int], Tensor], reader: _Reader) -> Tensor:
        total = reader.zero()
        for (cell, stride), probability in used.items():
            table = self._tables[cell.scale, stride].to(reader.dtype)
            following = self._layout.successor(cell, stride)
            expected = torch.einsum(
                "k,i,o,kio->", reader.of(f"op_{cell.name}"), reader.width(cell), reader.width(following), table
            )
            total = total + probability * expected
        return total


class _Reader:
    # Weights by label, checked once, with what is absent filled in.
    def __init__(self, layout: Layout, weights: Mapping[str, Tensor], fixed: Mapping[str, int]) -> None:
        self._layout = layout
        self._weights = weights
        self._fixed = fixed
        self._known: dict[str, Tensor] = {}
        self._widths: dict[Cell | None, Tensor] = {}
        self.dtype = next((w.dtype for w in weights.values()), torch.float32)

    def zero(self) -> Tensor:
        return torch.zeros((), dtype=self.dtype)

    def of(self, label: str) -> Tensor:
        if label not in self._known:
            self._known[label] = self._checked(label)
        return self._known[label]

    def inputs(self, cell: Cell) -> list[tuple[int, Cell, Tensor | None]]:
        sources = self._layout.inputs(cell)
        if len(sources) == 1:
            return [(index, source, None) for index, source in sources.items()]
        weights = self.of(f"in_{cell.name}")
        return [(index, source, weights[index]) for index, source in sources.items()]

    def width(self, node: Cell | None) -> Tensor:
        # Distribution over all widths of the space, also where the node has only the end widths.
        if node not in self._widths:
            self._widths[node] = self._width(node)
        return self._widths[node]

    def _width(self, node: Cell | None) -> Tensor:
        layout = self._layout
        values, label = layout.width_values(node), layout.width_label(node)
        positions = torch.tensor([layout.widths.index(value) for value in values])
        spread = torch.nn.functional.one_hot(positions, len(layout.widths)).to(self.dtype)
        return (self.of(label) if label else torch.ones(1, dtype=self.dtype)) @ spread

    def _checked(self, label: str) -> Tensor:
        values = self._layout.choices[label]
        if label in self._weights:
            weight = self._weights[label]
            if weight.shape != (len(values),):
                raise ArchitectureError(
                    f"weights of '{label}' have shape {tuple(weight.shape)}; expected ({len(values)},)"
                )
            return weight
        if label in self._fixed:
            return torch.tensor([float(value == self._fixed[label]) for value in values], dtype=self.dtype)
        if label == BRANCHES_LABEL or len(values) == 1:
            return torch.full((len(values),), 1.0 / len(values), dtype=self.dtype)
        raise ArchitectureError(f"the weights lack '{label}'; expected probabilities of {', '.join(map(str, values))}")
