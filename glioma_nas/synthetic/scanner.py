"""What a scanner does to a clean image: head motion, thick slices, uneven coils, noise, arbitrary units."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from scipy.spatial.transform import Rotation

from glioma_nas.images import Affine
from glioma_nas.seeding import numpy_generator
from glioma_nas.synthetic.contrasts import SEQUENCES
from glioma_nas.synthetic.fields import Axes, Field, SmoothField

SUBSLICES = 3
"""Thin slices that make up a thick one."""


@dataclass(frozen=True)
class Site:
    """One hospital's scanner.

    Attributes:
        tones: Sequence → factors on the brightness of fluid, grey and white matter.
        scale: Sequence → how many units white matter on T1 has.
        noise: Deviation of the noise in that brightness.
        bias: Deviation of the logarithm of the coils' sensitivity.
    """

    tones: dict[str, tuple[float, float, float]]
    scale: dict[str, float]
    noise: float
    bias: float

    @classmethod
    def of(cls, name: str, seed: int) -> Site:
        """Return the scanner of a site; the same for all its patients."""
        generator = numpy_generator(seed, "synthetic", "site", name)
        tones = {}
        for sequence in SEQUENCES:
            fluid, grey, white = 1 + 0.05 * np.clip(generator.standard_normal(3), -2, 2)
            tones[sequence] = (float(fluid), float(grey), float(white))
        level = float(np.exp(generator.normal(0, 0.5)))
        scale = {name: 500 * level * float(np.exp(generator.normal(0, 0.25))) for name in SEQUENCES}
        return cls(tones, scale, float(generator.uniform(0.015, 0.03)), float(generator.uniform(0.05, 0.11)))


@dataclass(frozen=True)
class Grid:
    """The voxels of one series.

    Attributes:
        shape: (X, Y, Z) voxels.
        affine: (4, 4), voxel index → millimetres in RAS+ scanner space; axes towards left, posterior, superior.
    """

    shape: tuple[int, int, int]
    affine: Affine

    @classmethod
    def draw(
        cls, side_px: int, pixel_mm: float, n_slices: int, slice_mm: float, generator: np.random.Generator
    ) -> Grid:
        """Place a stack of slices tilted by a few degrees about the isocentre."""
        tilt = Rotation.from_euler("xyz", generator.uniform([-12, -3, -3], [12, 3, 3]), degrees=True).as_matrix()
        affine = np.eye(4)
        affine[:3, :3] = tilt @ np.diag([-pixel_mm, -pixel_mm, slice_mm])
        shape = (side_px, side_px, n_slices)
        affine[:3, 3] = generator.uniform(-15, 15, 3) - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
        return cls(shape, affine)

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Size of a voxel along its axes."""
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(x), float(y), float(z)

    @property
    def fine_axes(self) -> Axes:
        """Places of thin slices and pixels about the middle of the grid, as if its axes were the head's."""
        steps = np.array([-1.0, -1.0, 1.0]) * self.spacing_mm / np.array([1, 1, SUBSLICES])
        sides = (self.shape[0], self.shape[1], self.shape[2] * SUBSLICES)
        x, y, z = ((np.arange(side) - (side - 1) / 2) * step for side, step in zip(sides, steps, strict=True))
        return x, y, z

    @property
    def head_to_scanner(self) -> Affine:
        """(4, 4) transform under which `fine_axes` fill exactly this grid."""
        x, y, z = self.spacing_mm
        straight = np.diag([-x, -y, z, 1.0])
        straight[:3, 3] = -straight[:3, :3] @ ((np.array(self.shape) - 1) / 2)
        return np.asarray(self.affine @ np.linalg.inv(straight))


def draw_motion(translation_mm: float, rotation_deg: float, generator: np.random.Generator) -> Affine:
    """Draw a rigid motion about the origin: uniform within ± the given size along and about each axis."""
    motion = np.eye(4)
    motion[:3, :3] = Rotation.from_euler("xyz", generator.uniform(-1, 1, 3) * rotation_deg, degrees=True).as_matrix()
    motion[:3, 3] = generator.uniform(-1, 1, 3) * translation_mm
    return motion


def slice_thickly(fine: Field, axes: Axes, grid: Grid, head_to_scanner: Affine) -> Field:
    """Average a fine image over the thick voxels of a grid; 0 where the grid reaches beyond it.

    Args:
        fine: Image in the head's own frame.
        axes: Its voxels there.
        grid: Where slices are taken.
        head_to_scanner: (4, 4) rigid transform, where the head lay when they were.

    Returns:
        Float32 of the grid's shape.
    """
    sides = (grid.shape[0], grid.shape[1], grid.shape[2] * SUBSLICES)
    thin = np.diag([1, 1, 1 / SUBSLICES, 1.0])
    thin[2, 3] = -(SUBSLICES - 1) / (2 * SUBSLICES)
    to_index = np.eye(4)
    for k, axis in enumerate(axes):
        to_index[k, k] = 1 / (axis[1] - axis[0])
        to_index[k, 3] = -axis[0] * to_index[k, k]
    matrix = to_index @ np.linalg.inv(head_to_scanner) @ grid.affine @ thin
    if fine.shape == sides and np.allclose(matrix, np.eye(4), atol=1e-6):
        sampled = fine
    else:
        sampled = ndimage.affine_transform(fine, matrix, output_shape=sides, order=1)
    return np.asarray(sampled.reshape(*grid.shape, SUBSLICES).mean(axis=3), dtype=np.float32)


@dataclass(frozen=True)
class Acquisition:
    """The chance of one series, drawn before its image is known: coil sensitivity, noise level, units."""

    sensitivity: SmoothField
    bias: float
    noise: float
    scale: float

    @classmethod
    def draw(cls, site: Site, name: str, noise_factor: float, generator: np.random.Generator) -> Acquisition:
        """Draw what one series of a sequence ``name`` suffers."""
        vary = np.exp(generator.normal(0, 0.12, 3))
        return cls(
            SmoothField.draw(80, generator),
            min(site.bias * noise_factor**0.5 * float(vary[0]), 0.3),
            site.noise * noise_factor * float(vary[1]),
            site.scale[name] * float(vary[2]),
        )

    def apply(self, clean: Field, grid: Grid, generator: np.random.Generator) -> npt.NDArray[np.int16]:
        """Return the magnitude image; its noise is Rician (Gudbjartsson and Patz 1995).

        Args:
            clean: (X, Y, Z), white matter on T1 about 1.
            grid: Its voxels.
            generator: Source of the noise.
        """
        fine = grid.fine_axes
        axes: Axes = (fine[0], fine[1], fine[2].reshape(-1, SUBSLICES).mean(axis=1))
        image = clean * np.exp(np.float32(self.bias) * self.sensitivity.on(axes))
        noise = generator.standard_normal((2, *clean.shape), dtype=np.float32)
        noise *= np.float32(self.noise)
        noise[0] += image
        magnitude = np.hypot(noise[0], noise[1]) * np.float32(self.scale)
        return np.asarray(np.clip(np.rint(magnitude), 0, 32767), dtype=np.int16)
