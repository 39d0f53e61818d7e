"""What one trial does: find or take an architecture, train it, measure it, report it.

A co-search trial runs the search stage with its hyper-parameters and goes on with the student; an architecture trial
takes the choices it was given. Either way the network is trained from scratch on one half of fold 0's training patients
and measured on the other half: the fold's test patients are never read, so that ranking trials does not use them up.
"""

from __future__ import annotations

import fcntl
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from glioma_nas import registry
from glioma_nas.architecture import Architecture
from glioma_nas.config import RunConfig
from glioma_nas.epoch_metrics import listening
from glioma_nas.errors import ConfigError, LabelError
from glioma_nas.files import read_json, write_json
from glioma_nas.marker_evaluator import build_evaluator
from glioma_nas.marker_study import MarkerStudy
from glioma_nas.nni_experiments.trial_channel import TrialChannel
from glioma_nas.nni_experiments.trial_metrics import TrialResult, intermediate_metrics
from glioma_nas.nni_experiments.trial_pages import TrialBoard, write_trial_page
from glioma_nas.nni_experiments.trial_settings import ARCHITECTURE, CO_SEARCH, TrialSettings, load_trial_settings
from glioma_nas.pipeline import StageContext
from glioma_nas.prepared import PreparedCase, PreparedCohort
from glioma_nas.progress import Silent
from glioma_nas.seeding import derive_seed, isolated_torch_rng
from glioma_nas.segmentation_inference import THRESHOLD, predict_probability
from glioma_nas.segmentation_metrics import dice_coefficient, hd95_mm
from glioma_nas.space_building import build_space

RESULT_FILE = "result.json"
FOLD = 0
STAGES = ("search", "train")
"""What a trial trains, in order: the supernet, then the network that was found. Classifiers' epochs are not shown."""


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
            board.add_epoch(STAGES[int(epoch["stage"])], step, epoch)
        with _reporting(channel, board, "search"):
            architecture = _architecture(settings, config, parameters, folder)
        with _reporting(channel, board, "train"):
            result = _measured(settings, config, architecture, folder)
        metrics = result.final_metrics(
            target_latency_ms=settings.target_latency_ms, target_exponents=settings.target_exponents
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
def _reporting(channel: TrialChannel, board: TrialBoard, stage: str) -> Iterator[None]:
    def report(published_by: str, epoch: int, figures: Mapping[str, float]) -> None:
        if published_by in STAGES:
            metrics = intermediate_metrics(STAGES.index(stage), epoch, figures)
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

        partial = folder / ".search.partial"
        partial.mkdir(parents=True, exist_ok=True)
        inputs = {stage: settings.stage_folder(stage) for stage in ("preprocess", "latency")}
        search.run(StageContext(config, partial, inputs, Silent()))
        partial.rename(folder / "search")
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


def _measured(settings: TrialSettings, config: RunConfig, architecture: Architecture, folder: Path) -> TrialResult:
    known = folder / RESULT_FILE
    if known.is_file():
        return TrialResult(**read_json(known))
    seed = derive_seed(config.seed, "trial")
    with isolated_torch_rng(seed, "initial weights"):
        network: nn.Module = build_space(config).derive(architecture)
    prepared = settings.stage_folder("preprocess")
    train = config.train
    evaluator = registry.evaluators.get("segmentation")(
        str(prepared),
        config.cohort.channels,
        folder=str(folder / "train"),
        split="search",
        fold=FOLD,
        epochs=train.epochs,
        steps_per_epoch=train.steps_per_epoch,
        batch_size=train.batch_size,
        learning_rate=train.learning_rate,
        weight_decay=train.weight_decay,
        loss=train.loss,
        auxiliary_weight=0.4,
        schedule="poly",
        tumour_slice_fraction=train.tumour_slice_fraction,
        augmentation=config.augmentation.model_dump(),
        augment=train.augment,
        seed=seed,
        # The experiment's, not the trial's: a tuner that varies the seed must not find the easiest patients.
        split_seed=derive_seed(settings.config["seed"], "trial"),
        device=config.device,
        label="train",
    )
    evaluator.evaluate(network)
    network = network.to(config.device).eval()
    cohort = PreparedCohort.load(prepared)
    seen = set(evaluator.training_patients)
    cases = [cohort.cases[case_id] for case_id in cohort.folds.train(FOLD)]
    cases = [case for case in cases if case.patient_id not in seen and case.mask() is not None]
    dice, distance_mm = _overlap(network, config, cases)
    auc = {
        marker: _auc(config, marker, network, prepared, cases, tuple(sorted(seen)))
        if marker in settings.markers
        else None
        for marker in ("idh", "ki67")
    }
    result = TrialResult(
        dice=dice,
        hd95_mm=distance_mm,
        **_speed(network, config),
        auc_idh=auc["idh"],
        auc_ki67=auc["ki67"],
        fold=FOLD,
        seed=config.seed,
    )
    write_json(known, asdict(result))
    shutil.rmtree(folder / "train")
    return result


def _overlap(network: nn.Module, config: RunConfig, cases: list[PreparedCase]) -> tuple[float, float | None]:
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


def _speed(network: nn.Module, config: RunConfig) -> dict[str, float]:
    from glioma_nas.stages.export import measure_networks

    row = measure_networks({"student": network.cpu()}, config, Silent())["networks"]["student"]
    return {
        "latency_ms": row["median_ms"],
        "latency_p95_ms": row["p95_ms"],
        "macs_g": row["macs_g"],
        "params_m": row["params_m"],
    }


def _auc(
    config: RunConfig,
    marker: str,
    network: nn.Module,
    prepared: Path,
    cases: list[PreparedCase],
    seen: tuple[str, ...],
) -> float | None:
    from glioma_nas.stages.classify import classifier_settings

    rule = config.classify.markers[marker]
    study = MarkerStudy(
        preprocess_folder=prepared,
        marker=marker,
        config=rule,
        sheet=config.cohort.sheet,
        network_sequences=config.cohort.channels,
        network_patients=seen,
        case_ids=tuple(case.case_id for case in cases),
        seed=config.seed,
        device=config.device,
        missing_sequence="zero" if config.cohort.feeds_zeros else config.cohort.missing_sequence,
    )
    evaluator = build_evaluator(rule.classifier, classifier_settings(config.classify, rule), rule.options, study=study)
    try:
        return evaluator.evaluate(network.to(config.device))
    except LabelError as err:
        # To stderr, which the web UI shows beside the trial; NNI sends log records to a file of its own.
        sys.stderr.write(f"marker '{marker}' not measured: {err}\n")
        return None


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one process at a time work in ``folder``; a second trial with the same parameters waits for the first."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
