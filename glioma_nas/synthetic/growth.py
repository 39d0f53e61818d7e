"""Grow a glioma by reaction and diffusion, let its oedema follow the white matter, and push the brain aside.

Tumour cell density u in [0, 1] obeys the Fisher-Kolmogorov equation (Swanson et al. 2000,
https://doi.org/10.1046/j.1365-2184.2000.00177.x; with anisotropy: Jbabdi et al. 2005,
https://doi.org/10.1002/mrm.20625)

    du/dt = div(D grad u) + r u (1 - u),     D = d (w + 0.1 g) (1 - a n n^T),

with w and g the shares of white and grey matter: cells move ten times as fast in white matter as in grey, and not at
all in fluid. The tensor hinders movement along n, the direction in which the share of white matter changes, so growth
keeps to the tracts; its diagonal is used. Time is counted in 1/r, so the one length left, ``sqrt(d/r)``, sets how
gradual the border is; a border moves at ``2 sqrt(d r)``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import fft, ndimage

from glioma_nas.synthetic.fields import Axes, Field

_HINDRANCE = 0.8
_MAX_VIGOUR = 3.0
_MAX_STEPS = 1500
_SEED_MM = 4.0
GREY_SHARE = 0.1
"""Diffusivity in grey matter by that in white matter."""


@dataclass(frozen=True)
class Ground:
    """Where cells can go, on an even grid.

    Attributes:
        axes: The grid, with the same step along all three.
        room: Share of living tissue in each voxel, 0 in fluid and outside the brain.
        conductance: Diffusivity through the faces between neighbours along x, y, z, in units of d; one shorter along
            their own axis than the grid.
    """

    axes: Axes
    room: Field
    conductance: tuple[Field, Field, Field]

    @classmethod
    def of(cls, axes: Axes, wm: Field, gm: Field, *, grey_share: float = GREY_SHARE) -> Ground:
        """Lay the ground from tissue shares; a voxel that is mostly fluid counts as fluid."""
        room = np.where(wm + gm > 0.5, wm + gm, 0).astype(np.float32)
        speed = np.where(room > 0, wm + np.float32(grey_share) * gm, 0).astype(np.float32)
        gradient = np.stack(np.gradient(ndimage.gaussian_filter(wm, 1.0)))
        squared = gradient**2
        normal = squared / np.maximum(squared.sum(axis=0), 1e-6)
        strength = np.clip(np.sqrt(squared.sum(axis=0)) / 0.15, 0, 1)
        faces = []
        for axis in range(3):
            along = speed * (1 - np.float32(_HINDRANCE) * strength * normal[axis])
            low, high = _neighbours(along, axis)
            # The harmonic mean: nothing passes when either side is closed.
            faces.append(np.asarray(2 * low * high / np.maximum(low + high, 1e-6), dtype=np.float32))
        return cls(axes, room, (faces[0], faces[1], faces[2]))

    @property
    def step_mm(self) -> float:
        """Distance of neighbouring voxels."""
        return float(self.axes[0][1] - self.axes[0][0])


def seed(ground: Ground, centre_mm: npt.NDArray[np.float64]) -> Field:
    """Return the first cells: a small ball about the living tissue nearest to ``centre_mm``."""
    grids = np.meshgrid(*ground.axes, indexing="ij", sparse=True)
    distance = np.sqrt(sum((grid - place) ** 2 for grid, place in zip(grids, centre_mm, strict=True)))
    nearest = np.unravel_index(int(np.argmin(np.where(ground.room > 0.9, distance, np.inf))), distance.shape)
    start = [axis[index] for axis, index in zip(ground.axes, nearest, strict=True)]
    distance = np.sqrt(sum((grid - place) ** 2 for grid, place in zip(grids, start, strict=True)))
    return np.asarray(np.clip(1.5 - distance / _SEED_MM, 0, 1) * (ground.room > 0), dtype=np.float32)


def grow(
    cells: Field, ground: Ground, *, length_mm: float, volume_ml: float, vigour: Field | None = None, level: float = 0.5
) -> Field:
    """Grow until ``volume_ml`` have more than ``level`` of cells, and return their density.

    Args:
        cells: (X, Y, Z) float32 in [0, 1], where to begin.
        ground: Where cells can go.
        length_mm: ``sqrt(d/r)`` in white matter.
        volume_ml: When to stop; growth also stops when there is no more room.
        vigour: Factor on r in each voxel; counts up to 3.
        level: Density that counts as grown.
    """
    u = cells.copy()
    reach = (length_mm / ground.step_mm) ** 2
    rate = (ground.room > 0).astype(np.float32)
    if vigour is not None:
        rate *= np.minimum(vigour, np.float32(_MAX_VIGOUR))
    # With at most half of the way to 1 left to growth, and half to diffusion, no density leaves [0, 1].
    step = min(0.5 / (6 * reach), 0.5 / max(float(rate.max()), 1e-6))
    rate *= np.float32(step)
    faces = [np.float32(step * reach) * face for face in ground.conductance]
    wanted = volume_ml * 1000 / ground.step_mm**3
    flows = [np.empty_like(face) for face in faces]
    for count in range(_MAX_STEPS):
        if count % 4 == 0 and np.count_nonzero(u > level) >= wanted:
            break
        growth = rate * u
        growth *= 1 - u
        for axis, (face, flow) in enumerate(zip(faces, flows, strict=True)):
            low, high = _neighbours(u, axis)
            np.subtract(high, low, out=flow)
            flow *= face
            low_growth, high_growth = _neighbours(growth, axis)
            low_growth += flow
            high_growth -= flow
        u += growth
    return u


def mass_effect(mass: Field, brain: Field, step_mm: float, largest_mm: float) -> tuple[Field, Field, Field]:
    """Return how far a growing mass pushes the tissue found at each voxel, along x, y, z in millimetres.

    The displacement is the gradient of a potential whose Laplacian is the mass, so tissue is pushed outwards and less
    with distance. The skull holds: it dwindles towards the border of the brain.

    Args:
        mass: Density of what grew, (X, Y, Z).
        brain: Share of brain.
        step_mm: Distance of neighbouring voxels.
        largest_mm: Size of the largest displacement.
    """
    # Padded, so that the mass hardly feels its periodic images.
    shape = [fft.next_fast_len(int(1.4 * side)) for side in mass.shape]
    frequencies = [fft.fftfreq(side) for side in shape[:2]] + [fft.rfftfreq(shape[2])]
    waves = np.meshgrid(*(2 * np.pi * f.astype(np.float32) for f in frequencies), indexing="ij", sparse=True)
    squared = sum(wave**2 for wave in waves)
    squared[0, 0, 0] = np.inf
    potential = fft.rfftn(mass, shape) / -squared
    inside = tuple(slice(side) for side in mass.shape)
    parts = [fft.irfftn(1j * wave * potential, shape)[inside] for wave in waves]
    depth_mm = ndimage.distance_transform_edt(np.pad(brain > 0.5, 1), sampling=step_mm)[1:-1, 1:-1, 1:-1]
    hold = np.clip(depth_mm / 14, 0, 1)
    size = np.sqrt(sum(part**2 for part in parts)) * hold
    factor = largest_mm / max(float(size.max()), 1e-6)
    x, y, z = (np.asarray(part * hold * factor, dtype=np.float32) for part in parts)
    return x, y, z


def displaced(values: Field, push_mm: tuple[Field, Field, Field], step_mm: float) -> Field:
    """Move values with the tissue they belong to."""
    places = np.indices(values.shape, dtype=np.float32)
    places -= np.stack(push_mm) / np.float32(step_mm)
    return np.asarray(ndimage.map_coordinates(values, places, order=1), dtype=np.float32)


def _neighbours(values: Field, axis: int) -> tuple[Field, Field]:
    # Views of all voxels but the last, and of all but the first, along one axis.
    low = [slice(None)] * 3
    high = [slice(None)] * 3
    low[axis], high[axis] = slice(None, -1), slice(1, None)
    return values[tuple(low)], values[tuple(high)]
