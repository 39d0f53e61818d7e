"""Segment a new case and predict its markers with everything of the run frozen.

The segmentation is the mean probability of the networks of all folds; a marker's probability is the mean of its folds'
classifiers, each at its own temperature. How far the members lie apart is reported, and decides about abstention.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glioma_nas import __version__
from glioma_nas.case_preparation import is_prepared, prepare_case
from glioma_nas.cohort import Case
from glioma_nas.errors import StorageError
from glioma_nas.files import canonical_json, read_json, sha256_text, write_json, write_text
from glioma_nas.images import write_mask
from glioma_nas.marker_evaluator import finished_folds
from glioma_nas.marker_masks import EXPERT, GIVEN
from glioma_nas.marker_tuning import Tuning
from glioma_nas.markers import cut_case
from glioma_nas.new_patients.case_inputs import problems_of_input, require_servable
from glioma_nas.new_patients.case_page import render_case
from glioma_nas.new_patients.frozen_run import FrozenRun
from glioma_nas.pipeline import MANIFEST, source_hash
from glioma_nas.prepared import PreparedCase
from glioma_nas.segmentation_inference import THRESHOLD, predict_probability
from glioma_nas.segmentation_metrics import dice_coefficient

MASK_FILE = "mask.nii.gz"
PREDICTION_FILE = "prediction.json"
PAGE_FILE = "report.html"
PREPARED_FOLDER = "prepared"

DISCLAIMER = (
    "Imaging-based prediction for research use only. Not a medical device, and not a WHO integrated diagnosis: that "
    "needs tissue."
)


@dataclass(frozen=True)
class MarkerPrediction:
    """What the run says of one marker of a new patient.

    Attributes:
        marker: Its name.
        positive_class: What a probability of 1 would mean.
        probability: Mean of the folds' classifiers; none when it was not predicted.
        lowest: Least probability of a fold's classifier.
        highest: Greatest.
        threshold: Mean of the folds' thresholds.
        call: ``positive``, ``negative``, or ``none`` when the classifiers disagree or the marker was not predicted.
        reason: Why there is no call; empty when there is one.
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
    auc: Mapping[str, Any]
    statement: str


def prediction_key(case: Case, run: FrozenRun) -> str:
    """Return a hash of all that decides a prediction; files count by place, size and time of change.

    Without the place, patients whose folders are both called ``anat`` could be taken for each other: uncompressed scans
    are of one size, and archives restore one time of change.
    """
    files = {
        name: [str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns]
        for name, path in sorted(case.images.items())
    }
    stages = [run.folder / stage / MANIFEST for stage in ("preprocess", "search", "train", "classify")]
    content = {
        "case": [case.case_id, case.age, case.sex, files],
        "run": [path.read_text(encoding="utf-8") for path in stages if path.is_file()],
        "network": run.network,
        "source": source_hash(),
    }
    return sha256_text(canonical_json(content))


def is_predicted(case: Case, run: FrozenRun, folder: Path) -> bool:
    """Tell whether ``folder`` holds the prediction of this very case by this very run."""
    record = folder / PREDICTION_FILE
    if not record.is_file():
        return False
    try:
        return bool(read_json(record).get("key") == prediction_key(case, run))
    except StorageError:  # cut short; it is made again
        return False


def predict_case(case: Case, run: FrozenRun, folder: Path) -> dict[str, Any]:
    """Segment a case, predict its markers, and write mask, record and page into ``folder``.

    Args:
        case: Its scans; a mask in it is not looked at.
        run: The frozen run.
        folder: Where ``mask.nii.gz``, ``prediction.json``, ``report.html`` and ``prepared/`` go.

    Returns:
        What ``prediction.json`` holds.

    Raises:
        CohortError: The run cannot serve the case.
        ImageError: A scan cannot be used.
    """
    started = time.monotonic()
    require_servable(case, run)
    unmasked = Case(case.case_id, case.patient_id, case.images, None, case.age, case.sex)
    prepared_folder = folder / PREPARED_FOLDER
    if not is_prepared(unmasked, prepared_folder, run.recipe):
        prepare_case(unmasked, prepared_folder, run.recipe)
    prepared = PreparedCase.load(prepared_folder)
    warnings = [*problems_of_input(case, run), *_warned(known_case(prepared, run))]

    members = ensemble_probabilities(prepared, run)
    probability = members.mean(axis=0, dtype=np.float32)
    mask = (prepared.to_native(probability) >= THRESHOLD).astype(np.uint8)
    write_mask(folder / MASK_FILE, mask, like=prepared.reference)
    prepared_mask = (probability >= THRESHOLD).astype(np.uint8)
    segmentation = _describe_segmentation(prepared, run, members, mask)
    if not mask.any():
        warnings.append("no tumour was found; markers are predicted from the middle slices and mean little")
    if run.markers:
        warnings += other_masks(run.config.classify.masks, run.network)
    markers = [predict_marker(name, prepared, prepared_mask, run) for name in run.markers]
    record = {
        "case_id": case.case_id,
        "key": prediction_key(case, run),
        "segmentation": segmentation,
        "markers": [asdict(marker) for marker in markers],
        "warnings": warnings,
        "quality": dict(prepared.quality),
        "run": {"name": run.folder.name, "source": source_hash(), "glioma_nas": __version__},
        "disclaimer": DISCLAIMER,
        "wall_s": round(time.monotonic() - started, 2),
    }
    write_text(folder / PAGE_FILE, render_case(record, prepared, prepared_mask, run))
    # Last: a folder that holds the record is complete.
    write_json(folder / PREDICTION_FILE, record)
    return record


def other_masks(trained_with: str, network: str) -> list[str]:
    """Say when markers are predicted from other masks than their classifiers were trained and tested with.

    Args:
        trained_with: The run's ``classify.masks``.
        network: The network that segments new cases.

    >>> other_masks("student", "student")
    []
    """
    if trained_with == network:
        return []
    masks = f"{trained_with} masks" if trained_with in (EXPERT, GIVEN) else f"masks of the {trained_with}"
    return [
        f"the marker classifiers were trained and tested with {masks} and get those of the {network} here: "
        "the AUC shown was not measured with these"
    ]


def predict_marker(name: str, case: PreparedCase, mask: NDArray[np.uint8], run: FrozenRun) -> MarkerPrediction:
    """Predict one marker of a prepared case.

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
    if missing and (not zero_missing or len(missing) == len(evaluator.settings.sequences)):
        return MarkerPrediction(
            **known,
            probability=None,
            lowest=None,
            highest=None,
            threshold=None,
            call="none",
            reason=f"not predicted: {', '.join(missing)} missing",
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
    folder = run.marker_folder(name)
    members = evaluator.predict_members(folder, [cut], device=config.device)[:, 0]
    thresholds = np.array([Tuning.read(fold).threshold for fold in finished_folds(folder)])
    call, reason = decide(members, thresholds, margin=config.classify.abstain_margin)
    return MarkerPrediction(
        **known,
        probability=float(members.mean()),
        lowest=float(members.min()),
        highest=float(members.max()),
        threshold=float(thresholds.mean()),
        call=call,
        reason=reason,
    )


def decide(members: NDArray[np.float64], thresholds: NDArray[np.float64], *, margin: float) -> tuple[str, str]:
    """Turn the probabilities of the folds' classifiers into a call, or into the reason for none.

    Args:
        members: Probability of each classifier, float64 (folds,).
        thresholds: Each one's own threshold, float64 (folds,).
        margin: Distance of the mean probability from the mean threshold below which no call is made.

    Returns:
        ``positive``, ``negative`` or ``none``, and the reason for none. A third or more of the classifiers against the
        majority is a disagreement.
    """
    votes = members >= thresholds
    minority = min(int(votes.sum()), int((~votes).sum()))
    if 3 * minority >= len(votes):
        return "none", f"no call: {minority} of {len(votes)} classifiers disagree with the others"
    distance = abs(float(members.mean() - thresholds.mean()))
    if distance < margin:
        return "none", f"no call: within {margin:g} of the threshold"
    return ("positive" if 2 * int(votes.sum()) > len(votes) else "negative"), ""


def ensemble_probabilities(case: PreparedCase, run: FrozenRun) -> NDArray[np.float32]:
    """Return the tumour probability of every pixel by the network of each fold, float32 (folds, Z, H, W) in [0, 1]."""
    images, channels, device = case.images(), run.config.cohort.channels, run.config.device
    return np.stack(
        [predict_probability(network, images, case.sequences, channels, device=device) for network in run.networks]
    )


def _describe_segmentation(
    case: PreparedCase, run: FrozenRun, members: NDArray[np.float32], mask: NDArray[np.uint8]
) -> dict[str, Any]:
    together = members.mean(axis=0) >= THRESHOLD
    pixel_ml = float(np.prod(case.spacing_mm)) / 1000
    volumes = [float((member >= THRESHOLD).sum()) * pixel_ml for member in members]
    agreement = [
        dice_coefficient((member >= THRESHOLD).astype(np.uint8), together.astype(np.uint8)) for member in members
    ]
    return {
        "network": run.network,
        "n_members": len(members),
        "mask_on": case.native_sequence,
        "volume_ml": round(float(mask.sum()) * case.native_voxel_ml, 3),
        "volume_lowest_ml": round(min(volumes), 3),
        "volume_highest_ml": round(max(volumes), 3),
        "member_dice": round(float(np.mean(agreement)), 4),
        "out_of_fold_dice": run.out_of_fold_dice,
    }


def known_case(case: PreparedCase, run: FrozenRun) -> str | None:
    """Return the case of the run that has a scan with the very same voxels; none for a new patient."""
    same = sorted({run.known_voxels[digest] for digest in case.voxel_hashes.values() if digest in run.known_voxels})
    return same[0] if same else None


def _warned(known: str | None) -> list[str]:
    if known is None:
        return []
    return [
        f"a scan of this case is the same as one of case {known}, which the run was trained on: the prediction says "
        "nothing about new patients"
    ]
