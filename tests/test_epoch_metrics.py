"""Figures of every epoch reach whoever listens."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
from test_training import Points, Regression
from torch.utils.data import DataLoader

from glioma_nas.epoch_metrics import Listener, listening, publish
from glioma_nas.training import fit

Heard = list[tuple[str, int, dict[str, float]]]


def recorder(heard: Heard) -> Listener:
    def listen(stage: str, epoch: int, metrics: Mapping[str, float]) -> None:
        heard.append((stage, epoch, dict(metrics)))

    return listen


def test_listener_hears_finite_numbers_only() -> None:
    heard: Heard = []
    with listening(recorder(heard)):
        publish("search", 3, {"loss": 0.5, "phase": "pretrain", "dice": math.nan, "latency_ms": math.inf, "steps": 4})
    assert heard == [("search", 3, {"loss": 0.5, "steps": 4.0})]


def test_listeners_nest_and_fall_silent_after_their_block() -> None:
    outer: Heard = []
    inner: Heard = []
    with listening(recorder(outer)):
        with listening(recorder(inner)):
            publish("train", 0, {})
        publish("train", 1, {})
    publish("train", 2, {})
    assert [epoch for _, epoch, _ in outer] == [0, 1]
    assert [epoch for _, epoch, _ in inner] == [0]


def test_another_thread_is_not_heard() -> None:
    heard: Heard = []
    with listening(recorder(heard)):
        thread = threading.Thread(target=publish, args=("train", 0, {}))
        thread.start()
        thread.join()
    assert heard == []


def test_training_publishes_each_epoch_once_even_when_resumed(tmp_path: Path) -> None:
    heard: Heard = []
    loader = DataLoader(Points(), batch_size=4)
    with listening(recorder(heard)):
        history = fit(Regression(), loader, folder=tmp_path, epochs=2, seed=5, stage="classify")
        fit(Regression(), loader, folder=tmp_path, epochs=3, seed=5, stage="classify")
    assert [(stage, epoch) for stage, epoch, _ in heard] == [("classify", 0), ("classify", 1), ("classify", 2)]
    assert [metrics["loss"] for _, _, metrics in heard[:2]] == list(history.loss)


def test_what_a_listener_raises_ends_the_training(tmp_path: Path) -> None:
    def stop(stage: str, epoch: int, metrics: Mapping[str, float]) -> None:
        raise KeyError("stopped by the listener")

    with pytest.raises(KeyError, match="stopped by the listener"), listening(stop):
        fit(Regression(), DataLoader(Points(), batch_size=4), folder=tmp_path, epochs=2, seed=5)
