"""Grow a synthetic glioma: where it sits, how far core and oedema reach, what enhances and what is necrotic."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from glioma_nas.synthetic_patients import SyntheticPatient

Field = npt.NDArray[np.float32]

NECROSIS, OEDEMA, ENHANCING = 1, 2, 4
"""Mask labels as in BraTS; ``NECROSIS`` also stands for the core that does not enhance."""


@dataclass(frozen=True)
class TumourPlan:
    """The numbers that shape one tumour, drawn before it is grown.

    Attributes:
        core_mm: Mean radius of the core.
        oedema_mm: How far oedema and infiltration reach beyond it.
        axes: Three factors near 1 that stretch the shape.
        roughness: Deviation of the logarithm of the radius.
        softness: Width of the blurred border as a share of the radius.
        ring_mm: Thickness of the enhancing ring around necrosis; 0 for none.
        patch_share: Share of the core that enhances in patches; 0 for none.
        enhancement: Brightness that contrast agent adds, white matter on T1 being 1.
        texture: Deviation of brightness inside the core.
        mass_effect_mm: How far tissue at the border is pushed away.
    """

    core_mm: float
    oedema_mm: float
    axes: tuple[float, float, float]
    roughness: float
    softness: float
    ring_mm: float
    patch_share: float
    enhancement: float
    texture: float
    mass_effect_mm: float

    @classmethod
    def draw(cls, patient: SyntheticPatient, generator: np.random.Generator) -> TumourPlan:
        """Draw a plan in keeping with IDH status, grade and Ki67.

        A wildtype of grade 4 nearly always shows a ring around necrosis and wide oedema; a mutant of low grade mostly
        does not enhance and has a sharper border. Ki67 makes enhancement stronger and the core more uneven.
        """
        uniform = generator.uniform
        p_ring = {2: 0.0, 3: 0.1, 4: 0.6}[patient.grade] if patient.is_mutant else {3: 0.3, 4: 0.95}[patient.grade]
        p_patch = {2: 0.15, 3: 0.5, 4: 0.8}[patient.grade] if patient.is_mutant else 0.8
        has_ring = generator.random() < p_ring and not patient.t2_flair_mismatch
        has_patches = generator.random() < p_patch and not patient.t2_flair_mismatch
        vigour = patient.proliferation
        core_mm = uniform(15, 24) if patient.is_mutant else uniform(13, 22)
        return cls(
            core_mm=core_mm,
            oedema_mm=uniform(2, 6) if patient.is_mutant else uniform(8, 18),
            axes=(uniform(0.8, 1.25), uniform(0.8, 1.25), uniform(0.8, 1.25)),
            roughness=uniform(0.11, 0.18) if patient.is_mutant else uniform(0.22, 0.34),
            softness=uniform(0.03, 0.06) if patient.is_mutant else uniform(0.06, 0.12),
            ring_mm=uniform(2.5, 4.0) + 3.0 * vigour if has_ring else 0.0,
            patch_share=0.0 if has_ring or not has_patches else uniform(0.05, 0.15) + 0.25 * vigour,
            enhancement=(0.25 + 0.55 * vigour) * uniform(0.85, 1.15),
            texture=0.02 + 0.10 * vigour,
            mass_effect_mm=uniform(0.1, 0.25) * core_mm,
        )


@dataclass(frozen=True)
class Tumour:
    """A grown tumour on the fine grid; every field has its shape.

    Attributes:
        labels: uint8, 0 or one of the mask labels.
        presence: Share of oedema or core in each voxel, 0 to 1, with blurred borders.
        core: Share of core.
        necrosis: Share of fluid necrosis.
        enhancing: Share that takes up contrast agent.
        rim: Share of the outer shell of the core, where a T2-FLAIR mismatch stays bright on FLAIR.
        texture: Addend to brightness.
    """

    labels: npt.NDArray[np.uint8]
    presence: Field
    core: Field
    necrosis: Field
    enhancing: Field
    rim: Field
    texture: Field


def draw_centre(
    patient: SyntheticPatient, white_matter_mm: npt.NDArray[np.float64], generator: np.random.Generator
) -> npt.NDArray[np.float64]:
    """Choose where the tumour begins: in white matter, of mutants by preference in the frontal lobe.

    Args:
        patient: Whose tumour it is.
        white_matter_mm: (N, 3) candidate places in MNI space, millimetres.
        generator: Source of chance.
    """
    x, y, z = white_matter_mm.T
    frontal = (y > 5) & (z > -5)
    temporal = (z < 5) & (np.abs(x) > 28)
    weight = np.where(frontal, 4.0, 1.0) if patient.is_mutant else np.where(temporal, 3.0, 1.0)
    chosen: npt.NDArray[np.float64] = white_matter_mm[int(generator.choice(len(weight), p=weight / weight.sum()))]
    return chosen


def grow(
    plan: TumourPlan,
    offset_mm: tuple[Field, Field, Field],
    tissue: dict[str, Field],
    noise: list[Field],
) -> Tumour:
    """Grow the tumour of a plan.

    Args:
        plan: Its numbers.
        offset_mm: Distance of each voxel from the centre along x, y, z, broadcastable to the grid.
        tissue: ``wm``, ``csf`` and ``brain``, shares 0 to 1.
        noise: Five independent smooth fields of unit deviation, the last one finer than the others.
    """
    shape_core, shape_oedema, ring_noise, patch_noise, fine = noise
    brain, csf, wm = tissue["brain"] > 0.5, tissue["csf"], tissue["wm"]
    radius = np.sqrt(
        sum((offset * axis) ** 2 for offset, axis in zip(offset_mm, plan.axes, strict=True)), dtype=np.float32
    )
    # Level sets: 1 on the border of core and of oedema. Fluid spaces stop growth, white matter guides oedema.
    core_level = radius / plan.core_mm * np.exp(plan.roughness * (shape_core + 0.4 * fine)) + 0.8 * np.clip(
        csf - 0.3, 0, 1
    )
    reach = (plan.core_mm + plan.oedema_mm) * (0.72 + 0.4 * wm)
    oedema_level = radius / reach * np.exp((0.6 * plan.roughness + 0.08) * shape_oedema) + 1.2 * np.clip(
        csf - 0.2, 0, 1
    )
    inside_core = _component((core_level < 1) & brain, radius)
    inside = _component(inside_core | ((oedema_level < 1) & brain), radius)
    presence = np.maximum(_soft(core_level, plan.softness), _soft(oedema_level, plan.softness)) * _near(inside)
    core = _soft(core_level, plan.softness) * _near(inside_core)
    depth_mm = (1 - core_level) * plan.core_mm
    necrosis = np.zeros_like(core)
    enhancing = np.zeros_like(core)
    if plan.ring_mm > 0:
        thickness_mm = plan.ring_mm * np.clip(1 + 0.5 * ring_noise + 0.35 * fine, 0.2, 2.2)
        necrosis = core * _ramp(depth_mm - thickness_mm, 0.8)
        enhancing = core * (1 - _ramp(depth_mm - thickness_mm, 0.8))
    elif plan.patch_share > 0:
        patches = np.asarray(patch_noise + 0.5 * fine, dtype=np.float32)
        border = float(np.quantile(patches[inside_core], 1 - plan.patch_share)) if inside_core.any() else 0.0
        enhancing = core * _ramp(patches - np.float32(border), 0.15)
    labels = np.zeros(core.shape, dtype=np.uint8)
    labels[inside] = OEDEMA
    labels[inside_core] = NECROSIS
    labels[inside_core & (enhancing > 0.5)] = ENHANCING
    rim = core * (1 - _ramp(depth_mm - 0.12 * plan.core_mm, 0.8))
    texture = np.asarray(0.6 * plan.texture * (fine + patch_noise) * core, dtype=np.float32)
    return Tumour(labels, presence, core, necrosis, enhancing, rim, texture)


def _soft(level: Field, softness: float) -> Field:
    return _ramp(1 - level, softness)


def _ramp(value: Field, width: float) -> Field:
    # A smooth step from 0 to 1 over about ±2 widths; cheaper than a logistic and exactly 0 and 1 outside.
    t = np.clip(value / (4 * width) + 0.5, 0, 1)
    return np.asarray(t * t * (3 - 2 * t), dtype=np.float32)


def _near(inside: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    # Room for the blurred border around the part that is kept, without the islands that were dropped.
    near: npt.NDArray[np.bool_] = ndimage.binary_dilation(inside, iterations=2)
    return near


def _component(inside: npt.NDArray[np.bool_], radius: Field) -> npt.NDArray[np.bool_]:
    # The piece nearest to the centre; growth is contiguous.
    if not inside.any():
        return inside
    pieces, _ = ndimage.label(inside)
    nearest = np.unravel_index(int(np.argmin(np.where(inside, radius, np.inf))), inside.shape)
    kept: npt.NDArray[np.bool_] = pieces == pieces[nearest]
    return kept
