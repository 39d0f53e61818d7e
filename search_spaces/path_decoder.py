"""Find the branches' paths through the grid of cells that a relaxed search thinks best.

The downsampling positions of all branches are decoded together, because an NNI sample has one input choice for each
cell: two branches that pass the same node come from the same place. The best legal combinations are found exactly, by
dynamic programming over the layers from the last to the first.

Reference: METHOD §4; Chen et al., FasterSeg, ICLR 2020.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from itertools import combinations, pairwise, product
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from glioma_nas.errors import ArchitectureError, did_you_mean
from glioma_nas.search_spaces.layout import FROM_FINER, Cell, Layout

METHODS = ("joint", "viterbi", "fasterseg")

# Log score of what has probability 0: finite, so that among impossible paths the one with fewest such steps wins.
IMPOSSIBLE = -1e9

_Node = tuple[Cell, ...]
_T = TypeVar("_T")


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
        method: ``joint``, ``viterbi`` or ``fasterseg``, see `decode`.

    Returns:
        Final scale → cells of layer 1 to L.
    """
    return k_best_paths(layout, weights, finals, 1, method=method)[0][1]


def k_best_paths(
    layout: Layout, weights: Mapping[str, Any], finals: tuple[int, ...], k: int, *, method: str = "joint"
) -> list[tuple[float, dict[int, list[Cell]]]]:
    """Find the ``k`` best combinations of paths, or all if there are fewer; see `best_paths`.

    Returns:
        Log score and paths, best first.
    """
    probabilities = ChoiceProbabilities(layout, weights)
    if method not in METHODS:
        raise ArchitectureError(f"decode method {method!r}: {did_you_mean(method, METHODS)}")
    if method == "fasterseg":
        return _best_restricted_paths(layout, probabilities, finals, k)
    # State: where each branch is in the present layer. Value: log scores of what follows, with the layers behind it.
    start = tuple(Cell(scale, layout.n_layers) for scale in finals)
    states: dict[_Node, list[tuple[float, tuple[_Node, ...]]]] = {start: [(0.0, (start,))]}
    for _ in range(layout.n_layers - 1):
        following: dict[_Node, list[tuple[float, tuple[_Node, ...]]]] = {}
        for state, trails in sorted(states.items(), key=lambda item: [cell.scale for cell in item[0]]):
            for choice, gain in _moves(layout, state, probabilities, method):
                reached = tuple(layout.inputs(cell)[choice[cell]] for cell in state)
                following.setdefault(reached, []).extend((score + gain, (reached, *trail)) for score, trail in trails)
        states = {reached: _best(trails, k) for reached, trails in following.items()}
    (trails,) = states.values()
    return [
        (score, {scale: [node[index] for node in trail] for index, scale in enumerate(finals)})
        for score, trail in trails
    ]


def _best(scored: list[tuple[float, _T]], k: int) -> list[tuple[float, _T]]:
    # Stable, and blind to rounding errors: of equal scores the first one given stays first.
    return sorted(scored, key=lambda item: -round(item[0], 11))[:k]


def _moves(
    layout: Layout, state: _Node, probabilities: ChoiceProbabilities, method: str
) -> list[tuple[dict[Cell, int], float]]:
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


def _log_score(layout: Layout, cell: Cell, index: int, probabilities: ChoiceProbabilities, method: str) -> float:
    if method == "joint" and index != FROM_FINER:
        return 0.0
    if not layout.has_input_choice(cell):
        # A node with one input has no β. Its probability is 1 on a path, but as a position to choose it would beat
        # every learned one, and each branch would go down at once whatever the search found.
        return IMPOSSIBLE if method == "joint" and index == FROM_FINER else 0.0
    value = float(probabilities.of(f"in_{cell.name}")[index])
    return math.log(value) if value > 0 else IMPOSSIBLE


def _best_restricted_paths(
    layout: Layout, probabilities: ChoiceProbabilities, finals: tuple[int, ...], k: int
) -> list[tuple[float, dict[int, list[Cell]]]]:
    candidates = [_restricted_paths(layout, probabilities, scale) for scale in finals]
    found = [
        (sum(gain for gain, _ in combination), tuple(path for _, path in combination))
        for combination in product(*candidates)
    ]
    best = _best([(score, paths) for score, paths in found if _consistent(paths)], k)
    if not best:
        raise ArchitectureError(f"no branches to {finals} within {layout.n_layers} layers keep to FasterSeg's ranges")
    return [(score, dict(zip(finals, paths, strict=True))) for score, paths in best]


def _restricted_paths(layout: Layout, probabilities: ChoiceProbabilities, final: int) -> list[tuple[float, list[Cell]]]:
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


class ChoiceProbabilities:
    """The weights of a relaxed search, checked when they are asked for.

    Args:
        layout: The space.
        weights: Label → probabilities over the choice's values, shape (n,).
    """

    def __init__(self, layout: Layout, weights: Mapping[str, Any]) -> None:
        self._layout = layout
        self._weights = weights
        self._known: dict[str, NDArray[np.float64]] = {}
        self._ranked: dict[tuple[str, bool], list[tuple[Any, float]]] = {}

    def of(self, label: str) -> NDArray[np.float64]:
        """Return the probabilities of a label, shape (n,), sum 1.

        Raises:
            ArchitectureError: The label is missing, has the wrong length or is not a probability.
        """
        if label not in self._known:
            self._known[label] = self._checked(label)
        return self._known[label]

    def best(self, label: str, without: Collection[str] = ()) -> Any:
        """Return the most probable value, the first one of equals.

        Raises:
            ArchitectureError: Nothing is left ``without`` these values.
        """
        values = self._layout.choices[label]
        if len(values) == 1:
            return values[0]
        allowed = [index for index, value in enumerate(values) if value not in without]
        if not allowed:
            raise ArchitectureError(f"'{label}' offers nothing but {', '.join(map(str, values))}")
        array = self.of(label)
        return values[max(allowed, key=lambda index: (array[index], -index))]

    def share(self, label: str, value: Any) -> float:
        """Return the probability of one value."""
        return float(self.of(label)[self._layout.choices[label].index(value)])

    def ranked(self, label: str, without: Collection[str] = ()) -> list[tuple[Any, float]]:
        """Return the values with the logarithm of their probability relative to the best's, best first."""
        key = (label, bool(without))
        if key not in self._ranked:
            values = self._layout.choices[label]
            first = self.best(label, without)
            logs = [
                (value, math.log(share) if (share := self.share(label, value)) > 0 else IMPOSSIBLE)
                for value in values
                if value not in without
            ]
            # The order of `best`, which the first place must agree with.
            logs.sort(key=lambda item: (item[0] != first, -item[1]))
            self._ranked[key] = [(value, share - logs[0][1]) for value, share in logs]
        return self._ranked[key]

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
