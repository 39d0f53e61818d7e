"""Give tissue and tumour the brightness they have on each sequence.

Healthy tissue is painted in units of white matter on T1. The tumour's parts are painted by z-score, deviations from the
mean of the whole brain, tumour included, because that is what is known of real gliomas and what networks are shown: see
`LESION_Z`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from glioma_nas.synthetic.anatomy import Tissue
from glioma_nas.synthetic.fields import Field
from glioma_nas.synthetic.tumours import TumourPlan, TumourShares

SEQUENCES = ("t1", "t1ce", "t2", "flair")

# Brightness of fluid, grey and white matter.
_HEALTHY = {
    "t1": (0.30, 0.70, 1.00),
    "t1ce": (0.32, 0.72, 1.00),
    "t2": (1.30, 0.66, 0.47),
    "flair": (0.14, 0.66, 0.54),
}
# How far vessels with contrast agent, and spots of ageing white matter, stand out.
_VESSELS = {"t1ce": 0.75}
_SPOTS = {"t1": -0.12, "t1ce": -0.12, "t2": 0.25, "flair": 0.35}
# How much of the template's own T1 brightness is mixed in, for deep nuclei.
_TEMPLATE_SHARE = 0.5
_TEMPLATE_WHITE = 0.86

LESION_Z: dict[str, dict[str, tuple[float, float, float, float]]] = {
    "oedema": {
        "t1": (-0.45, 0.25, -1.2, 0.3),
        "t1ce": (-0.50, 0.25, -1.2, 0.3),
        "t2": (1.80, 0.45, 1.3, 3.2),
        "flair": (2.95, 0.70, 2.2, 4.8),
    },
    "solid": {
        "t1": (-0.80, 0.35, -1.6, 0.2),
        "t1ce": (-0.70, 0.35, -1.5, 0.3),
        "t2": (2.00, 0.50, 1.0, 3.2),
        "flair": (2.60, 0.70, 1.2, 4.5),
    },
    "enhancing": {
        "t1": (-0.30, 0.30, -1.0, 0.5),
        "t1ce": (3.40, 0.70, 2.5, 4.9),
        "t2": (1.20, 0.45, 0.3, 2.4),
        "flair": (1.90, 0.60, 0.8, 3.4),
    },
    "necrosis": {
        "t1": (-1.35, 0.20, -1.7, -0.7),
        "t1ce": (-1.10, 0.25, -1.6, -0.5),
        "t2": (2.50, 0.50, 1.3, 3.6),
        "flair": (0.60, 0.80, -0.8, 2.2),
    },
    "watery": {
        "t1": (-1.35, 0.20, -1.7, -0.8),
        "t1ce": (-1.30, 0.20, -1.7, -0.8),
        "t2": (3.00, 0.40, 2.2, 3.8),
        "flair": (0.00, 0.35, -0.7, 0.7),
    },
}
"""Part of the tumour → sequence → mean, deviation, smallest and largest z-score that is painted."""

# Parts that are brighter on T2 are brighter on FLAIR too.
_SHARED = 0.6
_OPACITY = 0.95


@dataclass(frozen=True)
class LesionTones:
    """The z-scores of one tumour: part → sequence → z."""

    z: dict[str, dict[str, float]]

    @classmethod
    def draw(cls, generator: np.random.Generator) -> LesionTones:
        """Draw the z-scores within `LESION_Z`."""
        tones: dict[str, dict[str, float]] = {}
        for part, sequences in LESION_Z.items():
            shared = {True: generator.standard_normal(), False: generator.standard_normal()}
            tones[part] = {}
            for name, (mean, deviation, low, high) in sequences.items():
                chance = _SHARED * shared[name.startswith("t1")] + (1 - _SHARED**2) ** 0.5 * generator.standard_normal()
                tones[part][name] = float(np.clip(mean + deviation * chance, low, high))
        return cls(tones)


def paint(
    name: str,
    tissue: Tissue,
    shares: TumourShares,
    plan: TumourPlan,
    lesion: LesionTones,
    tones: tuple[float, float, float],
) -> Field:
    """Paint one sequence without noise, float32; white matter on T1 is about 1.

    Args:
        name: One of `SEQUENCES`.
        tissue: Healthy tissue, pushed aside.
        shares: Tumour on the same grid.
        plan: Its plan.
        lesion: Its z-scores.
        tones: Factors on the brightness of fluid, grey and white matter, near 1.
    """
    csf, grey, white = (np.float32(a * b) for a, b in zip(_HEALTHY[name], tones, strict=True))
    image = csf * tissue.csf + grey * tissue.gm + white * tissue.wm
    if name.startswith("t1"):
        template = tissue.t1 * np.float32(white / _TEMPLATE_WHITE)
        image += np.float32(_TEMPLATE_SHARE) * (template * tissue.brain - image)
    image += np.float32(_SPOTS[name]) * tissue.spots
    if name in _VESSELS:
        image += np.float32(_VESSELS[name]) * tissue.vessels
    z = {part: np.float32(values[name]) for part, values in lesion.z.items()}
    inside = shares.presence > 0
    core, presence = shares.core[inside], np.float32(_OPACITY) * shares.presence[inside]
    scores = z["oedema"] + (z["solid"] - z["oedema"]) * core
    for part, share in (("watery", shares.watery), ("necrosis", shares.necrosis), ("enhancing", shares.enhancing)):
        scores += (z[part] - scores) * share[inside]
    scores += np.float32(plan.texture) * shares.texture[inside]
    healthy = image[inside]
    rest = image[(tissue.brain > 0.5) & ~inside]
    # Mean and deviation depend on the tumour, whose brightness depends on them; the loop settles at once.
    mean, deviation = float(rest.mean()), float(rest.std())
    painted = healthy
    for _ in range(4):
        painted = healthy + presence * (np.float32(mean) + np.float32(deviation) * scores - healthy)
        n, m = rest.size, painted.size
        mean = (float(rest.sum(dtype=np.float64)) + float(painted.sum(dtype=np.float64))) / (n + m)
        squares = float((rest.astype(np.float64) ** 2).sum()) + float((painted.astype(np.float64) ** 2).sum())
        deviation = float(np.sqrt(squares / (n + m) - mean**2))
    image[inside] = painted
    return np.asarray(np.maximum(image, 0), dtype=np.float32)
