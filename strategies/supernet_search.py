"""The training loop of a one-shot search: pretrain the weights, then alternate architecture and weights.

One pass is back-propagated at once, so the memory of a step is that of one pass, however many widths and architectures
it trains (METHOD §3).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from nni.nas.oneshot.pytorch.base_lightning import BaseOneShotLightningModule
from torch import Tensor

from glioma_nas.relaxation import Relaxation, RelaxationSlot
from glioma_nas.strategies.architecture_parameters import GROUPS, ArchitectureParameters
from glioma_nas.strategies.latency_term import DecoupledLatency
from glioma_nas.training import FiniteGuard


class SupernetSearch(BaseOneShotLightningModule):
    """Lightning module that wraps the evaluator's own and searches.

    Args:
        training_module: The evaluator's module over the supernet; its ``training_step`` gives the loss of a batch.
        slot: Where the supernet reads the active relaxation.
        architectures: The parameter sets, in the order they are stepped.
        latencies: Architecture name → its latency term; architectures without one are free to be slow.
        latency_weight: λ of eq. 4-11, per ms.
        pretrain_epochs: Epochs that train W only.
        pretrain_widths: Width rules of the passes of a step while pretraining; see `ArchitectureParameters.relaxation`.
        search_widths: Likewise while searching.
        architecture_learning_rate: Adam's learning rate for α, β, γ.
        gradient_clip: Largest norm of the gradient of W.
    """

    def __init__(
        self,
        training_module: Any,
        *,
        slot: RelaxationSlot,
        architectures: Sequence[ArchitectureParameters],
        latencies: Mapping[str, DecoupledLatency],
        latency_weight: float,
        pretrain_epochs: int,
        pretrain_widths: Sequence[str],
        search_widths: Sequence[str],
        architecture_learning_rate: float,
        gradient_clip: float,
    ) -> None:
        super().__init__(training_module)
        self.slot = slot
        self.sets = tuple(architectures)
        # Registered as modules too, so that checkpoints hold them.
        self.architectures = torch.nn.ModuleDict({item.name: item for item in architectures})
        self.latencies = dict(latencies)
        self.latency_weight = latency_weight
        self.pretrain_epochs = pretrain_epochs
        self.pretrain_widths = tuple(pretrain_widths)
        self.search_widths = tuple(search_widths)
        self.architecture_learning_rate = architecture_learning_rate
        self.gradient_clip = gradient_clip
        self.latest_loss = math.nan
        self._guard = FiniteGuard("search")
        self._sums: dict[str, list[float]] = {}

    @property
    def searching(self) -> bool:
        """Whether the architecture is being updated in this epoch."""
        return bool(self.trainer.current_epoch >= self.pretrain_epochs)

    def configure_optimizers(self) -> Any:
        """Return the evaluator's optimiser for W, Adam for α, β, γ, and the evaluator's schedule."""
        optimizers, schedulers = self.training_module.configure_optimizers()
        if len(optimizers) != 1:
            raise ValueError(f"the evaluator gives {len(optimizers)} optimisers; a one-shot search needs exactly one")
        adam = torch.optim.Adam(
            self.architectures.parameters(), lr=self.architecture_learning_rate, betas=(0.5, 0.999), weight_decay=0.0
        )
        return [optimizers[0], adam], schedulers

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Take one architecture step on ``batch["val"]`` (once searching) and one step of W on ``batch["train"]``."""
        if self.searching:
            self._architecture_step(batch["val"], batch_idx)
        self._weight_step(batch["train"], batch_idx)

    def on_train_epoch_end(self) -> None:
        """Advance the schedule of W; Lightning leaves that to manual optimisation."""
        schedulers = self.lr_schedulers()
        for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
            if scheduler is not None:
                scheduler.step()
        super().on_train_epoch_end()

    def epoch_figures(self) -> dict[str, float | str]:
        """Return the epoch's mean losses, expected latency and entropies for the history."""
        sums, self._sums = self._sums, {}
        figures: dict[str, float | str] = {"phase": "search" if self.searching else "pretrain"}
        figures.update({name: sum(values) / len(values) for name, values in sums.items()})
        # The one under the latency term, the student, searches all three kinds.
        parameters = next((item for item in self.sets if item.name in self.latencies), self.sets[-1])
        latency = self.latencies.get(parameters.name)
        if latency is not None:
            figures["expected_latency_ms"] = latency.expected({k: v.detach() for k, v in parameters.weights().items()})
        for kind in GROUPS:
            figures[f"entropy_{kind}"] = parameters.entropy(kind)
        return figures

    def _weight_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()[0]
        optimizer.zero_grad()
        passes = self._passes()
        for relaxation in passes:
            self._backward(relaxation, batch, batch_idx, share=1 / len(passes), name="loss_weights")
        weights = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        torch.nn.utils.clip_grad_norm_(weights, self.gradient_clip)
        optimizer.step()

    def _architecture_step(self, batch: Any, batch_idx: int) -> None:
        weight_optimizer, optimizer = self.optimizers()
        weights = [parameter for group in weight_optimizer.param_groups for parameter in group["params"]]
        # Nothing uses the gradient of W here; leaving it out saves about a third of the backward pass.
        for parameter in weights:
            parameter.requires_grad_(False)
        try:
            optimizer.zero_grad()
            for parameters in self.sets:
                relaxation = parameters.relaxation("sampled", differentiable=True)
                self._backward(relaxation, batch, batch_idx, share=1.0, name=f"loss_architecture_{parameters.name}")
                latency = self.latencies.get(parameters.name)
                if latency is not None and self.latency_weight > 0:
                    self.manual_backward(self.latency_weight * latency(parameters.weights()))
            optimizer.step()
        finally:
            for parameter in weights:
                parameter.requires_grad_(True)

    def _passes(self) -> list[Relaxation]:
        rules = self.search_widths if self.searching else self.pretrain_widths
        passes = []
        for parameters in self.sets:
            # Without γ every rule but "max" would train widths that this architecture never uses.
            own = rules if parameters.groups["width"] else ("max",)
            passes += [parameters.relaxation(rule, differentiable=False) for rule in own]
        return passes

    def _backward(self, relaxation: Relaxation, batch: Any, batch_idx: int, *, share: float, name: str) -> None:
        with self.slot.using(relaxation):
            outcome = self.training_module.training_step(batch, batch_idx)
        if outcome is None:
            return
        loss: Tensor = outcome["loss"] if isinstance(outcome, Mapping) else outcome
        if self._guard.accepts(loss):
            self.manual_backward(share * loss)
            self.latest_loss = float(loss.detach())
            self._sums.setdefault(name, []).append(self.latest_loss)


class RandomPathTraining(SupernetSearch):
    """Train the weights of a supernet along uniformly drawn paths; no architecture is learned.

    Args:
        training_module: See `SupernetSearch`.
        slot: See `SupernetSearch`.
        architecture: Whose stem and heads are trained; its parameters stay at zero, which is the uniform distribution.
        paths: Paths drawn in each step; their gradients are averaged.
        gradient_clip: See `SupernetSearch`.
    """

    def __init__(
        self,
        training_module: Any,
        *,
        slot: RelaxationSlot,
        architecture: ArchitectureParameters,
        paths: int,
        gradient_clip: float,
    ) -> None:
        super().__init__(
            training_module,
            slot=slot,
            architectures=[architecture],
            latencies={},
            latency_weight=0.0,
            pretrain_epochs=0,
            pretrain_widths=(),
            search_widths=(),
            architecture_learning_rate=0.0,
            gradient_clip=gradient_clip,
        )
        self.paths = paths
        for logits in architecture.logits.values():
            torch.nn.init.zeros_(logits)

    @property
    def searching(self) -> bool:
        """Never: every epoch trains weights only."""
        return False

    def _passes(self) -> list[Relaxation]:
        return [self.sets[0].random_path() for _ in range(self.paths)]
