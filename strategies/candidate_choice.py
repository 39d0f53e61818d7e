"""Choose among decoded networks that inherit a supernet's weights: score them, keep the limits, evolve them.

Reference: METHOD eq. 4-1 of the thesis; Guo et al., Single Path One-Shot NAS, ECCV 2020 (scores by inherited weights).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from glioma_nas.architecture import Architecture
from glioma_nas.errors import DivergedError, SearchError
from glioma_nas.files import canonical_json
from glioma_nas.progress import Progress, Silent
from glioma_nas.seeding import numpy_generator
from glioma_nas.strategies.architecture_parameters import ArchitectureParameters, choices_of
from glioma_nas.strategies.candidate_scoring import Candidate, finetune, recalibrate_batch_norm, target_score
from glioma_nas.strategies.evolution import evolve
from glioma_nas.strategies.random_networks import random_networks
from glioma_nas.training import require_finite_weights

BRANCHES_LABEL = "branches"
"""Label of the choice that is made last, by scoring every value's decoded network."""

_logger = logging.getLogger(__name__)


class CandidateChoice:
    """What a one-shot strategy of ours does once its supernet is trained; stands before NNI's class in the bases."""

    architectures: tuple[str, ...]
    profiler: Any
    target_latency_ms: float | None
    target_exponents: tuple[float, float]
    latency_limit_ms: float | None
    finetune_steps: int
    recalibration_batches: int
    evolution_generations: int
    evolution_population: int
    sampled_networks: int
    sampled: list[tuple[Architecture, Candidate]]
    sampled_s: float
    seed: int
    notes: list[str]
    found: dict[str, Architecture]
    candidates: dict[str, list[Candidate]]
    oneshot_module: Any  # NNI's, untyped
    model_space: Any
    _loaders: dict[str, Any]
    _evaluator: Any

    def _decode(self, parameters: ArchitectureParameters) -> list[Architecture]:
        raise NotImplementedError

    def _note_missed_window(self) -> None:
        raise NotImplementedError

    def _choose(self) -> None:
        """Decode every branch set of every architecture, score it with inherited weights, keep the best of each."""
        space, module = self._space(), self._module()
        self.notes += [module.early_stop.reason] if module.early_stop.reason else []
        for name in reversed(self.architectures):
            decoded = self._decode(module.architectures[name])
            if not hasattr(space, "derive"):
                (self.found[name],) = self._within_limit(name, decoded)
                continue
            if self.evolution_generations and self._searches_latency(name):
                decoded = self._evolved(name, decoded)
            self._keep_best(name, decoded)
        self._note_missed_window()

    def _score_sampled(self) -> None:
        """Score networks drawn at random with the supernet's weights as they are; nothing is chosen among them."""
        space, started = self._space(), time.monotonic()
        fixed = space.fixed_choices.get("student", {})
        drawn = random_networks(space, self.sampled_networks, fixed=fixed, state=np.random.RandomState(0))
        with self._progress().task("score sampled networks", len(drawn)) as task:
            for item in drawn:
                candidate = self._score_or_none("student", item, finetune_steps=0, downstream=None)
                if candidate is not None:
                    self.sampled.append((item, candidate))
                task.advance(1)
        self.sampled_s = time.monotonic() - started

    def _evolved(self, name: str, decoded: Sequence[Architecture]) -> list[Architecture]:
        """Return as many networks as were decoded, better ones where evolution found some, and the decoded ones."""
        space = self._space()
        limit_ms = math.inf if self.latency_limit_ms is None else self.latency_limit_ms

        def target(architecture: Architecture) -> float:
            # Dice alone: markers would cost a cross-validation for every child.
            candidate = self._score_or_none(name, architecture, finetune_steps=0, downstream=None)
            return -math.inf if candidate is None else candidate.target

        best = evolve(
            decoded,
            choices=choices_of(space),
            build=space.architecture,
            fixed=set(space.fixed_choices.get(name, {})),
            identity=lambda architecture: canonical_json(space.describe(architecture)),
            score=target,
            latency_ms=lambda architecture: self._latency_ms(architecture) or 0.0,
            limit_ms=limit_ms,
            generations=self.evolution_generations,
            population=self.evolution_population,
            generator=numpy_generator(self.seed, "evolution", name),
            progress=self._progress(),
        )
        kept = {item.id: item for item in (*decoded, *best[: len(decoded)])}
        return list(kept.values())

    def _within_limit(self, name: str, architectures: Sequence[Architecture]) -> list[Architecture]:
        """Return the networks that keep the hard limit; all of them where there is none.

        Raises:
            SearchError: Every one is slower.
        """
        if self.latency_limit_ms is None or not self._searches_latency(name):
            return list(architectures)
        latencies = [self._latency_ms(item) or 0.0 for item in architectures]
        allowed = [item for item, ms in zip(architectures, latencies, strict=True) if ms <= self.latency_limit_ms]
        if not allowed:
            raise SearchError(
                f"no network of the {name} keeps latency_limit_ms {self.latency_limit_ms:g}: the fastest of "
                f"{len(latencies)} takes {min(latencies):.3g} ms; raise the limit or latency_weight, or set "
                "evolution_generations"
            )
        return allowed

    def _keep_best(self, name: str, architectures: Sequence[Architecture]) -> None:
        """Score architectures with the supernet's weights and keep the one with the highest target in the limit.

        Raises:
            SearchError: Every one is slower than the hard limit, or computes no finite numbers.
        """
        allowed = self._within_limit(name, architectures)
        scored = []
        # The student's masks are what markers will be predicted from.
        downstream = getattr(self._evaluator, "downstream", None) if self._searches_latency(name) else None
        with self._progress().task(f"score candidates ({name})", len(allowed)) as task:
            for item in allowed:
                candidate = self._score_or_none(name, item, finetune_steps=self.finetune_steps, downstream=downstream)
                if candidate is None:
                    task.advance(1)
                    continue
                scored.append((candidate, item))
                task.advance(1, dice=candidate.accuracy)
        if not scored:
            raise SearchError(
                f"none of the {len(allowed)} candidates of the {name} computes finite numbers with the supernet's "
                "weights; lower the learning rate, or set finetune_steps to 0"
            )
        if len(scored) < len(allowed):
            self.notes.append(
                f"{len(allowed) - len(scored)} of {len(allowed)} candidates of the {name} were left out: what they "
                "compute is not finite"
            )
        self.candidates[name] = [candidate for candidate, _ in scored]
        self.found[name] = max(scored, key=lambda item: item[0].target)[1]

    def _score_or_none(
        self, name: str, architecture: Architecture, *, finetune_steps: int, downstream: Any
    ) -> Candidate | None:
        """Score a network; none when it computes something that is no finite number."""
        try:
            candidate = self._score(name, architecture, finetune_steps=finetune_steps, downstream=downstream)
        except DivergedError as err:
            _logger.warning("candidate %s of the %s cannot be scored: %s", architecture.id, name, err)
            return None
        return candidate if math.isfinite(candidate.target) else None

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
        require_finite_weights(network, "scoring with inherited weights")
        scoring = getattr(self._evaluator, "scoring_loader", None) or self._loaders["val"]
        dice = training.score(network.eval(), scoring)
        aucs: Mapping[str, float] = {} if downstream is None else downstream.aucs(network)
        accuracy = dice if downstream is None else downstream.accuracy(dice, aucs)
        latency_ms = self._latency_ms(architecture)
        # The teacher is free to be slow: accuracy alone ranks it.
        priced = latency_ms if self._searches_latency(name) else None
        target = target_score(
            accuracy, priced, target_latency_ms=self.target_latency_ms, exponents=self.target_exponents
        )
        return Candidate(architecture.choices.get(BRANCHES_LABEL), accuracy, latency_ms, target, dice, aucs)

    def _latency_ms(self, architecture: Architecture) -> float | None:
        return None if self.profiler is None else float(self.profiler.profile(architecture.sample()))

    def _searches_latency(self, name: str) -> bool:
        """Whether this architecture searches widths under the latency term; the teacher does neither."""
        return name != "teacher"

    def _progress(self) -> Progress:
        progress: Progress = getattr(self._evaluator, "progress", None) or Silent()
        return progress

    def _module(self) -> Any:
        return self.oneshot_module

    def _space(self) -> Any:
        return self.model_space.model_space
