"""What an inference engine must offer, so that it can be measured, compared with PyTorch and exported.

A `LatencyBackend` turns a network into an `Engine`; `glioma_nas.latency_timing` times engines, all of them in the same
way. A backend that cannot be used here raises; it is never replaced by another one.
"""

from __future__ import annotations

import platform
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import nn

from glioma_nas import registry
from glioma_nas.errors import BackendError, did_you_mean
from glioma_nas.files import read_bytes, write_bytes
from glioma_nas.latency_devices import cpu_clock_mhz, cpu_name
from glioma_nas.latency_records import Environment, LatencyRecord, Shape
from glioma_nas.latency_timing import TOLERANCE, check_runs, time_until_stable

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

    def layer_times_ms(self, runs: int) -> dict[str, float]:
        """Return what the engine says that each of its layers took, in milliseconds, median of ``runs`` calls.

        A layer is what the engine made of one or several operators of the model; its name holds theirs.

        Raises:
            BackendError: The engine does not tell.
        """
        raise BackendError(f"{type(self).__name__} does not tell how long its layers take")

    def inspect(self) -> dict[str, Any]:
        """Return what the engine says of the layers it made of the model, as plain JSON under ``Layers``.

        Raises:
            BackendError: The engine does not tell.
        """
        raise BackendError(f"{type(self).__name__} does not tell what its layers are; openvino and tensorrt do")


class LatencyBackend(ABC):
    """An inference engine that can be timed. Register subclasses with ``@latency_backends.register(name)``.

    Attributes:
        name: The registered name.
        precisions: Number formats the engine can compute in; the first is the default.
        precision: The one that this instance computes in; `open_backend` sets it.
    """

    name: ClassVar[str]
    precisions: ClassVar[tuple[str, ...]] = ("float32",)
    precision: str = "float32"

    @classmethod
    @abstractmethod
    def available(cls) -> str | None:
        """Return None if the engine can be used here, else why not, with the pip line that installs it."""

    def lacking(self) -> str | None:
        """Return None if this device computes in `precision`, else what it lacks; `open_backend` asks.

        An engine that quietly computes in another format than it is told would give its times a wrong name.
        """
        return None

    @classmethod
    def buildable(cls) -> str | None:
        """Return None if engines can be made here, be it without the device that runs them; else as `available`."""
        return cls.available()

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

    def clock_mhz(self) -> float | None:
        """Return the device's clock at this moment; none where the system does not show it."""
        return cpu_clock_mhz()

    def environment(self, *, threads: int) -> Environment:
        """Describe the conditions of what `measure` returns for as many threads."""
        import torch

        self.require_available()
        self._require_precision()
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
        self,
        module: nn.Module,
        input_shapes: Sequence[Shape],
        *,
        warmup_runs: int,
        runs: int,
        threads: int,
        max_runs: int | None = None,
        tolerance: float = TOLERANCE,
    ) -> LatencyRecord:
        """Time ``module`` on random inputs, standard normal and the same in every call, until the median stands still.

        The conditions that hold for every measurement of this backend (device, versions, precision, threads) are those
        of `environment`; the record has what is its own.

        Args:
            module: See `prepare`.
            input_shapes: See `prepare`.
            warmup_runs: Untimed calls before.
            runs: Timed calls at least.
            threads: See `prepare`.
            max_runs: Timed calls at most; none: exactly ``runs``.
            tolerance: Half-width of the median's 95 % interval, relative to it, at which timing stops.

        Raises:
            BackendError: See `prepare`; or ``runs`` is not positive.
        """
        check_runs(warmup_runs, runs)
        engine = self.prepare(module, input_shapes, threads=threads)
        taken = time_until_stable(engine, warmup_runs=warmup_runs, runs=runs, max_runs=max_runs, tolerance=tolerance)
        return taken.record(warmup_runs=warmup_runs, input_shapes=input_shapes, clock_mhz=self.clock_mhz())

    def _require_precision(self) -> None:
        lacking = self.lacking()
        if lacking is not None:
            raise BackendError(f"latency backend '{self.name}' cannot compute in '{self.precision}' here: {lacking}")

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
    """A backend whose engine is made from an ONNX model; subclasses write `load`.

    Attributes:
        opset: ONNX operator set of what `prepare` exports.
        symmetric_int8: Whether 8-bit activations must lie symmetrically around zero.
        file_suffix: Suffix of the engine's own files.
    """

    opset: ClassVar[int] = 17
    symmetric_int8: ClassVar[bool] = False
    file_suffix: ClassVar[str] = ".onnx"

    @abstractmethod
    def load(self, model: bytes, input_shapes: Sequence[Shape], *, threads: int) -> Engine:
        """Make an engine of a serialised ONNX model; arguments and errors as for `LatencyBackend.prepare`."""

    def prepare(self, module: nn.Module, input_shapes: Sequence[Shape], *, threads: int) -> Engine:
        """Export with fixed shapes, which lets the engine fold every resize size to a constant, and `load` that.

        Precision ``int8`` is calibrated on random inputs: good enough to be timed, not to be used.
        """
        from glioma_nas.onnx_export import export_onnx

        self.require_available()
        check_shapes(input_shapes)
        model = export_onnx(module, input_shapes, opset=self.opset)
        return self.load(self.convert(model, random_inputs(input_shapes)), input_shapes, threads=threads)

    def write_file(
        self, model: bytes, path: Path, input_shape: Shape, *, max_batch: int, gpus: Sequence[str] = ()
    ) -> None:
        """Write an ONNX model as this engine's own file; needs what builds engines, not what runs them.

        Args:
            model: Serialised ONNX model with an open batch size.
            path: With `file_suffix`.
            input_shape: Shape to be fastest for.
            max_batch: Largest batch that the engine must accept.
            gpus: GPU generations to build for; engines on the CPU ignore it.

        Raises:
            BackendError: What writes it is not installed, or refuses the model.
        """
        write_bytes(path, model)

    def read_file(self, path: Path, input_shape: Shape, *, threads: int) -> Engine:
        """Load what `write_file` wrote.

        Raises:
            BackendError: See `load`; or the file is of another version of the engine, or damaged.
            StorageError: The file is missing.
        """
        return self.load(read_bytes(path), [input_shape], threads=threads)

    def convert(self, model: bytes, images: Array | Sequence[Array]) -> bytes:
        """Return a float32 ONNX model in this backend's precision, as `load` expects it.

        Args:
            model: Serialised ONNX model.
            images: Slices (N, C, H, W) to calibrate ``int8`` on, for several inputs as many arrays.

        Raises:
            BackendError: See `glioma_nas.model_precision.to_int8`.
        """
        from glioma_nas import model_precision

        if self.precision == "int8":
            return model_precision.to_int8(model, images, symmetric=self.symmetric_int8)
        return model_precision.to_float16(model) if self.precision == "float16" else model


def open_backend(name: str, precision: str | None = None) -> LatencyBackend:
    """Return the registered backend called ``name``, ready for use.

    Args:
        name: Registered name.
        precision: One of its `LatencyBackend.precisions`; none: the first.

    Raises:
        UnknownNameError: No backend has that name.
        BackendError: It cannot be used here, or does not compute in that precision, or not on this device.
    """
    backend: LatencyBackend = registry.latency_backends.get(name)()
    wanted = backend.precisions[0] if precision is None else precision
    if wanted not in backend.precisions:
        raise BackendError(
            f"latency backend '{name}' does not compute in '{wanted}': {did_you_mean(wanted, backend.precisions)}"
        )
    backend.require_available()
    backend.precision = wanted
    backend._require_precision()
    return backend


def open_onnx_backend(name: str, precision: str | None = None) -> OnnxBackend:
    """Return the backend called ``name`` as one that runs ONNX models.

    Raises:
        UnknownNameError: No backend has that name.
        BackendError: See `open_backend`; or the backend runs no ONNX models.
    """
    backend = open_backend(name, precision)
    if not isinstance(backend, OnnxBackend):
        able = [item.name for item in registry.latency_backends.entries() if issubclass(item.component, OnnxBackend)]
        raise BackendError(f"latency backend '{name}' runs no ONNX models; those that do: {', '.join(able)}")
    return backend


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can be used here.

    Attributes:
        name: Registered name.
        state: ``ok``, ``builds only`` (engines can be made here, but not run) or ``missing``.
        detail: Version of its library, or why it cannot be used and what to install.
    """

    name: str
    state: str
    detail: str


def describe_backends() -> list[BackendStatus]:
    """Tell for each registered backend whether it can be used here."""
    rows = []
    for entry in registry.latency_backends.entries():
        backend: LatencyBackend = entry.component()
        reason = backend.available()
        if reason is None:
            rows.append(BackendStatus(entry.name, "ok", backend.version()))
        else:
            state = "missing" if backend.buildable() is not None else "builds only"
            rows.append(BackendStatus(entry.name, state, reason))
    return rows


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
