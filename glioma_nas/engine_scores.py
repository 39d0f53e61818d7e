"""Dice of an engine's outlines with the experts' masks: what fewer bits cost where it counts.

`glioma_nas.parity` asks whether an engine computes what PyTorch does; this asks how good its outlines are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from glioma_nas.errors import CohortError
from glioma_nas.latency_backend import Array, Engine
from glioma_nas.prepared import PreparedCase
from glioma_nas.segmentation_scores import native_outline, native_scores


def expert_dice(engine: Engine, cases: Sequence[PreparedCase], sequences: Sequence[str]) -> list[float]:
    """Return the Dice of each case that has an expert mask, in [0, 1], on the case's own grid.

    Args:
        engine: Made for one slice (1, C, H, W); gives logits (1, K, H, W).
        cases: Prepared cases, of patients that the network has not seen.
        sequences: Its input channels, in order.

    Raises:
        CohortError: No case has an expert mask.
    """
    found = []
    for case in cases:
        if case.native_mask() is None:
            continue
        images = case.images()[:, list(case.channels(tuple(sequences)))]
        probability = np.stack([_tumour_probability(engine, image) for image in images])
        found.append(float(native_scores(case, native_outline(case, probability))["dice"]))
    if not found:
        raise CohortError("none of the cases has an expert mask to compare outlines with; add masks to the sheet")
    return found


def _tumour_probability(engine: Engine, image: Array) -> Array:
    """Return one minus the probability of class 0, float32 (H, W), for one slice (C, H, W)."""
    (logits,) = engine.run([np.ascontiguousarray(image, dtype=np.float32)[None]])[0]
    powers = np.exp(logits - logits.max(axis=0))
    probability: Array = (1 - powers[0] / powers.sum(axis=0)).astype(np.float32)
    return probability
