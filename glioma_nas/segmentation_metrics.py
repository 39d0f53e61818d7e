"""Compare a predicted tumour mask with the expert's: overlap and surface distance, with empty masks defined.

Empty masks follow one rule everywhere: nothing found where nothing is scores 1, one empty and one not scores 0, and a
surface distance that does not exist is none, never a number in its place.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glioma_nas.errors import ConfigError, ImageError, did_you_mean

Mask = NDArray[Any]

DICE_REDUCTIONS = ("case", "slice", "global")


def _binary(prediction: Mask, truth: Mask) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    if prediction.shape != truth.shape:
        raise ImageError(
            f"predicted mask has shape {prediction.shape}, the reference {truth.shape}; both must lie on one grid"
        )
    return np.asarray(prediction) != 0, np.asarray(truth) != 0


def dice_coefficient(prediction: Mask, truth: Mask) -> float:
    """Return 2·|P ∩ T| / (|P| + |T|) over all voxels; 1 when both are empty.

    Args:
        prediction: Any shape; non-zero is tumour.
        truth: The same shape; non-zero is tumour.

    Raises:
        ImageError: The shapes differ.

    Reference:
        Dice, Ecology 26 (1945).
    """
    p, t = _binary(prediction, truth)
    total = int(p.sum()) + int(t.sum())
    return 1.0 if total == 0 else 2.0 * int((p & t).sum()) / total


def dice_of_slices(prediction: Mask, truth: Mask) -> float:
    """Return the mean Dice over slices in which either mask shows tumour; 1 when there is none.

    Slices empty in both are left out: a scan is mostly free of tumour, and counting them would lift any score.

    Args:
        prediction: (Z, H, W); non-zero is tumour.
        truth: (Z, H, W); non-zero is tumour.

    Raises:
        ImageError: The shapes differ.
    """
    p, t = _binary(prediction, truth)
    shown = [index for index in range(p.shape[0]) if p[index].any() or t[index].any()]
    return float(np.mean([dice_coefficient(p[index], t[index]) for index in shown])) if shown else 1.0


def dice_over_cases(pairs: Iterable[tuple[Mask, Mask]], *, reduction: str = "case") -> float:
    """Return one Dice for several cases.

    Args:
        pairs: (prediction, truth) of each case, (Z, H, W) each, non-zero is tumour.
        reduction: ``case``: mean of the cases' Dice; ``slice``: mean over all slices of all cases that show tumour in
            either mask; ``global``: one Dice over the voxels of all cases together.

    Raises:
        ConfigError: The reduction is unknown.
        ImageError: A prediction and its reference differ in shape, or there is no case.
    """
    if reduction not in DICE_REDUCTIONS:
        raise ConfigError(f"unknown Dice reduction '{reduction}': {did_you_mean(reduction, DICE_REDUCTIONS)}")
    scores: list[float] = []
    overlap = total = 0
    for prediction, truth in pairs:
        p, t = _binary(prediction, truth)
        if reduction == "case":
            scores.append(dice_coefficient(p, t))
        elif reduction == "slice":
            scores += [dice_coefficient(a, b) for a, b in zip(p, t, strict=True) if a.any() or b.any()] or [1.0]
        else:
            scores.append(0.0)
            overlap += int((p & t).sum())
            total += int(p.sum()) + int(t.sum())
    if not scores:
        raise ImageError("Dice over no cases is not defined; give at least one prediction with its reference mask")
    if reduction == "global":
        return 1.0 if total == 0 else 2.0 * overlap / total
    return float(np.mean(scores))


def hd95_mm(prediction: Mask, truth: Mask, spacing_mm: Sequence[float]) -> float | None:
    """Return the 95th percentile of the symmetric surface distance; none when either mask is empty.

    Args:
        prediction: (X, Y, Z) or (Z, H, W); non-zero is tumour.
        truth: The same shape and axis order; non-zero is tumour.
        spacing_mm: Voxel size along each axis, in the order of the axes, in millimetres.

    Raises:
        ImageError: The shapes differ, or there is not one positive spacing for each axis.
    """
    p, t = _binary(prediction, truth)
    if len(spacing_mm) != p.ndim or not all(np.isfinite(size) and size > 0 for size in spacing_mm):
        raise ImageError(f"spacing {tuple(spacing_mm)} mm does not give one positive size for each of {p.ndim} axes")
    if not p.any() or not t.any():
        return None
    # MONAI takes seconds to import and only this function needs it.
    import torch
    from monai.metrics.hausdorff_distance import compute_hausdorff_distance

    def batch(mask: NDArray[np.bool_]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(mask))[None, None].float()

    distance = compute_hausdorff_distance(
        batch(p), batch(t), include_background=True, percentile=95, spacing=[float(size) for size in spacing_mm]
    )
    return float(distance.item())
