"""Smooth random fields that are the same function of place on every grid."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Field = npt.NDArray[np.float32]
Axes = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64]]
"""Places of a grid's voxels along x, y and z in millimetres of the head's own frame (RAS+, middle of the head 0)."""

_HALF_MM = np.array([135.0, 135.0, 115.0])
_OVERLAP = 0.6


@dataclass(frozen=True)
class SmoothField:
    """Random values on a lattice over the head, joined by Gaussian bumps; mean 0 and unit deviation everywhere.

    Attributes:
        values: (I, J, K) float32, standard normal.
        spacing_mm: Distance of the lattice points, which is about the size of the field's features.
    """

    values: Field
    spacing_mm: float

    @classmethod
    def draw(cls, spacing_mm: float, generator: np.random.Generator) -> SmoothField:
        """Draw a field whose features are ``spacing_mm`` wide."""
        shape = np.ceil(2 * _HALF_MM / spacing_mm).astype(int) + 1
        return cls(generator.standard_normal(tuple(shape), dtype=np.float32), spacing_mm)

    def on(self, axes: Axes) -> Field:
        """Return the field on a grid, float32 of the grid's shape."""
        field = self.values
        for axis_mm, half_mm, n in zip(axes, _HALF_MM, self.values.shape, strict=True):
            place = (axis_mm[:, None] + half_mm) / self.spacing_mm - np.arange(n)
            weights = np.exp(-0.5 * (place / _OVERLAP) ** 2)
            weights = (weights / np.sqrt((weights**2).sum(axis=1, keepdims=True))).astype(np.float32)
            # Contracting the first axis and appending its result turns the axes once round.
            field = np.tensordot(field, weights, axes=(0, 1))
        return field


def interpolate(values: Field, from_axes: Axes, to_axes: Axes) -> Field:
    """Resample from one grid to another linearly; 0 beyond the borders. Both grids share the directions of their axes.

    Args:
        values: On the grid ``from_axes``, whose steps are even.
        from_axes: Where the values are.
        to_axes: Where they are wanted.
    """
    field = values
    for old, new in zip(from_axes, to_axes, strict=True):
        place = (new[:, None] - old[0]) / (old[1] - old[0]) - np.arange(len(old))
        weights = np.clip(1 - np.abs(place), 0, None).astype(np.float32)
        field = np.tensordot(field, weights, axes=(0, 1))
    return field


def ramp(value: Field, width: float) -> Field:
    """Rise smoothly from 0 to 1 over ±2 ``width`` about 0; exactly 0 and 1 beyond."""
    t = np.clip(value / np.float32(4 * width) + np.float32(0.5), 0, 1)
    return np.asarray(t * t * (3 - 2 * t), dtype=np.float32)
