"""The one way to take an inference time: what an engine must offer, and the loop that times it.

A `LatencyBackend` turns a network into an `Engine`; `time_engines` warms engines up and times them. Every backend is
timed by this same loop, so that only the engine differs between two numbers. A backend that is not installed raises;
it is never replaced by another one.
"""

from __future__ import annotations

import gc
import os
import platform
import re
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import nn

from glioma_nas import registry
from glioma_nas.errors import BackendError
from glioma_nas.latency_records import Environment, LatencyRecord, Shape
from glioma_nas.progress import Progress, Silent

Array = NDArray[np.float32]


class Engine(ABC):
    """A network made ready to run on one device with a fixed input shape and number of threads."""

    @abstractmethod
    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """Compute the outputs for ``inputs``, float32 arrays of the shapes the engine was prepared for.

        Called once for each slice in parity checks.
        """

    @abstractmethod
    def call(self) -> None:
        """Run once on the inputs the engine was prepared with and wait for the end. Called in the timed loop."""

    def time_ms(self) -> float:
        """Time one `call` in milliseconds; an engine with a clock of its own (CUDA events) overrides this."""
        started = time.perf_counter_ns()
        self.call()
        return (time.perf_counter_ns() - started) / 1e6


class LatencyBackend(ABC):
    """An inference engine that can be timed. Register subclasses with ``@latency_backends.register(name)``.

    Attributes:
        name: The registered name.
        precision: Number format the engine computes in.
    """

    name: ClassVar[str]
    precision: ClassVar[str] = "float32"

    @classmethod
    @abstractmethod
    def available(cls) -> str | None:
        """Return None if the engine can be used here, else why not, with the pip line that installs it."""

    @abstractmethod
    def version(self) -> str:
        """Return the version of the engine's library."""

    @abstractmethod
    def prepare(self, module: nn.Module, input_shapes: Sequence[Shape], *, threads: int) -> Engine:
        """Make an engine of ``module`` in evaluation mode.

        Args:
            module: The network; takes ``len(input_shapes)`` float32 tensors.
            input_shapes: Shape of each input, batch first.
            threads: Threads inside one operator.

        Raises:
            BackendError: The engine is missing or refuses the network, or a shape is not positive.
        """

    def device(self) -> str:
        """Name the device the engine runs on."""
        return cpu_name()

    def environment(self, *, threads: int) -> Environment:
        """Describe the conditions of what `measure` returns for as many threads."""
        import torch

        self.require_available()
        return Environment(
            device=self.device(),
            threads=threads,
            backend=self.name,
            backend_version=self.version(),
            precision=self.precision,
            torch_version=torch.__version__,
            platform=f"{platform.system()} {platform.machine()}",
        )

    def measure(
        self, module: nn.Module, input_shapes: Sequence[Shape], *, warmup_runs: int, runs: int, threads: int
    ) -> LatencyRecord:
        """Time ``module`` on random inputs, standard normal and the same in every call.

        Raises:
            BackendError: See `prepare`; or ``runs`` is not positive.
        """
        _check_runs(warmup_runs, runs)
        engine = self.prepare(module, input_shapes, threads=threads)
        times = time_engines({"": engine}, warmup_runs=warmup_runs, runs=runs)[""]
        return summarise(times, warmup_runs=warmup_runs, input_shapes=input_shapes)

    @classmethod
    def require_available(cls) -> None:
        """Raise unless the engine can be used here.

        Raises:
            BackendError: It cannot; the message holds the pip line.
        """
        reason = cls.available()
        if reason is not None:
            raise BackendError(f"latency backend '{cls.name}' cannot be used here: {reason}")


class OnnxBackend(LatencyBackend):
    """A backend whose engine is made from an ONNX model; subclasses write `load`."""

    opset: ClassVar[int] = 17

    @abstractmethod
    def load(self, model: bytes, input_shapes: Sequence[Shape], *, threads: int) -> Engine:
        """Make an engine of a serialised ONNX model; arguments and errors as for `LatencyBackend.prepare`."""

    def prepare(self, module: nn.Module, input_shapes: Sequence[Shape], *, threads: int) -> Engine:
        """Export with fixed shapes, which lets the engine fold every resize size to a constant, and `load` that."""
        from glioma_nas.onnx_export import export_onnx

        self.require_available()
        check_shapes(input_shapes)
        return self.load(export_onnx(module, input_shapes, opset=self.opset), input_shapes, threads=threads)


def open_backend(name: str) -> LatencyBackend:
    """Return the registered backend called ``name``, ready for use.

    Raises:
        UnknownNameError: No backend has that name.
        BackendError: It cannot be used here.
    """
    backend: LatencyBackend = registry.latency_backends.get(name)()
    backend.require_available()
    return backend


def describe_backends() -> list[tuple[str, bool, str]]:
    """Tell for each registered backend whether it can be used here: (name, usable, version or what to install)."""
    rows = []
    for entry in registry.latency_backends.entries():
        reason = entry.component.available()
        rows.append((entry.name, reason is None, entry.component().version() if reason is None else reason))
    return rows


def time_engines(
    engines: Mapping[str, Engine],
    *,
    warmup_runs: int,
    runs: int,
    progress: Progress | None = None,
    description: str = "timing",
) -> dict[str, list[float]]:
    """Time several engines in turn, one call each a round, so that a slow spell of the machine hits all of them.

    The order turns by one place every round: no engine always runs behind the same neighbour, whose data fill the
    cache.

    Returns:
        Name → times of its ``runs`` calls in milliseconds, in the order taken.

    Raises:
        BackendError: ``runs`` is not positive or ``warmup_runs`` is negative.
    """
    _check_runs(warmup_runs, runs)
    names = list(engines)
    times: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        for _ in range(warmup_runs):
            engines[name].time_ms()
    collecting = gc.isenabled()
    gc.disable()  # a collection inside a timed call would be charged to the engine
    try:
        with (progress or Silent()).task(description, runs) as task:
            for turn in range(runs):
                first = turn % max(len(names), 1)
                for name in names[first:] + names[:first]:
                    times[name].append(engines[name].time_ms())
                task.advance()
    finally:
        if collecting:
            gc.enable()
    return times


def summarise(times_ms: Sequence[float], *, warmup_runs: int, input_shapes: Sequence[Shape]) -> LatencyRecord:
    """Reduce the times of repeated calls to median and 95th percentile (linear interpolation)."""
    return LatencyRecord(
        median_ms=float(np.median(times_ms)),
        p95_ms=float(np.percentile(times_ms, 95)),
        n=len(times_ms),
        warmup_runs=warmup_runs,
        input_shapes=tuple(tuple(shape) for shape in input_shapes),
    )


@dataclass(frozen=True)
class Ratio:
    """How many times as long one engine takes as another, over the rounds they ran side by side.

    Attributes:
        median: Median of the rounds' ratios.
        p5: 5th percentile.
        p95: 95th percentile.
    """

    median: float
    p5: float
    p95: float


def ratio(times_ms: Sequence[float], reference_ms: Sequence[float]) -> Ratio:
    """Compare two engines timed by one `time_engines` call round by round, so that slow spells cancel."""
    rounds = np.asarray(times_ms, dtype=np.float64) / np.asarray(reference_ms, dtype=np.float64)
    return Ratio(float(np.median(rounds)), float(np.percentile(rounds, 5)), float(np.percentile(rounds, 95)))


def random_inputs(input_shapes: Sequence[Shape]) -> list[Array]:
    """Draw standard normal inputs, float32, the same in every call."""
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape, dtype=np.float32) for shape in input_shapes]


def check_shapes(input_shapes: Sequence[Shape]) -> None:
    """Make sure that there is an input and that every size is positive.

    Raises:
        BackendError: There is none, or a size is not a positive integer.
    """
    if not input_shapes or not all(
        shape and all(int(size) == size and size > 0 for size in shape) for shape in input_shapes
    ):
        raise BackendError(
            f"input shapes {[tuple(shape) for shape in input_shapes]}: every size must be a positive integer"
        )


def check_threads(threads: int) -> None:
    """Make sure that ``threads`` is positive.

    Raises:
        BackendError: It is not.
    """
    if threads < 1:
        raise BackendError(f"threads is {threads}; give 1 or more (latency.threads)")


def _check_runs(warmup_runs: int, runs: int) -> None:
    if runs < 1:
        raise BackendError(f"runs is {runs}; give 1 or more timed runs (latency.runs)")
    if warmup_runs < 0:
        raise BackendError(f"warmup_runs is {warmup_runs}; give 0 or more (latency.warmup_runs)")


def cpu_name() -> str:
    """Name the processor, with the number of cores this process may use: two tables of one name are comparable."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{_cpu_model()} ({cores} cores)"


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        fields = dict(
            re.findall(r"^([^\t:]+?)\s*:\s*(.+)$", cpuinfo.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
        )
        # Virtual machines shorten the model name ("AMD EPYC"); family and model number still tell generations apart.
        numbers = (
            f" family {fields['cpu family']} model {fields['model']}"
            if {"cpu family", "model"} <= fields.keys()
            else ""
        )
        if "model name" in fields:
            return f"{' '.join(fields['model name'].split())}{numbers}"
    if sys.platform == "darwin":
        answer = subprocess.run(
            ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False
        )
        if answer.returncode == 0 and answer.stdout.strip():
            return answer.stdout.strip()
    return platform.processor() or platform.machine()
