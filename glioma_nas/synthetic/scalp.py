"""Skull and scalp around a brain, as layers of a given thickness: enough for a head to need stripping.

There is no face, neck or eye, so nothing here can be taken for a person.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from glioma_nas.synthetic.fields import Axes, Field, SmoothField, ramp

# Brightness of fluid around the brain, bone, fat.
_TONES = {
    "t1": (0.28, 0.12, 1.35),
    "t1ce": (0.30, 0.12, 1.35),
    "t2": (1.25, 0.10, 0.85),
    "flair": (0.14, 0.10, 0.75),
}
_FLUID_MM, _BONE_MM, _FAT_MM = 2.0, 7.0, 6.0


@dataclass(frozen=True)
class Scalp:
    """Shares of the layers on one grid."""

    fluid: Field
    bone: Field
    fat: Field

    def paint(self, name: str, brain: Field) -> Field:
        """Add the layers to a clean image of the brain."""
        fluid, bone, fat = (np.float32(tone) for tone in _TONES[name])
        image: Field = brain + fluid * self.fluid + bone * self.bone + fat * self.fat
        return image


def add_scalp(brain: Field, axes: Axes, generator: np.random.Generator) -> Scalp:
    """Lay fluid, bone and fat around the brain, each of slightly varying thickness.

    Args:
        brain: Share of brain in each voxel.
        axes: The grid.
        generator: Source of chance.
    """
    # Closed first, so that bone bridges the sulci.
    inside = ndimage.binary_closing(np.pad(brain > 0.5, 8), iterations=6)[8:-8, 8:-8, 8:-8]
    steps_mm = [abs(float(axis[1] - axis[0])) for axis in axes]
    distance = ndimage.distance_transform_edt(~inside, sampling=steps_mm).astype(np.float32)
    vary = np.float32(0.12) * SmoothField.draw(40, generator).on(axes)
    beyond_fluid = ramp(distance - _FLUID_MM * (1 + vary), 0.4)
    beyond_bone = ramp(distance - (_FLUID_MM + _BONE_MM) * (1 + vary), 0.4)
    beyond_fat = ramp(distance - (_FLUID_MM + _BONE_MM + _FAT_MM) * (1 + vary), 0.4)
    return Scalp((1 - brain) * (1 - beyond_fluid), beyond_fluid - beyond_bone, beyond_bone - beyond_fat)
