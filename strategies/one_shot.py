"""Latency-regularised one-shot strategies: ``latency_darts`` for one network, ``co_search`` for teacher and student.

Both are NNI strategies over a Lightning evaluator and run in a plain ``NasExperiment(space, evaluator, strategy)``.

Reference: Liu et al., DARTS, ICLR 2019; Chen et al., FasterSeg, ICLR 2020; thesis 4.3.2-4.3.6.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import nni.nas.strategy  # noqa: F401 - before nni.nas.oneshot: the other order makes NNI lose its own one-shot strategies
import numpy as np
from nni.nas.oneshot.pytorch.strategy import OneShotStrategy
from nni.nas.space import RawFormatModelSpace
from pytorch_lightning.utilities.combined_loader import CombinedLoader

from glioma_nas.architecture import Architecture
from glioma_nas.errors import ConfigError, did_you_mean
from glioma_nas.registry import strategies
from glioma_nas.relaxation import RelaxationSlot, relaxation_hooks
from glioma_nas.seeding import derive_seed, isolated_torch_rng
from glioma_nas.strategies.architecture_parameters import ArchitectureParameters, choices_of, groups_of
from glioma_nas.strategies.candidate_scoring import (
    Candidate,
    finetune,
    ignored_latency_weight,
    recalibrate_batch_norm,
    target_score,
    warn_about_equal_exponents,
)
from glioma_nas.strategies.latency_term import DecoupledLatency
from glioma_nas.strategies.supernet_search import RandomPathTraining, SupernetSearch
from glioma_nas.training import interruptible

BRANCHES_LABEL = "branches"
"""Label of the choice that is made last, by scoring every value's decoded network."""

DECODINGS = ("joint", "viterbi", "fasterseg")
WIDTH_RULES = ("max", "min", "random", "sampled")


class LatencyRegularisedSearch(OneShotStrategy):
    """Base of both strategies.

    Args:
        profiler: NNI profiler of the space with ``expectation(weights) -> Tensor`` in ms, differentiable, and
            ``profile(sample) -> float``; none searches for accuracy only and requires ``latency_weight=0``.
        latency_weight: λ of eq. 4-11, per ms; acts on the student only.
        latency_coefficients: (w₁, w₂, w₃) of eq. 4-9, or ``auto``.
        pretrain_epochs: Epochs that train W only.
        pretrain_widths: Width rules of one step's passes while pretraining.
        search_widths: Likewise while searching.
        architecture_learning_rate: Adam's learning rate for α, β, γ.
        gradient_clip: Largest norm of the gradient of W.
        decode: Decoding of β, see the space's decoder.
        target_latency_ms: T of eq. 4-1.
        target_exponents: (a, b) of eq. 4-1.
        finetune_steps: Optimiser steps on W's data for each decoded network before it is scored; the supernet's weights
            served soft mixtures and suit no single network. 0 leaves them as they are.
        recalibration_batches: Batches for the batch norms of a decoded network before it is scored.
        seed: Seed of everything drawn.
    """

    architectures: tuple[str, ...] = ()

    def __init__(
        self,
        *,
        profiler: Any = None,
        latency_weight: float = 0.01,
        latency_coefficients: Any = "auto",
        pretrain_epochs: int = 20,
        pretrain_widths: Sequence[str] = ("max", "min", "random", "random"),
        search_widths: Sequence[str] = ("max", "min", "sampled"),
        architecture_learning_rate: float = 3e-4,
        gradient_clip: float = 5.0,
        decode: str = "joint",
        target_latency_ms: float | None = None,
        target_exponents: tuple[float, float] = (-0.07, -0.07),
        finetune_steps: int = 100,
        recalibration_batches: int = 8,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if profiler is None and latency_weight > 0:
            raise ConfigError("latency_weight > 0 needs a profiler; build a latency table or set latency_weight: 0")
        below, above = _two_numbers("target_exponents", target_exponents)
        if target_latency_ms is None and below != above:
            raise ConfigError("unequal target_exponents need target_latency_ms")
        for name, value in (
            ("latency_weight", latency_weight),
            ("architecture_learning_rate", architecture_learning_rate),
            ("gradient_clip", gradient_clip),
            ("finetune_steps", finetune_steps),
            ("recalibration_batches", recalibration_batches),
        ):
            if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
                raise ConfigError(f"{name} is {value!r}; give a number of at least 0")
        if decode not in DECODINGS:
            raise ConfigError(f"unknown decoding '{decode}': {did_you_mean(decode, DECODINGS)}")
        for rule in (*pretrain_widths, *search_widths):
            if rule not in WIDTH_RULES:
                raise ConfigError(f"unknown width rule '{rule}'; allowed: {', '.join(WIDTH_RULES)}")
        warn_about_equal_exponents((below, above), target_latency_ms)
        self.relaxation_slot = RelaxationSlot()
        self.profiler = profiler
        self.latency_weight = latency_weight
        self.latency_coefficients = latency_coefficients
        self.pretrain_epochs = pretrain_epochs
        self.pretrain_widths = tuple(pretrain_widths)
        self.search_widths = tuple(search_widths)
        self.architecture_learning_rate = architecture_learning_rate
        self.gradient_clip = gradient_clip
        self.decode = decode
        self.target_latency_ms = target_latency_ms
        self.target_exponents = (below, above)
        self.finetune_steps = finetune_steps
        self.recalibration_batches = recalibration_batches
        self.seed = seed
        self.found: dict[str, Architecture] = {}
        self.candidates: dict[str, list[Candidate]] = {}
        self._loaders: dict[str, Any] = {}
        self._evaluator: Any = None

    def default_mutation_hooks(self) -> list[Any]:
        """Return the hooks that relax layer and input choices; the space brings those for its layers."""
        return [*relaxation_hooks(self.relaxation_slot), *super().default_mutation_hooks()]

    def mutate_model(self, model: Any) -> Any:
        """Turn the space into a supernet, its new weights drawn from this strategy's seed."""
        with isolated_torch_rng(self.seed, "supernet"):
            return super().mutate_model(model)

    def train_dataloader(self, train_dataloader_fn: Any, val_dataloader_fn: Any) -> Any:
        """Pair a batch for W with a batch for the architecture in each step."""
        self._loaders = {"train": train_dataloader_fn(), "val": val_dataloader_fn()}
        return CombinedLoader(dict(self._loaders), mode="min_size")

    def val_dataloader(self, train_dataloader_fn: Any, val_dataloader_fn: Any) -> Any:
        """Return the loader the architecture trains on; the trainer never validates with it."""
        return self._loaders["val"]

    def mutate_evaluator(self, evaluator: Any) -> Any:
        """Wrap the evaluator's training, and remember the evaluator for scoring; called by NNI."""
        self._evaluator = evaluator
        return super().mutate_evaluator(evaluator)

    def configure_oneshot_module(self, training_module: Any) -> SupernetSearch:
        """Build the searching module; called by NNI once the space is a supernet."""
        space = self._space()
        choices, groups = choices_of(space), groups_of(space)
        fixed = getattr(space, "fixed_choices", {})
        with isolated_torch_rng(self.seed, "architecture parameters"):
            parameters = [
                ArchitectureParameters(
                    name,
                    choices=choices,
                    groups=groups,
                    fixed=fixed.get(name, {}),
                    search_widths=self._searches_latency(name),
                )
                for name in self.architectures
            ]
        latencies = {
            item.name: self._latency_term(item, choices, groups)
            for item in parameters
            if self.profiler is not None and self._searches_latency(item.name)
        }
        return SupernetSearch(
            training_module,
            slot=self.relaxation_slot,
            architectures=parameters,
            latencies=latencies,
            latency_weight=self.latency_weight,
            pretrain_epochs=self.pretrain_epochs,
            pretrain_widths=self.pretrain_widths,
            search_widths=self.search_widths,
            architecture_learning_rate=self.architecture_learning_rate,
            gradient_clip=self.gradient_clip,
        )

    def list_models(self, sort: bool = True, limit: int | None = None) -> Iterator[RawFormatModelSpace]:
        """Yield the found networks, the student first; NNI calls it after the run."""
        for architecture in list(self.found.values())[:limit]:
            yield self.model_space.freeze(architecture.sample())

    def _run(self) -> None:
        with interruptible():
            with isolated_torch_rng(self.seed, "search"):
                super()._run()
            # A stream of its own: what is chosen must not depend on whether the training above was resumed.
            with isolated_torch_rng(self.seed, "choose"):
                self._choose()

    def _choose(self) -> None:
        """Decode every branch set of every architecture, score it with inherited weights, keep the best of each."""
        space: Any = self.supernet
        module: Any = self.oneshot_module
        for name in reversed(self.architectures):
            weights = module.architectures[name].decoded()
            if not hasattr(space, "decode"):
                self.found[name] = Architecture(
                    type(space).__name__,
                    {},
                    {label: _argmax_choice(space, label, weight) for label, weight in weights.items()},
                )
                continue
            self._keep_best(
                name,
                [
                    space.decode(weights, architecture=name, branches=branches, method=self.decode)
                    for branches in choices_of(space).get(BRANCHES_LABEL, [None])
                ],
            )

    def _keep_best(self, name: str, architectures: Sequence[Architecture]) -> None:
        """Score architectures with the supernet's weights and keep the one with the highest target."""
        scored = [(self._score(name, architecture), architecture) for architecture in architectures]
        self.candidates[name] = [candidate for candidate, _ in scored]
        self.found[name] = max(scored, key=lambda item: item[0].target)[1]

    def _score(self, name: str, architecture: Architecture) -> Candidate:
        space: Any = self.supernet
        device = self._evaluator.trainer.strategy.root_device
        network = space.derive(architecture, inherit=name).to(device)
        batches = self._loaders["train"]
        # The draws of an epoch that the search never reached, whether or not it was resumed.
        if hasattr(batches.sampler, "set_epoch"):
            batches.sampler.set_epoch(self._evaluator.trainer.max_epochs)
        module: Any = self.oneshot_module
        training = module.training_module
        finetune(network, batches, training.loss, steps=int(self.finetune_steps), learning_rate=training.learning_rate)
        recalibrate_batch_norm(network, batches, n_batches=int(self.recalibration_batches))
        scoring = getattr(self._evaluator, "scoring_loader", None) or self._loaders["val"]
        accuracy = training.score(network.eval(), scoring)
        latency_ms = None if self.profiler is None else float(self.profiler.profile(architecture.sample()))
        # The teacher is free to be slow: accuracy alone ranks it.
        priced = latency_ms if self._searches_latency(name) else None
        target = target_score(
            accuracy, priced, target_latency_ms=self.target_latency_ms, exponents=self.target_exponents
        )
        return Candidate(architecture.choices.get(BRANCHES_LABEL), accuracy, latency_ms, target)

    def _latency_term(
        self,
        parameters: ArchitectureParameters,
        choices: Mapping[str, Sequence[Any]],
        groups: Mapping[str, Sequence[str]],
    ) -> DecoupledLatency:
        constants = {
            label: weight.detach() for label, weight in parameters.weights().items() if label not in parameters.logits
        }
        return DecoupledLatency(
            self.profiler.expectation,
            groups=parameters.groups,
            constants=constants,
            sizes={label: len(values) for label, values in choices.items()},
            coefficients=self.latency_coefficients,
        )

    def _searches_latency(self, name: str) -> bool:
        """Whether this architecture searches widths under the latency term; the teacher does neither."""
        return name != "teacher"

    def _space(self) -> Any:
        model_space: Any = self.model_space
        return model_space.model_space


@strategies.register("co_search")
class CoSearch(LatencyRegularisedSearch):
    """Search a teacher and a student together over one set of weights (thesis 4.3.4)."""

    architectures = ("teacher", "student")


@strategies.register("latency_darts")
class LatencyDarts(LatencyRegularisedSearch):
    """Search one network by DARTS with decoupled, differentiable latency (thesis 4.3.2-4.3.3)."""

    architectures = ("student",)


@strategies.register("random_with_shared_weights")
class RandomWithSharedWeights(LatencyRegularisedSearch):
    """Baseline: train a supernet along random paths, then keep the best of N random networks by Target(m).

    It learns no architecture, so a latency weight has nothing to act on; latency counts through Target(m) alone. All
    epochs train weights, those the configuration calls pretraining included.

    Args:
        profiler: See `LatencyRegularisedSearch`.
        latency_weight: Not used; noted when it is not 0.
        pretrain_epochs: Not used: the evaluator's epochs are all alike.
        n_candidates: N.
        paths: Random paths of one step.
        gradient_clip: See `LatencyRegularisedSearch`.
        target_latency_ms: See `LatencyRegularisedSearch`.
        target_exponents: See `LatencyRegularisedSearch`.
        finetune_steps: See `LatencyRegularisedSearch`; none by default, because N networks would each be trained.
        recalibration_batches: See `LatencyRegularisedSearch`.
        seed: See `LatencyRegularisedSearch`.

    Reference:
        Li & Talwalkar, Random Search and Reproducibility for NAS, UAI 2019; Guo et al., ECCV 2020.
    """

    architectures = ("student",)

    def __init__(
        self,
        *,
        profiler: Any = None,
        latency_weight: float = 0.0,
        pretrain_epochs: int = 0,
        n_candidates: int = 30,
        paths: int = 4,
        gradient_clip: float = 5.0,
        target_latency_ms: float | None = None,
        target_exponents: tuple[float, float] = (-0.07, -0.07),
        finetune_steps: int = 0,
        recalibration_batches: int = 8,
        seed: int = 0,
    ) -> None:
        if n_candidates < 1 or paths < 1:
            raise ConfigError(f"n_candidates {n_candidates} and paths {paths} must be at least 1")
        super().__init__(
            profiler=profiler,
            latency_weight=0.0,
            gradient_clip=gradient_clip,
            finetune_steps=finetune_steps,
            target_latency_ms=target_latency_ms,
            target_exponents=target_exponents,
            recalibration_batches=recalibration_batches,
            seed=seed,
        )
        self.notes = ignored_latency_weight(
            "random_with_shared_weights", latency_weight, "latency counts through Target(m) alone"
        )
        self.n_candidates = n_candidates
        self.paths = paths

    def configure_oneshot_module(self, training_module: Any) -> SupernetSearch:
        """Build the module that trains random paths; called by NNI once the space is a supernet."""
        space, (name,) = self._space(), self.architectures
        if not hasattr(space, "derive"):
            raise ConfigError(f"{type(space).__name__} has no derive() that inherits the supernet's weights")
        with isolated_torch_rng(self.seed, "architecture parameters"):
            parameters = ArchitectureParameters(
                name,
                choices=choices_of(space),
                groups=groups_of(space),
                fixed=space.fixed_choices.get(name, {}),
                search_widths=True,
            )
        return RandomPathTraining(
            training_module,
            slot=self.relaxation_slot,
            architecture=parameters,
            paths=self.paths,
            gradient_clip=self.gradient_clip,
        )

    def _choose(self) -> None:
        """Draw networks uniformly, score them with inherited weights, keep the best."""
        space, (name,) = self._space(), self.architectures
        state = np.random.RandomState(derive_seed(self.seed, "candidates") % 2**32)
        drawn: dict[str, Architecture] = {}
        # A small space may hold fewer than N networks.
        for _ in range(20 * self.n_candidates):
            sample: dict[str, Any] = {}
            for mutable in space.simplify().values():
                mutable.random(sample, state)
            architecture = space.architecture({**sample, **space.fixed_choices.get(name, {})})
            drawn.setdefault(architecture.id, architecture)
            if len(drawn) == self.n_candidates:
                break
        self._keep_best(name, list(drawn.values()))


def _argmax_choice(space: Any, label: str, weight: Any) -> Any:
    mutable = space.simplify()[label]
    value = list(mutable.values)[int(weight.argmax())]
    return [value] if type(mutable).__name__ == "CategoricalMultiple" else value


def _two_numbers(name: str, value: Any) -> tuple[float, float]:
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 2:
        raise ConfigError(f"{name} is {value!r}; give two numbers")
    first, second = value
    if not all(isinstance(item, int | float) for item in value):
        raise ConfigError(f"{name} is {value!r}; give two numbers")
    return float(first), float(second)
