"""Search stage: run the configured strategy on fold 0's training patients and record what it found."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import torch

from glioma_nas.config import RunConfig
from glioma_nas.downstream import DownstreamScore, marker_strata
from glioma_nas.files import canonical_json, write_json, write_text
from glioma_nas.latency_conditions import require_table_of_this_machine
from glioma_nas.latency_records import LatencyTable
from glioma_nas.nni_bridge import explore, found_architectures, trials_of
from glioma_nas.pipeline import StageContext
from glioma_nas.prepared import PreparedCohort
from glioma_nas.registry import evaluators
from glioma_nas.search_records import ARCHITECTURE_HISTORY_FILE, TENSORBOARD_FOLDER
from glioma_nas.seeding import derive_seed, isolated_torch_rng
from glioma_nas.space_building import build_space, build_strategy
from glioma_nas.training import HISTORY_FILE

SEARCH_FOLD = 0

ROLES = ("teacher", "student")

TRIALS_FILE = "trials.csv"

SAMPLED_FILE = "sampled.json"
"""Networks that were drawn at random and scored with the supernet's weights, where the strategy was asked for some."""

WEIGHT_PATIENTS_FILE = "weight_patients.json"
"""Patients whose scans trained weights of the search."""


def run(context: StageContext, *, split_seed: int | None = None, epoch_s: float | None = None) -> dict[str, Any]:
    """Write teacher.json, student.json, their drawings and cell tables, weight_patients.json, what the strategy leaves.

    A search with our supernets is refused before it starts when its memory would not suffice; any search when its
    latency table is of another device or engine.

    A one-shot strategy leaves history.csv and tensorboard/, one of ours architecture_history.csv and probabilities.json
    as well, a multi-trial one trials.csv.

    Args:
        context: The stage's context.
        split_seed: Seed of the halves of the training patients; none for one that follows from the run's seed.
        epoch_s: Wall time of an epoch in seconds; none for ``search.steps_per_epoch`` alone. ``results`` then count the
            steps that were taken.
    """
    config, search = context.config, context.config.search
    folder = context.folder / "supernet"
    seed = derive_seed(config.seed, "search")
    with isolated_torch_rng(seed, "space"):
        space = build_space(config)
    table = LatencyTable.load(context.inputs["latency"] / "latency_table.json")
    require_table_of_this_machine(table, config)
    profiler = evaluators.get("latency_table")(space, table, config.search.latency_calibration)
    evaluator = evaluators.get("segmentation")(
        str(context.inputs["preprocess"]),
        config.cohort.channels,
        folder=str(folder),
        split="search",
        fold=SEARCH_FOLD,
        epochs=search.pretrain_epochs + search.search_epochs,
        steps_per_epoch=search.steps_per_epoch,
        batch_size=search.batch_size,
        learning_rate=search.learning_rate,
        weight_decay=search.weight_decay,
        loss=search.loss,
        auxiliary_weight=search.auxiliary_weight,
        logit_weights=search.logit_weights,
        tumour_slice_fraction=search.tumour_slice_fraction,
        augmentation=config.augmentation.model_dump(),
        seed=seed,
        split_seed=split_seed,
        device=config.device,
        precision=search.precision,
        compiled=search.compile,
        progress=context.progress,
        label=f"search ({search.strategy})",
        tensorboard=search.tensorboard,
        epoch_s=epoch_s,
        **_markers(config, context.inputs["preprocess"], seed),
    )
    strategy = build_strategy(config, profiler=profiler, seed=seed)
    mixes_operators = hasattr(strategy, "relaxation_slot") or getattr(strategy, "mixes_operators", False)
    if hasattr(space, "search_memory") and mixes_operators:
        space.search_memory(search.batch_size).require(_available_bytes(config.device))
    explore(space, evaluator, strategy)
    # The other half of the training patients chooses the architecture.
    write_json(context.folder / WEIGHT_PATIENTS_FILE, evaluator.training_patients)

    # A space that a one-shot strategy has turned into a supernet no longer draws or describes like the plain one.
    plain = build_space(config)
    found = found_architectures(strategy, plain)
    notes = list(getattr(strategy, "notes", []))
    if evaluator.downstream is not None:
        notes.append(evaluator.downstream.note())
    results: dict[str, Any] = {
        "strategy": search.strategy,
        "strategy_notes": notes,
        "latency_weight": search.latency_weight,
        "finetune_steps": getattr(strategy, "finetune_steps", 0),
        "search_fold": SEARCH_FOLD,
        "n_search_patients": len(PreparedCohort.load(context.inputs["preprocess"]).folds.train(SEARCH_FOLD)),
        "search_patients_note": (
            f"The architecture was searched on the training patients of fold {SEARCH_FOLD} alone. Test patients of the "
            f"other folds were among them, so only fold {SEARCH_FOLD} is untouched by the search; its figures stand "
            "beside."
        ),
    }
    if evaluator.downstream is not None:
        results["downstream"] = evaluator.downstream.cost()
    if epoch_s is not None:
        results["steps"] = evaluator.clock.steps
    for role in ROLES:
        architecture = found[role]
        architecture.save(context.folder / f"{role}.json")
        write_text(context.folder / f"{role}.svg", plain.draw(architecture))
        write_json(context.folder / f"{role}_cells.json", plain.describe(architecture))
        results[role] = {
            "id": architecture.id,
            "branches": architecture.choices.get("branches"),
            "table_latency_ms": round(float(profiler.profile(architecture.sample())), 4),
            "candidates": [candidate.row() for candidate in getattr(strategy, "candidates", {}).get(role, [])],
        }
    sampled = getattr(strategy, "sampled", [])
    if sampled:
        rows = [{"architecture": network.to_json(), **candidate.row()} for network, candidate in sampled]
        write_json(context.folder / SAMPLED_FILE, rows)
        results["sampled_s"] = round(strategy.sampled_s, 2)
    module: Any = getattr(strategy, "oneshot_module", None)
    if hasattr(module, "architectures"):
        weights = {
            name: {k: v.tolist() for k, v in item.decoded().items()} for name, item in module.architectures.items()
        }
        write_text(context.folder / "probabilities.json", canonical_json(weights) + "\n")
        results["latency_terms"] = {
            name: {"sensitivities_ms": term.sensitivities, "coefficients": term.coefficients}
            for name, term in module.latencies.items()
        }
    trials = [
        {
            "trial": number,
            "id": plain.architecture(trial.sample).id,
            "status": trial.status,
            "accuracy" if search.marker_weight > 0 else "dice": trial.metric,
            "table_latency_ms": round(float(profiler.profile(trial.sample)), 4),
        }
        for number, trial in enumerate(trials_of(strategy))
    ]
    if trials:
        write_text(context.folder / TRIALS_FILE, pd.DataFrame(trials).to_csv(index=False))
        results["n_trials"] = len(trials)
    for name in (HISTORY_FILE, ARCHITECTURE_HISTORY_FILE):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, context.folder / name)
    if (folder / TENSORBOARD_FOLDER).is_dir():
        shutil.copytree(folder / TENSORBOARD_FOLDER, context.folder / TENSORBOARD_FOLDER, dirs_exist_ok=True)
    shutil.rmtree(folder)  # checkpoints of the supernet or the trials: of no use once the architectures are known
    return results


def _markers(config: RunConfig, prepared: Path, seed: int) -> dict[str, Any]:
    if config.search.marker_weight == 0:
        return {}
    score = partial(DownstreamScore, config, prepared, seed=seed)
    return {"downstream": score, "strata": marker_strata(config, prepared)}


def _available_bytes(device: str) -> int:
    """Return the free memory of the device a search runs on."""
    if device == "cpu":
        return int(psutil.virtual_memory().available)
    return int(torch.cuda.mem_get_info(torch.device(device))[0])
