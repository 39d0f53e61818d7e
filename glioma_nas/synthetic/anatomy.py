"""One head: the MNI152 tissue maps, posed, resized and warped, with cortical folds of its own.

The maps are those nilearn ships (MNI ICBM152 2009 nonlinear symmetric, Fonov et al. 2011,
https://doi.org/10.1016/j.neuroimage.2010.07.033), so nothing is downloaded. They are averages of 152 heads and
therefore blurred; every head gets steep borders back, moved by smooth noise so that no two have the same sulci.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from scipy.spatial.transform import Rotation

from glioma_nas.synthetic.fields import Axes, Field, SmoothField, ramp
from glioma_nas.synthetic.patients import LOBES

# Where the middle of the field of view lies in MNI space.
_MIDDLE_MM = np.array([0.0, -18.0, 10.0])
_BRAIN_FROM = 0.22
_STEEPNESS = 7.0
_CORTEX_MM = 3.4
_SINUS_MM = 8.0


@dataclass(frozen=True)
class Tissue:
    """Shares of tissue on one grid, float32 in [0, 1]; the first three add up to ``brain``.

    Attributes:
        wm: White matter.
        gm: Grey matter.
        csf: Fluid.
        brain: All of them.
        t1: The template's own brightness, which knows deep nuclei and myelin, white matter being about 0.85.
        vessels: Where contrast agent is seen in a healthy head: sinuses, cortical vessels, choroid plexus.
        spots: Small bright spots of ageing white matter, as on FLAIR.
    """

    wm: Field
    gm: Field
    csf: Field
    brain: Field
    t1: Field
    vessels: Field
    spots: Field


@dataclass(frozen=True)
class _Atlas:
    t1: Field
    gm: Field
    wm: Field
    cortex_mm: Field
    to_voxel: npt.NDArray[np.float64]
    seeds_mm: dict[str, npt.NDArray[np.float64]]


@dataclass(frozen=True)
class Head:
    """The numbers that make one head, drawn before any grid is known.

    Attributes:
        to_atlas: (3, 3), from the head's millimetres to the atlas': pose, size, shear, left for right in half of them.
        bends: Displacement along x, y, z: (large features, small features).
        folds: Noise in the border of white matter, and in the thickness of the cortex.
        vessels: Noise that places vessels.
        spots: Noise that places white matter spots.
        spot_share: How many of them, 0 to 1.
    """

    to_atlas: npt.NDArray[np.float64]
    bends: tuple[tuple[SmoothField, SmoothField], ...]
    folds: tuple[SmoothField, SmoothField]
    vessels: SmoothField
    spots: SmoothField
    spot_share: float

    @classmethod
    def draw(cls, generator: np.random.Generator) -> Head:
        """Draw a head."""
        turn = Rotation.from_euler("xyz", generator.uniform([-7, -4, -6], [7, 4, 6]), degrees=True).as_matrix()
        size = np.diag(generator.uniform(0.94, 1.06, 3))
        shear = np.eye(3) + np.triu(generator.normal(0, 0.02, (3, 3)), 1)
        mirror = np.diag([generator.choice([-1.0, 1.0]), 1.0, 1.0])
        return cls(
            mirror @ turn @ shear @ size,
            tuple((SmoothField.draw(45, generator), SmoothField.draw(16, generator)) for _ in range(3)),
            (SmoothField.draw(7, generator), SmoothField.draw(7, generator)),
            SmoothField.draw(5, generator),
            SmoothField.draw(6, generator),
            float(generator.beta(1.2, 3)),
        )

    def seed_mm(self, lobe: str, generator: np.random.Generator) -> npt.NDArray[np.float64]:
        """Choose a place in the white matter of a lobe, in the head's millimetres (3,)."""
        places = _atlas().seeds_mm[lobe]
        return np.asarray(np.linalg.solve(self.to_atlas, places[int(generator.integers(len(places)))] - _MIDDLE_MM))

    def tissue(self, axes: Axes, push_mm: tuple[Field, Field, Field] | None = None) -> Tissue:
        """Return the tissue on a grid.

        Args:
            axes: The grid.
            push_mm: How far the tissue found at each voxel was pushed along x, y and z by a tumour.
        """
        atlas = _atlas()
        moved = []
        for k, axis in enumerate(axes):
            shape = [1, 1, 1]
            shape[k] = -1
            large, small = self.bends[k]
            place = np.float32(2.2) * large.on(axes) + np.float32(1.3) * small.on(axes)
            place += axis.astype(np.float32).reshape(shape)
            if push_mm is not None:
                place -= push_mm[k]
            moved.append(place)
        places_mm = _affine(self.to_atlas, _MIDDLE_MM, moved)
        places = np.stack(_affine(atlas.to_voxel[:3, :3], atlas.to_voxel[:3, 3], places_mm))
        t1, gm, wm, cortex_mm = (
            ndimage.map_coordinates(volume, places, order=1)
            for volume in (atlas.t1, atlas.gm, atlas.wm, atlas.cortex_mm)
        )
        brain = np.clip((t1 - np.float32(_BRAIN_FROM)) / np.float32(0.04), 0, 1)
        border, depth = (noise.on(axes) for noise in self.folds)
        # Cortex is about 3 mm thick, so what lies further from white matter is the fluid of a sulcus.
        sulcus = ramp(cortex_mm - np.float32(_CORTEX_MM) - np.float32(0.6) * depth, 0.4)
        csf = np.clip(1 - gm - wm, 0, 1) + np.float32(0.55) * sulcus
        border *= np.float32(0.09)
        parts = [np.exp(np.float32(_STEEPNESS) * part) for part in (wm - border, gm + border, csf)]
        share = brain / (parts[0] + parts[1] + parts[2])
        wm, gm, csf = (part * share for part in parts)
        return Tissue(wm, gm, csf, brain, t1, self._vessels(axes, places_mm, csf, brain), self._spots(axes, wm))

    def _vessels(self, axes: Axes, places_mm: list[Field], csf: Field, brain: Field) -> Field:
        x, y, z = (np.abs(places_mm[0]), places_mm[1], places_mm[2])
        noise = self.vessels.on(axes)
        in_sulci = np.clip(noise - np.float32(1.3), 0, 1) * csf
        # The plexus lies in the trigones of the lateral ventricles; the sagittal sinus along the midline at the vault.
        plexus = np.exp(-(((x - 21) / 5) ** 2 + ((y + 40) / 8) ** 2 + ((z - 8) / 6) ** 2)) * csf
        width = [max(3, round(_SINUS_MM / abs(float(axis[1] - axis[0])))) for axis in axes]
        edge = np.clip(1 - ndimage.uniform_filter(brain, width), 0, 1) * brain
        sinus = np.exp(-((x / 3.5) ** 2)) * np.clip((z + 10) / 20, 0, 1) * edge * 2
        return np.asarray(np.clip(in_sulci + 1.2 * plexus + sinus, 0, 1), dtype=np.float32)

    def _spots(self, axes: Axes, wm: Field) -> Field:
        level = np.float32(3.4 - 1.6 * self.spot_share)
        return np.asarray(np.clip(2 * (self.spots.on(axes) - level), 0, 1) * wm, dtype=np.float32)


def _affine(matrix: npt.NDArray[np.float64], offset: npt.NDArray[np.float64], parts: list[Field]) -> list[Field]:
    # Written out for the three parts, because a matrix product would need them side by side in memory.
    rows = matrix.astype(np.float32)
    return [
        row[0] * parts[0] + row[1] * parts[1] + row[2] * parts[2] + np.float32(shift)
        for row, shift in zip(rows, offset, strict=True)
    ]


@lru_cache(maxsize=1)
def _atlas() -> _Atlas:
    # Imported here because nilearn takes two seconds to load and only this function needs it.
    from nilearn.datasets import load_mni152_gm_template, load_mni152_template, load_mni152_wm_template

    t1, gm, wm = (
        load(resolution=1) for load in (load_mni152_template, load_mni152_gm_template, load_mni152_wm_template)
    )
    volumes = [image.get_fdata(dtype=np.float32) for image in (t1, gm, wm)]
    deep = ndimage.uniform_filter(volumes[2], 9)[::3, ::3, ::3] > 0.55
    places = np.argwhere(deep) * 3
    places_mm = places @ t1.affine[:3, :3].T + t1.affine[:3, 3]
    lobes = np.array([_lobe(*place) for place in places_mm])
    seeds_mm = {lobe: places_mm[lobes == lobe] for lobe in LOBES}
    return _Atlas(
        volumes[0], volumes[1], volumes[2], _cortex_mm(volumes[2], t1.affine), np.linalg.inv(t1.affine), seeds_mm
    )


def _cortex_mm(wm: Field, affine: npt.NDArray[np.float64]) -> Field:
    # Distance to white matter, 0 where grey matter is a deep nucleus or cerebellum, which have no sulci at this scale.
    distance = ndimage.distance_transform_edt(wm[::2, ::2, ::2] < 0.4, sampling=2.0).astype(np.float32)
    distance = ndimage.zoom(distance, np.array(wm.shape) / distance.shape, order=1)
    x, y, z = (
        np.arange(side, dtype=np.float32).reshape(shape) + np.float32(affine[axis, 3])
        for axis, (side, shape) in enumerate(zip(wm.shape, ((-1, 1, 1), (1, -1, 1), (1, 1, -1)), strict=True))
    )
    nuclei = (np.abs(x) < 36) & (y > -38) & (y < 26) & (z > -16) & (z < 24)
    cerebellum = (z < -14) & (y < -30)
    distance[nuclei | cerebellum] = 0
    return np.asarray(ndimage.uniform_filter(distance, 3), dtype=np.float32)


def _lobe(x: float, y: float, z: float) -> str:
    # Coarse boxes in MNI millimetres; "" for brain stem, cerebellum and the midline, where no tumour begins.
    x = abs(x)
    if x < 12 or z < -28 or (z < -12 and y < -35):
        return ""
    if y < -68:
        return "occipital"
    if z < -2 + 0.25 * max(0.0, -20 - y) and x > 26 and y < 8:
        return "temporal"
    if -8 <= z <= 16 and x >= 28 and -24 <= y <= 22:
        return "insular"
    if -4 <= z <= 16 and x < 28 and -30 <= y <= 14:
        return "deep"
    if y > -2 - 0.45 * max(z, 0.0):
        return "frontal"
    return "parietal" if z > 8 else ""
