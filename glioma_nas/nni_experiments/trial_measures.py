"""What a trial measures on its network: overlap with the given outlines, speed, what its masks tell of a marker."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from torch import nn

from glioma_nas.config import RunConfig
from glioma_nas.downstream import DownstreamScore
from glioma_nas.errors import LabelError
from glioma_nas.prepared import PreparedCase
from glioma_nas.progress import Silent
from glioma_nas.segmentation_inference import THRESHOLD, predict_probability
from glioma_nas.segmentation_metrics import dice_coefficient, hd95_mm


def overlap(network: nn.Module, config: RunConfig, cases: list[PreparedCase]) -> tuple[float, float | None]:
    """Return mean Dice, in [0, 1], and median HD95 in mm over the cases, on the scans' own grids.

    Args:
        network: In evaluation mode, on the configuration's device.
        config: The trial's configuration.
        cases: Cases with masks. Where a distance is not defined, a case is left out of the median; none when all are.
    """
    dice, distances = [], []
    for case in cases:
        probability = predict_probability(
            network, case.images(), case.sequences, config.cohort.channels, device=config.device
        )
        predicted = (case.to_native(probability) >= THRESHOLD).astype(np.uint8)
        truth = case.native_mask()
        assert truth is not None  # cases without a mask were left out
        spacing = np.linalg.norm(np.asarray(case.native_affine)[:3, :3], axis=0)
        dice.append(dice_coefficient(predicted, truth))
        distance = hd95_mm(predicted, truth, (float(spacing[0]), float(spacing[1]), float(spacing[2])))
        if distance is not None:
            distances.append(distance)
    return float(np.mean(dice)), float(np.median(distances)) if distances else None


def speed(network: nn.Module, config: RunConfig) -> dict[str, float]:
    """Return latency, size and cost of one slice, as `TrialResult` names them; moves the network to the CPU."""
    from glioma_nas.stages.export import measure_networks

    row = measure_networks({"student": network.cpu()}, config, Silent())["networks"]["student"]
    return {
        "latency_ms": row["median_ms"],
        "latency_p95_ms": row["p95_ms"],
        "macs_g": row["macs_g"],
        "params_m": row["params_m"],
    }


def marker_auc(
    config: RunConfig,
    marker: str,
    network: nn.Module,
    prepared: Path,
    cases: list[PreparedCase],
    seen: tuple[str, ...],
    *,
    seed: int,
    required: bool,
) -> float | None:
    """Return the patient-level AUC of a marker predicted with the network's masks; none where it cannot be measured.

    Args:
        config: The trial's configuration.
        marker: One of its markers.
        network: The trained network.
        prepared: Folder of the preprocess stage.
        cases: Cases of patients who did not train the network.
        seen: Patients who did.
        seed: Seed of the classifiers and their folds.
        required: Trials are ranked by it.

    Raises:
        LabelError: It cannot be measured, and is required.
    """
    try:
        score = DownstreamScore(
            config,
            prepared,
            network_patients=seen,
            case_ids=[case.case_id for case in cases],
            markers=(marker,),
            seed=seed,
        )
    except LabelError as err:
        if required:
            raise
        # To stderr, which the web UI shows beside the trial; NNI sends log records to a file of its own.
        sys.stderr.write(f"marker '{marker}' not measured: {err}\n")
        return None
    return score.aucs(network.to(config.device))[marker]
