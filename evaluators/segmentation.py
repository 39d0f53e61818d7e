"""The NNI evaluator that trains and scores a segmentation network on prepared slices.

It is an NNI Lightning evaluator, so one-shot strategies (ours and NNI's) can take its training apart, and multi-trial
strategies can call `evaluate` on a frozen model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import nni
from nni.nas.evaluator.pytorch import DataLoader, Lightning
from torch import nn

from glioma_nas.config import AugmentationConfig
from glioma_nas.distributed_training import rank, share_of_batch, world_size
from glioma_nas.downstream import DownstreamScore
from glioma_nas.errors import CohortError, ConfigError, did_you_mean
from glioma_nas.evaluators.segmentation_module import CHECKPOINTS, SegmentationModule
from glioma_nas.files import read_json, write_json
from glioma_nas.losses import LossFunction
from glioma_nas.nni_bridge import current_sample, in_trial, sample_key
from glioma_nas.prepared import PreparedCase, PreparedCohort
from glioma_nas.progress import Progress
from glioma_nas.registry import evaluators
from glioma_nas.seeding import derive_seed, isolated_torch_rng, numpy_generator
from glioma_nas.slices import EpochSampler, SliceDataset
from glioma_nas.training import (
    LAST_CHECKPOINT,
    EpochClock,
    history_of,
    interruptible,
    make_trainer,
    require_finite_weights,
    resume_arguments,
)

GRADIENT_CLIP = 5.0
"""Largest norm of a gradient (METHOD's schedule); one-shot strategies clip by themselves."""

TRIALS_FOLDER = "trials"
TRIAL_RESULT = "result.json"


def split_training_cases(
    cohort: PreparedCohort,
    *,
    fold: int,
    split: str,
    seed: int,
    validation_fraction: float = 0.0,
    strata: Mapping[str, str] | None = None,
) -> tuple[list[PreparedCase], list[PreparedCase]]:
    """Return the cases that train and those that validate, by patient; test patients of the fold are in neither.

    Args:
        cohort: The prepared cohort.
        fold: Which fold's training patients.
        split: ``search`` gives two halves (METHOD §3: W and architecture data 1:1), ``trial`` the same ones; ``train``
            gives all and none, or what ``validation_fraction`` says.
        seed: Seed of the halving.
        validation_fraction: Share of the training patients, in [0, 1), that validates with ``train``. Which ones they
            are depends on the fold alone, so that all networks and seeds of a fold have the same.
        strata: Patient → stratum; ``search`` deals each stratum evenly to both halves.

    Raises:
        ConfigError: Unknown split, or an impossible fraction.
        CohortError: Fewer than two training patients with masks.
    """
    cases = [cohort.cases[case_id] for case_id in cohort.folds.train(fold)]
    cases = [case for case in cases if case.mask() is not None]
    if split == "train":
        if not cases:
            raise CohortError(f"fold {fold}: no training case has a mask; add masks to the sheet")
        return _hold_out(cases, validation_fraction, fold) if validation_fraction else (cases, [])
    if split not in ("search", "trial"):
        raise ConfigError(f"unknown split '{split}'; allowed: search, train, trial")
    patients = sorted({case.patient_id for case in cases})
    if len(patients) < 2:
        raise CohortError(f"fold {fold}: {len(patients)} training patients with masks; searching needs at least 2")
    numpy_generator(seed, "search halves").shuffle(patients)
    first = set(patients[: (len(patients) + 1) // 2])
    if strata is not None:
        first = set(sorted(patients, key=lambda patient: strata.get(patient, ""))[::2])  # stable: as drawn within each
    return [case for case in cases if case.patient_id in first], [
        case for case in cases if case.patient_id not in first
    ]


def _hold_out(
    cases: Sequence[PreparedCase], fraction: float, fold: int
) -> tuple[list[PreparedCase], list[PreparedCase]]:
    if not 0 < fraction < 1:
        raise ConfigError(f"validation_fraction is {fraction!r}; give a share of at least 0 and less than 1")
    patients = sorted({case.patient_id for case in cases})
    if len(patients) < 2:
        raise CohortError(f"fold {fold}: {len(patients)} training patient with a mask; validation needs at least 2")
    numpy_generator(0, "validation part", fold).shuffle(patients)
    n_held = min(max(1, round(fraction * len(patients))), len(patients) - 1)
    held = set(patients[:n_held])
    return [case for case in cases if case.patient_id not in held], [case for case in cases if case.patient_id in held]


@evaluators.register("segmentation")
@nni.trace
class SegmentationEvaluator(Lightning):
    """Train a segmentation network on one fold's training patients and score it by Dice.

    As a trial of a multi-trial strategy every network has a folder of its own, ``folder/trials/<key of its sample>``,
    with its result, so that a search that is run again repeats no finished trial. Outside a trial an evaluator trains
    one network, in ``folder`` itself.

    Args:
        prepared: Folder of the preprocess stage.
        sequences: Input channels, in order.
        folder: Where checkpoints and history go.
        split: ``search``: half of the training patients train and the other half scores; ``train``: all of them train;
            ``trial``: half of them train, as with ``train``, and whoever asked measures the network on the other half.
        fold: Fold whose training patients are used; its test patients are never read.
        epochs: Epochs in total.
        steps_per_epoch: Batches of an epoch; none for one pass over all slices.
        batch_size: Slices of a batch.
        learning_rate: See `SegmentationModule`.
        weight_decay: See `SegmentationModule`.
        loss: See `SegmentationModule`.
        auxiliary_weight: See `SegmentationModule`.
        logit_weights: See `SegmentationModule`.
        schedule: See `SegmentationModule`.
        tumour_slice_fraction: Share of drawn slices with tumour.
        augment: Whether training slices are augmented.
        augmentation: How, as keyword arguments of `glioma_nas.config.AugmentationConfig`.
        seed: Seed of this training.
        split_seed: Seed of the halves of ``search``, the same for networks that are compared; none for ``seed``.
        device: See `glioma_nas.training.make_trainer`.
        progress: Where to report.
        label: Name of the progress bar.
        teacher: See `SegmentationModule`.
        kd_weight: See `SegmentationModule`.
        kd_temperature: See `SegmentationModule`.
        kd_direction: See `SegmentationModule`.
        kd_norm: See `SegmentationModule`.
        ema_decay: See `SegmentationModule`.
        validation_fraction: See `split_training_cases`; with ``train`` only.
        checkpoint: Which weights `evaluate` leaves in the network: those of the ``last`` epoch, or the ``best`` by
            validation Dice.
        precision: See `glioma_nas.training.make_trainer`.
        compiled: See `SegmentationModule`.
        tensorboard: See `glioma_nas.training.make_trainer`.
        downstream: Makes the score of the markers that networks are ranked by too, from ``network_patients`` and
            ``case_ids``: it is told the patients that train, and the cases of those that validate. For ``search``.
        strata: See `split_training_cases`.
        epoch_s: Wall time of an epoch in seconds, for networks compared at equal time: it ends an epoch that
            ``steps_per_epoch`` has not. What is found then depends on the machine's speed.
    """

    def __init__(
        self,
        prepared: str,
        sequences: Sequence[str],
        *,
        folder: str,
        split: str = "search",
        fold: int = 0,
        epochs: int = 1,
        steps_per_epoch: int | None = None,
        batch_size: int = 8,
        learning_rate: float = 0.02,
        weight_decay: float = 5e-4,
        loss: str | LossFunction = "focal",
        auxiliary_weight: float = 1.0,
        logit_weights: Mapping[str, float] | None = None,
        schedule: str = "exponential",
        tumour_slice_fraction: float = 0.7,
        augment: bool = True,
        augmentation: Mapping[str, Any] | None = None,
        seed: int = 0,
        split_seed: int | None = None,
        device: str = "cpu",
        progress: Progress | None = None,
        label: str = "training",
        teacher: nn.Module | None = None,
        kd_weight: float = 1.0,
        kd_temperature: float = 1.0,
        kd_direction: str = "teacher_student",
        kd_norm: str = "pixel",
        ema_decay: float = 0.0,
        validation_fraction: float = 0.0,
        checkpoint: str = "last",
        precision: str = "32-true",
        compiled: bool | str = False,
        tensorboard: bool = False,
        downstream: Callable[..., DownstreamScore] | None = None,
        strata: Mapping[str, str] | None = None,
        epoch_s: float | None = None,
    ) -> None:
        if downstream is not None and split != "search":
            raise ConfigError("networks are ranked by markers while searching only; leave downstream out")
        if checkpoint not in CHECKPOINTS:
            raise ConfigError(f"unknown checkpoint '{checkpoint}': {did_you_mean(checkpoint, CHECKPOINTS)}")
        if checkpoint == "best" and (split != "train" or not validation_fraction):
            raise ConfigError("checkpoint 'best' needs validation patients; set train.validation_fraction above 0")
        self.seed = derive_seed(seed, "segmentation", split, fold)
        cohort = PreparedCohort.load(Path(prepared))
        split_seed = seed if split_seed is None else split_seed
        training, validation = split_training_cases(
            cohort, fold=fold, split=split, seed=split_seed, validation_fraction=validation_fraction, strata=strata
        )
        self.validation_patients = sorted({case.patient_id for case in validation})
        self.training_patients = sorted({case.patient_id for case in training})
        self.downstream: DownstreamScore | None = None
        if downstream is not None:
            self.downstream = downstream(
                network_patients=self.training_patients, case_ids=[case.case_id for case in validation]
            )

        def loader(cases: Sequence[PreparedCase], name: str) -> Any:
            dataset = SliceDataset(
                cases,
                tuple(sequences),
                augment=augment,
                augmentation=AugmentationConfig(**(augmentation or {})),
                seed=derive_seed(self.seed, name),
            )
            length = steps_per_epoch * batch_size if steps_per_epoch else None
            sampler = EpochSampler(
                dataset,
                length=length,
                tumour_fraction=tumour_slice_fraction,
                seed=derive_seed(self.seed, name, "order"),
                share=(rank(), world_size()),
            )
            size = share_of_batch(batch_size)
            return DataLoader(dataset, batch_size=size, sampler=sampler, drop_last=len(sampler) > size)

        # Scores are taken on every slice once, as it is, so that they do not depend on any draw.
        self.scoring_loader = None
        if validation and split != "trial":
            plain = SliceDataset(validation, tuple(sequences), augment=False, seed=self.seed)
            self.scoring_loader = DataLoader(plain, batch_size=batch_size)

        self.progress = progress  # for what a strategy does after the training
        self._folder = Path(folder)
        self._network: nn.Module | None = None
        self.clock = EpochClock(epoch_s)  # one for all trials
        # Kept as recipes: each trial needs a module and a trainer that have not run.
        self._new_module = partial(
            SegmentationModule,
            loss=loss,
            auxiliary_weight=auxiliary_weight,
            logit_weights=logit_weights,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            epochs=epochs,
            schedule=schedule,
            teacher=teacher,
            kd_weight=kd_weight,
            kd_temperature=kd_temperature,
            kd_direction=kd_direction,
            kd_norm=kd_norm,
            ema_decay=ema_decay,
            validation=self.scoring_loader if split == "train" else None,
            compiled=compiled,
            clock=self.clock,
        )
        self._checkpoint = None if split == "search" else checkpoint
        self.kept: dict[str, Any] = {}
        self._new_trainer = partial(
            make_trainer,
            epochs=epochs,
            seed=self.seed,
            progress=progress,
            label=label,
            device=device,
            stage="search" if split == "search" else "train",
            precision=precision,
            tensorboard=tensorboard,
        )
        super().__init__(
            self._new_module(),
            self._new_trainer(self._folder),
            train_dataloaders=loader(training, "train"),
            val_dataloaders=loader(validation, "validation") if validation else None,
            fit_kwargs=resume_arguments(self._folder),
        )

    def evaluate(self, model: nn.Module) -> float | None:
        """Train ``model`` to the last epoch; return its validation Dice, or None when no patient validates.

        With ``downstream`` a trial of a strategy returns the accuracy that counts the markers' AUC in. With ``train``
        the attribute ``kept`` then says which weights the network holds; see `SegmentationModule.keep`.

        Reports the Dice to NNI when it runs as a trial.

        Raises:
            RuntimeError: A second network outside a trial: it would continue from the first one's checkpoint.
        """
        sample = current_sample()
        outcome = self._evaluate_alone(model) if sample is None else self._evaluate_trial(model, sample)
        accuracy: float | None = outcome["accuracy"]
        if accuracy is not None and in_trial():
            nni.report_final_result({"default": accuracy, "dice": outcome["dice"], **outcome["auc"]})
        return accuracy

    def _evaluate_alone(self, model: nn.Module) -> dict[str, Any]:
        if self._network is not None and self._network is not model:
            raise RuntimeError("this evaluator has trained another network; make one evaluator for each network")
        self._network = model
        self.module.set_model(model)
        # Only now: Lightning refuses to clip where a one-shot strategy steps by itself.
        self.trainer.gradient_clip_val = GRADIENT_CLIP
        with interruptible(), isolated_torch_rng(self.seed, "fit"):
            # No validation loop inside the training: the score is taken once, at the end.
            self.trainer.fit(self.module, self.train_dataloaders, **self.fit_kwargs)
        if self._checkpoint is not None:
            self.kept = self.module.keep(self._checkpoint)
        require_finite_weights(model, "segmentation training")
        dice = self._dice(self.module, model)
        return {"dice": dice, "accuracy": dice, "auc": {}}

    def _evaluate_trial(self, model: nn.Module, sample: Mapping[str, Any]) -> dict[str, Any]:
        folder = self._folder / TRIALS_FOLDER / sample_key(sample)
        result = folder / TRIAL_RESULT
        if result.is_file():
            return dict(read_json(result))
        module = self._new_module()
        module.set_model(model)
        trainer = self._new_trainer(folder, gradient_clip=GRADIENT_CLIP)
        with interruptible(), isolated_torch_rng(self.seed, "fit"):
            trainer.fit(module, self.train_dataloaders, **resume_arguments(folder))
        require_finite_weights(model, "segmentation training")
        dice = self._dice(module, model)
        outcome: dict[str, Any] = {"dice": dice, "accuracy": dice, "auc": {}}
        if self.downstream is not None and dice is not None:
            aucs = self.downstream.aucs(model)
            outcome |= {
                "accuracy": self.downstream.accuracy(dice, aucs),
                "auc": {f"auc_{marker}": value for marker, value in aucs.items()},
            }
        write_json(result, {**outcome, "sample": dict(sample)})
        (folder / LAST_CHECKPOINT).unlink(missing_ok=True)  # a trial is not trained further
        return outcome

    def _dice(self, module: SegmentationModule, model: nn.Module) -> float | None:
        return None if self.scoring_loader is None else float(module.score(model.eval(), self.scoring_loader))

    def history(self) -> Any:
        """Return the history so far as a data frame, one row for each epoch."""
        return history_of(self.trainer)
