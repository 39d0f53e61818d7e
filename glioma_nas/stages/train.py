"""Train stage: teacher, student and baselines from scratch, once for each fold, on that fold's training patients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from glioma_nas.distributed_training import launch, rank
from glioma_nas.errors import ConfigError
from glioma_nas.files import read_json, write_json
from glioma_nas.pipeline import StageContext
from glioma_nas.prepared import PreparedCohort
from glioma_nas.registry import evaluators
from glioma_nas.seeding import derive_seed, isolated_torch_rng
from glioma_nas.stages.train_process import write_job
from glioma_nas.trained_networks import WEIGHTS_FILE, build_network, load_network, network_names, save_weights
from glioma_nas.training import HISTORY_FILE, LAST_CHECKPOINT
from glioma_nas.training_recipe import training_recipe

TRAINED_ON_FILE = "trained_on.json"


def run(context: StageContext) -> dict[str, Any]:
    """Write fold{k}/{network}/weights.safetensors, history.csv and trained_on.json."""
    cohort = PreparedCohort.load(context.inputs["preprocess"])
    names = network_names(context.config)
    jobs = [(fold, name) for fold in range(cohort.folds.n) for name in names]
    with context.progress.task("networks", len(jobs)) as task:
        for fold, name in jobs:
            folder = context.folder / f"fold{fold}" / name
            # The weights are written last: a folder that holds them is complete.
            if not (folder / WEIGHTS_FILE).is_file():
                if context.config.train.devices == 1:
                    train_network(context, fold, name, folder)
                else:
                    train_together(context, fold, name, folder)
            task.advance(1)
    kept = {
        f"fold {fold}, {name}": read_json(context.folder / f"fold{fold}" / name / TRAINED_ON_FILE)["kept"]
        for fold, name in jobs
    }
    return {"networks": list(names), "n_folds": cohort.folds.n, "epochs": context.config.train.epochs, "kept": kept}


def train_together(context: StageContext, fold: int, name: str, folder: Path) -> None:
    """Train one network in ``train.devices`` processes of their own; else as `train_network`.

    Raises:
        ConfigError: The batch cannot be shared evenly, or the machine has fewer GPUs.
        ResourceError: One of the processes failed.
    """
    config, n_devices = context.config, context.config.train.devices
    if config.train.batch_size % n_devices:
        raise ConfigError(
            f"train.batch_size {config.train.batch_size} cannot be shared by {n_devices} devices; choose a multiple"
        )
    if config.device != "cpu" and (config.device != "cuda" or torch.cuda.device_count() < n_devices):
        raise ConfigError(
            f"train.devices {n_devices} needs device: cpu, or device: cuda on a machine with as many GPUs; this is "
            f"'{config.device}' with {torch.cuda.device_count()}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    job = write_job(context, fold, name, folder)
    history = folder / HISTORY_FILE
    with context.progress.task(f"train {name}, fold {fold + 1}, {n_devices} devices", config.train.epochs) as task:
        done = 0

        def look() -> None:
            nonlocal done
            rows = max(0, len(history.read_text().splitlines()) - 1) if history.is_file() else 0
            if rows > done:
                task.advance(rows - done)
                done = rows

        launch(["-m", "glioma_nas.stages.train_process", str(job)], n_processes=n_devices, folder=folder, waiting=look)
        look()
    job.unlink()


def train_network(
    context: StageContext, fold: int, name: str, folder: Path, *, teacher: nn.Module | None = None
) -> None:
    """Train one network for one fold and write its files; called in every process that trains it.

    Args:
        context: The stage's context.
        fold: Number of the fold.
        name: One of `network_names`.
        folder: Where its files go.
        teacher: Trained on the same fold, for the student to be distilled from; none: the teacher of the same run.
    """
    config, train = context.config, context.config.train
    seed = derive_seed(config.seed, "train", fold, name)
    search = context.inputs["search"]
    with isolated_torch_rng(seed, "initial weights"):
        network = build_network(config, search, name)
    # The teacher of the same fold, so that nothing of the fold's test patients reaches the student through it.
    if teacher is None and name == "student" and train.kd_weight > 0:
        teacher = load_network(config, search, context.folder, fold, "teacher")
    evaluator = evaluators.get("segmentation")(
        str(context.inputs["preprocess"]),
        config.cohort.channels,
        folder=str(folder),
        split="train",
        fold=fold,
        **training_recipe(config),
        seed=seed,
        progress=context.progress,
        label=f"train {name}, fold {fold + 1}",
        teacher=teacher,
        validation_fraction=train.validation_fraction,
        checkpoint=train.checkpoint,
        tensorboard=train.tensorboard,
    )
    evaluator.evaluate(network)
    if rank() > 0:
        return
    write_json(
        folder / TRAINED_ON_FILE,
        {
            "fold": fold,
            "network": name,
            # Those that chose the epoch count as trained on: their masks are no out-of-fold masks either.
            "patients": sorted({*evaluator.training_patients, *evaluator.validation_patients}),
            "validation_patients": evaluator.validation_patients,
            "kept": evaluator.kept,
        },
    )
    save_weights(network, folder / WEIGHTS_FILE)
    (folder / LAST_CHECKPOINT).unlink(missing_ok=True)
