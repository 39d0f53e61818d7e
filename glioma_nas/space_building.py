"""Build the search space that a configuration names: the one place where its options come from."""

from __future__ import annotations

import inspect
from typing import Any

from glioma_nas import registry
from glioma_nas.config import RunConfig
from glioma_nas.errors import ConfigError, did_you_mean

N_CLASSES = 2
"""Classes of the segmentation: background and tumour."""


def space_options(config: RunConfig) -> dict[str, Any]:
    """Return the keyword arguments of the configured search space: the user's, plus what the data decide.

    Raises:
        ConfigError: The user set one of the latter.
    """
    decided = {
        "in_channels": len(config.cohort.channels),
        "n_classes": N_CLASSES,
        "image_size_px": config.preprocess.image_size_px,
    }
    for name, where in (
        ("in_channels", "cohort.sequences and cohort.missing_sequence"),
        ("n_classes", "tumour and background"),
        ("image_size_px", "preprocess.image_size_px"),
    ):
        if name in config.search.space_options:
            raise ConfigError(f"search.space_options.{name} is decided by {where}; remove it")
    return {**config.search.space_options, **decided}


def build_space(config: RunConfig) -> Any:  # an NNI ModelSpace; NNI's classes are untyped
    """Build the search space named by ``search.space`` for the images of this configuration.

    Raises:
        UnknownNameError: No search space has that name.
        ConfigError: It does not know an option of ``search.space_options``.
    """
    return construct(
        registry.search_spaces.get(config.search.space),
        space_options(config),
        where=f"search.space_options of '{config.search.space}'",
    )


def build_strategy(config: RunConfig, *, profiler: Any, seed: int) -> Any:  # an NNI Strategy, likewise untyped
    """Build the strategy named by ``search.strategy``.

    Args:
        config: The run's configuration.
        profiler: Latency profiler of the space; none only with ``search.latency_weight`` 0.
        seed: Seed of the search.

    Raises:
        UnknownNameError: No strategy has that name.
        ConfigError: It does not take an option of ``search.strategy_options``, another key decides it, or markers are
            to count where no single network is ranked.
    """
    search = config.search
    decided = {"latency_weight": search.latency_weight, "pretrain_epochs": search.pretrain_epochs, "seed": seed}
    for name in (*decided, "profiler"):
        if name in search.strategy_options:
            where = {"seed": "the key 'seed'", "profiler": "the latency stage"}.get(name, f"search.{name}")
            raise ConfigError(f"search.strategy_options.{name} is decided by {where}; remove it")
    strategy = construct(
        registry.strategies.get(search.strategy),
        search.strategy_options,
        where=f"search.strategy_options of '{search.strategy}'",
        profiler=profiler,
        **decided,
    )
    if search.marker_weight > 0 and not getattr(strategy, "ranks_networks", False):
        raise ConfigError(
            f"search.marker_weight: '{search.strategy}' ranks no single networks, so markers cannot count; set it to "
            "0, or take another strategy (docs/strategies.md)"
        )
    return strategy


def construct(factory: Any, options: dict[str, Any], *, where: str, **fixed: Any) -> Any:
    """Call a registered component with options a user wrote.

    Args:
        factory: The class or function.
        options: Keyword arguments from the configuration.
        where: Their place in the configuration, for the message.
        fixed: Further keyword arguments.

    Raises:
        ConfigError: The component does not take one of them.
    """
    try:
        return factory(**fixed, **options)
    except TypeError as err:
        # NNI wraps constructors, which hides their signature; Python's own message still names the culprit.
        culprit = next((name for name in options if f"unexpected keyword argument '{name}'" in str(err)), None)
        if culprit is None:
            raise
        allowed = options_of(factory) - set(fixed)
        hint = did_you_mean(culprit, allowed) if allowed else "the component does not say which it has."
        raise ConfigError(f"{where}: unknown option '{culprit}': {hint}") from err


def options_of(factory: Any) -> set[str]:
    """Return the names of a component's keyword arguments, through the wrappers NNI puts round constructors."""
    initialiser = getattr(factory, "_init_wrapped", factory)
    kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(initialiser).parameters.values()
    return {item.name for item in parameters if item.kind in kinds and item.name != "self"}
