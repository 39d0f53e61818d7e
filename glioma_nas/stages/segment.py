"""Segment stage: every case is segmented by the networks that never saw its patient, and scored on its own grid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from glioma_nas.errors import LeakageError
from glioma_nas.files import atomic_path, read_json, write_json, write_text
from glioma_nas.images import write_mask
from glioma_nas.pipeline import StageContext
from glioma_nas.prepared import PreparedCase, PreparedCohort
from glioma_nas.segmentation_inference import THRESHOLD, predict_probability
from glioma_nas.segmentation_scores import native_outline, native_scores
from glioma_nas.trained_networks import load_network, network_names


def run(context: StageContext) -> dict[str, Any]:
    """Write masks/{network}/{case}.nii.gz, dice.csv and in masks_prepared/{network} {case}.npy and provenance.json."""
    cohort = PreparedCohort.load(context.inputs["preprocess"])
    names = network_names(context.config)
    jobs = [(fold, name) for fold in range(cohort.folds.n) for name in names]
    n_steps = sum(len(cohort.folds.test(fold)) for fold, _ in jobs)
    rows: list[dict[str, Any]] = []
    provenance: dict[str, dict[str, Any]] = {name: {} for name in names}
    with context.progress.task("segment", n_steps) as task:
        for fold, name in jobs:
            trained_on = read_json(context.inputs["train"] / f"fold{fold}" / name / "trained_on.json")["patients"]
            network: nn.Module | None = None
            for case_id in cohort.folds.test(fold):
                case = cohort.cases[case_id]
                if case.patient_id in trained_on:
                    raise LeakageError(f"case {case_id}: network '{name}' of fold {fold} was trained on its patient")
                row_file = context.folder / "rows" / name / f"{case_id}.json"
                if not row_file.is_file():
                    if network is None:
                        network = load_network(
                            context.config, context.inputs["search"], context.inputs["train"], fold, name
                        )
                        network = network.to(context.config.device)
                    row = _segment(context, network, case, name, fold)
                    write_json(row_file, row)
                rows.append(read_json(row_file))
                provenance[name][case_id] = {"network": name, "fold": fold, "train_patients": trained_on}
                task.advance(1)
    write_text(context.folder / "dice.csv", pd.DataFrame(rows).to_csv(index=False))
    for name, record in provenance.items():
        write_json(context.folder / "masks_prepared" / name / "provenance.json", record)
    table = pd.DataFrame(rows)
    return {
        "mean_dice": {name: _mean(table, name) for name in names},
        "n_cases": {name: int(table[table.network == name].dice.notna().sum()) for name in names},
        "split": f"out-of-fold, {cohort.folds.n} folds, by patient",
    }


def _segment(context: StageContext, network: nn.Module, case: PreparedCase, name: str, fold: int) -> dict[str, Any]:
    probability = predict_probability(
        network, case.images(), case.sequences, context.config.cohort.channels, device=context.config.device
    )
    _save_array(
        context.folder / "masks_prepared" / name / f"{case.case_id}.npy", (probability >= THRESHOLD).astype(np.uint8)
    )
    mask = native_outline(case, probability)
    write_mask(context.folder / "masks" / name / f"{case.case_id}.nii.gz", mask, like=case.reference)
    known = {"network": name, "case_id": case.case_id, "patient_id": case.patient_id, "fold": fold}
    return {**known, **native_scores(case, mask)}


def _save_array(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        np.save(temporary, array, allow_pickle=False)


def _mean(table: pd.DataFrame, name: str) -> float | None:
    values = table[table.network == name].dice.dropna()
    return round(float(values.mean()), 4) if len(values) else None
