"""Give every strategy the same number of optimiser steps, whether it trains one supernet or many trials."""

from __future__ import annotations

from glioma_nas import registry
from glioma_nas.config import RunConfig
from glioma_nas.errors import ConfigError
from glioma_nas.space_building import options_of

OBJECTIVE = ("target_latency_ms", "target_exponents", "latency_limit_ms")
"""Options that say what is looked for: the same for all strategies that take them."""

SCORING = ("finetune_steps", "recalibration_batches")
"""Options that say how single networks are scored with inherited weights, likewise."""

TRIALS = 8
"""Trials that the budget of a multi-trial strategy is cut into, unless the user says otherwise."""


def search_steps(config: RunConfig) -> int:
    """Return the optimiser steps of the configured search: (pretrain + search epochs) · steps per epoch.

    Raises:
        ConfigError: ``search.steps_per_epoch`` is not set, so that the number would depend on the cohort.
    """
    search = config.search
    if search.steps_per_epoch is None:
        raise ConfigError("compare needs search.steps_per_epoch: set it, so that the budget is a number of steps")
    return (search.pretrain_epochs + search.search_epochs) * search.steps_per_epoch


def is_multi_trial(strategy: str) -> bool:
    """Tell whether a strategy trains candidates one by one: it then takes the option ``trials``.

    Raises:
        UnknownNameError: No strategy has that name.
    """
    return "trials" in options_of(registry.strategies.get(strategy))


def with_budget(config: RunConfig, strategy: str, *, seed: int, trials: int = TRIALS, ranked: int = 0) -> RunConfig:
    """Return the configuration of one search of the comparison, at the budget of the given one.

    A one-shot strategy keeps the epochs; of a multi-trial one, every trial gets an equal share of them. Options of the
    configuration's own strategy are kept for that strategy alone, except those of `OBJECTIVE` and `SCORING`: networks
    that were chosen by different targets, or after different treatments, cannot be compared.

    Args:
        config: The base configuration.
        strategy: Registered name.
        seed: Seed of the search and of the training that follows.
        trials: Trials of a multi-trial strategy.
        ranked: Networks that a supernet scores for its rank correlation; 0 for none.

    Raises:
        ConfigError: The budget is too small for so many trials.
    """
    search = config.search
    epochs = search.pretrain_epochs + search.search_epochs
    taken = options_of(registry.strategies.get(strategy))
    kept = search.strategy_options if strategy == search.strategy else taken.intersection((*OBJECTIVE, *SCORING))
    options = {name: value for name, value in search.strategy_options.items() if name in kept}
    if ranked and "sampled_networks" in taken:
        options["sampled_networks"] = ranked
    changed = {"strategy": strategy, "strategy_options": options, "tensorboard": False}
    if is_multi_trial(strategy):
        if epochs < trials:
            raise ConfigError(
                f"{strategy}: {epochs} epochs cannot be shared by {trials} trials; lower --trials or raise "
                "search.search_epochs and lower search.steps_per_epoch"
            )
        # Whole epochs, so the budget may not be used up to the last step; never more than it.
        changed |= {"pretrain_epochs": 0, "search_epochs": epochs // trials}
        options["trials"] = trials
    train = config.train.model_copy(update={"kd_weight": 0.0, "baselines": ()})
    return config.model_copy(update={"seed": seed, "search": search.model_copy(update=changed), "train": train})


def used_steps(config: RunConfig) -> int:
    """Return the optimiser steps that the search of a configuration made by `with_budget` takes."""
    return search_steps(config) * int(config.search.strategy_options.get("trials", 1))
