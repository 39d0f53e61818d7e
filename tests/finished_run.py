"""A run that went through every stage `predict` and `evaluate` read, at the smallest size, on a phantom cohort."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from glioma_nas.config import parse_config
from glioma_nas.new_patients.frozen_run import FrozenRun
from glioma_nas.pipeline import Pipeline
from glioma_nas.progress import Silent
from glioma_nas.testing.phantoms import write_phantom_cohort

CONFIG: dict[str, Any] = {
    "seed": 3,
    "cohort": {"sheet": "cohort/cohort.csv", "sequences": ["t1ce", "flair"]},
    "preprocess": {"crop_size_px": 48, "image_size_px": 32, "workers": 1},
    "folds": {"n_folds": 2},
    "latency": {"runs": 2, "warmup_runs": 1, "network_runs": 3},
    "search": {
        "space_options": {"preset": "tiny"},
        "strategy": "random_with_shared_weights",
        "strategy_options": {"n_candidates": 2, "recalibration_batches": 1},
        "pretrain_epochs": 0,
        "search_epochs": 1,
        "steps_per_epoch": 2,
        "batch_size": 4,
    },
    # Long enough for the teacher to find every tumour; the student, a tenth of its size, is left at half of them.
    "train": {"epochs": 10, "steps_per_epoch": 12, "batch_size": 6, "learning_rate": 0.05, "kd_weight": 0.0},
    "classify": {
        "epochs": 1,
        "slices_per_case": 2,
        "image_size_px": 32,
        "inner_folds": 2,
        "baselines": [],
        "bootstrap_samples": 100,
        "permutation_samples": 100,
        "grad_cam_cases": 0,
        "subtype": {"predicted": {"idh": "idh"}},
        "markers": {
            "idh": {"column": "idh", "positive": "mutant", "classifier": "idh"},
            "ki67": {"column": "ki67", "threshold": 10, "classifier": "age_sex"},
        },
    },
}
STAGES = ("preprocess", "latency", "search", "train", "segment", "classify")


def make_finished_run(folder: Path) -> Path:
    """Make cohort and run below ``folder`` and return the run folder."""
    write_phantom_cohort(folder / "cohort", 8, 0)
    run = folder / "run"
    Pipeline(parse_config(CONFIG, source="test", folder=folder), run, Silent()).run(STAGES)
    return run


def seeing_no_tumour(run: FrozenRun) -> FrozenRun:
    """Open the run again with networks that are sure of background everywhere."""
    blind = FrozenRun(run.folder, run.config, run.network)
    last = [
        layer
        for network in blind.networks
        for layer in network.modules()
        if isinstance(layer, torch.nn.Conv2d) and layer.out_channels == 2 and layer.bias is not None
    ]
    assert len(last) >= len(blind.networks)
    for layer in last:
        assert layer.bias is not None
        layer.bias.data = torch.tensor([100.0, -100.0])
    return blind
