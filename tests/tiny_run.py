"""The smallest run that goes through every stage, for tests that need one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from glioma_nas.testing.phantoms import write_phantom_cohort

TINY_RUN: dict[str, Any] = {
    "seed": 1,
    "cohort": {"sheet": "cohort/cohort.csv", "sequences": ["t1ce", "flair"]},
    "preprocess": {"crop_size_px": 48, "image_size_px": 32, "workers": 1},
    "folds": {"n_folds": 2},
    "latency": {"runs": 2, "warmup_runs": 1, "network_runs": 3, "threads": 1},
    "search": {
        "space_options": {"preset": "tiny"},
        "strategy_options": {
            "pretrain_widths": ["max"],
            "search_widths": ["sampled"],
            "finetune_steps": 2,
            "recalibration_batches": 1,
        },
        "pretrain_epochs": 1,
        "search_epochs": 2,
        "steps_per_epoch": 2,
        "batch_size": 4,
    },
    "train": {"epochs": 2, "steps_per_epoch": 2, "batch_size": 4},
}


def write_run(folder: Path, *, n_patients: int = 8, **changes: Any) -> Path:
    """Write a cohort of phantoms and the configuration of a tiny run on it; return the configuration's file."""
    write_phantom_cohort(folder / "cohort", n_patients, 0)
    (folder / "run.yaml").write_text(yaml.safe_dump({**TINY_RUN, **changes}))
    return folder / "run.yaml"
