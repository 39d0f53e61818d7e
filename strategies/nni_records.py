"""What NNI's one-shot modules lack beside the search itself: guards against steps that must not be taken, and records.

`StepRecorder` watches every step, `EpochRecord` gives our trainer the figures, probabilities and live row it asks for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from glioma_nas.training import FiniteGuard

_STATE_KEY = "refused_in_a_row"


class StepRecorder:
    """Stand between an NNI one-shot module and the evaluator's ``training_step``: keep the losses, refuse bad steps.

    A step whose loss or gradient is not finite leaves the parameters, momentum and all, as they were.

    Args:
        training_module: The evaluator's module.
        alternates: Whether even steps are the architecture's and odd ones the weights', as in DARTS.
        manual: Whether NNI back-propagates by itself; it then takes no ``None`` for a step to be skipped.
    """

    def __init__(self, training_module: Any, *, alternates: bool, manual: bool) -> None:
        self._module = training_module
        self._step = training_module.training_step
        self._alternates = alternates
        self._manual = manual
        self._losses: dict[str, list[float]] = {}
        self._refused = False
        self.guard = FiniteGuard("search")
        self.latest_loss = math.nan

    def __call__(self, batch: Any, batch_idx: int) -> Any:
        """Run the step and note its loss."""
        outcome = self._step(batch, batch_idx)
        loss = outcome["loss"] if isinstance(outcome, Mapping) else outcome
        self._refused = not self.guard.accepts(None if loss is None else loss.detach())
        if self._refused:
            return self._no_gradient() if self._manual else None
        for_architecture = self._alternates and batch_idx % 2 == 0
        name = "loss_architecture_student" if for_architecture else "loss_weights"
        self.latest_loss = float(loss.detach())
        self._losses.setdefault(name, []).append(self.latest_loss)
        return outcome

    def before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the gradients away from an optimiser that must not step; called by Lightning before each step."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        searched = getattr(optimizer, "is_arch_optimizer", False)
        name = f"gradient of the {'architecture parameters' if searched else 'weights'}"
        # The stand-in for a refused loss has a gradient of zeros, with which momentum would still move the parameters.
        if self._refused or (gradients and not self.guard.accepts(torch.nn.utils.get_total_norm(gradients), name)):
            optimizer.zero_grad(set_to_none=True)

    def figures(self) -> dict[str, float]:
        """Return the mean losses and the number of refused steps since the last call."""
        losses, self._losses = self._losses, {}
        means = {name: sum(values) / len(values) for name, values in losses.items()}
        return {**means, "skipped_steps": self.guard.take_skipped()}

    def _no_gradient(self) -> Tensor:
        parameters = [parameter for parameter in self._module.parameters() if parameter.requires_grad]
        return torch.stack([0.0 * parameter.sum() for parameter in parameters]).sum()


class EpochRecord:
    """Give NNI's module what our trainer asks modules for: figures, probabilities, a live row, its place in the epochs.

    Args:
        module: NNI's module, changed in place.
        recorder: Holds losses and refused steps.
        rows: Returns the probabilities of every choice.
        searches_from: First epoch that searches.
    """

    def __init__(
        self,
        module: Any,
        recorder: StepRecorder,
        rows: Callable[[], list[dict[str, Any]]],
        *,
        searches_from: float,
    ) -> None:
        self._module = module
        self._recorder = recorder
        self._rows = rows
        self._searches_from = searches_from
        self._begun = -1
        self._start_epoch, self._start_batch = module.on_train_epoch_start, module.on_train_batch_start
        module.epoch_figures = self.epoch_figures
        module.architecture_rows = rows
        module.table_row = self.table_row
        module.on_train_epoch_start = self.on_train_epoch_start
        module.on_train_batch_start = self.on_train_batch_start
        module.on_save_checkpoint = self.on_save_checkpoint
        module.on_load_checkpoint = self.on_load_checkpoint

    def epoch_figures(self) -> dict[str, float | str]:
        """Return the figures of the epoch that ends, for the history."""
        trainer = self._module.trainer
        figures: dict[str, float | str] = {
            "phase": "search" if trainer.current_epoch >= self._searches_from else "pretrain",
            **self._recorder.figures(),
        }
        by_kind: dict[str, dict[str, list[float]]] = {}
        for row in self._rows():
            by_kind.setdefault(row["kind"], {}).setdefault(row["label"], []).append(row["probability"])
        for kind, choices in by_kind.items():
            shares = [_entropy_share(probabilities) for probabilities in choices.values()]
            figures[f"entropy_{kind}"] = sum(shares) / len(shares)
        figures["learning_rate"] = float(trainer.optimizers[0].param_groups[0]["lr"])
        return figures

    def table_row(self, figures: Mapping[str, Any]) -> dict[str, float | str]:
        """Choose from an epoch's figures what a person wants to watch; called by the progress after every epoch."""
        loss = figures.get("loss_architecture_student", figures.get("loss_weights"))
        wanted = {"phase": figures["phase"], "loss": loss, "entropy": figures.get("entropy_operator")}
        return {name: value for name, value in wanted.items() if value is not None}

    def on_train_epoch_start(self) -> None:
        """See Lightning."""
        self._begun = self._module.trainer.current_epoch
        self._start_epoch()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        """Begin an epoch that Lightning does not: it leaves that out for the first one after a restart."""
        self._module.latest_loss = self._recorder.latest_loss  # what the progress bar shows
        if self._begun != self._module.trainer.current_epoch:
            self.on_train_epoch_start()
        return self._start_batch(batch, batch_idx)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep how many steps in a row were refused."""
        checkpoint[_STATE_KEY] = dict(self._recorder.guard.in_a_row)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put it back."""
        self._recorder.guard.in_a_row = dict(checkpoint[_STATE_KEY])


def _entropy_share(probabilities: Sequence[float]) -> float:
    """Return an entropy as a share of the uniform one's."""
    return -sum(p * math.log(max(p, 1e-12)) for p in probabilities) / math.log(len(probabilities))
