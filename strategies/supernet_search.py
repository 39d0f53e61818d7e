"""The training loop of a one-shot search: pretrain the weights, then alternate architecture and weights.

One pass is back-propagated at once, so the memory of a step is that of one pass, however many widths and architectures
it trains (METHOD §3). A step whose loss or gradient is not finite is skipped and counted; too many in a row end the
search with a reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from nni.nas.oneshot.pytorch.base_lightning import BaseOneShotLightningModule
from torch import Tensor

from glioma_nas.relaxation import Relaxation, RelaxationSlot
from glioma_nas.strategies.architecture_parameters import GROUPS, ArchitectureParameters
from glioma_nas.strategies.early_stop import EarlyStop
from glioma_nas.strategies.latency_term import DecoupledLatency
from glioma_nas.strategies.search_settings import SearchSettings
from glioma_nas.training import FiniteGuard

_STATE_KEY = "one_shot_search"


class SupernetSearch(BaseOneShotLightningModule):
    """Lightning module that wraps the evaluator's own and searches.

    Args:
        training_module: The evaluator's module over the supernet; its ``training_step`` gives the loss of a batch.
        slot: Where the supernet reads the active relaxation.
        architectures: The parameter sets, in the order they are stepped.
        latencies: Architecture name → its latency term; architectures without one are free to be slow.
        settings: See `SearchSettings`.
        skips: Values of operator choices that are skip connections.
        decoded_latency_ms: Returns the latency of the network that an architecture would become now; none without a
            profiler.
    """

    def __init__(
        self,
        training_module: Any,
        *,
        slot: RelaxationSlot,
        architectures: Sequence[ArchitectureParameters],
        latencies: Mapping[str, DecoupledLatency],
        settings: SearchSettings,
        skips: Sequence[Any] = (),
        decoded_latency_ms: Callable[[ArchitectureParameters], float] | None = None,
    ) -> None:
        super().__init__(training_module)
        self.slot = slot
        self.sets = tuple(architectures)
        # Registered as modules too, so that checkpoints hold them.
        self.architectures = torch.nn.ModuleDict({item.name: item for item in architectures})
        self.latencies = dict(latencies)
        self.settings = settings
        self.latency_weight = settings.latency_weight
        self.early_stop = EarlyStop(settings.max_skip_fraction, settings.min_entropy, skips=skips)
        self.latest_loss = math.nan
        self._decoded_latency_ms = decoded_latency_ms
        self._guard = FiniteGuard("search")
        self._sums: dict[str, list[float]] = {}
        self._measured = (-1, math.nan)

    @property
    def searching(self) -> bool:
        """Whether the architecture is being updated in this epoch."""
        return bool(self.trainer.current_epoch >= self.settings.pretrain_epochs)

    @property
    def search_fraction(self) -> float:
        """How much of the search is over: 0 while pretraining and in the first search epoch, 1 in the last one."""
        epochs = int(self.trainer.max_epochs or 0) - self.settings.pretrain_epochs
        done = self.trainer.current_epoch - self.settings.pretrain_epochs
        if done < 0:
            return 0.0
        return min(done / (epochs - 1), 1.0) if epochs > 1 else 1.0

    def configure_architecture_optimizers(self) -> Any:
        """Return Adam for α, β, γ; NNI puts it behind the evaluator's optimiser."""
        return torch.optim.Adam(
            self.architectures.parameters(),
            lr=self.settings.architecture_learning_rate,
            betas=(0.5, 0.999),
            weight_decay=0.0,
        )

    def configure_optimizers(self) -> Any:
        """Return the evaluator's optimiser for W, Adam for α, β, γ, and the evaluator's schedule."""
        configured = super().configure_optimizers()
        optimizers = configured[0] if isinstance(configured, tuple) else configured
        if len(optimizers) != 2:
            raise ValueError(f"the evaluator gives {len(optimizers) - 1} optimisers; a one-shot search needs one")
        return configured

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Take one architecture step on ``batch["val"]`` (once searching) and one step of W on ``batch["train"]``."""
        if self.searching:
            self._architecture_step(batch["val"], batch_idx)
        self._weight_step(batch["train"], batch_idx)

    def on_train_start(self) -> None:
        """End at once a search that was cut off after it had stopped by itself."""
        super().on_train_start()
        self.trainer.should_stop = self.early_stop.reason is not None

    def on_train_epoch_end(self) -> None:
        """Advance the schedule of W, steer λ, and stop early when asked to."""
        schedulers = self.lr_schedulers()
        for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
            if scheduler is not None:
                scheduler.step()
        super().on_train_epoch_end()
        if not self.searching:
            return
        latency_ms = self._latency_now()
        if latency_ms is not None:
            self.latency_weight = self.settings.next_latency_weight(self.latency_weight, latency_ms)
        if self.early_stop.should_stop(self.architectures, self._priced()):
            self.trainer.should_stop = True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what is no parameter: λ, the early stop, and how many steps in a row were refused."""
        checkpoint[_STATE_KEY] = {
            "latency_weight": self.latency_weight,
            "early_stop": self.early_stop.state_dict(),
            "refused_in_a_row": dict(self._guard.in_a_row),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put it back."""
        state = checkpoint[_STATE_KEY]
        self.latency_weight = state["latency_weight"]
        self.early_stop.load_state_dict(state["early_stop"])
        self._guard.in_a_row = dict(state["refused_in_a_row"])

    def epoch_figures(self) -> dict[str, float | str]:
        """Return the epoch's mean losses and Dice, latencies, λ and entropies for the history."""
        sums, self._sums = self._sums, {}
        figures: dict[str, float | str] = {"phase": "search" if self.searching else "pretrain"}
        figures.update({name: sum(values) / len(values) for name, values in sums.items()})
        parameters = self._priced()
        latency = self.latencies.get(parameters.name)
        if latency is not None:
            figures["expected_latency_ms"] = latency.expected({k: v.detach() for k, v in parameters.weights().items()})
            decoded = self._latency_now()
            if decoded is not None:
                figures["decoded_latency_ms"] = decoded
            figures["latency_weight"] = self.latency_weight
        for kind in GROUPS:
            figures[f"entropy_{kind}"] = parameters.entropy(kind)
        figures["skip_fraction"] = self.early_stop.skip_fraction(parameters)
        figures["skipped_steps"] = self._guard.take_skipped()
        return figures

    def table_row(self, figures: Mapping[str, Any]) -> dict[str, float | str]:
        """Choose from an epoch's figures what a person wants to watch; called by the progress after every epoch."""
        name = f"architecture_{self._priced().name}" if self.searching else "weights"
        wanted = {
            "phase": "phase",
            "loss": f"loss_{name}",
            "dice": f"dice_{name}",
            "expected_ms": "expected_latency_ms",
            "decoded_ms": "decoded_latency_ms",
            "lambda": "latency_weight",
            "entropy": "entropy_operator",
            "skips": "skip_fraction",
        }
        return {column: figures[key] for column, key in wanted.items() if key in figures}

    def architecture_rows(self) -> list[dict[str, Any]]:
        """Return every α, β and γ of every architecture, for its history; see `ArchitectureParameters.rows`."""
        return [row for parameters in self.sets for row in parameters.rows()]

    def _priced(self) -> ArchitectureParameters:
        """Return the architecture under the latency term, the student, which searches all three kinds."""
        return next((item for item in self.sets if item.name in self.latencies), self.sets[-1])

    def _latency_now(self) -> float | None:
        """Return the latency in ms of the network the architecture would become now; decoded once an epoch."""
        if self._decoded_latency_ms is None:
            return None
        if self._measured[0] != self.trainer.current_epoch:
            self._measured = (self.trainer.current_epoch, self._decoded_latency_ms(self._priced()))
        return self._measured[1]

    def _weight_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()[0]
        optimizer.zero_grad()
        passes = self._passes()
        for relaxation in passes:
            if not self._backward(relaxation, batch, batch_idx, share=1 / len(passes), name="weights"):
                optimizer.zero_grad()
                return
        weights = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        limit = self.settings.gradient_clip or math.inf
        if self._guard.accepts(torch.nn.utils.clip_grad_norm_(weights, limit), "gradient of the weights"):
            optimizer.step()
        else:
            optimizer.zero_grad()

    def _architecture_step(self, batch: Any, batch_idx: int) -> None:
        weight_optimizer, optimizer = self.optimizers()
        weights = [parameter for group in weight_optimizer.param_groups for parameter in group["params"]]
        # Nothing uses the gradient of W here; leaving it out saves about a third of the backward pass.
        for parameter in weights:
            parameter.requires_grad_(False)
        try:
            optimizer.zero_grad()
            if not all(self._architecture_pass(parameters, batch, batch_idx) for parameters in self.sets):
                return
            gradients = [item.grad for item in self.architectures.parameters() if item.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
            if self._guard.accepts(norm, "gradient of the architecture parameters"):
                optimizer.step()
        finally:
            for parameter in weights:
                parameter.requires_grad_(True)

    def _architecture_pass(self, parameters: ArchitectureParameters, batch: Any, batch_idx: int) -> bool:
        relaxation = self._relaxation(parameters, "sampled", differentiable=True)
        if not self._backward(relaxation, batch, batch_idx, share=1.0, name=f"architecture_{parameters.name}"):
            return False
        latency = self.latencies.get(parameters.name)
        if latency is not None and self.latency_weight > 0:
            self.manual_backward(self.latency_weight * latency(parameters.weights()))
        decay = self.settings.beta_decay_at(self.search_fraction)
        if decay > 0 and parameters.groups["operator"]:
            self.manual_backward(decay * parameters.concentration())
        return True

    def _relaxation(self, parameters: ArchitectureParameters, rule: str, *, differentiable: bool) -> Relaxation:
        fraction = self.search_fraction
        return parameters.relaxation(
            rule,
            differentiable=differentiable,
            temperature=self.settings.temperature_at(fraction),
            # While α and β rest they are uniform, and samples of them would only add noise.
            gumbel=self.settings.operator_relaxation == "gumbel" and self.searching,
            auxiliary_skip=self.settings.auxiliary_skip_at(fraction),
        )

    def _passes(self) -> list[Relaxation]:
        rules = self.settings.search_widths if self.searching else self.settings.pretrain_widths
        passes = []
        for parameters in self.sets:
            # Without γ every rule but "max" would train widths that this architecture never uses.
            own = rules if parameters.groups["width"] else ("max",)
            passes += [self._relaxation(parameters, rule, differentiable=False) for rule in own]
        return passes

    def _backward(self, relaxation: Relaxation, batch: Any, batch_idx: int, *, share: float, name: str) -> bool:
        """Back-propagate one pass; False when its loss is not finite and the step must not be taken."""
        with self.slot.using(relaxation):
            outcome = self.training_module.training_step(batch, batch_idx)
        loss: Tensor | None = outcome["loss"] if isinstance(outcome, Mapping) else outcome
        if not self._guard.accepts(None if loss is None else loss.detach()):
            return False
        assert loss is not None
        self.manual_backward(share * loss)
        self.latest_loss = float(loss.detach())
        self._sums.setdefault(f"loss_{name}", []).append(self.latest_loss)
        dice = getattr(self.training_module, "latest_dice", None)
        if dice is not None:
            self._sums.setdefault(f"dice_{name}", []).append(float(dice))
        return True


class RandomPathTraining(SupernetSearch):
    """Train the weights of a supernet along uniformly drawn paths; no architecture is learned.

    Args:
        training_module: See `SupernetSearch`.
        slot: See `SupernetSearch`.
        architecture: Whose stem and heads are trained; its parameters stay at zero, which is the uniform distribution.
        paths: Paths drawn in each step; their gradients are averaged.
        gradient_clip: See `SearchSettings`.
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
        settings = SearchSettings(
            latency_weight=0.0, pretrain_epochs=0, architecture_learning_rate=0.0, gradient_clip=gradient_clip
        )
        super().__init__(training_module, slot=slot, architectures=[architecture], latencies={}, settings=settings)
        self.paths = paths
        for logits in architecture.logits.values():
            torch.nn.init.zeros_(logits)

    @property
    def searching(self) -> bool:
        """Never: every epoch trains weights only."""
        return False

    def architecture_rows(self) -> list[dict[str, Any]]:
        """Return nothing: no architecture is learned."""
        return []

    def _passes(self) -> list[Relaxation]:
        return [self.sets[0].random_path() for _ in range(self.paths)]
