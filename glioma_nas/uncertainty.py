"""How sure a stored classifier is of a new patient: the folds as an ensemble, each asked about altered copies too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from glioma_nas.marker_evaluator import MarkerEvaluator, finished_folds
from glioma_nas.marker_tuning import Tuning
from glioma_nas.markers import MarkerCase
from glioma_nas.seeding import derive_seed
from glioma_nas.slice_batches import augment

SPREAD = (0.05, 0.95)


@dataclass(frozen=True)
class UncertainPrediction:
    """A new patient's probability and its spread over folds and altered copies.

    Attributes:
        case_id: Name of the case.
        probability: Mean, in [0, 1].
        low: 5th percentile of the members.
        high: 95th percentile.
        deviation: Standard deviation.
        threshold: Mean threshold of the folds.
        n_members: Folds times copies.
        abstains: The spread of the members' distances from their own folds' thresholds holds 0: they disagree.
    """

    case_id: str
    probability: float
    low: float
    high: float
    deviation: float
    threshold: float
    n_members: int
    abstains: bool

    @property
    def call(self) -> bool | None:
        """Positive or negative; none when abstained."""
        return None if self.abstains else self.probability >= self.threshold

    def as_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {key: round(value, 4) if isinstance(value, float) else value for key, value in asdict(self).items()}


def predict_with_uncertainty(
    evaluator: MarkerEvaluator,
    folder: Path,
    cases: Sequence[MarkerCase],
    *,
    copies: int = 8,
    seed: int = 0,
    device: str = "cpu",
) -> list[UncertainPrediction]:
    """Predict patients none of the folds has seen, with the spread over folds and test-time augmentation.

    The spread shows how far members disagree. It is no confidence interval of the true probability.

    Args:
        evaluator: Of the kind whose folds lie in ``folder``, see `glioma_nas.marker_evaluator.load_evaluator`.
        folder: The folder ``cross_validate`` was given.
        cases: New cases.
        copies: Altered copies (mirrored, rotated, shifted, other gain, as in training) beside the case itself.
        seed: Of the alterations.
        device: ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        StorageError: ``folder`` holds no finished fold.
    """
    thresholds = np.asarray([Tuning.read(fold).threshold for fold in finished_folds(folder)])
    members = [evaluator.predict_members(folder, cases, device=device)]
    for copy in range(copies):
        altered = [altered_copy(case, derive_seed(seed, "test-time augmentation", copy)) for case in cases]
        members.append(evaluator.predict_members(folder, altered, device=device))
    stacked = np.concatenate(members)
    # Each member calls by the threshold of its own fold: temperatures differ, so another fold's means something else.
    margins = stacked - np.tile(thresholds, len(members))[:, None]
    found = []
    for case, column, margin in zip(cases, stacked.T, margins.T, strict=True):
        low, high = (float(value) for value in np.quantile(column, SPREAD))
        below, above = np.quantile(margin, SPREAD)
        found.append(
            UncertainPrediction(
                case.case_id,
                float(column.mean()),
                low,
                high,
                float(column.std()),
                float(thresholds.mean()),
                int(column.size),
                bool(below < 0 <= above),
            )
        )
    return found


def altered_copy(case: MarkerCase, seed: int) -> MarkerCase:
    """Return the case with all its slices altered alike."""
    images, masks = [], []
    for image, mask in zip(case.images, case.mask, strict=True):
        moved, moved_mask = augment(
            torch.from_numpy(np.array(image, dtype=np.float32)),
            torch.from_numpy(np.array(mask, dtype=np.float32))[None],
            torch.Generator().manual_seed(seed),
        )
        images.append(moved.numpy())
        masks.append(moved_mask[0].numpy().astype(np.uint8))
    return replace(case, images=np.stack(images), mask=np.stack(masks))
