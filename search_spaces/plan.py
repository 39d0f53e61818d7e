"""From a sample to the network it stands for: which cells, joined how, shared between which branches. No torch here.

Every branch is walked back from its last cell along the input choices. Stride-1 skips are then removed (policy
``remove``), and the branches are merged into one tree: they share a cell, its weights and its features, while cell,
operator, stride and widths agree; after the first difference never again (METHOD §4).

Two optional keys of a sample say what NNI's labels cannot:

* ``kept_skips``: names of the cells whose stride-1 skip stays although the policy removes skips. Without it, branches
  that would get shallower than the minimal depth keep their first skips.
* ``down_operators``: cell name → operator of its down output, where that differs from the operator of its keep output
  (a skip that one branch leaves out and another goes down through).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from glioma_nas.costs import OperatorSpec
from glioma_nas.search_spaces.layout import BRANCHES_LABEL, DOWN_OPERATORS, ENDS_LABEL, KEPT_SKIPS, Cell, Layout


@dataclass(frozen=True)
class Step:
    """One operator of the derived network.

    Attributes:
        name: Unique within the network, usable as a module name.
        cell: Where in the grid.
        operator: Registered operator name.
        stride: 1 (keep) or 2 (down).
        width: χ of the output; it has ``width · scale · stride`` channels.
        in_channels: Channels of the input.
        source: Index of the step whose output it takes; none: the stem.
        branches: Final scales of the branches that pass through.
    """

    name: str
    cell: Cell
    operator: str
    stride: int
    width: int
    in_channels: int
    source: int | None
    branches: tuple[int, ...]

    @property
    def out_scale(self) -> int:
        """Downsampling rate of the output."""
        return self.cell.scale * self.stride

    @property
    def out_channels(self) -> int:
        """Channels of the output."""
        return self.width * self.out_scale


@dataclass(frozen=True)
class NetworkPlan:
    """Everything needed to build, price or draw one derived network.

    Attributes:
        end_width: χ of the stem's output and of the branches' last outputs.
        branch_set: Name of the set of branches, for example ``2_4``.
        steps: Operators, each after its source.
        outputs: Final scale → index of the step that feeds the head.
        paths: Final scale → cells passed, removed skips included, layer 1 to L.
        removed: Cells whose skip was left out, by final scale.
    """

    end_width: int
    branch_set: str
    steps: tuple[Step, ...]
    outputs: Mapping[int, int]
    paths: Mapping[int, tuple[Cell, ...]]
    removed: Mapping[int, frozenset[Cell]]

    def branch_steps(self, scale: int) -> list[int]:
        """Return the indices of the steps of the branch that ends at ``scale``, from the stem on."""
        indices: list[int] = []
        current: int | None = self.outputs[scale]
        while current is not None:
            indices.append(current)
            current = self.steps[current].source
        return indices[::-1]

    def specs(self, layout: Layout) -> list[OperatorSpec]:
        """Return the priced operators, each shared one once, at the layout's input size."""
        return [
            OperatorSpec(step.operator, step.in_channels, step.out_channels, step.stride, size, size)
            for step in self.steps
            for size in (layout.size_px(step.cell.scale),)
        ]


@dataclass
class _Draft:
    # A cell of one branch before merging.
    cell: Cell
    operator: str
    stride: int
    width: int
    removed: bool = field(default=False)


def walk_back(layout: Layout, sample: Mapping[str, Any], scale: int) -> list[Cell]:
    """Follow the input choices from the last cell at ``scale`` to the first cell.

    Returns:
        One cell for each layer 1 … L.
    """
    cell = Cell(scale, layout.n_layers)
    path = [cell]
    while inputs := layout.inputs(cell):
        index = sample[f"in_{cell.name}"][0] if len(inputs) == 2 else next(iter(inputs))
        cell = inputs[int(index)]
        path.append(cell)
    return path[::-1]


def stride_at(path: list[Cell] | tuple[Cell, ...], position: int) -> int:
    """Return 2 where the path goes down after ``position``, else 1."""
    return path[position + 1].scale // path[position].scale if position + 1 < len(path) else 1


def min_depth(layout: Layout, scale: int) -> int:
    """Return the number of cells below which no skip of a branch is removed: round(L/3) + 2·downsamplings."""
    return round(layout.n_layers / 3) + 2 * layout.scales.index(scale)


def removable_skips(path: list[Cell], operators: list[str], skips: Collection[str]) -> list[int]:
    """Return the positions of stride-1 skips on a path."""
    return [i for i in range(len(path)) if operators[i] in skips and stride_at(path, i) == 1]


def choose_kept(layout: Layout, path: list[Cell], removable: list[int], confidence: Mapping[int, float]) -> set[int]:
    """Choose which removable skips of one branch stay: as few as the minimal depth and the last segment allow.

    Args:
        path: The branch's cells.
        removable: Positions of its stride-1 skips.
        confidence: Position → how sure the search is of the skip; the surest are removed first.

    Returns:
        Positions that stay.
    """
    order = sorted(removable, key=lambda position: (-confidence[position], -position))
    allowed = max(0, len(path) - min_depth(layout, path[-1].scale))
    kept = set(order[allowed:])
    # A segment that ends in a down output keeps that; only the last one can lose every cell.
    last_segment = [i for i, cell in enumerate(path) if cell.scale == path[-1].scale]
    if set(last_segment) <= set(removable) - kept:
        kept.add(min(last_segment, key=lambda position: (confidence[position], position)))
    return kept


def make_plan(layout: Layout, sample: Mapping[str, Any], skips: Collection[str]) -> NetworkPlan:
    """Read a sample.

    Args:
        layout: The space.
        sample: Complete sample, perhaps with refinements.
        skips: Operators that are skip connections.

    Raises:
        ArchitectureError: The sample is not one of the space.
    """
    layout.check_sample(sample)
    end_width = int(sample.get(ENDS_LABEL, layout.end_widths[0]))
    finals = layout.branch_sets[sample[BRANCHES_LABEL]]
    paths = {scale: walk_back(layout, sample, scale) for scale in finals}
    kept = _kept_cells(layout, sample, paths, skips)
    drafts = {scale: _draft(layout, sample, path, kept, skips, end_width) for scale, path in paths.items()}
    steps, outputs = _merge(drafts, end_width * layout.scales[0])
    return NetworkPlan(
        end_width,
        sample[BRANCHES_LABEL],
        tuple(steps),
        outputs,
        {scale: tuple(path) for scale, path in paths.items()},
        {scale: frozenset(draft.cell for draft in branch if draft.removed) for scale, branch in drafts.items()},
    )


def _kept_cells(
    layout: Layout, sample: Mapping[str, Any], paths: Mapping[int, list[Cell]], skips: Collection[str]
) -> set[Cell]:
    if layout.skip_policy == "conv":
        return set(layout.cells)
    named = set(sample.get(KEPT_SKIPS, ()))
    kept: set[Cell] = set()
    for path in paths.values():
        operators = [sample[f"op_{cell.name}"] for cell in path]
        removable = removable_skips(path, operators, skips)
        # Nothing is known about confidence here, so what a decoder named counts as unsure, and otherwise late goes
        # first.
        confidence = {i: 0.0 if path[i].name in named else 1.0 for i in removable}
        kept |= {path[i] for i in choose_kept(layout, path, removable, confidence)}
    # A skip that one branch needs stays for both: otherwise they would stop sharing there.
    return kept


def _draft(
    layout: Layout, sample: Mapping[str, Any], path: list[Cell], kept: set[Cell], skips: Collection[str], end_width: int
) -> list[_Draft]:
    branch = []
    for position, cell in enumerate(path):
        stride = stride_at(path, position)
        operator = sample[f"op_{cell.name}"]
        if stride == 2:
            operator = sample.get(DOWN_OPERATORS, {}).get(cell.name, operator)
        following = path[position + 1] if position + 1 < len(path) else None
        label = layout.width_label(following)
        width = int(sample[label]) if label else layout.width_values(following)[0]
        removed = stride == 1 and operator in skips and cell not in kept
        branch.append(_Draft(cell, operator, stride, width, removed))
    # With trailing skips gone, the last cell that stays feeds the head and has its width.
    next(draft for draft in reversed(branch) if not draft.removed).width = end_width
    return branch


def _merge(drafts: Mapping[int, list[_Draft]], stem_channels: int) -> tuple[list[Step], dict[int, int]]:
    nodes: dict[tuple[Any, ...], int] = {}
    found: list[dict[str, Any]] = []
    outputs: dict[int, int] = {}
    for scale, branch in drafts.items():
        source: int | None = None
        channels = stem_channels
        for draft in branch:
            if draft.removed:
                continue
            key = (source, draft.cell, draft.operator, draft.stride, draft.width)
            if key not in nodes:
                nodes[key] = len(found)
                found.append({"draft": draft, "in_channels": channels, "source": source, "branches": []})
            source = nodes[key]
            found[source]["branches"].append(scale)
            channels = draft.width * draft.cell.scale * draft.stride
        assert source is not None
        outputs[scale] = source
    names: set[str] = set()
    steps = []
    for entry in found:
        draft, branches = entry["draft"], tuple(entry["branches"])
        name = f"{draft.cell.name}_{'down' if draft.stride == 2 else 'keep'}"
        if name in names:
            name += "_for_" + "_".join(map(str, branches))
        names.add(name)
        steps.append(
            Step(
                name,
                draft.cell,
                draft.operator,
                draft.stride,
                draft.width,
                entry["in_channels"],
                entry["source"],
                branches,
            )
        )
    return steps, outputs
