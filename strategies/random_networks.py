"""Draw networks of a space uniformly, choice by choice."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from glioma_nas.architecture import Architecture

_TRIES = 20
_TRIES_OF_FEW = 200


def random_networks(
    space: Any,
    count: int,
    *,
    fixed: Mapping[str, Any],
    state: np.random.RandomState,
    accepts: Callable[[Architecture], bool] | None = None,
) -> list[Architecture]:
    """Return ``count`` different networks, or fewer from a space that holds no more.

    Args:
        space: A space with ``architecture(sample)``.
        count: How many.
        fixed: Choices that are not drawn.
        state: Source of every draw; NNI's mutables take no other kind.
        accepts: Which networks count; none for all. Few of a space may pass, so more is drawn then.
    """
    drawn: dict[str, Architecture] = {}
    # A small space may hold fewer networks than that.
    for _ in range(count * (_TRIES if accepts is None else _TRIES_OF_FEW)):
        sample: dict[str, Any] = {}
        for mutable in space.simplify().values():
            mutable.random(sample, state)
        architecture = space.architecture({**sample, **fixed})
        if architecture.id not in drawn and (accepts is None or accepts(architecture)):
            drawn[architecture.id] = architecture
        if len(drawn) == count:
            break
    return list(drawn.values())
