"""Plan a synthetic glioma from what its patient is, grow it, and say what every voxel of it consists of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from glioma_nas.synthetic.anatomy import Head, Tissue
from glioma_nas.synthetic.fields import Axes, Field, SmoothField, interpolate, ramp
from glioma_nas.synthetic.growth import Ground, displaced, grow, mass_effect, seed
from glioma_nas.synthetic.patients import SyntheticPatient

CORE, OEDEMA, ENHANCING = 1, 2, 4
"""Mask labels as in BraTS: 1 is necrosis and the core that does not enhance."""

_STEP_MM = 2.5
_HALF_BOX_MM = 65.0
_CORE_FROM = 0.5
_INFILTRATED_FROM = 0.3
_FLUID_FOLLOWS_WHITE = 0.03


@dataclass(frozen=True)
class TumourPlan:
    """The numbers that shape one tumour, drawn before it is grown.

    Attributes:
        core_ml: Volume of the core.
        oedema_ml: Volume of core and oedema together.
        length_mm: Diffusion length of the cells in white matter; a longer one makes a more diffuse tumour.
        softness: Width of the visible border in units of cell density.
        roughness: Deviation of the logarithm of the growth rate from place to place.
        ring_mm: Thickness of the enhancing ring around necrosis; 0 for none.
        patch_share: Share of the core that enhances in patches; 0 for none.
        rim_mm: Thickness of the rim of a T2-FLAIR mismatch; 0 for none.
        texture: Deviation of brightness inside the core, in deviations of the brain.
        mass_effect_mm: Largest displacement of tissue.
    """

    core_ml: float
    oedema_ml: float
    length_mm: float
    softness: float
    roughness: float
    ring_mm: float
    patch_share: float
    rim_mm: float
    texture: float
    mass_effect_mm: float

    @classmethod
    def draw(cls, patient: SyntheticPatient, generator: np.random.Generator) -> TumourPlan:
        """Draw a plan in keeping with IDH status, enhancement and Ki67.

        A mutant's border is sharper and its oedema smaller; a tumour that enhances has more oedema. Ki67, against the
        median of its grade, makes the core a little more uneven.
        """
        mutant = patient.is_mutant

        def around(median: float, log_deviation: float) -> float:
            return median * float(np.exp(log_deviation * np.clip(generator.standard_normal(), -2, 2)))

        core_ml = around(28, 0.55) if mutant else around(22, 0.6)
        halo = around(0.3, 0.6) if mutant else around(0.75, 0.6)
        if patient.enhancement != "none":
            halo += around(0.5, 0.5)
        rim_mm = around(4.0, 0.2)
        ring_mm, patch_share = around(4.5, 0.25), float(generator.uniform(0.12, 0.4))
        radius_mm = (core_ml * 750 / np.pi) ** (1 / 3)
        return cls(
            core_ml=core_ml,
            oedema_ml=min(core_ml * (1 + halo), 190.0),
            length_mm=around(1.5, 0.25) if mutant else around(2.0, 0.3),
            softness=around(0.05, 0.4) if mutant else around(0.075, 0.4),
            roughness=float(generator.uniform(0.45, 0.8)) if mutant else float(generator.uniform(0.5, 0.9)),
            ring_mm=ring_mm if patient.enhancement == "ring" else 0.0,
            patch_share=patch_share if patient.enhancement == "patches" else 0.0,
            rim_mm=rim_mm if patient.t2_flair_mismatch else 0.0,
            texture=around(0.35, 0.35) * float(np.exp(0.22 * patient.proliferation)),
            mass_effect_mm=min(radius_mm * float(generator.uniform(0.15, 0.38)), 9.0),
        )


@dataclass(frozen=True)
class GrownTumour:
    """A tumour on its own coarse grid, tissue already pushed aside.

    Attributes:
        axes: The grid, in the head's millimetres.
        cells: Density of tumour cells.
        fluid: Density of oedema.
        push_mm: How far the tissue found at each voxel was pushed.
        noise: Fields that make ring, patches and texture uneven: coarse, middle, fine.
    """

    axes: Axes
    cells: Field
    fluid: Field
    push_mm: tuple[Field, Field, Field]
    noise: tuple[SmoothField, SmoothField, SmoothField]

    def push_on(self, axes: Axes) -> tuple[Field, Field, Field]:
        """Return the displacement on another grid; 0 far from the tumour."""
        x, y, z = (interpolate(part, self.axes, axes) for part in self.push_mm)
        return x, y, z


@dataclass(frozen=True)
class TumourShares:
    """What the tumour is made of on a grid, float32 in [0, 1].

    Attributes:
        presence: How much of a voxel's brightness is the tumour's.
        core: Share of core in that, of any kind.
        necrosis: Share of fluid necrosis.
        enhancing: Share that takes up contrast agent.
        watery: Share of the inside of a T2-FLAIR mismatch.
        texture: Unevenness of the core, unit deviation.
        labels: Shares of the mask labels core, oedema and enhancing; at most 1 together.
    """

    presence: Field
    core: Field
    necrosis: Field
    enhancing: Field
    watery: Field
    texture: Field
    labels: tuple[Field, Field, Field]


def grow_tumour(
    plan: TumourPlan, head: Head, centre_mm: npt.NDArray[np.float64], generator: np.random.Generator
) -> GrownTumour:
    """Grow the tumour of a plan in a head from ``centre_mm`` (3,), in the head's millimetres."""
    steps = np.arange(-_HALF_BOX_MM, _HALF_BOX_MM + 1e-6, _STEP_MM)
    axes: Axes = (centre_mm[0] + steps, centre_mm[1] + steps, centre_mm[2] + steps)
    noise = (SmoothField.draw(12, generator), SmoothField.draw(9, generator), SmoothField.draw(5, generator))
    rate = np.exp(np.float32(plan.roughness) * SmoothField.draw(16, generator).on(axes))
    tissue = head.tissue(axes)
    ground = Ground.of(axes, tissue.wm, tissue.gm)
    cells = grow(
        seed(ground, centre_mm),
        ground,
        length_mm=plan.length_mm,
        volume_ml=plan.core_ml,
        vigour=rate,
        level=_CORE_FROM,
    )
    # Oedema seeps along white matter from the border of the core and hardly enters the cortex.
    paths = Ground.of(axes, tissue.wm, tissue.gm, grey_share=_FLUID_FOLLOWS_WHITE)
    fluid = grow(cells, paths, length_mm=2.5, volume_ml=plan.oedema_ml, vigour=rate * tissue.wm, level=_CORE_FROM)
    push = mass_effect(cells, tissue.brain, _STEP_MM, plan.mass_effect_mm)
    return GrownTumour(axes, displaced(cells, push, _STEP_MM), displaced(fluid, push, _STEP_MM), push, noise)


def shares_of(tumour: GrownTumour, plan: TumourPlan, tissue: Tissue, axes: Axes) -> TumourShares:
    """Say what the tumour consists of on a grid.

    Args:
        tumour: As grown.
        plan: Its plan.
        tissue: Of the same grid, pushed aside.
        axes: The grid.
    """
    shape = tissue.wm.shape
    box = tuple(_covered(axis, old) for axis, old in zip(axes, tumour.axes, strict=True))
    near: Axes = (axes[0][box[0]], axes[1][box[1]], axes[2][box[2]])
    cells = interpolate(tumour.cells, tumour.axes, near)
    fluid = interpolate(tumour.fluid, tumour.axes, near)
    coarse, middle, fine = (noise.on(near) for noise in tumour.noise)
    white, grey = tissue.wm[box], tissue.gm[box]
    solid = np.clip((white + grey) * 1.6, 0, 1)
    cells = cells + np.float32(0.05) * fine * (cells > 0.05)
    core = ramp(cells - np.float32(_CORE_FROM), plan.softness) * solid
    infiltrated = ramp(cells - np.float32(_INFILTRATED_FROM), plan.softness) * solid
    seeped = ramp(fluid - np.float32(_CORE_FROM), 2 * plan.softness) * np.clip(white + 0.35 * grey, 0, 1) * solid
    presence = np.maximum(infiltrated, seeped)
    steps_mm = [abs(float(axis[1] - axis[0])) for axis in near]
    depth_mm = ndimage.distance_transform_edt(core > 0.5, sampling=steps_mm).astype(np.float32)
    necrosis, enhancing, watery = np.zeros_like(core), np.zeros_like(core), np.zeros_like(core)
    if plan.ring_mm > 0:
        thickness_mm = plan.ring_mm * np.clip(1 + 0.45 * coarse + 0.3 * fine, 0.35, 2.2)
        inner = ramp(depth_mm - thickness_mm, 0.6)
        necrosis, enhancing = core * inner, core * (1 - inner) * ramp(middle + 1.5, 0.4)
    elif plan.patch_share > 0 and (core > 0.5).any():
        uneven = middle + np.float32(0.5) * fine
        enhancing = core * ramp(uneven - np.quantile(uneven[core > 0.5], 1 - plan.patch_share), 0.3)
    if plan.rim_mm > 0:
        watery = core * ramp(depth_mm - plan.rim_mm * np.clip(1 + 0.3 * coarse, 0.4, 1.8), 0.5)
    # What a reader would outline: a mismatch's rim is bright on FLAIR and goes with the oedema.
    inside = watery if plan.rim_mm > 0 else core
    parts = (presence, core, necrosis, enhancing, watery, (0.6 * middle + 0.8 * fine) * core)
    labels = (np.clip(inside - enhancing, 0, 1), np.clip(presence - np.maximum(inside, enhancing), 0, 1), enhancing)
    presence, core, necrosis, enhancing, watery, texture = (_placed(part, box, shape) for part in parts)
    share_core, share_oedema, share_enhancing = (_placed(part, box, shape) for part in labels)
    return TumourShares(
        presence, core, necrosis, enhancing, watery, texture, (share_core, share_oedema, share_enhancing)
    )


def _covered(axis: npt.NDArray[np.float64], old: npt.NDArray[np.float64]) -> slice:
    places = np.flatnonzero((axis >= old[0]) & (axis <= old[-1]))
    return slice(int(places[0]), int(places[-1]) + 1)


def _placed(part: Field, box: tuple[slice, ...], shape: tuple[int, ...]) -> Field:
    whole = np.zeros(shape, dtype=np.float32)
    whole[box] = part
    return whole
