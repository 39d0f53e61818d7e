"""The NNI evaluator that trains and scores a segmentation network on prepared slices.

It is an NNI Lightning evaluator, so one-shot strategies (ours and NNI's) can take its training apart, and multi-trial
strategies can call `evaluate` on a frozen model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import nni
import torch
from nni.nas.evaluator.pytorch import DataLoader, Lightning, LightningModule
from torch import Tensor, nn

from glioma_nas.errors import CohortError, ConfigError
from glioma_nas.files import read_json, write_json
from glioma_nas.losses import distillation_loss, segmentation_loss
from glioma_nas.nni_bridge import current_sample, in_trial, sample_key
from glioma_nas.prepared import PreparedCase, PreparedCohort
from glioma_nas.progress import Progress
from glioma_nas.registry import evaluators
from glioma_nas.seeding import derive_seed, isolated_torch_rng, numpy_generator
from glioma_nas.slices import EpochSampler, SliceDataset
from glioma_nas.training import (
    LAST_CHECKPOINT,
    FiniteGuard,
    history_of,
    interruptible,
    make_trainer,
    resume_arguments,
)

POLY_POWER = 0.9
EXPONENTIAL_DECAY = 0.978

TRIALS_FOLDER = "trials"
TRIAL_RESULT = "result.json"


class SegmentationModule(LightningModule):
    """Training recipe of a segmentation network: loss, distillation, SGD with momentum and a falling learning rate.

    Args:
        loss: Name of a loss in `glioma_nas.losses`.
        auxiliary_weight: Weight of the single-scale logits; see `segmentation_loss`.
        learning_rate: First learning rate of SGD (momentum 0.9).
        weight_decay: L2 penalty of SGD.
        epochs: Epochs the schedule spans.
        schedule: ``poly`` falls to zero as (1 - epoch/epochs)^0.9; ``exponential`` multiplies by 0.978 each epoch.
        teacher: Trained network to distil from, in evaluation mode; none for training from labels only.
        kd_weight: Weight of the distillation loss.
        kd_temperature: See `distillation_loss`.
        kd_direction: See `distillation_loss`.
    """

    def __init__(
        self,
        *,
        loss: str,
        auxiliary_weight: float,
        learning_rate: float,
        weight_decay: float,
        epochs: int,
        schedule: str,
        teacher: nn.Module | None = None,
        kd_weight: float = 1.0,
        kd_temperature: float = 1.0,
        kd_direction: str = "teacher_student",
    ) -> None:
        super().__init__()
        if schedule not in ("poly", "exponential"):
            raise ConfigError(f"unknown schedule '{schedule}'; allowed: poly, exponential")
        self.loss = segmentation_loss(loss, auxiliary_weight=auxiliary_weight)
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.epochs = epochs
        self.schedule = schedule
        self.kd_weight = kd_weight
        self.kd_temperature = kd_temperature
        self.kd_direction = kd_direction
        # In a tuple, so that the teacher's weights do not become part of this module's checkpoints.
        self._teacher = (teacher.eval().requires_grad_(False),) if teacher is not None and kd_weight > 0 else ()
        self._guard = FiniteGuard("segmentation training")
        self.latest_loss = math.nan
        self._epoch_losses: list[float] = []

    def forward(self, image: Tensor) -> Any:
        """Run the network; ``image`` is (N, C, H, W) float32."""
        return self.model(image)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor | None:
        """Return the loss of one batch, or None (Lightning skips the step) when it is not finite."""
        loss = self.step_loss(batch)
        if not self._guard.accepts(loss):
            return None
        self.latest_loss = float(loss.detach())
        self._epoch_losses.append(self.latest_loss)
        return loss

    def step_loss(self, batch: Mapping[str, Any]) -> Tensor:
        """Return L_seg + w·KD of one batch, a scalar with gradient."""
        outputs = self.model(batch["image"])
        loss: Tensor = self.loss(outputs, batch["mask"])
        for teacher in self._teacher:
            with torch.no_grad():
                soft_target = teacher.to(batch["image"].device)(batch["image"])
            logits = outputs if isinstance(outputs, Tensor) else outputs["logits"]
            loss = loss + self.kd_weight * distillation_loss(
                logits, soft_target, temperature=self.kd_temperature, direction=self.kd_direction
            )
        return loss

    def configure_optimizers(self) -> Any:
        """Return SGD and a schedule stepped once per epoch."""
        # Architecture parameters of a one-shot strategy live outside the model, so this is W alone.
        optimizer = torch.optim.SGD(
            [parameter for parameter in self.model.parameters() if parameter.requires_grad],
            lr=self.learning_rate,
            momentum=0.9,
            weight_decay=self.weight_decay,
        )

        def factor(epoch: int) -> float:
            if self.schedule == "exponential":
                return EXPONENTIAL_DECAY**epoch
            return float(max(1 - epoch / self.epochs, 0.0) ** POLY_POWER)

        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, factor)]

    def epoch_figures(self) -> dict[str, float]:
        """Return this epoch's mean loss and learning rate, and start the next epoch's mean."""
        optimizer = self.trainer.optimizers[0]
        losses, self._epoch_losses = self._epoch_losses, []
        return {
            "loss": sum(losses) / len(losses) if losses else math.nan,
            "learning_rate": float(optimizer.param_groups[0]["lr"]),
        }

    @torch.no_grad()
    def score(self, model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> float:
        """Return the mean over cases of the Dice coefficient pooled over each case's slices, in [0, 1].

        A case without tumour in the given slices counts only when the network marks something there (Dice 0): its Dice
        is not defined otherwise.

        Args:
            model: Network in evaluation mode; gives logits (N, K, H, W).
            batches: As the loaders of this evaluator yield them.
        """
        device = next(model.parameters()).device
        overlap: dict[str, int] = {}
        total: dict[str, int] = {}
        for batch in batches:
            predicted = model(batch["image"].to(device)).argmax(1).cpu() > 0
            truth = batch["mask"] > 0
            for row, case in enumerate(batch["case"]):
                overlap[case] = overlap.get(case, 0) + int((predicted[row] & truth[row]).sum())
                total[case] = total.get(case, 0) + int(predicted[row].sum()) + int(truth[row].sum())
        dice = [2 * overlap[case] / total[case] for case in overlap if total[case]]
        return sum(dice) / len(dice) if dice else 0.0


def split_training_cases(
    cohort: PreparedCohort, *, fold: int, split: str, seed: int
) -> tuple[list[PreparedCase], list[PreparedCase]]:
    """Return the cases that train and those that validate, by patient; test patients of the fold are in neither.

    Args:
        cohort: The prepared cohort.
        fold: Which fold's training patients.
        split: ``search`` gives two halves (METHOD §3: W and architecture data 1:1); ``train`` gives all and none.
        seed: Seed of the halving.

    Raises:
        ConfigError: Unknown split.
        CohortError: Fewer than two training patients with masks.
    """
    cases = [cohort.cases[case_id] for case_id in cohort.folds.train(fold)]
    cases = [case for case in cases if case.mask() is not None]
    if split == "train":
        if not cases:
            raise CohortError(f"fold {fold}: no training case has a mask; add masks to the sheet")
        return cases, []
    if split != "search":
        raise ConfigError(f"unknown split '{split}'; allowed: search, train")
    patients = sorted({case.patient_id for case in cases})
    if len(patients) < 2:
        raise CohortError(f"fold {fold}: {len(patients)} training patients with masks; searching needs at least 2")
    numpy_generator(seed, "search halves").shuffle(patients)
    first = set(patients[: (len(patients) + 1) // 2])
    return [case for case in cases if case.patient_id in first], [
        case for case in cases if case.patient_id not in first
    ]


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
        split: ``search``: half of the training patients train and the other half scores; ``train``: all of them train.
        fold: Fold whose training patients are used; its test patients are never read.
        epochs: Epochs in total.
        steps_per_epoch: Batches of an epoch; none for one pass over all slices.
        batch_size: Slices of a batch.
        learning_rate: See `SegmentationModule`.
        weight_decay: See `SegmentationModule`.
        loss: See `SegmentationModule`.
        auxiliary_weight: See `SegmentationModule`.
        schedule: See `SegmentationModule`.
        tumour_slice_fraction: Share of drawn slices with tumour.
        augment: Whether training slices are augmented.
        seed: Seed of this training.
        device: See `glioma_nas.training.make_trainer`.
        progress: Where to report.
        label: Name of the progress bar.
        teacher: See `SegmentationModule`.
        kd_weight: See `SegmentationModule`.
        kd_temperature: See `SegmentationModule`.
        kd_direction: See `SegmentationModule`.
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
        loss: str = "focal",
        auxiliary_weight: float = 1.0,
        schedule: str = "exponential",
        tumour_slice_fraction: float = 0.7,
        augment: bool = True,
        seed: int = 0,
        device: str = "cpu",
        progress: Progress | None = None,
        label: str = "training",
        teacher: nn.Module | None = None,
        kd_weight: float = 1.0,
        kd_temperature: float = 1.0,
        kd_direction: str = "teacher_student",
    ) -> None:
        self.seed = derive_seed(seed, "segmentation", split, fold)
        cohort = PreparedCohort.load(Path(prepared))
        training, validation = split_training_cases(cohort, fold=fold, split=split, seed=seed)
        self.training_patients = sorted({case.patient_id for case in training})

        def loader(cases: Sequence[PreparedCase], name: str) -> Any:
            dataset = SliceDataset(cases, tuple(sequences), augment=augment, seed=derive_seed(self.seed, name))
            length = steps_per_epoch * batch_size if steps_per_epoch else None
            sampler = EpochSampler(
                dataset,
                length=length,
                tumour_fraction=tumour_slice_fraction,
                seed=derive_seed(self.seed, name, "order"),
            )
            return DataLoader(dataset, batch_size=batch_size, sampler=sampler, drop_last=len(sampler) > batch_size)

        # Scores are taken on every slice once, as it is, so that they do not depend on any draw.
        self.scoring_loader = None
        if validation:
            plain = SliceDataset(validation, tuple(sequences), augment=False, seed=self.seed)
            self.scoring_loader = DataLoader(plain, batch_size=batch_size)

        self._folder = Path(folder)
        self._network: nn.Module | None = None
        # Kept as recipes: each trial needs a module and a trainer that have not run.
        self._new_module = partial(
            SegmentationModule,
            loss=loss,
            auxiliary_weight=auxiliary_weight,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            epochs=epochs,
            schedule=schedule,
            teacher=teacher,
            kd_weight=kd_weight,
            kd_temperature=kd_temperature,
            kd_direction=kd_direction,
        )
        self._new_trainer = partial(
            make_trainer,
            epochs=epochs,
            seed=self.seed,
            progress=progress,
            label=label,
            device=device,
            gradient_clip=5.0 if split == "train" else None,
            stage=split,
        )
        super().__init__(
            self._new_module(),
            self._new_trainer(self._folder),
            train_dataloaders=loader(training, "train"),
            val_dataloaders=loader(validation, "validation") if validation else None,
            fit_kwargs=resume_arguments(self._folder),
        )

    def evaluate(self, model: nn.Module) -> float | None:
        """Train ``model`` to the last epoch; return its validation Dice, or None for the ``train`` split.

        Reports the Dice to NNI when it runs as a trial.

        Raises:
            RuntimeError: A second network outside a trial: it would continue from the first one's checkpoint.
        """
        sample = current_sample()
        dice = self._evaluate_alone(model) if sample is None else self._evaluate_trial(model, sample)
        if dice is not None and in_trial():
            nni.report_final_result({"default": dice, "dice": dice})
        return dice

    def _evaluate_alone(self, model: nn.Module) -> float | None:
        if self._network is not None and self._network is not model:
            raise RuntimeError("this evaluator has trained another network; make one evaluator for each network")
        self._network = model
        self.module.set_model(model)
        with interruptible(), isolated_torch_rng(self.seed, "fit"):
            # No validation loop inside the training: the score is taken once, at the end.
            self.trainer.fit(self.module, self.train_dataloaders, **self.fit_kwargs)
        return self._dice(self.module, model)

    def _evaluate_trial(self, model: nn.Module, sample: Mapping[str, Any]) -> float | None:
        folder = self._folder / TRIALS_FOLDER / sample_key(sample)
        result = folder / TRIAL_RESULT
        if result.is_file():
            known: float | None = read_json(result)["dice"]
            return known
        module = self._new_module()
        module.set_model(model)
        trainer = self._new_trainer(folder)
        with interruptible(), isolated_torch_rng(self.seed, "fit"):
            trainer.fit(module, self.train_dataloaders, **resume_arguments(folder))
        dice = self._dice(module, model)
        write_json(result, {"dice": dice, "sample": dict(sample)})
        (folder / LAST_CHECKPOINT).unlink(missing_ok=True)  # a trial is not trained further
        return dice

    def _dice(self, module: SegmentationModule, model: nn.Module) -> float | None:
        return None if self.scoring_loader is None else float(module.score(model.eval(), self.scoring_loader))

    def history(self) -> Any:
        """Return the history so far as a data frame, one row for each epoch."""
        return history_of(self.trainer)
