"""The baseline every search has to beat: a supernet trained along random paths, and the best of N random networks."""

from __future__ import annotations

from typing import Any

import numpy as np

from glioma_nas.architecture import Architecture
from glioma_nas.errors import ConfigError, SearchError
from glioma_nas.registry import strategies
from glioma_nas.seeding import derive_seed, isolated_torch_rng
from glioma_nas.strategies.architecture_parameters import ArchitectureParameters, choices_of, groups_of
from glioma_nas.strategies.candidate_scoring import ignored_latency_weight
from glioma_nas.strategies.one_shot import LatencyRegularisedSearch
from glioma_nas.strategies.random_networks import random_networks
from glioma_nas.strategies.supernet_search import RandomPathTraining
from glioma_nas.strategies.trial_prefilter import require_prefilter
from glioma_nas.strategies.zero_cost import PROXIES, ranked


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
        prefilter: Zero-cost proxy that chooses the N among more draws: ``synflow``, ``naswot`` or ``grad_norm``; none
            for N plain draws. See `glioma_nas.strategies.zero_cost`.
        prefilter_draws: Draws for each network that is kept.
        gradient_clip: See `LatencyRegularisedSearch`.
        target_latency_ms: See `LatencyRegularisedSearch`.
        target_exponents: See `LatencyRegularisedSearch`.
        latency_limit_ms: Hard limit in ms: no slower network is drawn.
        finetune_steps: See `LatencyRegularisedSearch`; none by default, because N networks would each be trained.
        recalibration_batches: See `LatencyRegularisedSearch`.
        sampled_networks: See `LatencyRegularisedSearch`.
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
        prefilter: str | None = None,
        prefilter_draws: int = 10,
        gradient_clip: float = 5.0,
        target_latency_ms: float | None = None,
        target_exponents: tuple[float, float] = (-0.07, -0.07),
        latency_limit_ms: float | None = None,
        finetune_steps: int = 0,
        recalibration_batches: int = 8,
        sampled_networks: int = 0,
        seed: int = 0,
    ) -> None:
        if n_candidates < 1 or paths < 1:
            raise ConfigError(f"n_candidates {n_candidates} and paths {paths} must be at least 1")
        require_prefilter(prefilter, prefilter_draws)
        super().__init__(
            profiler=profiler,
            latency_weight=0.0,
            gradient_clip=gradient_clip,
            finetune_steps=finetune_steps,
            target_latency_ms=target_latency_ms,
            target_exponents=target_exponents,
            latency_limit_ms=latency_limit_ms,
            recalibration_batches=recalibration_batches,
            sampled_networks=sampled_networks,
            seed=seed,
        )
        self.notes = ignored_latency_weight(
            "random_with_shared_weights", latency_weight, "latency counts through Target(m) alone"
        )
        self.n_candidates = n_candidates
        self.paths = paths
        self.prefilter = prefilter
        self.prefilter_draws = prefilter_draws

    def check_space(self, space: Any) -> None:
        """Look at a space before anything is searched.

        Raises:
            ConfigError: Its networks cannot inherit weights.
        """
        if not hasattr(space, "derive"):
            raise ConfigError(f"{type(space).__name__} has no derive() that inherits the supernet's weights")

    def configure_oneshot_module(self, training_module: Any) -> RandomPathTraining:
        """Build the module that trains random paths; called by NNI once the space is a supernet."""
        space, (name,) = self._space(), self.architectures
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
            gradient_clip=self.settings.gradient_clip,
        )

    def _choose(self) -> None:
        """Draw networks uniformly, score them with inherited weights, keep the best."""
        space, (name,) = self._space(), self.architectures
        state = np.random.RandomState(derive_seed(self.seed, "candidates") % 2**32)
        wanted = self.n_candidates * (self.prefilter_draws if self.prefilter else 1)
        limit_ms = self.latency_limit_ms
        drawn = random_networks(
            space,
            wanted,
            fixed=space.fixed_choices.get(name, {}),
            state=state,
            accepts=None if limit_ms is None else lambda network: (self._latency_ms(network) or 0.0) <= limit_ms,
        )
        if not drawn:
            raise SearchError(f"no network that was drawn keeps latency_limit_ms {limit_ms:g}; raise the limit")
        if limit_ms is not None and len(drawn) < wanted:
            self.notes.append(
                f"only {len(drawn)} of {wanted} networks were found that keep latency_limit_ms {limit_ms:g}"
            )
        self._keep_best(name, self._prefiltered(drawn))

    def _prefiltered(self, drawn: list[Architecture]) -> list[Architecture]:
        """Return the N draws that the zero-cost proxy ranks highest, in the order they were drawn."""
        if self.prefilter is None or len(drawn) <= self.n_candidates:
            return drawn
        proxy, space = PROXIES[self.prefilter], self._space()
        batch = next(iter(self._loaders["train"]))
        loss = self._module().training_module.loss
        scores = []
        with self._progress().task(f"pre-filter ({self.prefilter})", len(drawn)) as task:
            for architecture in drawn:
                # The same start for all: what differs is the network.
                with isolated_torch_rng(self.seed, "prefilter"):
                    network = space.derive(architecture)
                scores.append(proxy(network, batch["image"], batch["mask"], loss))
                task.advance(1)
        kept = ranked(scores)[: self.n_candidates]
        self.notes.append(f"{self.prefilter} chose the {len(kept)} networks that were scored among {len(drawn)} draws")
        return [drawn[index] for index in sorted(kept)]
