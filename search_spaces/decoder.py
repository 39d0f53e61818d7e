"""From the weights of a relaxed search to one architecture.

Operators and widths are the most probable ones. The downsampling positions of all branches are decoded together,
because an NNI sample has one input choice for each cell: two branches that pass the same node come from the same
place. The best legal combination is found exactly, by dynamic programming over the layers from the last to the first.

Reference: METHOD §4; Chen et al., FasterSeg, ICLR 2020.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from itertools import combinations, pairwise, product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glioma_nas.errors import ArchitectureError, did_you_mean
from glioma_nas.search_spaces.layout import (
    BRANCHES_LABEL,
    DOWN_OPERATORS,
    FROM_FINER,
    KEPT_SKIPS,
    Cell,
    Layout,
)
from glioma_nas.search_spaces.plan import choose_kept, make_plan, removable_skips, stride_at

METHODS = ("joint", "viterbi", "fasterseg")
DOWN_SKIPS = ("keep", "next_best")

# Log score of what has probability 0: finite, so that among impossible paths the one with fewest such steps wins.
_IMPOSSIBLE = -1e9

_Node = tuple[Cell, ...]


def decode(
    layout: Layout,
    weights: Mapping[str, Any],
    *,
    skips: Collection[str],
    architecture: str = "student",
    branches: str | None = None,
    method: str = "joint",
    down_skips: str = "keep",
) -> dict[str, Any]:
    """Decode one architecture.

    Args:
        layout: The space.
        weights: Label → probabilities in the order of the choice's values, shape (n,), in [0, 1]. The teacher needs no
            widths. ``branches`` is needed only where the argument of that name is not given.
        skips: Operators that are skip connections.
        architecture: ``student``, or ``teacher``: widest, and no skips.
        branches: Name of the set of branches, for example ``2_4``.
        method: ``joint`` takes the downsampling positions with the largest product of β⁰ among the nodes that have a β
            (two inputs); ``viterbi`` takes the likelihood of the whole path, with (1-β⁰) where the scale is kept;
            ``fasterseg`` is ``joint`` within that project's ranges (three cells before the first downsampling and
            between two, two after the last), and replaces every skip that is not removed by the next best operator.
        down_skips: What a branch does that goes down through a cell whose operator is a skip: ``keep`` the strided
        skip, or
            take the ``next_best`` operator.

    Returns:
        A complete sample, with the refinements of `plan` where they are needed.

    Raises:
        ArchitectureError: A label is missing, has the wrong length or is not a probability; unknown method or branches.
    """
    probabilities = _Weights(layout, weights)
    if down_skips not in DOWN_SKIPS:
        raise ArchitectureError(f"down_skips {down_skips!r}: {did_you_mean(down_skips, DOWN_SKIPS)}")
    if architecture not in layout.fixed_choices:
        raise ArchitectureError(f"architecture {architecture!r}: {did_you_mean(architecture, layout.fixed_choices)}")
    if branches is None:
        branches = str(probabilities.best(BRANCHES_LABEL))
    if branches not in layout.branch_sets:
        raise ArchitectureError(f"branches {branches!r}: {did_you_mean(branches, layout.branch_sets)}")
    teacher = architecture == "teacher"
    sample: dict[str, Any] = {}
    for label, values in layout.choices.items():
        if label.startswith("op_"):
            sample[label] = probabilities.best(label, without=skips if teacher else ())
        elif label.startswith("in_"):
            sample[label] = [int(probabilities.best(label))]
        elif label.startswith("width_s"):
            sample[label] = values[-1] if teacher else probabilities.best(label)
    sample[BRANCHES_LABEL] = branches
    sample.update(layout.fixed_choices[architecture])
    paths = best_paths(layout, weights, layout.branch_sets[branches], method=method)
    for path in paths.values():
        for position in range(1, len(path)):
            if layout.has_input_choice(path[position]):
                sample[f"in_{path[position].name}"] = [0 if path[position - 1].scale < path[position].scale else 1]
    if down_skips == "next_best" or method == "fasterseg":
        _replace_down_skips(layout, sample, paths, probabilities, skips)
    if layout.skip_policy == "remove":
        kept = _kept_skips(layout, sample, paths, probabilities, skips)
        if method == "fasterseg":
            for cell in kept:
                sample[f"op_{cell.name}"] = probabilities.best(f"op_{cell.name}", without=skips)
        else:
            _note_kept_skips(layout, sample, kept, skips)
    return sample


def best_paths(
    layout: Layout, weights: Mapping[str, Any], finals: tuple[int, ...], *, method: str = "joint"
) -> dict[int, list[Cell]]:
    """Find the consistent paths of several branches whose scores have the largest product.

    Consistent means that branches which pass the same node enter it the same way. A node counts once for every branch
    that passes it. Of equal products the one that goes down latest wins, so that branches share as much as they can.

    Args:
        layout: The space.
        weights: Label → probabilities; only ``in_…`` labels are read.
        finals: Final scales of the branches.
        method: See `decode`.

    Returns:
        Final scale → cells of layer 1 to L.
    """
    probabilities = _Weights(layout, weights)
    if method not in METHODS:
        raise ArchitectureError(f"decode method {method!r}: {did_you_mean(method, METHODS)}")
    if method == "fasterseg":
        return _best_restricted_paths(layout, probabilities, finals)
    # State: where each branch is in the present layer. Value: log score of what follows and the layers behind it.
    start = tuple(Cell(scale, layout.n_layers) for scale in finals)
    states: dict[_Node, tuple[float, tuple[_Node, ...]]] = {start: (0.0, (start,))}
    for _ in range(layout.n_layers - 1):
        following: dict[_Node, tuple[float, tuple[_Node, ...]]] = {}
        for state, (score, trail) in sorted(states.items(), key=lambda item: [cell.scale for cell in item[0]]):
            for choice, gain in _moves(layout, state, probabilities, method):
                reached = tuple(layout.inputs(cell)[choice[cell]] for cell in state)
                total = score + gain
                if reached not in following or total > following[reached][0] + 1e-12:
                    following[reached] = (total, (reached, *trail))
        states = following
    ((_, trail),) = states.values()
    return {scale: [node[index] for node in trail] for index, scale in enumerate(finals)}


def _moves(layout: Layout, state: _Node, probabilities: _Weights, method: str) -> list[tuple[dict[Cell, int], float]]:
    cells = sorted(set(state), key=lambda cell: cell.scale)
    options = []
    for cell in cells:
        passing = state.count(cell)
        options.append(
            [
                (cell, index, passing * _log_score(layout, cell, index, probabilities, method))
                for index in layout.inputs(cell)
            ]
        )
    return [
        ({cell: index for cell, index, _ in combination}, sum(gain for *_, gain in combination))
        for combination in product(*options)
    ]


def _log_score(layout: Layout, cell: Cell, index: int, probabilities: _Weights, method: str) -> float:
    if method == "joint" and index != FROM_FINER:
        return 0.0
    if not layout.has_input_choice(cell):
        # A node with one input has no β. Its probability is 1 on a path, but as a position to choose it would beat
        # every learned one, and each branch would go down at once whatever the search found.
        return _IMPOSSIBLE if method == "joint" and index == FROM_FINER else 0.0
    value = float(probabilities.of(f"in_{cell.name}")[index])
    return math.log(value) if value > 0 else _IMPOSSIBLE


def _replace_down_skips(
    layout: Layout,
    sample: dict[str, Any],
    paths: Mapping[int, list[Cell]],
    probabilities: _Weights,
    skips: Collection[str],
) -> None:
    used: dict[Cell, set[int]] = {}
    for path in paths.values():
        for position, cell in enumerate(path):
            used.setdefault(cell, set()).add(stride_at(path, position))
    down: dict[str, str] = {}
    for cell, strides in used.items():
        if 2 not in strides or sample[f"op_{cell.name}"] not in skips:
            continue
        operator = str(probabilities.best(f"op_{cell.name}", without=skips))
        if 1 in strides:
            down[cell.name] = operator
        else:
            sample[f"op_{cell.name}"] = operator
    if down:
        sample[DOWN_OPERATORS] = down


def _kept_skips(
    layout: Layout,
    sample: Mapping[str, Any],
    paths: Mapping[int, list[Cell]],
    probabilities: _Weights,
    skips: Collection[str],
) -> set[Cell]:
    kept: set[Cell] = set()
    for path in paths.values():
        removable = removable_skips(path, [sample[f"op_{cell.name}"] for cell in path], skips)
        confidence = {i: float(probabilities.of(f"op_{path[i].name}").max()) for i in removable}
        kept |= {path[i] for i in choose_kept(layout, path, removable, confidence)}
    return kept


def _note_kept_skips(layout: Layout, sample: dict[str, Any], kept: set[Cell], skips: Collection[str]) -> None:
    def left() -> set[Cell]:
        return {
            step.cell for step in make_plan(layout, sample, skips).steps if step.operator in skips and step.stride == 1
        }

    if left() != kept:
        sample[KEPT_SKIPS] = sorted(cell.name for cell in kept)


def _best_restricted_paths(layout: Layout, probabilities: _Weights, finals: tuple[int, ...]) -> dict[int, list[Cell]]:
    candidates = [_restricted_paths(layout, probabilities, scale) for scale in finals]
    best: tuple[float, tuple[list[Cell], ...]] | None = None
    for combination in product(*candidates):
        score = sum(gain for gain, _ in combination)
        paths = tuple(path for _, path in combination)
        if (best is None or score > best[0] + 1e-12) and _consistent(paths):
            best = (score, paths)
    if best is None:
        raise ArchitectureError(f"no branches to {finals} within {layout.n_layers} layers keep to FasterSeg's ranges")
    return dict(zip(finals, best[1], strict=True))


def _restricted_paths(layout: Layout, probabilities: _Weights, final: int) -> list[tuple[float, list[Cell]]]:
    # At least three cells before the first downsampling and between two, and two after the last.
    n_downs = layout.scales.index(final)
    found = []
    for targets in combinations(range(4, layout.n_layers), n_downs):
        if any(later - earlier < 3 for earlier, later in pairwise(targets)):
            continue
        path = [
            Cell(layout.scales[sum(target <= layer for target in targets)], layer)
            for layer in range(1, layout.n_layers + 1)
        ]
        score = sum(_log_score(layout, path[target - 1], FROM_FINER, probabilities, "joint") for target in targets)
        found.append((score, path))
    if not found:
        raise ArchitectureError(
            f"a branch to scale {final} needs more than {layout.n_layers} layers in FasterSeg's ranges"
        )
    return sorted(found, key=lambda item: -item[0])


def _consistent(paths: tuple[list[Cell], ...]) -> bool:
    sources: dict[Cell, Cell] = {}
    return all(sources.setdefault(cell, source) == source for path in paths for source, cell in pairwise(path))


class _Weights:
    def __init__(self, layout: Layout, weights: Mapping[str, Any]) -> None:
        self._layout = layout
        self._weights = weights
        self._known: dict[str, NDArray[np.float64]] = {}

    def of(self, label: str) -> NDArray[np.float64]:
        if label not in self._known:
            self._known[label] = self._checked(label)
        return self._known[label]

    def best(self, label: str, without: Collection[str] = ()) -> Any:
        values = self._layout.choices[label]
        if len(values) == 1:
            return values[0]
        allowed = [index for index, value in enumerate(values) if value not in without]
        if not allowed:
            raise ArchitectureError(f"'{label}' offers nothing but {', '.join(map(str, values))}")
        array = self.of(label)
        return values[max(allowed, key=lambda index: (array[index], -index))]

    def _checked(self, label: str) -> NDArray[np.float64]:
        values = self._layout.choices[label]
        if len(values) == 1:
            return np.ones(1)
        if label not in self._weights:
            raise ArchitectureError(
                f"the weights lack '{label}'; expected probabilities of {', '.join(map(str, values))}"
            )
        array = np.asarray(self._weights[label], dtype=np.float64)
        if array.shape != (len(values),):
            raise ArchitectureError(f"weights of '{label}' have shape {array.shape}; expected ({len(values)},)")
        if not np.isfinite(array).all() or (array < 0).any() or not math.isclose(array.sum(), 1.0, abs_tol=1e-3):
            raise ArchitectureError(f"weights of '{label}' are {array.tolist()}; expected probabilities that sum to 1")
        return array
