"""Read the parameters of a search that was run elsewhere: plain arrays α, β and γ on the grid of scales and layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glioma_nas.errors import ArchitectureError
from glioma_nas.search_spaces.layout import Cell, Layout


def weights_from_arrays(
    layout: Layout, alpha: Any, beta: Any, gamma: Any = None, *, logits: bool = True
) -> dict[str, NDArray[np.float64]]:
    """Turn grid-shaped parameters into label → probabilities, as the decoder takes them.

    Entry ``[i, l - 1]`` belongs to the cell at scale ``layout.scales[i]`` and layer l. Entries of positions where no
    such choice exists are ignored and may be NaN.

    Args:
        layout: The space.
        alpha: Operators, shape (S, L, O), in the order of ``layout.operators``.
        beta: Inputs, shape (S, L, 2): from the finer scale, from the same scale.
        gamma: Widths of the cells' input nodes, shape (S, L, X), in the order of ``layout.widths``; none for a teacher.
        logits: Whether the numbers are unnormalised (a softmax is applied) or already probabilities.

    Raises:
        ArchitectureError: A shape does not fit, or a number that is needed is not finite.
    """
    given = {"op": ("alpha", alpha, len(layout.operators)), "in": ("beta", beta, 2)}
    if gamma is not None:
        given["width"] = ("gamma", gamma, len(layout.widths))
    weights: dict[str, NDArray[np.float64]] = {}
    for kind, (name, values, length) in given.items():
        array = _grid(layout, name, values, length)
        for cell in layout.cells:
            label = f"{kind}_{cell.name}"
            if len(layout.choices.get(label, ())) > 1:
                weights[label] = _probabilities(layout, name, array, cell, logits)
    return weights


def arrays_from_weights(layout: Layout, weights: Mapping[str, Any]) -> tuple[NDArray[np.float64], ...]:
    """Return (α, β, γ) of label → probabilities, shaped as in `weights_from_arrays`; NaN where there is no choice."""
    shape = (len(layout.scales), layout.n_layers)
    arrays = []
    for kind, length in (("op", len(layout.operators)), ("in", 2), ("width", len(layout.widths))):
        array = np.full((*shape, length), np.nan)
        for cell in layout.cells:
            label = f"{kind}_{cell.name}"
            if label in weights:
                array[layout.scales.index(cell.scale), cell.layer - 1] = np.asarray(weights[label])
        arrays.append(array)
    return tuple(arrays)


def _grid(layout: Layout, name: str, values: Any, length: int) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    expected = (len(layout.scales), layout.n_layers, length)
    if array.shape != expected:
        raise ArchitectureError(f"{name} has shape {array.shape}; expected {expected} (scales, layers, values)")
    return array


def _probabilities(
    layout: Layout, name: str, array: NDArray[np.float64], cell: Cell, logits: bool
) -> NDArray[np.float64]:
    place = (layout.scales.index(cell.scale), cell.layer - 1)
    row: NDArray[np.float64] = array[place]
    if not np.isfinite(row).all():
        raise ArchitectureError(
            f"{name}[{place[0]}, {place[1]}], the cell at scale {cell.scale} in layer {cell.layer}, is {row.tolist()}; "
            "expected finite numbers"
        )
    if not logits:
        return row
    shifted: NDArray[np.float64] = np.exp(row - row.max())
    normalised: NDArray[np.float64] = shifted / shifted.sum()
    return normalised
