from __future__ import annotations

import time
from collections.abc import Sequence
from typing import ClassVar

import pytest
import torch
from torch import nn

from glioma_nas import registry
from glioma_nas.errors import BackendError, UnknownNameError
from glioma_nas.latency_backend import (
    Array,
    Engine,
    LatencyBackend,
    OnnxBackend,
    describe_backends,
    open_backend,
    ratio,
    summarise,
    time_engines,
)
from glioma_nas.latency_records import Shape
from glioma_nas.testing.latency_suite import LatencyBackendSuite


class SleepingEngine(Engine):
    def __init__(self, seconds: float, log: list[str] | None = None, name: str = "") -> None:
        self.seconds, self.log, self.name = seconds, log, name

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        return list(inputs)

    def call(self) -> None:
        if self.log is not None:
            self.log.append(self.name)
        time.sleep(self.seconds)


class SleepingBackend(LatencyBackend):
    name: ClassVar[str] = "sleeping"

    @classmethod
    def available(cls) -> str | None:
        return None

    def version(self) -> str:
        return "1"

    def prepare(self, module: nn.Module, input_shapes: Sequence[Shape], *, threads: int) -> Engine:
        return SleepingEngine(0.02)


class AbsentBackend(SleepingBackend):
    name: ClassVar[str] = "absent"

    @classmethod
    def available(cls) -> str | None:
        return "nosuchengine not installed; run `pip install nosuchengine`"


class ClockedEngine(SleepingEngine):
    def __init__(self, times_ms: Sequence[float]) -> None:
        super().__init__(0.0)
        self.times_ms = list(times_ms)

    def time_ms(self) -> float:
        return self.times_ms.pop(0)


class TestOnnxRuntime(LatencyBackendSuite):
    def backend(self) -> LatencyBackend:
        return registry.latency_backends.get("onnxruntime")()


class TestTorch(LatencyBackendSuite):
    def backend(self) -> LatencyBackend:
        return registry.latency_backends.get("torch")()


def test_engine_that_sleeps_a_known_time_is_measured_right() -> None:
    record = SleepingBackend().measure(nn.Identity(), [(1, 1)], warmup_runs=1, runs=9, threads=1)
    # sleep never returns early; how late it returns is the machine's business, but half of nine calls late by as much
    # again would be another fault.
    assert 20.0 <= record.median_ms < 40.0
    assert record.n == 9


def test_median_and_p95_are_those_of_the_timed_calls_without_warmup() -> None:
    engine = ClockedEngine([1000.0, 1000.0, *range(1, 22)])
    times = time_engines({"clocked": engine}, warmup_runs=2, runs=21)["clocked"]
    record = summarise(times, warmup_runs=2, input_shapes=[(1, 1)])
    assert (record.median_ms, record.p95_ms, record.n) == (11.0, 20.0, 21)


def test_engines_take_turns_and_the_order_rotates() -> None:
    log: list[str] = []
    time_engines({name: SleepingEngine(0.0, log, name) for name in "abc"}, warmup_runs=1, runs=3)
    assert "".join(log) == "abc" + "abc" + "bca" + "cab"


def test_ratio_is_taken_round_by_round() -> None:
    # The second round was slow for both: the ratio does not notice.
    found = ratio([2.0, 20.0, 2.0], [1.0, 10.0, 1.0])
    assert (found.median, found.p5, found.p95) == (2.0, 2.0, 2.0)


def test_missing_backend_is_an_error_with_the_pip_line() -> None:
    with pytest.raises(BackendError, match=r"'absent' cannot be used here: .*pip install nosuchengine"):
        AbsentBackend().environment(threads=1)


def test_unknown_backend_suggests_a_name() -> None:
    with pytest.raises(UnknownNameError, match=r"did you mean 'onnxruntime'"):
        open_backend("onnxruntim")


def test_description_lists_every_registered_backend() -> None:
    rows = {name: (usable, detail) for name, usable, detail in describe_backends()}
    assert set(rows) == set(registry.latency_backends.names()) >= {"onnxruntime", "torch"}
    assert rows["torch"] == (True, torch.__version__)


def test_torch_engine_gives_the_thread_count_back() -> None:
    before = torch.get_num_threads()
    open_backend("torch").measure(nn.Conv2d(1, 1, 3), [(1, 1, 8, 8)], warmup_runs=0, runs=1, threads=before + 1)
    assert torch.get_num_threads() == before


def test_engine_is_not_changed_by_later_training_of_the_module() -> None:
    module = nn.Conv2d(1, 1, 1)
    for name in ("torch", "onnxruntime"):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
        engine = open_backend(name).prepare(module, [(1, 1, 2, 2)], threads=1)
        nn.init.zeros_(module.weight)
        assert engine.run([torch.full((1, 1, 2, 2), 3.0).numpy()])[0].max() == pytest.approx(3.0)


def test_file_that_is_no_onnx_model_is_refused() -> None:
    backend = open_backend("onnxruntime")
    assert isinstance(backend, OnnxBackend)
    with pytest.raises(BackendError, match=r"ONNX Runtime .* refuses the model"):
        backend.load(b"not a model", [(1, 1)], threads=1)
