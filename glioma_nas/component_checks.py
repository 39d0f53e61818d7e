"""Find the mistakes of a configuration before the first stage runs, rather than hours into the run."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from glioma_nas.config import RunConfig
from glioma_nas.errors import ConfigError, did_you_mean


def check_components(config: RunConfig, stages: Collection[str]) -> None:
    """Resolve every name and option that the given stages will use.

    Args:
        config: The run's configuration.
        stages: Names of the stages that are about to run.

    Raises:
        GliomaNasError: A component, option, loss or device is not there; the message says what is.
    """
    # Libraries as heavy as these are loaded here only, because the command line imports this module at every start.
    from glioma_nas import registry

    if "preprocess" in stages:
        for step in config.preprocess.steps:
            registry.preprocess_steps.get(step)
    if "latency" in stages or "export" in stages:
        registry.latency_backends.get(config.latency.backend)
    if "export" in stages:
        from glioma_nas.export_formats import check_formats

        check_formats(config.export.formats)
    if "latency" in stages or "search" in stages:
        _check_search(config)
    if "train" in stages:
        _check_training(config)
    if "classify" in stages:
        _check_markers(config)
    if {"search", "train", "segment", "classify"} & set(stages):
        from glioma_nas.training import resolve_device

        resolve_device(config.device)


class _LatencyToCome:
    """Stand where the profiler will stand, so that options that need one can be checked before there is one."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise RuntimeError(f"a strategy asked for the latency ({name}) before it was measured")


def _check_search(config: RunConfig) -> None:
    from glioma_nas import registry
    from glioma_nas.seeding import isolated_torch_rng
    from glioma_nas.space_building import build_space, build_strategy

    with isolated_torch_rng(config.seed, "check"):
        space = build_space(config)
    registry.evaluators.get("segmentation")
    registry.losses.get(config.search.loss)
    # Latencies are not measured yet: whoever asks for one already here fails loudly.
    strategy = build_strategy(config, profiler=_LatencyToCome(), seed=config.seed)
    # A strategy may know spaces, or parts of them, that it cannot search.
    if hasattr(strategy, "check_space"):
        strategy.check_space(space)


def _check_training(config: RunConfig) -> None:
    from glioma_nas import registry
    from glioma_nas.trained_networks import network_names

    registry.losses.get(config.train.loss)
    network_names(config)
    for name in config.train.baselines:
        registry.networks.get(name)
    for name in config.train.baseline_options:
        if name not in config.train.baselines:
            raise ConfigError(
                f"train.baseline_options names '{name}', which is not in train.baselines: "
                f"{did_you_mean(name, config.train.baselines)}"
            )
    for name in config.train.baselines:
        _take_an_image(config, name)


def _take_an_image(config: RunConfig, name: str) -> None:
    """Let a baseline refuse the images' size or its options now, and not after the others have been trained for hours.

    Raises:
        ImageError: It cannot take images of ``preprocess.image_size_px``; the message says which.
        ConfigError: It takes no such option.
    """
    import torch

    from glioma_nas.errors import ImageError
    from glioma_nas.seeding import isolated_torch_rng
    from glioma_nas.trained_networks import build_network

    side = config.preprocess.image_size_px
    with isolated_torch_rng(config.seed, "check"), torch.inference_mode():
        network = build_network(config, Path(), name).eval()
        try:
            network(torch.zeros(1, len(config.cohort.channels), side, side))
        except ImageError as err:
            raise ImageError(f"baseline '{name}': {err}") from err


def _check_markers(config: RunConfig) -> None:
    from glioma_nas import registry
    from glioma_nas.stages.classify import build_evaluators

    for marker in config.classify.markers.values():
        build_evaluators(config, marker)
    if config.classify.subtype is not None:
        registry.subtypes.get(config.classify.subtype.rules)
        for name, wanted in config.classify.subtype.predicted.items():
            if wanted not in config.classify.markers:
                raise ConfigError(
                    f"classify.subtype.predicted.{name}: no marker '{wanted}': "
                    f"{did_you_mean(wanted, config.classify.markers)}"
                )
