"""Draw networks of a space uniformly, choice by choice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from glioma_nas.architecture import Architecture


def random_networks(
    space: Any, count: int, *, fixed: Mapping[str, Any], state: np.random.RandomState
) -> list[Architecture]:
    """Return ``count`` different networks, or fewer from a space that holds no more.

    Args:
        space: A space with ``architecture(sample)``.
        count: How many.
        fixed: Choices that are not drawn.
        state: Source of every draw; NNI's mutables take no other kind.
    """
    drawn: dict[str, Architecture] = {}
    # A small space may hold fewer networks than that.
    for _ in range(20 * count):
        sample: dict[str, Any] = {}
        for mutable in space.simplify().values():
            mutable.random(sample, state)
        architecture = space.architecture({**sample, **fixed})
        drawn.setdefault(architecture.id, architecture)
        if len(drawn) == count:
            break
    return list(drawn.values())
