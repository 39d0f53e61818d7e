"""What one trial does: find or take an architecture, train it, measure it, report it.

A co-search trial runs the search stage with its hyper-parameters and goes on with the student; an architecture trial
takes the choices it was given. Either way the network is trained from scratch on one half of fold 0's training patients
and measured on the other half. In all trials of an experiment, whatever their seeds, the halves are the same, and the
weights of supernets and teachers are trained on the first half as well, so that a trial is measured on patients that
none of its weights has seen. (The second half also chooses architectures: trials are ranked by it, not judged.) The
fold's test patients are never read, so that ranking trials does not use them up.
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from glioma_nas import registry
from glioma_nas.architecture import Architecture
from glioma_nas.config import RunConfig
from glioma_nas.downstream import marker_strata
from glioma_nas.epoch_metrics import listening
from glioma_nas.errors import ConfigError
from glioma_nas.files import read_json, write_json
from glioma_nas.nni_experiments.trial_channel import TrialChannel
from glioma_nas.nni_experiments.trial_measures import marker_auc, overlap, speed
from glioma_nas.nni_experiments.trial_metrics import TrialResult, intermediate_metrics
from glioma_nas.nni_experiments.trial_pages import TrialBoard, write_trial_page
from glioma_nas.nni_experiments.trial_settings import (
    ARCHITECTURE,
    CO_SEARCH,
    MARKERS,
    TrialSettings,
    load_trial_settings,
)
from glioma_nas.pipeline import StageContext
from glioma_nas.prepared import PreparedCohort
from glioma_nas.progress import Silent
from glioma_nas.seeding import derive_seed, isolated_torch_rng
from glioma_nas.space_building import build_space
from glioma_nas.trained_networks import WEIGHTS_FILE, build_network, load_network, save_weights
from glioma_nas.training_recipe import training_recipe

RESULT_FILE = "result.json"
TRAIN_FOLDER = "train"
FOLD = 0

Shown = Callable[[str], AbstractContextManager[None]]
"""Makes the epochs of a stage intermediate results while the context lasts."""

PATIENTS_FILE = "patients.json"


def run_trial(settings_file: Path, channel: TrialChannel) -> None:
    """Run the trial that NNI has asked for and report its result.

    A trial that was interrupted continues from its checkpoint, and one whose result is known reports it again.

    Raises:
        GliomaNasError: The hyper-parameters, the inputs or the training are at fault.
    """
    settings = load_trial_settings(settings_file)
    parameters = channel.parameters
    overrides = parameters if settings.kind == CO_SEARCH else {}
    config = settings.run_config(overrides, folder=settings_file.resolve().parent)
    folder = settings.work_folder(parameters)
    with _locked(folder), TrialBoard(channel.output_folder) as board:
        channel.open(folder)
        for step, epoch in enumerate(channel.epochs if board.is_new else ()):  # of another trial with these parameters
            board.add_epoch(settings.stages[int(epoch["stage"])], step, epoch)
        show = partial(_reporting, channel, board, settings)
        with show("search"):
            architecture = _architecture(settings, config, parameters, folder)
        result = _measured(settings, config, architecture, folder, show)
        metrics = result.final_metrics(
            target_latency_ms=settings.target_latency_ms,
            target_exponents=settings.target_exponents,
            marker_weight=settings.marker_weight,
            markers=settings.markers,
        )
        space = build_space(config)
        choices = {label: list(mutable.values) for label, mutable in space.simplify().items()}
        board.add_architecture(space.draw_png(architecture), folder / "search" / "probabilities.json", choices)
        write_trial_page(
            channel.output_folder, parameters, metrics, drawing=space.draw(architecture), run_folder=settings.run_folder
        )
        architecture.save(channel.output_folder / "architecture.json")
        channel.report_final(metrics)


@contextmanager
def _reporting(channel: TrialChannel, board: TrialBoard, settings: TrialSettings, stage: str) -> Iterator[None]:
    def report(published_by: str, epoch: int, figures: Mapping[str, float]) -> None:
        if published_by in ("search", "train"):  # classifiers' epochs are not shown
            metrics = intermediate_metrics(settings.stages.index(stage), epoch, figures)
            board.add_epoch(stage, channel.report_epoch(metrics), metrics)

    with listening(report):
        yield


def _architecture(
    settings: TrialSettings, config: RunConfig, parameters: Mapping[str, Any], folder: Path
) -> Architecture:
    if settings.kind == ARCHITECTURE:
        return sampled_architecture(build_space(config), parameters)
    found = folder / "search" / "student.json"
    if not found.is_file():
        from glioma_nas.stages import search

        unfinished = folder / ".search.partial"
        unfinished.mkdir(parents=True, exist_ok=True)
        inputs = {stage: settings.stage_folder(stage) for stage in ("preprocess", "latency")}
        search.run(StageContext(config, unfinished, inputs, Silent()), split_seed=_split_seed(settings))
        unfinished.rename(folder / "search")
    return Architecture.load(found)


def sampled_architecture(space: Any, parameters: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a sample that an NNI tuner drew.

    Raises:
        ConfigError: A choice of the space is missing from the sample, or is none of the space's.
    """
    from nni.mutable import CategoricalMultiple

    mutables = space.simplify()
    if set(parameters) != set(mutables):
        odd = sorted(set(parameters) ^ set(mutables))
        raise ConfigError(
            f"the sample does not fit the search space '{type(space).__name__}': {odd[0]} is in one of them only; "
            "write the experiment again with `glioma-nas nni config`"
        )
    sample = {
        label: [value] if isinstance(mutables[label], CategoricalMultiple) else value
        for label, value in parameters.items()
    }
    for label, mutable in mutables.items():
        if (problem := mutable.check_contains(sample)) is not None:
            raise ConfigError(f"choice '{label}' = {parameters[label]!r}: {problem}")
    architecture: Architecture = space.architecture(sample)
    return architecture


def _measured(
    settings: TrialSettings, config: RunConfig, architecture: Architecture, folder: Path, show: Shown
) -> TrialResult:
    known = folder / RESULT_FILE
    if known.is_file():
        return TrialResult(**read_json(known))
    teacher: nn.Module | None = None
    if settings.distil:
        with show("teacher"):
            teacher = _teacher(settings, config, folder)
    seed = derive_seed(config.seed, "trial")
    with isolated_torch_rng(seed, "initial weights"):
        network: nn.Module = build_space(config).derive(architecture)
    with show("train"):
        evaluator = _train(settings, config, network, folder / TRAIN_FOLDER / "student", seed=seed, teacher=teacher)
    network = network.to(config.device).eval()
    prepared = settings.stage_folder("preprocess")
    cohort = PreparedCohort.load(prepared)
    halves = {"trained": evaluator.training_patients, "measured": evaluator.validation_patients}
    write_json(folder / PATIENTS_FILE, halves)
    cases = [cohort.cases[case_id] for case_id in cohort.folds.train(FOLD)]
    cases = [case for case in cases if case.patient_id in halves["measured"] and case.mask() is not None]
    dice, distance_mm = overlap(network, config, cases)
    auc = {
        marker: marker_auc(
            config,
            marker,
            network,
            prepared,
            cases,
            tuple(halves["trained"]),
            # The experiment's, not the trial's: trials must differ by their masks, not by their classifiers' luck.
            seed=settings.config["seed"],
            required=settings.marker_weight > 0,
        )
        if marker in settings.markers
        else None
        for marker in MARKERS
    }
    result = TrialResult(
        dice=dice,
        hd95_mm=distance_mm,
        **speed(network, config),
        auc_idh=auc["idh"],
        auc_ki67=auc["ki67"],
        fold=FOLD,
        seed=config.seed,
    )
    write_json(known, asdict(result))
    shutil.rmtree(folder / TRAIN_FOLDER)
    return result


def _split_seed(settings: TrialSettings) -> int:
    """Return the halves' seed, the experiment's: a tuner that varies the trial's must not find the easiest patients."""
    return derive_seed(settings.config["seed"], "trial")


def _teacher(settings: TrialSettings, config: RunConfig, folder: Path) -> nn.Module:
    """Train the teacher that the trial's search found, or take it from an attempt that was interrupted later."""
    train_folder = folder / TRAIN_FOLDER
    weights = train_folder / f"fold{FOLD}" / "teacher" / WEIGHTS_FILE
    if not weights.is_file():
        seed = derive_seed(config.seed, "trial", "teacher")
        with isolated_torch_rng(seed, "initial weights"):
            network = build_network(config, folder / "search", "teacher")
        _train(settings, config, network, weights.parent, seed=seed)
        save_weights(network, weights)
    return load_network(config, folder / "search", train_folder, FOLD, "teacher")


def _train(
    settings: TrialSettings,
    config: RunConfig,
    network: nn.Module,
    folder: Path,
    *,
    seed: int,
    teacher: nn.Module | None = None,
) -> Any:
    """Train a network as the train stage does, on the first half, and return its evaluator."""
    prepared = settings.stage_folder("preprocess")
    evaluator = registry.evaluators.get("segmentation")(
        str(prepared),
        config.cohort.channels,
        folder=str(folder),
        split="trial",
        fold=FOLD,
        **training_recipe(config),
        seed=seed,
        split_seed=_split_seed(settings),
        # As in the search stage, so that both halve the patients alike.
        strata=marker_strata(config, prepared) if settings.marker_weight > 0 else None,
        teacher=teacher,
        label="train",
    )
    evaluator.evaluate(network)
    return evaluator


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one process at a time work in ``folder``; a second trial with the same parameters waits for the first."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
