"""NNI's own multi-trial strategies by name: each trial trains one network from scratch.

Each takes the keywords that the search stage gives to every strategy, the number of trials, and NNI's own options.
Dice guides them (they know nothing of latency); the network that is kept is the one with the best Target(m), as with
our own strategies. Run again with the same seed and folder, they repeat their proposals and find the finished trials'
results on disk, so they resume where they stopped. docs/strategies.md lists the faults of NNI that are worked round.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import nni
from nni.mutable import Categorical, CategoricalMultiple
from nni.nas.strategy import TPE, GridSearch, PolicyBasedRL, Random, RegularizedEvolution
from nni.nas.strategy.base import Strategy

from glioma_nas.errors import ConfigError, SearchError
from glioma_nas.registry import strategies
from glioma_nas.seeding import derive_seed, isolated_torch_rng
from glioma_nas.strategies.candidate_scoring import (
    ignored_latency_weight,
    target_score,
    warn_about_equal_exponents,
)
from glioma_nas.strategies.nni_faults import isolated_numpy_rng, require_reinforcement_learning
from glioma_nas.strategies.search_settings import require_number
from glioma_nas.strategies.trial_prefilter import TrialPrefilter, refuse_prefilter, walk_in_limit
from glioma_nas.training import interruptible

DEFAULT_TRIALS = 20


class _NniMultiTrial(Strategy):
    """What all of them share; stands before NNI's class in the bases."""

    ranks_networks = True

    trials: int
    seed: int
    notes: list[str]

    def record_run(
        self,
        name: str,
        *,
        profiler: Any,
        latency_weight: float,
        trials: int,
        target_latency_ms: float | None,
        target_exponents: tuple[float, float],
        latency_limit_ms: float | None,
        seed: int,
    ) -> None:
        """Keep budget, seed, limit and Target(m); called by each constructor.

        Raises:
            ConfigError: Fewer than one trial, exponents that need a target latency, or a limit without a profiler.
        """
        if trials < 1:
            raise ConfigError(f"{name}: trials is {trials}; give at least 1")
        below, above = target_exponents
        if below != above and target_latency_ms is None:
            raise ConfigError("unequal target_exponents need target_latency_ms")
        require_number("latency_limit_ms", latency_limit_ms or 0)
        if latency_limit_ms is not None and profiler is None:
            raise ConfigError(f"{name}: latency_limit_ms needs a profiler; build a latency table or leave it out")
        warn_about_equal_exponents((below, above), target_latency_ms)
        self.latency_limit_ms = latency_limit_ms
        self.trials = trials
        self.seed = seed
        self.profiler = profiler
        self.target_latency_ms = target_latency_ms
        self.target_exponents = (below, above)
        self.notes = ignored_latency_weight(
            name, latency_weight, "Dice guides the trials, the best one is chosen by Target(m)"
        )

    def list_models(self, sort: bool = True, limit: int | None = None) -> Iterator[Any]:
        """Yield the trials' models; sorted, those with a result that keep the limit, by falling Target(m).

        Raises:
            SearchError: Sorted, and there are results, but of networks slower than the limit alone.
        """
        models = list(super().list_models(sort=sort, limit=None))
        if sort and self.latency_limit_ms is not None and not list(self.engine.list_models()):
            raise SearchError(f"no network that it came to keeps latency_limit_ms {self.latency_limit_ms:g}; raise it")
        if sort:
            kept = [model for model in models if self.keeps_limit(model.sample)]
            if models and not kept:
                raise SearchError(
                    f"none of the {len(models)} networks that were trained keeps latency_limit_ms "
                    f"{self.latency_limit_ms:g}: the fastest takes "
                    f"{min(self.latency_ms(model.sample) for model in models):.3g} ms; raise the limit or trials"
                )
            models = sorted(kept, key=self.target, reverse=True)
        yield from models[:limit]

    def target(self, model: Any) -> float:
        """Return Target(m) of a trial that has a result."""
        latency_ms = None if self.profiler is None else self.latency_ms(model.sample)
        return target_score(
            float(model.metric), latency_ms, target_latency_ms=self.target_latency_ms, exponents=self.target_exponents
        )

    def latency_ms(self, sample: Mapping[str, Any]) -> float:
        """Return the latency of a sample in ms; with a profiler only."""
        return float(self.profiler.profile(sample))

    def keeps_limit(self, sample: Mapping[str, Any]) -> bool:
        """Tell whether a sample is fast enough."""
        return self.latency_limit_ms is None or self.latency_ms(sample) <= self.latency_limit_ms

    def wait_for_resource(self) -> bool:
        """Tell whether another trial may begin: ``trials`` counts in any engine, a plain ``NasExperiment``'s too."""
        return len(list(self.engine.list_models())) < self.trials and bool(super().wait_for_resource())

    def _initialize(self, model_space: Any, engine: Any) -> Any:
        with isolated_torch_rng(self.seed, "strategy"):
            return super()._initialize(model_space, engine)

    def _run(self) -> None:
        with interruptible(), isolated_torch_rng(self.seed, "search"):
            try:
                super()._run()
            except SearchError as err:
                # NNI draws the next network before it asks whether another trial may begin.
                done = len(list(self.engine.list_models()))
                if not done:
                    raise
                if done < self.trials:
                    self.notes.append(f"{done} of {self.trials} trials: {err}")


def _nni_seed(seed: int) -> int:
    # NNI's strategies seed numpy's RandomState, which takes 32 bits.
    return derive_seed(seed, "proposals") % 2**32


@strategies.register("nni.random")
class NniRandom(TrialPrefilter, _NniMultiTrial, Random):
    """NNI's random search: every trial trains a randomly drawn network from scratch.

    Args:
        profiler: Latency of a sample in ms, for Target(m); none to rank by Dice alone.
        latency_weight: Not used; noted when it is not 0.
        pretrain_epochs: Not used: a trial's epochs are all alike.
        trials: Networks to train.
        target_latency_ms: T of eq. 4-1.
        target_exponents: (a, b) of eq. 4-1.
        latency_limit_ms: Hard limit in ms: no slower network is chosen, and none is drawn where NNI draws at random or
            mutates; needs a profiler.
        seed: Seed of everything drawn.
        dedup: Never try a network twice.
        prefilter: Zero-cost proxy that chooses each network among several draws: ``synflow``, ``naswot`` or
            ``grad_norm``; none for plain draws. See `glioma_nas.strategies.trial_prefilter`.
        prefilter_draws: Draws for each network that is tried.
    """

    def __init__(
        self,
        *,
        profiler: Any = None,
        latency_weight: float = 0.0,
        pretrain_epochs: int = 0,
        trials: int = DEFAULT_TRIALS,
        target_latency_ms: float | None = None,
        target_exponents: tuple[float, float] = (-0.07, -0.07),
        latency_limit_ms: float | None = None,
        seed: int = 0,
        dedup: bool = True,
        prefilter: str | None = None,
        prefilter_draws: int = 10,
    ) -> None:
        super().__init__(dedup=dedup, seed=_nni_seed(seed))
        self.record_run(
            "nni.random",
            profiler=profiler,
            latency_weight=latency_weight,
            trials=trials,
            target_latency_ms=target_latency_ms,
            target_exponents=target_exponents,
            latency_limit_ms=latency_limit_ms,
            seed=seed,
        )
        self.record_prefilter(prefilter, prefilter_draws)


@strategies.register("nni.grid")
class NniGrid(_NniMultiTrial, GridSearch):
    """NNI's grid search, in order or shuffled within every hundred; for small spaces only.

    Args:
        profiler: See `NniRandom`.
        latency_weight: See `NniRandom`.
        pretrain_epochs: See `NniRandom`.
        trials: See `NniRandom`.
        target_latency_ms: See `NniRandom`.
        target_exponents: See `NniRandom`.
        latency_limit_ms: See `NniRandom`.
        seed: See `NniRandom`.
        shuffle: Shuffle every hundred networks of the order; under a limit as many as there are trials, if fewer.
        prefilter: Refused: the order is the grid's.
    """

    def __init__(
        self,
        *,
        profiler: Any = None,
        latency_weight: float = 0.0,
        pretrain_epochs: int = 0,
        trials: int = DEFAULT_TRIALS,
        target_latency_ms: float | None = None,
        target_exponents: tuple[float, float] = (-0.07, -0.07),
        latency_limit_ms: float | None = None,
        seed: int = 0,
        shuffle: bool = True,
        prefilter: str | None = None,
    ) -> None:
        refuse_prefilter("nni.grid", prefilter)
        super().__init__(shuffle=shuffle, seed=_nni_seed(seed))
        self.record_run(
            "nni.grid",
            profiler=profiler,
            latency_weight=latency_weight,
            trials=trials,
            target_latency_ms=target_latency_ms,
            target_exponents=target_exponents,
            latency_limit_ms=latency_limit_ms,
            seed=seed,
        )
        if latency_limit_ms is not None:
            # NNI fills its buffer before the first trial; under a limit each of its networks may take long to find.
            self._shuffle_buffer_size = min(GridSearch._shuffle_buffer_size, trials)

    def _grid_generator(self, model_space: Any) -> Iterator[Any]:
        walk = super()._grid_generator(model_space)
        return walk_in_limit(
            walk, self.keeps_limit, limit_ms=self.latency_limit_ms, wanted=self.trials, notes=self.notes
        )


@strategies.register("nni.evolution")
class NniEvolution(TrialPrefilter, _NniMultiTrial, RegularizedEvolution):
    """NNI's regularised evolution: random networks first, then mutants of the best of a sample of the population.

    Args:
        profiler: See `NniRandom`.
        latency_weight: See `NniRandom`.
        pretrain_epochs: See `NniRandom`.
        trials: See `NniRandom`; NNI's ``cycles`` is gone.
        target_latency_ms: See `NniRandom`.
        target_exponents: See `NniRandom`.
        latency_limit_ms: See `NniRandom`.
        seed: See `NniRandom`.
        population_size: Networks alive; none for a third of the trials, at most NNI's 100.
        sample_size: Networks in a tournament; none for a quarter of the population.
        mutation_prob: Probability that a choice is drawn again.
        crossover: Cross two parents instead of copying one.
        dedup: Never try a network twice.
        prefilter: See `NniRandom`; acts on the random networks of the first generation.
        prefilter_draws: See `NniRandom`.
    """

    def __init__(
        self,
        *,
        profiler: Any = None,
        latency_weight: float = 0.0,
        pretrain_epochs: int = 0,
        trials: int = DEFAULT_TRIALS,
        target_latency_ms: float | None = None,
        target_exponents: tuple[float, float] = (-0.07, -0.07),
        latency_limit_ms: float | None = None,
        seed: int = 0,
        population_size: int | None = None,
        sample_size: int | None = None,
        mutation_prob: float = 0.05,
        crossover: bool = False,
        dedup: bool = True,
        prefilter: str | None = None,
        prefilter_draws: int = 10,
        cycles: int | None = None,
    ) -> None:
        if cycles is not None:
            raise ConfigError(f"nni.evolution: NNI 3.0 refuses 'cycles'; set trials: {cycles} instead")
        population = population_size or min(100, max(2, trials // 3))
        tournament = sample_size or max(1, population // 4)
        if not 1 <= tournament <= population:
            raise ConfigError(f"nni.evolution: sample_size {tournament} is not in 1 … population_size {population}")
        super().__init__(
            population_size=population,
            sample_size=tournament,
            mutation_prob=mutation_prob,
            crossover=crossover,
            dedup=dedup,
            seed=_nni_seed(seed),
        )
        self.record_run(
            "nni.evolution",
            profiler=profiler,
            latency_weight=latency_weight,
            trials=trials,
            target_latency_ms=target_latency_ms,
            target_exponents=target_exponents,
            latency_limit_ms=latency_limit_ms,
            seed=seed,
        )
        self.record_prefilter(prefilter, prefilter_draws)
        if population >= trials:
            self.notes.append(f"population {population} of {trials} trials: nothing evolves, this is random search")

    def new_individual(self) -> Any:
        """Return NNI's next mutant, one that keeps the limit; called by NNI for each."""
        return self.first_in_limit(super().new_individual)


@strategies.register("nni.tpe")
class NniTpe(_NniMultiTrial, TPE):
    """NNI's tree-structured Parzen estimator over the choices of the space.

    Args:
        profiler: See `NniRandom`.
        latency_weight: See `NniRandom`.
        pretrain_epochs: See `NniRandom`.
        trials: See `NniRandom`.
        target_latency_ms: See `NniRandom`.
        target_exponents: See `NniRandom`.
        latency_limit_ms: See `NniRandom`.
        seed: See `NniRandom`.
        tpe_args: NNI's ``TpeArguments``; ``n_startup_jobs`` (random trials first) is a third of the trials, at most 20,
            unless given.
        prefilter: Refused: the estimator waits for the result of all it proposes.
    """

    def __init__(
        self,
        *,
        profiler: Any = None,
        latency_weight: float = 0.0,
        pretrain_epochs: int = 0,
        trials: int = DEFAULT_TRIALS,
        target_latency_ms: float | None = None,
        target_exponents: tuple[float, float] = (-0.07, -0.07),
        latency_limit_ms: float | None = None,
        seed: int = 0,
        tpe_args: Mapping[str, Any] | None = None,
        prefilter: str | None = None,
    ) -> None:
        refuse_prefilter("nni.tpe", prefilter)
        arguments = {"n_startup_jobs": min(20, max(2, trials // 3)), **(tpe_args or {})}
        if arguments["n_startup_jobs"] < 2:
            raise ConfigError("nni.tpe: tpe_args.n_startup_jobs must be at least 2: NNI fails on one trial")
        # NNI's default is to minimise, which for a Dice finds the worst network.
        super().__init__(optimize_mode="maximize", seed=_nni_seed(seed), tpe_args=arguments)
        self.record_run(
            "nni.tpe",
            profiler=profiler,
            latency_weight=latency_weight,
            trials=trials,
            target_latency_ms=target_latency_ms,
            target_exponents=target_exponents,
            latency_limit_ms=latency_limit_ms,
            seed=seed,
        )

    def _run(self) -> None:
        # NNI's own loop hands mutables to the tuner as they are, which input choices do not support, and sleeps for a
        # second after every trial.
        values = {label: _sample_values(label, mutable) for label, mutable in self.model_space.simplify().items()}
        self.tuner.update_search_space(
            {label: {"_type": "choice", "_value": list(range(len(allowed)))} for label, allowed in values.items()}
        )
        with interruptible(), isolated_torch_rng(self.seed, "search"):
            while self.wait_for_resource():
                try:
                    proposed = self.tuner.generate_parameters(self._model_count)
                except nni.NoMoreTrialError:
                    return
                model = self.model_space.freeze({label: values[label][index] for label, index in proposed.items()})
                self._model_to_id[model] = self._model_count
                self._model_count += 1
                self.engine.submit_models(model)


@strategies.register("nni.policy_rl")
class NniPolicyRl(_NniMultiTrial, PolicyBasedRL):
    """NNI's reinforcement learning (PPO): a policy proposes the trials; needs tianshou.

    Args:
        profiler: See `NniRandom`.
        latency_weight: See `NniRandom`.
        pretrain_epochs: See `NniRandom`.
        trials: See `NniRandom`.
        target_latency_ms: See `NniRandom`.
        target_exponents: See `NniRandom`.
        latency_limit_ms: See `NniRandom`.
        seed: See `NniRandom`.
        samples_per_update: Trials for one update of the policy; none for a fifth of the trials, at most NNI's 20.
        prefilter: Refused: the policy waits for the result of all it proposes.

    Raises:
        PluginError: tianshou or gym is not installed.
    """

    def __init__(
        self,
        *,
        profiler: Any = None,
        latency_weight: float = 0.0,
        pretrain_epochs: int = 0,
        trials: int = DEFAULT_TRIALS,
        target_latency_ms: float | None = None,
        target_exponents: tuple[float, float] = (-0.07, -0.07),
        latency_limit_ms: float | None = None,
        seed: int = 0,
        samples_per_update: int | None = None,
        prefilter: str | None = None,
    ) -> None:
        refuse_prefilter("nni.policy_rl", prefilter)
        require_reinforcement_learning("nni.policy_rl")
        super().__init__(samples_per_update=samples_per_update or min(20, max(1, trials // 5)))
        self.record_run(
            "nni.policy_rl",
            profiler=profiler,
            latency_weight=latency_weight,
            trials=trials,
            target_latency_ms=target_latency_ms,
            target_exponents=target_exponents,
            latency_limit_ms=latency_limit_ms,
            seed=seed,
        )

    def _run(self) -> None:
        with isolated_numpy_rng(self.seed):
            super()._run()


def _sample_values(label: str, mutable: Any) -> list[Any]:
    if isinstance(mutable, Categorical):
        return list(mutable.values)
    if isinstance(mutable, CategoricalMultiple) and mutable.n_chosen == 1:
        return [[value] for value in mutable.values]
    raise ConfigError(f"nni.tpe searches choices of one value; '{label}' is a {type(mutable).__name__}")
