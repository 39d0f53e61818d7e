"""Derive every component's own random generator from the one seed of the run.

A component's stream depends on the seed and on its name only, so adding a component, or running stages in another
process, never changes what another one draws.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np


def derive_seed(seed: int, *names: str | int) -> int:
    """Return a seed in [0, 2⁶³) for the component called ``names``.

    >>> derive_seed(0, "folds") == derive_seed(0, "folds")
    True
    >>> derive_seed(0, "train", 1) == derive_seed(0, "train", 2)
    False
    """
    text = "/".join([str(seed), *(str(name) for name in names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def numpy_generator(seed: int, *names: str | int) -> np.random.Generator:
    """Return a NumPy generator for the component called ``names``."""
    return np.random.default_rng(derive_seed(seed, *names))


@contextmanager
def isolated_torch_rng(seed: int, *names: str | int) -> Iterator[None]:
    """Seed PyTorch's global CPU and CUDA generators inside the block and put them back afterwards.

    Layer initialisation and dropout draw from the global generators; this keeps what they draw reproducible without
    changing anybody else's stream.
    """
    import torch

    devices = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(derive_seed(seed, *names))
        yield
