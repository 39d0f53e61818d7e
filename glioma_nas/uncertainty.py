"""How sure stored classifiers are of a patient, and when no call is made: folds as an ensemble, asked about copies too.

New patients are judged by all folds, cross-validated ones by the one fold that never saw them; the rule for a call is
the same. The stages `classify`, `predict` and `evaluate` take theirs from here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from glioma_nas.binary_statistics import wilson_interval
from glioma_nas.marker_evaluator import MarkerEvaluator, finished_folds
from glioma_nas.marker_tuning import Tuning
from glioma_nas.markers import MarkerCase
from glioma_nas.seeding import derive_seed
from glioma_nas.slice_batches import augment

SPREAD = (0.05, 0.95)
CALL_COLUMNS = ("call", "lowest", "highest")


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
    copies: int,
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
    return _asked(evaluator, finished_folds(folder), cases, copies=copies, seed=seed, device=device)


def out_of_fold_uncertainty(
    evaluator: MarkerEvaluator,
    folder: Path,
    folds: Mapping[str, int],
    cases: Sequence[MarkerCase],
    *,
    copies: int,
    seed: int,
    device: str = "cpu",
) -> dict[str, UncertainPrediction]:
    """Ask, about every cross-validated case and altered copies of it, the one classifier that never saw its patient.

    Args:
        evaluator: Of the kind whose folds lie in ``folder``.
        folder: The folder ``cross_validate`` was given.
        folds: Case id → the fold that tested it.
        cases: The cases.
        copies: See `predict_with_uncertainty`.
        seed: Of the alterations.
        device: ``cpu``, ``cuda`` or ``cuda:N``.

    Returns:
        Case id → prediction; the members are the case and its copies.
    """
    found = {}
    for fold in sorted(set(folds.values())):
        own = [case for case in cases if folds[case.case_id] == fold]
        for item in _asked(evaluator, [folder / f"fold{fold}"], own, copies=copies, seed=seed, device=device):
            found[item.case_id] = item
    return found


def _asked(
    evaluator: MarkerEvaluator,
    folds: Sequence[Path],
    cases: Sequence[MarkerCase],
    *,
    copies: int,
    seed: int,
    device: str,
) -> list[UncertainPrediction]:
    thresholds = np.asarray([Tuning.read(fold).threshold for fold in folds])
    members = [evaluator.predict_fold(fold, cases, device=device) for fold in folds]
    for copy in range(copies):
        altered = [altered_copy(case, derive_seed(seed, "test-time augmentation", copy)) for case in cases]
        members += [evaluator.predict_fold(fold, altered, device=device) for fold in folds]
    stacked = np.asarray(members)
    # Each member calls by the threshold of its own fold: temperatures differ, so another fold's means something else.
    margins = stacked - np.tile(thresholds, copies + 1)[:, None]
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


def decide(found: UncertainPrediction, *, margin: float) -> tuple[str, str]:
    """Turn a prediction into a call, or into the reason for none.

    Args:
        found: Probability, spread and abstention.
        margin: Distance of the probability from the threshold below which no call is made either.

    Returns:
        ``positive``, ``negative`` or ``none``, and the reason for none.
    """
    if found.abstains:
        return "none", (
            f"no call: members disagree ({found.low:.2f} to {found.high:.2f} around thresholds of "
            f"{found.threshold:.2f} in the mean)"
        )
    if abs(found.probability - found.threshold) < margin:
        return "none", f"no call: within {margin:g} of the threshold"
    return ("positive" if found.call else "negative"), ""


def with_calls(frame: pd.DataFrame, found: Mapping[str, UncertainPrediction], *, margin: float) -> pd.DataFrame:
    """Add `CALL_COLUMNS` to out-of-fold predictions: the call (see `decide`) and the spread of the members.

    Args:
        frame: One row a case, as ``cross_validate`` returns them.
        found: What `out_of_fold_uncertainty` returned.
        margin: See `decide`.
    """
    items = [found[case_id] for case_id in frame["case_id"]]
    calls = [decide(item, margin=margin)[0] for item in items]
    return frame.assign(call=calls, lowest=[item.low for item in items], highest=[item.high for item in items])


def called_patients(frame: pd.DataFrame, *, copies: int) -> dict[str, Any]:
    """Count the patients for whom a call is made, and how many of these calls are right, with Wilson's interval.

    A patient with several cases is called when all of them are, and alike.

    Args:
        frame: What `with_calls` returned.
        copies: For the record.
    """
    groups = frame.groupby("patient_id", sort=True)
    one_call = groups["call"].nunique() == 1
    calls, labels = groups["call"].first()[one_call], groups["label"].first()[one_call]
    called = calls != "none"
    n, right = int(called.sum()), int(((calls == "positive") == (labels == 1))[called].sum())
    low, high = wilson_interval(right, n) if n else (None, None)
    return {
        "tta_copies": copies,
        "n_patients": len(groups),
        "n_called": n,
        "n_right": right,
        "accuracy_of_called": right / n if n else None,
        "low": low,
        "high": high,
    }


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
