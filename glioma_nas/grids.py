"""Carry volumes from one voxel grid to another, and measure rigid motions.

A grid is a shape and an affine. A motion is a (4, 4) rigid map between two scanner spaces, in RAS+ millimetres. All
of it is plain linear algebra in double precision on one thread, so the result is the same everywhere.
"""

from __future__ import annotations

from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt

from glioma_nas.images import Affine, FloatVolume

IDENTITY: Affine = np.eye(4)
LPS_FROM_RAS: Affine = np.diag([-1.0, -1.0, 1.0, 1.0])
"""NIfTI counts millimetres to the right, anterior, superior; ITK and DICOM to the left, posterior, superior."""

_WHOLE_VOXELS = 1e-4
_SAME_DIRECTION = 1e-3


def voxel_map(target: Affine, source: Affine, motion: Affine = IDENTITY) -> Affine:
    """Return the map from voxel indices of ``target`` to voxel indices of ``source``.

    Args:
        target: Affine of the grid that is asked for.
        source: Affine of the grid that holds the data.
        motion: From the target's scanner space to the source's.
    """
    mapped: Affine = np.linalg.inv(source) @ motion @ target
    return mapped


def resample_to_grid(
    data: FloatVolume, source: Affine, target: Affine, shape: tuple[int, int, int], *, motion: Affine = IDENTITY
) -> FloatVolume:
    """Interpolate a volume linearly at the voxel centres of another grid; 0 outside.

    A map of whole voxels (the same grid, a flip, a crop) is a copy, without any rounding.

    Args:
        data: (X, Y, Z) float32 on ``source``.
        source: Affine of ``data``.
        target: Affine of the result.
        shape: Shape of the result.
        motion: From the target's scanner space to the source's.

    Returns:
        ``shape`` float32.
    """
    from scipy.ndimage import affine_transform

    matrix = voxel_map(target, source, motion)
    nearest = np.rint(matrix)
    corners = np.array([[x, y, z, 1] for x in (0, shape[0]) for y in (0, shape[1]) for z in (0, shape[2])], dtype=float)
    if np.abs(corners @ (matrix - nearest).T).max() < _WHOLE_VOXELS:
        matrix = nearest
        if shape == data.shape and np.array_equal(nearest, IDENTITY):
            return np.ascontiguousarray(data, dtype=np.float32)
    sampled: FloatVolume = affine_transform(
        np.asarray(data, dtype=np.float32),
        matrix[:3, :3],
        matrix[:3, 3],
        output_shape=shape,
        order=1,
        mode="grid-constant",
        cval=0.0,
    )
    return np.ascontiguousarray(sampled, dtype=np.float32)


def same_grid(
    shape: tuple[int, ...], affine: Affine, other_shape: tuple[int, ...], other_affine: Affine, *, voxels: float = 0.1
) -> bool:
    """Tell whether two grids agree, up to a fraction of the smallest voxel side at every corner."""
    if tuple(shape) != tuple(other_shape):
        return False
    return corner_shift_mm(shape, affine, other_affine) <= voxels * float(spacing_mm(affine).min())


def turn_onto(data: npt.NDArray[Any], affine: Affine, target: Affine) -> tuple[npt.NDArray[Any], Affine]:
    """Swap and flip the axes of a volume so that they run like those of another grid; no voxel moves in space.

    Programs store one and the same volume with different axes: a converter from DICOM flips the rows, for example.

    Args:
        data: (X, Y, Z).
        affine: Its grid.
        target: Affine of the grid whose axes are wanted.

    Returns:
        The volume, and its affine.
    """
    turn = _turn(affine, target)
    turned: Affine = affine @ nib.orientations.inv_ornt_aff(turn, data.shape)
    return np.ascontiguousarray(nib.orientations.apply_orientation(data, turn)), turned


def turned_grid(shape: tuple[int, ...], affine: Affine, target: Affine) -> tuple[tuple[int, ...], Affine]:
    """Return shape and affine of what `turn_onto` makes of a volume, without the volume."""
    turn = _turn(affine, target)
    sides = [shape[int(old)] for old in np.argsort(turn[:, 0])]
    return tuple(sides), affine @ nib.orientations.inv_ornt_aff(turn, shape)


def _turn(affine: Affine, target: Affine) -> npt.NDArray[Any]:
    # Of two grids that agree but for rounding, one may be named by other axes than the other at about 45 degrees.
    one, other = (matrix[:3, :3] / spacing_mm(matrix) for matrix in (affine, target))
    if np.allclose(one, other, rtol=0, atol=_SAME_DIRECTION):
        return np.array([[0, 1], [1, 1], [2, 1]])
    turn: npt.NDArray[Any] = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.io_orientation(target))
    return turn


def corner_shift_mm(shape: tuple[int, ...], affine: Affine, other_affine: Affine) -> float:
    """Return the largest distance, along an axis, of a corner of the grid in both scanner spaces."""
    corners = np.array([[x, y, z, 1] for x in (0, shape[0]) for y in (0, shape[1]) for z in (0, shape[2])], dtype=float)
    return float(np.abs(corners @ (affine - other_affine).T).max())


def spacing_mm(affine: Affine) -> npt.NDArray[np.float64]:
    """Return the three voxel sides."""
    sides: npt.NDArray[np.float64] = np.linalg.norm(affine[:3, :3], axis=0)
    return sides


def rotation_degrees(motion: Affine) -> float:
    """Return the angle of a rigid motion, 0 to 180."""
    cosine = (np.trace(motion[:3, :3]) - 1) / 2
    return float(np.rad2deg(np.arccos(np.clip(cosine, -1.0, 1.0))))


def shift_mm(motion: Affine, centre: npt.NDArray[np.float64]) -> float:
    """Return how far a rigid motion carries the point ``centre``, (3,) millimetres."""
    return float(np.linalg.norm(motion[:3, :3] @ centre + motion[:3, 3] - centre))


def rotation_about(
    centre: npt.NDArray[np.float64], degrees: tuple[float, float, float], shift: tuple[float, float, float]
) -> Affine:
    """Return the rigid motion that turns about ``centre`` (x, then y, then z axis) and then moves by ``shift`` mm."""
    matrix = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(degrees)):
        turn = np.eye(3)
        first, second = [other for other in range(3) if other != axis]
        turn[first, first] = turn[second, second] = np.cos(angle)
        turn[first, second], turn[second, first] = -np.sin(angle), np.sin(angle)
        matrix = turn @ matrix
    motion = np.eye(4)
    motion[:3, :3] = matrix
    motion[:3, 3] = np.asarray(shift) + centre - matrix @ centre
    return motion
