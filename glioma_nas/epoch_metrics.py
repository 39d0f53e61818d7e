"""Tell whoever listens the figures of every epoch, without the training loops knowing who that is.

A loop calls `publish` once at the end of each epoch. Someone outside it, such as an NNI trial that draws intermediate
results, opens `listening` around the whole work. Listeners belong to a context (`contextvars`), so that two runs in two
threads do not hear each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

Listener = Callable[[str, int, Mapping[str, float]], None]
"""Called with the stage, the epoch and the figures, as `publish` was."""

_listeners: ContextVar[tuple[Listener, ...]] = ContextVar("glioma_nas_epoch_listeners", default=())


@contextmanager
def listening(callback: Listener) -> Iterator[None]:
    """Call ``callback(stage, epoch, metrics)`` for every epoch published inside the block.

    Blocks nest; the outer listeners are called first.

    Args:
        callback: Gets finite numbers only. What it raises ends the training: a listener may stop a run that way.
    """
    token = _listeners.set((*_listeners.get(), callback))
    try:
        yield
    finally:
        _listeners.reset(token)


def publish(stage: str, epoch: int, metrics: Mapping[str, object]) -> None:
    """Tell all listeners the figures of an epoch that has just ended; nobody listening is no error.

    Args:
        stage: What is running, such as ``search``, ``train`` or ``classify``.
        epoch: Number of the epoch, from 0; it begins again with every network that a stage trains.
        metrics: Figures by name; texts, NaN and infinity are left out.

    >>> with listening(lambda stage, epoch, metrics: print(stage, epoch, metrics)):
    ...     publish("train", 0, {"loss": 0.5, "phase": "search", "dice": float("nan")})
    train 0 {'loss': 0.5}
    """
    numbers = {
        name: float(value)
        for name, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }
    for listener in _listeners.get():
        listener(stage, epoch, numbers)
