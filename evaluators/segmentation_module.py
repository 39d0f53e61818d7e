"""The training recipe of a segmentation network as a Lightning module, which one-shot strategies can take apart."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from nni.nas.evaluator.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from glioma_nas.compilation import compile_for_training
from glioma_nas.distributed_training import world_size
from glioma_nas.errors import ConfigError, DivergedError
from glioma_nas.losses import LossFunction, distillation_loss, main_logits, segmentation_loss
from glioma_nas.training import EpochClock, FiniteGuard

POLY_POWER = 0.9
EXPONENTIAL_DECAY = 0.978

CHECKPOINTS = ("last", "best")

_STATE_KEY = "segmentation_training"


class SegmentationModule(LightningModule):
    """Training recipe of a segmentation network: loss, distillation, SGD with momentum and a falling learning rate.

    Args:
        loss: See `segmentation_loss`.
        auxiliary_weight: See `segmentation_loss`.
        logit_weights: See `segmentation_loss`.
        learning_rate: First learning rate of SGD (momentum 0.9).
        weight_decay: L2 penalty of SGD.
        epochs: Epochs the schedule spans.
        schedule: ``poly`` falls to zero as (1 - epoch/epochs)^0.9; ``exponential`` multiplies by 0.978 each epoch.
        teacher: Trained network to distil from, in evaluation mode; none for training from labels only.
        kd_weight: Weight of the distillation loss.
        kd_temperature: See `distillation_loss`.
        kd_direction: See `distillation_loss`.
        kd_norm: See `distillation_loss`.
        ema_decay: Decay of an exponential moving average of the weights, taken after every step; what is kept is then
            the average. 0 for none. Polyak & Juditsky, SIAM J. Control Optim. 30, 1992.
        validation: Batches of patients that do not train, scored after every epoch; none for no validation.
        compiled: Whether torch.compile takes the network over, or the name of the backend that it does so with; see
            `compile_for_training`.
        clock: Counts the steps, and may end epochs by time; none for a clock of its own that does not.
    """

    def __init__(
        self,
        *,
        loss: str | LossFunction,
        auxiliary_weight: float,
        learning_rate: float,
        weight_decay: float,
        epochs: int,
        schedule: str,
        teacher: nn.Module | None = None,
        kd_weight: float = 1.0,
        kd_temperature: float = 1.0,
        kd_direction: str = "teacher_student",
        kd_norm: str = "pixel",
        ema_decay: float = 0.0,
        validation: Iterable[Mapping[str, Any]] | None = None,
        compiled: bool | str = False,
        logit_weights: Mapping[str, float] | None = None,
        clock: EpochClock | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= ema_decay < 1:
            raise ConfigError(f"ema_decay is {ema_decay!r}; give a number of at least 0 and less than 1, such as 0.99")
        if schedule not in ("poly", "exponential"):
            raise ConfigError(f"unknown schedule '{schedule}'; allowed: poly, exponential")
        self.loss = segmentation_loss(loss, auxiliary_weight=auxiliary_weight, logit_weights=logit_weights)
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.epochs = epochs
        self.schedule = schedule
        self.kd_weight = kd_weight
        self.kd_temperature = kd_temperature
        self.kd_direction = kd_direction
        self.kd_norm = kd_norm
        self._ema_decay = ema_decay
        self._average: tuple[AveragedModel, ...] = ()
        self._validation = validation
        self._compiled = compiled
        self._clock = clock or EpochClock()
        self._validation_dice: dict[int, float] = {}
        self._best: dict[str, Tensor] | None = None
        # In a tuple, so that the teacher's weights do not become part of this module's checkpoints.
        self._teacher = (teacher.eval().requires_grad_(False),) if teacher is not None and kd_weight > 0 else ()
        self._guard = FiniteGuard("segmentation training")
        self.latest_loss = math.nan
        self.latest_dice = math.nan
        self._epoch_losses: list[float] = []
        self._epoch_dice: list[float] = []

    def forward(self, image: Tensor) -> Any:
        """Run the network; ``image`` is (N, C, H, W) float32."""
        return self.model(image)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor | None:
        """Return the loss of one batch, or None (Lightning skips the step) when it is not finite."""
        loss = self.step_loss(batch)
        # Where several processes train together, all must take the step or none: their common gradient decides.
        if world_size() == 1 and not self._guard.accepts(loss):
            return None
        self.latest_loss = float(loss.detach())
        self._epoch_losses.append(self.latest_loss)
        self._epoch_dice.append(self.latest_dice)
        return loss

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """Return -1, at which Lightning goes on to the end of the epoch, when the epoch's time is over."""
        return None if self._clock.allows(batch_idx) else -1

    def on_train_epoch_end(self) -> None:
        """Advance the learning rate after an epoch that the clock ended: nobody else does then."""
        if self._clock.cut:
            for config in self.trainer.lr_scheduler_configs:
                while config.scheduler.last_epoch <= self.trainer.current_epoch:
                    config.scheduler.step()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Leave the weights as they are when a gradient is not finite, although the loss was; called by Lightning."""
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        if gradients and not self._guard.accepts(torch.nn.utils.get_total_norm(gradients), "gradient"):
            optimizer.zero_grad(set_to_none=True)  # without gradients, SGD touches neither weights nor momentum

    def setup(self, stage: str) -> None:
        """Make the average of the weights, before a checkpoint may fill it, and compile; called by Lightning."""
        if self._ema_decay > 0 and not self._average:
            average = AveragedModel(
                self.model, multi_avg_fn=get_ema_multi_avg_fn(self._ema_decay), use_buffers=True
            ).requires_grad_(False)
            # In a tuple, for it is saved by hand and has no optimiser.
            self._average = (average,)
        if self._compiled and stage == "fit":
            compile_for_training(self.model, "inductor" if self._compiled is True else self._compiled)

    def on_fit_start(self) -> None:
        """See Lightning."""
        for average in self._average:
            average.to(self.device)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """See Lightning."""
        for average in self._average:
            average.update_parameters(self.model)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what Lightning does not know of: the guard, the average and the best epoch so far."""
        checkpoint[_STATE_KEY] = {
            "refused_in_a_row": dict(self._guard.in_a_row),
            "average": [average.state_dict() for average in self._average],
            "validation_dice": dict(self._validation_dice),
            "best": self._best,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put it back."""
        state = checkpoint[_STATE_KEY]
        self._guard.in_a_row = dict(state["refused_in_a_row"])
        for average, saved in zip(self._average, state["average"], strict=True):
            average.load_state_dict(saved)
        self._validation_dice = dict(state["validation_dice"])
        self._best = state["best"]

    def keep(self, which: str) -> dict[str, Any]:
        """Put the weights that training ends with into the network; called once, after the last epoch.

        Args:
            which: ``last`` epoch, or the ``best`` one by validation Dice.

        Returns:
            Which epoch (from 0) was kept, and the validation Dice of the last and of the best one; none without
            validation. The best Dice is an optimistic figure: it was chosen for being the highest.

        Raises:
            ConfigError: The best is asked for without validation.
        """
        if which == "best":
            if self._best is None:
                raise ConfigError("checkpoint 'best' needs validation patients; set train.validation_fraction above 0")
            self.model.load_state_dict(self._best)
        else:
            for average in self._average:
                self.model.load_state_dict(average.module.state_dict())
        dice = self._validation_dice
        best_epoch = max(dice, key=lambda epoch: dice[epoch]) if dice else None
        return {
            "checkpoint": which,
            "epoch": best_epoch if which == "best" else self.epochs - 1,
            "averaged": bool(self._average),
            "last_validation_dice": dice.get(self.epochs - 1),
            "best_epoch": best_epoch,
            "best_validation_dice": None if best_epoch is None else dice[best_epoch],
        }

    def _validate(self) -> float:
        """Score the network as it would be kept now, and remember it if it is the best so far."""
        assert self._validation is not None
        network: nn.Module = self._average[0].module if self._average else self.model
        dice = self.score(network.eval(), self._validation)
        network.train()
        if dice > max(self._validation_dice.values(), default=-math.inf):
            self._best = {name: value.detach().cpu().clone() for name, value in network.state_dict().items()}
        self._validation_dice[self.trainer.current_epoch] = dice
        return dice

    def step_loss(self, batch: Mapping[str, Any]) -> Tensor:
        """Return L_seg + w·KD of one batch, a scalar with gradient."""
        outputs = self.model(batch["image"])
        self.latest_dice = batch_dice(main_logits(outputs), batch["mask"])
        loss: Tensor = self.loss(outputs, batch["mask"])
        for teacher in self._teacher:
            with torch.no_grad():
                soft_target = teacher.to(batch["image"].device)(batch["image"])
            logits = main_logits(outputs)
            loss = loss + self.kd_weight * distillation_loss(
                logits,
                soft_target,
                temperature=self.kd_temperature,
                direction=self.kd_direction,
                norm=self.kd_norm,
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
        """Return this epoch's mean loss and Dice over its batches, and start the next epoch's mean."""
        optimizer = self.trainer.optimizers[0]
        losses, self._epoch_losses = self._epoch_losses, []
        dice, self._epoch_dice = self._epoch_dice, []
        figures = {
            "loss": sum(losses) / len(losses) if losses else math.nan,
            "batch_dice": sum(dice) / len(dice) if dice else math.nan,
            "skipped_steps": self._guard.take_skipped(),
            "learning_rate": float(optimizer.param_groups[0]["lr"]),
        }
        if self._validation is not None:
            figures["validation_dice"] = self._validate()
        return figures

    @torch.no_grad()
    def score(self, model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> float:
        """Return the mean over cases of the Dice coefficient pooled over each case's slices, in [0, 1].

        A case without tumour in the given slices counts only when the network marks something there (Dice 0): its Dice
        is not defined otherwise.

        Args:
            model: Network in evaluation mode; gives logits (N, K, H, W).
            batches: As the loaders of this evaluator yield them.

        Raises:
            DivergedError: The network gives logits that are no finite numbers, of which an outline means nothing.
        """
        device = next(model.parameters()).device
        overlap: dict[str, int] = {}
        total: dict[str, int] = {}
        for batch in batches:
            logits = model(batch["image"].to(device))
            if not torch.isfinite(logits).all():
                raise DivergedError("the network's outputs are no finite numbers, so they cannot be scored")
            predicted = logits.argmax(1).cpu() > 0
            truth = batch["mask"] > 0
            for row, case in enumerate(batch["case"]):
                overlap[case] = overlap.get(case, 0) + int((predicted[row] & truth[row]).sum())
                total[case] = total.get(case, 0) + int(predicted[row].sum()) + int(truth[row].sum())
        dice = [2 * overlap[case] / total[case] for case in overlap if total[case]]
        return sum(dice) / len(dice) if dice else 0.0


@torch.no_grad()
def batch_dice(logits: Tensor, mask: Tensor) -> float:
    """Return the Dice coefficient of tumour pooled over a batch, in [0, 1]; 1 when neither holds any.

    It says how training goes. What a network is worth is scored by case, in evaluation mode.

    Args:
        logits: (N, K, H, W), class 0 is background.
        mask: (N, H, W), int64, 0 is background.
    """
    predicted, truth = logits.argmax(1) > 0, mask > 0
    total = int(predicted.sum()) + int(truth.sum())
    return 2 * int((predicted & truth).sum()) / total if total else 1.0
