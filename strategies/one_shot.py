"""Latency-regularised one-shot strategies: ``latency_darts`` for one network, ``co_search`` for teacher and student.

Both are NNI strategies over a Lightning evaluator and run in a plain ``NasExperiment(space, evaluator, strategy)``.

Reference: Liu et al., DARTS, ICLR 2019; Chen et al., FasterSeg, ICLR 2020; thesis 4.3.2-4.3.6.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import nni.nas.strategy  # noqa: F401 - before nni.nas.oneshot: the other order makes NNI lose its own one-shot strategies
import numpy as np
from nni.nas.oneshot.pytorch.strategy import OneShotStrategy
from nni.nas.space import RawFormatModelSpace
from pytorch_lightning.utilities.combined_loader import CombinedLoader

from glioma_nas.architecture import Architecture
from glioma_nas.errors import ArchitectureError, ConfigError, SearchError, did_you_mean
from glioma_nas.files import canonical_json
from glioma_nas.progress import Progress, Silent
from glioma_nas.registry import strategies
from glioma_nas.relaxation import RelaxationSlot, relaxation_hooks
from glioma_nas.seeding import isolated_torch_rng, numpy_generator
from glioma_nas.strategies.architecture_parameters import ArchitectureParameters, choices_of, groups_of, skips_of
from glioma_nas.strategies.candidate_scoring import (
    Candidate,
    finetune,
    recalibrate_batch_norm,
    target_score,
    warn_about_equal_exponents,
)
from glioma_nas.strategies.evolution import evolve
from glioma_nas.strategies.latency_term import DecoupledLatency
from glioma_nas.strategies.random_networks import random_networks
from glioma_nas.strategies.search_settings import SearchSettings, require_number, two_numbers
from glioma_nas.strategies.supernet_search import SupernetSearch
from glioma_nas.training import interruptible

BRANCHES_LABEL = "branches"
"""Label of the choice that is made last, by scoring every value's decoded network."""

DECODINGS = ("joint", "viterbi", "fasterseg")

_logger = logging.getLogger(__name__)


class LatencyRegularisedSearch(OneShotStrategy):
    """Base of both strategies.

    Args:
        profiler: NNI profiler of the space with ``expectation(weights) -> Tensor`` in ms, differentiable, and
            ``profile(sample) -> float``; none searches for accuracy only and requires ``latency_weight=0``.
        latency_weight: λ of eq. 4-11, per ms; acts on the student only. See `SearchSettings`.
        latency_window_ms: See `SearchSettings`.
        latency_coefficients: (w₁, w₂, w₃) of eq. 4-9, or ``auto``.
        pretrain_epochs: See `SearchSettings`.
        pretrain_widths: See `SearchSettings`.
        search_widths: See `SearchSettings`.
        architecture_learning_rate: See `SearchSettings`.
        gradient_clip: See `SearchSettings`.
        auxiliary_skip: See `SearchSettings`.
        beta_decay: See `SearchSettings`.
        max_skip_fraction: See `SearchSettings`.
        min_entropy: See `SearchSettings`.
        gumbel_temperature: See `SearchSettings`.
        operator_relaxation: See `SearchSettings`.
        decode: Decoding of β, see the space's decoder.
        target_latency_ms: T of eq. 4-1.
        target_exponents: (a, b) of eq. 4-1.
        latency_limit_ms: Hard limit: no slower network is chosen, for the student only.
        finetune_steps: Optimiser steps on W's data for each decoded network before it is scored; the supernet's weights
            served soft mixtures and suit no single network. 0 leaves them as they are.
        recalibration_batches: Batches for the batch norms of a decoded network before it is scored.
        evolution_generations: Generations of weight-inheriting evolution after the search, see `evolve`; 0 for none.
        evolution_population: Networks of one generation.
        sampled_networks: Networks that are drawn at random after all is chosen and scored with the supernet's weights,
            kept in ``sampled``: to see whether the supernet ranks as training alone does. The same for every seed.
        seed: Seed of everything drawn.
    """

    architectures: tuple[str, ...] = ()
    ranks_networks = True

    def __init__(
        self,
        *,
        profiler: Any = None,
        latency_weight: float = 0.01,
        latency_window_ms: Any = None,
        latency_coefficients: Any = "auto",
        pretrain_epochs: int = 20,
        pretrain_widths: Sequence[str] = ("max", "min", "random", "random"),
        search_widths: Sequence[str] = ("max", "min", "sampled"),
        architecture_learning_rate: float = 3e-4,
        gradient_clip: float = 5.0,
        auxiliary_skip: float = 0.0,
        beta_decay: float = 0.0,
        max_skip_fraction: float | None = None,
        min_entropy: float | None = None,
        gumbel_temperature: Any = 1.0,
        operator_relaxation: str = "softmax",
        decode: str = "joint",
        target_latency_ms: float | None = None,
        target_exponents: tuple[float, float] = (-0.07, -0.07),
        latency_limit_ms: float | None = None,
        finetune_steps: int = 100,
        recalibration_batches: int = 8,
        evolution_generations: int = 0,
        evolution_population: int = 16,
        sampled_networks: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.settings = SearchSettings(
            latency_weight=latency_weight,
            latency_window_ms=latency_window_ms,
            pretrain_epochs=pretrain_epochs,
            pretrain_widths=tuple(pretrain_widths),
            search_widths=tuple(search_widths),
            architecture_learning_rate=architecture_learning_rate,
            gradient_clip=gradient_clip,
            auxiliary_skip=auxiliary_skip,
            beta_decay=beta_decay,
            max_skip_fraction=max_skip_fraction,
            min_entropy=min_entropy,
            gumbel_temperature=gumbel_temperature,
            operator_relaxation=operator_relaxation,
        )
        for needing, given in (("latency_weight > 0", latency_weight > 0), ("latency_limit_ms", latency_limit_ms)):
            if profiler is None and given:
                raise ConfigError(
                    f"{needing} needs a profiler; build a latency table or leave it out (latency_weight: 0)"
                )
        below, above = two_numbers("target_exponents", target_exponents)
        if target_latency_ms is None and below != above:
            raise ConfigError("unequal target_exponents need target_latency_ms")
        for name, value in (
            ("finetune_steps", finetune_steps),
            ("recalibration_batches", recalibration_batches),
            ("evolution_generations", evolution_generations),
            ("sampled_networks", sampled_networks),
            ("latency_limit_ms", latency_limit_ms or 0),
        ):
            require_number(name, value)
        if evolution_population < 2:
            raise ConfigError(f"evolution_population is {evolution_population}; give at least 2")
        if decode not in DECODINGS:
            raise ConfigError(f"unknown decoding '{decode}': {did_you_mean(decode, DECODINGS)}")
        warn_about_equal_exponents((below, above), target_latency_ms)
        self.relaxation_slot = RelaxationSlot()
        self.profiler = profiler
        self.latency_weight = latency_weight
        self.latency_coefficients = latency_coefficients
        self.decode = decode
        self.target_latency_ms = target_latency_ms
        self.target_exponents = (below, above)
        self.latency_limit_ms = latency_limit_ms
        self.finetune_steps = int(finetune_steps)
        self.recalibration_batches = int(recalibration_batches)
        self.evolution_generations = int(evolution_generations)
        self.evolution_population = int(evolution_population)
        self.sampled_networks = int(sampled_networks)
        self.sampled: list[tuple[Architecture, Candidate]] = []
        self.sampled_s = 0.0
        self.seed = seed
        self.notes: list[str] = []
        self.found: dict[str, Architecture] = {}
        self.candidates: dict[str, list[Candidate]] = {}
        self._loaders: dict[str, Any] = {}
        self._evaluator: Any = None

    def default_mutation_hooks(self) -> list[Any]:
        """Return the hooks that relax layer and input choices; the space brings those for its layers."""
        return [*relaxation_hooks(self.relaxation_slot), *super().default_mutation_hooks()]

    def mutate_model(self, model: Any) -> Any:
        """Turn the space into a supernet, its new weights drawn from this strategy's seed.

        Raises:
            ArchitectureError: The space holds a layer with choices that cannot be relaxed.
        """
        with isolated_torch_rng(self.seed, "supernet"):
            try:
                return super().mutate_model(model)
            except TypeError as err:
                raise ArchitectureError(
                    f"this space cannot become a supernet ({err}); supported are LayerChoice, InputChoice of one "
                    "input, and numeric choices in NNI's mutable layers such as MutableConv2d"
                ) from err

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
        skips = skips_of(space)
        if self.settings.max_skip_fraction is not None and not skips:
            raise ConfigError("max_skip_fraction: no operator of this space is a skip connection; remove the key")
        return SupernetSearch(
            training_module,
            slot=self.relaxation_slot,
            architectures=parameters,
            latencies=latencies,
            settings=self.settings,
            skips=skips,
            decoded_latency_ms=self._decoded_latency_ms if self.profiler is not None else None,
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
            if self.sampled_networks:
                with isolated_torch_rng(self.seed, "sampled networks"):
                    self._score_sampled()

    def _score_sampled(self) -> None:
        """Score networks drawn at random with the supernet's weights as they are; nothing is chosen among them."""
        space, started = self._space(), time.monotonic()
        if not hasattr(space, "derive"):
            raise ConfigError(f"sampled_networks: {type(space).__name__} has no derive() that inherits weights; set 0")
        fixed = space.fixed_choices.get("student", {})
        drawn = random_networks(space, self.sampled_networks, fixed=fixed, state=np.random.RandomState(0))
        with self._progress().task("score sampled networks", len(drawn)) as task:
            for item in drawn:
                self.sampled.append((item, self._score("student", item, finetune_steps=0, downstream=None)))
                task.advance(1)
        self.sampled_s = time.monotonic() - started

    def _choose(self) -> None:
        """Decode every branch set of every architecture, score it with inherited weights, keep the best of each."""
        space, module = self._space(), self._module()
        self.notes += [module.early_stop.reason] if module.early_stop.reason else []
        for name in reversed(self.architectures):
            decoded = self._decode(module.architectures[name])
            if not hasattr(space, "derive"):
                (self.found[name],) = decoded
                continue
            if self.evolution_generations and self._searches_latency(name):
                decoded = self._evolved(name, decoded)
            self._keep_best(name, decoded)
        self._note_missed_window()

    def _decode(self, parameters: ArchitectureParameters) -> list[Architecture]:
        """Return what an architecture's parameters mean now: one network for every branch set."""
        space = self._space()
        weights = parameters.decoded()
        if not hasattr(space, "decode"):
            choices = {label: _argmax_choice(space, label, weight) for label, weight in weights.items()}
            return [Architecture(type(space).__name__, {}, choices)]
        return [
            space.decode(weights, architecture=parameters.name, branches=branches, method=self.decode)
            for branches in choices_of(space).get(BRANCHES_LABEL, [None])
        ]

    def _decoded_latency_ms(self, parameters: ArchitectureParameters) -> float:
        """Return the latency of what the parameters mean now, in ms, the mean over branch sets."""
        latencies = [float(self.profiler.profile(item.sample())) for item in self._decode(parameters)]
        return sum(latencies) / len(latencies)

    def _evolved(self, name: str, decoded: Sequence[Architecture]) -> list[Architecture]:
        """Return as many networks as were decoded, better ones where evolution found some, and the decoded ones."""
        space = self._space()
        limit_ms = math.inf if self.latency_limit_ms is None else self.latency_limit_ms
        best = evolve(
            decoded,
            choices=choices_of(space),
            build=space.architecture,
            fixed=set(space.fixed_choices.get(name, {})),
            identity=lambda architecture: canonical_json(space.describe(architecture)),
            # Dice alone: markers would cost a cross-validation for every child.
            score=lambda architecture: self._score(name, architecture, finetune_steps=0, downstream=None).target,
            latency_ms=lambda architecture: self._latency_ms(architecture) or 0.0,
            limit_ms=limit_ms,
            generations=self.evolution_generations,
            population=self.evolution_population,
            generator=numpy_generator(self.seed, "evolution", name),
            progress=self._progress(),
        )
        kept = {item.id: item for item in (*decoded, *best[: len(decoded)])}
        return list(kept.values())

    def _keep_best(self, name: str, architectures: Sequence[Architecture]) -> None:
        """Score architectures with the supernet's weights and keep the one with the highest target in the limit.

        Raises:
            SearchError: Every one is slower than the hard limit.
        """
        limited = self.latency_limit_ms is not None and self._searches_latency(name)
        latencies = {item.id: self._latency_ms(item) or 0.0 for item in architectures} if limited else {}
        allowed = [item for item in architectures if latencies.get(item.id, 0.0) <= (self.latency_limit_ms or 0.0)]
        if not allowed:
            raise SearchError(
                f"no network of the {name} keeps latency_limit_ms {self.latency_limit_ms:g}: the fastest of "
                f"{len(latencies)} takes {min(latencies.values()):.3g} ms; raise the limit or latency_weight, or set "
                "evolution_generations"
            )
        scored = []
        # The student's masks are what markers will be predicted from.
        downstream = getattr(self._evaluator, "downstream", None) if self._searches_latency(name) else None
        with self._progress().task(f"score candidates ({name})", len(allowed)) as task:
            for item in allowed:
                candidate = self._score(name, item, finetune_steps=self.finetune_steps, downstream=downstream)
                scored.append((candidate, item))
                task.advance(1, dice=scored[-1][0].accuracy)
        self.candidates[name] = [candidate for candidate, _ in scored]
        self.found[name] = max(scored, key=lambda item: item[0].target)[1]

    def _latency_ms(self, architecture: Architecture) -> float | None:
        return None if self.profiler is None else float(self.profiler.profile(architecture.sample()))

    def _score(self, name: str, architecture: Architecture, *, finetune_steps: int, downstream: Any) -> Candidate:
        space, module = self._space(), self._module()
        device = self._evaluator.trainer.strategy.root_device
        network = space.derive(architecture, inherit=name).to(device)
        batches = self._loaders["train"]
        # The draws of an epoch that the search never reached, whether or not it was resumed.
        if hasattr(batches.sampler, "set_epoch"):
            batches.sampler.set_epoch(self._evaluator.trainer.max_epochs)
        training = module.training_module
        finetune(network, batches, training.loss, steps=finetune_steps, learning_rate=training.learning_rate)
        recalibrate_batch_norm(network, batches, n_batches=self.recalibration_batches)
        scoring = getattr(self._evaluator, "scoring_loader", None) or self._loaders["val"]
        dice = training.score(network.eval(), scoring)
        aucs = {} if downstream is None else downstream.aucs(network)
        accuracy = dice if downstream is None else downstream.accuracy(dice, aucs)
        latency_ms = self._latency_ms(architecture)
        # The teacher is free to be slow: accuracy alone ranks it.
        priced = latency_ms if self._searches_latency(name) else None
        target = target_score(
            accuracy, priced, target_latency_ms=self.target_latency_ms, exponents=self.target_exponents
        )
        return Candidate(architecture.choices.get(BRANCHES_LABEL), accuracy, latency_ms, target, dice, aucs)

    def _note_missed_window(self) -> None:
        if self.settings.latency_window_ms is None or "student" not in self.found:
            return
        low, high = self.settings.latency_window_ms
        latency_ms = self._latency_ms(self.found["student"])
        if latency_ms is not None and not low <= latency_ms <= high:
            note = (
                f"the student takes {latency_ms:.3g} ms by the latency table, outside latency_window_ms {low:g} to "
                f"{high:g}; the last latency_weight was {self._module().latency_weight:.3g}"
            )
            _logger.warning(note)
            self.notes.append(note)

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

    def _progress(self) -> Progress:
        progress: Progress = getattr(self._evaluator, "progress", None) or Silent()
        return progress

    def _module(self) -> Any:
        module: Any = self.oneshot_module
        return module

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


def _argmax_choice(space: Any, label: str, weight: Any) -> Any:
    mutable = space.simplify()[label]
    value = list(mutable.values)[int(weight.argmax())]
    return [value] if type(mutable).__name__ == "CategoricalMultiple" else value
