"""Train what the searches found, score it on patients no search has seen, time it: alike for all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from glioma_nas.comparison.cells import Cell
from glioma_nas.config import RunConfig
from glioma_nas.latency_backend import open_backend
from glioma_nas.latency_timing import time_in_turns
from glioma_nas.network_size import network_size
from glioma_nas.pipeline import StageContext
from glioma_nas.prepared import PreparedCohort
from glioma_nas.progress import Progress
from glioma_nas.segmentation_inference import predict_probability
from glioma_nas.segmentation_scores import native_outline, native_scores
from glioma_nas.stages.search import SEARCH_FOLD
from glioma_nas.stages.train import train_network
from glioma_nas.trained_networks import WEIGHTS_FILE, load_network

ROLE = "student"

TRAINING_SEED_STEP = 1000
"""Between the seeds of two trainings of one network: more than there are seeds of searches."""


def trained_network(cell: Cell, inputs: Mapping[str, Path], progress: Progress, *, training: int = 0) -> nn.Module:
    """Train the student in ``cell.folder/search`` on all training patients of the fold, unless that is done.

    Args:
        cell: Where the student is, and how it is trained.
        inputs: Finished folders of the preprocess and latency stages.
        progress: Where to report.
        training: Which of several trainings of this student; they differ in their seeds alone.
    """
    folder = cell.folder / ("train" if training == 0 else f"train{training}")
    config = cell.config.model_copy(update={"seed": cell.seed + TRAINING_SEED_STEP * training})
    network_folder = folder / f"fold{SEARCH_FOLD}" / ROLE
    if not (network_folder / WEIGHTS_FILE).is_file():
        context = StageContext(config, folder, {**inputs, "search": cell.folder / "search"}, progress)
        train_network(context, SEARCH_FOLD, ROLE, network_folder)
    return load_network(config, cell.folder / "search", folder, SEARCH_FOLD, ROLE)


def scores_on_test_patients(cell: Cell, cohort: PreparedCohort, network: nn.Module) -> dict[str, Any]:
    """Return ``dice``, the mean over the fold's test patients on their own grids, and ``n_patients``."""
    channels, device = cell.config.cohort.channels, cell.config.device
    by_patient: dict[str, list[dict[str, Any]]] = {}
    for case in cohort.select(cohort.folds.test(SEARCH_FOLD)):
        if case.has_mask:
            probability = predict_probability(network, case.images(), case.sequences, channels, device=device)
            by_patient.setdefault(case.patient_id, []).append(native_scores(case, native_outline(case, probability)))
    dice = [float(np.mean([score["dice"] for score in scores])) for scores in by_patient.values()]
    network.to("cpu")
    return {"dice": float(np.mean(dice)), "n_patients": len(dice)}


def timed_networks(
    networks: Mapping[str, nn.Module], config: RunConfig, progress: Progress
) -> tuple[dict[str, dict[str, Any]], dict[str, Exception]]:
    """Time all networks by turns in one process.

    Returns:
        Name → median latency with its 95 % interval and p95 in ms, number of rounds that count, share of disturbed
        calls, GMAC and million parameters; and name → why the engine does not take that network.
    """
    options, side = config.latency, config.preprocess.image_size_px
    shape = (1, len(config.cohort.channels), side, side)
    backend = open_backend(options.backend, options.precision)
    engines, refused = {}, {}
    for name, network in networks.items():
        try:
            engines[name] = backend.prepare(network, [shape], threads=options.threads)
        except Exception as err:  # noqa: BLE001 - one network's fault, the others can still be compared
            refused[name] = err
    warmup_runs = max(options.warmup_runs, 1)
    taken = time_in_turns(
        engines,
        warmup_runs=warmup_runs,
        runs=options.network_runs,
        max_runs=options.max_runs,
        progress=progress,
        description="timing networks",
    )
    clock_mhz = backend.clock_mhz()
    rows = {}
    for name in engines:
        record = taken[name].record(warmup_runs=warmup_runs, input_shapes=[shape], clock_mhz=clock_mhz)
        size = network_size(networks[name], shape)
        rows[name] = {
            "latency_ms": record.median_ms,
            "latency_low_ms": record.median_low_ms,
            "latency_high_ms": record.median_high_ms,
            "latency_p95_ms": record.p95_ms,
            "latency_n": record.n,
            "disturbed": record.disturbed,
            "clock_mhz": record.clock_mhz,
            "macs_g": size.macs_g,
            "params_m": size.params_m,
        }
    return rows, refused
