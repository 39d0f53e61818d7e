"""Build the search space that a configuration names: the one place where its options come from."""

from __future__ import annotations

from typing import Any

from glioma_nas import registry
from glioma_nas.config import RunConfig
from glioma_nas.errors import ConfigError

N_CLASSES = 2
"""Classes of the segmentation: background and tumour."""


def space_options(config: RunConfig) -> dict[str, Any]:
    """Return the keyword arguments of the configured search space: the user's, plus what the data decide.

    Raises:
        ConfigError: The user set one of the latter.
    """
    decided = {
        "in_channels": len(config.cohort.sequences),
        "n_classes": N_CLASSES,
        "image_size_px": config.preprocess.image_size_px,
    }
    for name, where in (
        ("in_channels", "the number of cohort.sequences"),
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
        raise ConfigError(
            f"{where}: unknown option '{culprit}'; see `glioma-nas list` for the component's options"
        ) from err
