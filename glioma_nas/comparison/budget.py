"""Give every strategy the same budget, in optimiser steps or in wall time, and the same treatment beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from glioma_nas import registry
from glioma_nas.config import RunConfig
from glioma_nas.errors import ConfigError
from glioma_nas.space_building import options_of

OBJECTIVE = ("target_latency_ms", "target_exponents", "latency_limit_ms")
"""Options that say what is looked for: the same for all strategies that take them."""

SCORING: Mapping[str, Any] = {"finetune_steps": 0, "recalibration_batches": 8}
"""How single networks with inherited weights are treated before they are scored, unless the user says otherwise.

The strategies' own defaults differ, since a baseline that scores thirty networks cannot train each of them. No
fine-tuning for anybody keeps the budget what it says.
"""

TRIALS = 8
"""Trials that the budget of a multi-trial strategy is cut into, unless the user says otherwise."""

FASTEST_STEP_S = 0.001
"""Wall time of an optimiser step that none goes below: how many batches an epoch that ends by time needs at most."""


def search_steps(config: RunConfig) -> int:
    """Return the optimiser steps of the configured search: (pretrain + search epochs) · steps per epoch.

    Raises:
        ConfigError: ``search.steps_per_epoch`` is not set, so that the number would depend on the cohort.
    """
    search = config.search
    if search.steps_per_epoch is None:
        raise ConfigError(
            "compare needs search.steps_per_epoch: set it, so that the budget is a number of steps, or give --minutes"
        )
    return (search.pretrain_epochs + search.search_epochs) * search.steps_per_epoch


def is_multi_trial(strategy: str) -> bool:
    """Tell whether a strategy trains candidates one by one: it then takes the option ``trials``.

    Raises:
        UnknownNameError: No strategy has that name.
    """
    return "trials" in options_of(registry.strategies.get(strategy))


def scoring_options(config: RunConfig) -> dict[str, Any]:
    """Return the options of `SCORING` as every strategy of the comparison gets them."""
    return {name: config.search.strategy_options.get(name, default) for name, default in SCORING.items()}


def without_limit(config: RunConfig, strategies: Sequence[str]) -> list[str]:
    """Return the strategies that ``latency_limit_ms`` does not bind, where the configuration sets it."""
    if config.search.strategy_options.get("latency_limit_ms") is None:
        return []
    return [
        name for name in strategies if not {"latency_limit_ms", "filter"} & options_of(registry.strategies.get(name))
    ]


def with_budget(
    config: RunConfig,
    strategy: str,
    *,
    seed: int,
    trials: int = TRIALS,
    ranked: int = 0,
    minutes: float | None = None,
) -> RunConfig:
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
        minutes: Wall time of the search's training; ``search.steps_per_epoch`` then only keeps an epoch from ending
            early. See `epoch_seconds`.

    Raises:
        ConfigError: The budget is too small for so many trials, or the strategy cannot be stopped by time.
    """
    search = config.search
    epochs = search.pretrain_epochs + search.search_epochs
    factory = registry.strategies.get(strategy)
    taken = options_of(factory)
    shared = {
        **{name: search.strategy_options[name] for name in OBJECTIVE if name in search.strategy_options},
        **scoring_options(config),
    }
    options = dict(search.strategy_options) if strategy == search.strategy else {}
    options |= {name: value for name, value in shared.items() if name in taken}
    if shared.get("latency_limit_ms") is not None and "filter" in taken:  # NNI's own word for a limit
        limit_ms, filtered = shared["latency_limit_ms"], options.get("filter") or {}
        options["filter"] = {**filtered, "max": min(limit_ms, filtered.get("max") or limit_ms)}
    if ranked and "sampled_networks" in taken:
        options["sampled_networks"] = ranked
    changed: dict[str, Any] = {"strategy": strategy, "strategy_options": options, "tensorboard": False}
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
    own = config.model_copy(update={"seed": seed, "search": search.model_copy(update=changed), "train": train})
    if minutes is None:
        return own
    if getattr(factory, "needs_whole_epochs", False):
        raise ConfigError(
            f"{strategy} learns at the end of each epoch, which --minutes would cut off; leave it out, or compare by "
            "steps"
        )
    most = math.ceil(epoch_seconds(own, minutes) / FASTEST_STEP_S)
    return own.model_copy(update={"search": own.search.model_copy(update={"steps_per_epoch": most})})


def epoch_seconds(config: RunConfig, minutes: float) -> float:
    """Return the wall time of each epoch, in seconds, at which a search by `with_budget` trains for so many minutes."""
    search = config.search
    return 60 * minutes / ((search.pretrain_epochs + search.search_epochs) * _trials(config))


def used_steps(config: RunConfig) -> int:
    """Return the optimiser steps that the search of a configuration made by `with_budget` takes."""
    return search_steps(config) * _trials(config)


def _trials(config: RunConfig) -> int:
    return int(config.search.strategy_options.get("trials", 1))
