"""Score an outline on the grid its expert mask was drawn on."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from glioma_nas.prepared import PreparedCase
from glioma_nas.segmentation_inference import THRESHOLD
from glioma_nas.segmentation_metrics import dice_coefficient, hd95_mm


def native_outline(case: PreparedCase, probability: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return the outline (X, Y, Z), uint8 0 or 1, on the case's own grid of a map (Z, H, W) on its slices."""
    return (case.to_native(probability) >= THRESHOLD).astype(np.uint8)


def native_scores(case: PreparedCase, outline: NDArray[np.uint8]) -> dict[str, Any]:
    """Return ``dice``, ``hd95_mm``, ``volume_true_ml`` (none without an expert mask) and ``volume_predicted_ml``.

    Args:
        case: The case.
        outline: uint8 (X, Y, Z), 0 or 1, on its own grid.
    """
    scores: dict[str, Any] = {
        "dice": None,
        "hd95_mm": None,
        "volume_true_ml": None,
        "volume_predicted_ml": float(outline.sum()) * case.native_voxel_ml,
    }
    truth = case.native_mask()
    if truth is not None:
        # Lengths of the affine's columns: the header's own spacing may disagree with it.
        spacing = np.linalg.norm(np.asarray(case.native_affine)[:3, :3], axis=0)
        scores["dice"] = dice_coefficient(outline, truth)
        scores["hd95_mm"] = hd95_mm(outline, truth, (float(spacing[0]), float(spacing[1]), float(spacing[2])))
        scores["volume_true_ml"] = float(truth.sum()) * case.native_voxel_ml
    return scores
