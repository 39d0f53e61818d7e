"""Predict the molecular markers of a new case with the classifiers of a frozen run, and say when no call is made.

The folds' classifiers are asked about the case and about altered copies of it (`glioma_nas.uncertainty`). Each keeps
the threshold and the temperature it chose on its own training patients. The same is done for one new patient and for a
cohort to validate on, so that what is validated is what is served.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glioma_nas.cohort import Case
from glioma_nas.markers import cut_case
from glioma_nas.new_patients.frozen_run import FrozenRun
from glioma_nas.prepared import PreparedCase
from glioma_nas.seeding import derive_seed
from glioma_nas.subtype_table import subtype_of, withheld_subtype
from glioma_nas.uncertainty import decide, predict_with_uncertainty

NO_TUMOUR = "no tumour was found in the images"


@dataclass(frozen=True)
class MarkerPrediction:
    """What the run says of one marker of a new patient.

    Attributes:
        marker: Its name.
        positive_class: What a probability of 1 would mean.
        probability: Mean over the folds' classifiers and the copies; none when it was not predicted.
        lowest: 5th percentile of these.
        highest: 95th percentile.
        threshold: Mean of the folds' thresholds.
        call: ``positive``, ``negative``, or ``none`` when abstained or not predicted.
        reason: Why there is no call; empty when there is one.
        n_members: Folds times copies.
        auc: Out-of-fold AUC of the classifier in the run's own patients, with ``low``, ``high`` and ``n``.
        statement: How it compared with its baselines there.
    """

    marker: str
    positive_class: str
    probability: float | None
    lowest: float | None
    highest: float | None
    threshold: float | None
    call: str
    reason: str
    n_members: int
    auc: Mapping[str, Any]
    statement: str


def predict_marker(name: str, case: PreparedCase, mask: NDArray[np.uint8], run: FrozenRun) -> MarkerPrediction:
    """Predict one marker of a prepared case; nothing is predicted of a case without tumour.

    In the run's own cross-validation a case without tumour is judged by its middle slices, so that no patient drops out
    of the figures. Nobody should be served a probability that comes from healthy brain.

    Args:
        name: The marker.
        case: The case.
        mask: Tumour on the prepared slices, uint8 (Z, H, W), 0 or 1.
        run: The frozen run.
    """
    config, evaluator, summary = run.config, run.markers[name], run.marker_summary(name)
    known: dict[str, Any] = {
        "marker": name,
        "positive_class": str(summary["positive_class"]),
        "auc": {key: summary["metrics"]["auc"].get(key) for key in ("value", "low", "high", "n", "n_positive")},
        "statement": str(summary["statement"]),
    }
    zero_missing = config.cohort.feeds_zeros
    missing = [sequence for sequence in evaluator.settings.sequences if sequence not in case.present]
    obstacle = ""
    if missing and (not zero_missing or len(missing) == len(evaluator.settings.sequences)):
        obstacle = f"{', '.join(missing)} missing"
    elif not mask.any():
        obstacle = NO_TUMOUR
    if obstacle:
        return MarkerPrediction(
            **known,
            probability=None,
            lowest=None,
            highest=None,
            threshold=None,
            call="none",
            reason=f"not predicted: {obstacle}",
            n_members=0,
        )
    cut = cut_case(
        case,
        mask,
        order=run.cohort.sequences,
        sequences=evaluator.settings.sequences,
        slices_per_case=evaluator.settings.slices_per_case,
        image_size_px=evaluator.settings.image_size_px,
        zero_missing=zero_missing,
    )
    (found,) = predict_with_uncertainty(
        evaluator,
        run.marker_folder(name),
        [cut],
        copies=config.classify.tta_copies,
        seed=derive_seed(config.seed, "new patients", name),
        device=config.device,
    )
    call, reason = decide(found, margin=config.classify.abstain_margin)
    return MarkerPrediction(
        **known,
        probability=found.probability,
        lowest=found.low,
        highest=found.high,
        threshold=found.threshold,
        call=call,
        reason=reason,
        n_members=found.n_members,
    )


def integrate_subtype(
    case: Case, markers: Sequence[MarkerPrediction], run: FrozenRun, *, tumour_found: bool = True
) -> dict[str, Any] | None:
    """Return the integrated subtype of a case as plain data; none when the run has no rules for it.

    A marker that abstains takes part with its probability: the rules' own ``tau`` decides whether anything is called.
    Without a tumour in the images nothing is called, whatever was measured in tissue: the images are of something else.

    Args:
        case: The case, with its columns of the sheet.
        markers: What was predicted.
        run: The frozen run.
        tumour_found: Whether its outline holds a voxel.

    Raises:
        LabelError: A measured column of the case holds neither of the values the run names.
    """
    config = run.config.classify.subtype
    if config is None or not run.markers:
        return None
    if not tumour_found:
        return withheld_subtype(config, case.labels, NO_TUMOUR)
    probabilities = {marker.marker: marker.probability for marker in markers if marker.probability is not None}
    return subtype_of(config, probabilities, case.labels)
