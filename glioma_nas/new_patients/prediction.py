"""Segment a new case and predict its markers with everything of the run frozen.

The segmentation is the mean probability of the networks of all folds, and how far they lie apart is reported.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glioma_nas import __version__
from glioma_nas.case_preparation import is_prepared, prepare_case
from glioma_nas.cohort import Case
from glioma_nas.errors import StorageError
from glioma_nas.files import read_json, write_json, write_text
from glioma_nas.images import write_mask
from glioma_nas.marker_masks import EXPERT, GIVEN
from glioma_nas.new_patients.case_page import render_case
from glioma_nas.new_patients.dicom_seg import write_dicom_seg
from glioma_nas.new_patients.frozen_run import FrozenRun
from glioma_nas.new_patients.input_checks import problems_of_input, require_servable
from glioma_nas.new_patients.marker_prediction import NO_TUMOUR, integrate_subtype, predict_marker
from glioma_nas.pipeline import MANIFEST, source_hash
from glioma_nas.prepared import PreparedCase
from glioma_nas.quality_control import flags
from glioma_nas.segmentation_inference import THRESHOLD, predict_probability
from glioma_nas.segmentation_metrics import dice_coefficient
from glioma_nas.segmentation_scores import native_outline

MASK_FILE = "mask.nii.gz"
SEG_FILE = "mask.dcm"
PREDICTION_FILE = "prediction.json"
PAGE_FILE = "report.html"
PREPARED_FOLDER = "prepared"

DISCLAIMER = (
    "Imaging-based prediction for research use only. Not a medical device, and not a WHO integrated diagnosis: that "
    "needs tissue."
)


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
        "case": [case.case_id, case.age, case.sex, dict(case.labels), files],
        "run": [path.read_text(encoding="utf-8") for path in stages if path.is_file()],
        "network": run.network,
        "source": source_hash(),
    }
    return case.digest(content)


def is_predicted(case: Case, run: FrozenRun, folder: Path) -> bool:
    """Tell whether ``folder`` holds the prediction of this very case by this very run."""
    record = folder / PREDICTION_FILE
    if not record.is_file():
        return False
    try:
        return bool(read_json(record).get("key") == prediction_key(case, run))
    except StorageError:  # cut short; it is made again
        return False


def predict_case(
    case: Case,
    run: FrozenRun,
    folder: Path,
    *,
    any_spacing: bool = False,
    series: Mapping[str, Sequence[Path]] | None = None,
) -> dict[str, Any]:
    """Segment a case, predict its markers, and write mask, record and page into ``folder``.

    Args:
        case: Its scans; a mask in it is not looked at.
        run: The frozen run.
        folder: Where ``mask.nii.gz``, ``prediction.json``, ``report.html`` and ``prepared/`` go.
        series: Sequence → files of its DICOM series, to write ``mask.dcm`` too.
        any_spacing: Serve slices much thinner or thicker than the run's too; the page says so.

    Returns:
        What ``prediction.json`` holds.

    Raises:
        CohortError: The run cannot serve the case.
        ImageError: A scan cannot be used.
    """
    started = time.monotonic()
    require_servable(case, run, any_spacing=any_spacing)
    unmasked = replace(case, mask=None, labels={})
    integrate_subtype(case, [], run)  # before any work: a cell may hold no state of its marker
    prepared_folder = folder / PREPARED_FOLDER
    if not is_prepared(unmasked, prepared_folder, run.recipe):
        prepare_case(unmasked, prepared_folder, run.recipe)
    prepared = PreparedCase.load(prepared_folder)
    warnings = [*problems_of_input(case, run), *_warned(known_case(prepared, run))]
    if run.other_code is not None:
        warnings.append(run.other_code)

    members = ensemble_probabilities(prepared, run)
    probability = members.mean(axis=0, dtype=np.float32)
    mask = native_outline(prepared, probability)
    write_mask(folder / MASK_FILE, mask, like=prepared.reference)
    if series is not None:
        write_dicom_seg(
            folder / SEG_FILE,
            mask,
            prepared.native_affine,
            series=series[prepared.native_sequence],
            network=run.network,
            key=prediction_key(case, run),
        )
    prepared_mask = tumour_on_slices(probability, mask)
    segmentation = _describe_segmentation(prepared, run, members, mask)
    if not mask.any():
        warnings.append(
            f"{NO_TUMOUR}: neither markers nor a subtype are predicted. Look at the scans: a small or faint tumour can "
            "be missed"
        )
    if run.markers:
        warnings += other_masks(run.config.classify.masks, run.network)
    markers = [predict_marker(name, prepared, prepared_mask, run) for name in run.markers]
    record = {
        "case_id": case.case_id,
        "key": prediction_key(case, run),
        "segmentation": segmentation,
        "markers": [asdict(marker) for marker in markers],
        "subtype": integrate_subtype(case, markers, run, tumour_found=bool(mask.any())),
        "warnings": warnings,
        "quality": dict(prepared.quality),
        "quality_flags": quality_flags(prepared, run),
        "run": {"name": run.folder.name, "source": source_hash(), "glioma_nas": __version__},
        "disclaimer": DISCLAIMER,
        "wall_s": round(time.monotonic() - started, 2),
    }
    write_text(folder / PAGE_FILE, render_case(record, prepared, prepared_mask, run))
    # Last: a folder that holds the record is complete.
    write_json(folder / PREDICTION_FILE, record)
    return record


def tumour_on_slices(probability: NDArray[np.float32], outline: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return what classifiers get as the tumour, uint8 (Z, H, W), 0 or 1; empty where the scan's own outline is.

    Args:
        probability: Of tumour on the prepared slices, float32 (Z, H, W) in [0, 1].
        outline: On the grid of the scan, uint8 (X, Y, Z), 0 or 1.
    """
    mask: NDArray[np.uint8] = ((probability >= THRESHOLD) & bool(outline.any())).astype(np.uint8)
    return mask


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


def ensemble_probabilities(case: PreparedCase, run: FrozenRun) -> NDArray[np.float32]:
    """Return the tumour probability of every pixel by the network of each fold, float32 (folds, Z, H, W) in [0, 1]."""
    images, channels, device = case.images(), run.config.cohort.channels, run.config.device
    return np.stack(
        [predict_probability(network, images, case.sequences, channels, device=device) for network in run.networks]
    )


def _describe_segmentation(
    case: PreparedCase, run: FrozenRun, members: NDArray[np.float32], mask: NDArray[np.uint8]
) -> dict[str, Any]:
    outlines = [native_outline(case, member) for member in members]
    volumes = [float(outline.sum()) * case.native_voxel_ml for outline in outlines]
    return {
        "network": run.network,
        "n_members": len(members),
        "mask_on": case.native_sequence,
        "volume_ml": round(float(mask.sum()) * case.native_voxel_ml, 3),
        "volume_lowest_ml": round(min(volumes), 3),
        "volume_highest_ml": round(max(volumes), 3),
        "member_dice": round(float(np.mean([dice_coefficient(outline, mask) for outline in outlines])), 4),
        "out_of_fold_dice": run.out_of_fold_dice,
    }


def quality_flags(case: PreparedCase, run: FrozenRun) -> list[str]:
    """List what somebody should look at: what anatomy makes unlikely, and what stands apart from the run's patients."""
    own = f"new {case.case_id}"  # no case of the run has a blank in its id
    known = {name: item.quality for name, item in run.cohort.cases.items()}
    return flags({**known, own: case.quality})[own]


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
