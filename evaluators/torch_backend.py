"""PyTorch itself as an engine, eager or compiled, on the CPU or on a CUDA device."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import ClassVar

import torch
from torch import Tensor, nn

from glioma_nas.compilation import why_not
from glioma_nas.errors import BackendError
from glioma_nas.latency_backend import Array, Engine, LatencyBackend, check_shapes, check_threads, random_inputs
from glioma_nas.latency_devices import cuda_clock_mhz
from glioma_nas.latency_records import Shape
from glioma_nas.registry import latency_backends


@contextmanager
def _threads(count: int) -> Iterator[None]:
    # The number of threads belongs to the process: leave it as it was for whoever trains next.
    before = torch.get_num_threads()
    if before != count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if before != count:
            torch.set_num_threads(before)


@contextmanager
def tf32_allowed(allowed: bool) -> Iterator[None]:
    """Let convolutions and matrix products on a GPU round float32 inputs to TF32's 10 bits inside the block, or not.

    PyTorch allows it for convolutions unless it is told otherwise: its times are no float32 times then.
    """
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


class TorchEngine(Engine):
    """A module in evaluation mode with the inputs of its timed calls."""

    def __init__(self, module: nn.Module, input_shapes: Sequence[Shape], threads: int) -> None:
        self._module = module
        self._inputs = [torch.from_numpy(array) for array in random_inputs(input_shapes)]
        self._count = threads

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """See `Engine.run`."""
        with _threads(self._count), torch.inference_mode():
            outputs = self._module(*(torch.from_numpy(array) for array in inputs))
        return [outputs.numpy()] if isinstance(outputs, Tensor) else [output.numpy() for output in outputs]

    def call(self) -> None:
        """See `Engine.call`."""
        with torch.inference_mode():
            self._module(*self._inputs)

    def time_ms(self) -> float:
        """Time one call; switching the number of threads is not part of it."""
        with _threads(self._count):
            return super().time_ms()


class CudaEngine(Engine):
    """A module on a CUDA device, timed by two events on the current stream.

    What passes between them is the device's time, including its waiting for the host where that launches kernels too
    slowly; copies to and from the device are not part of it.
    """

    def __init__(self, module: nn.Module, input_shapes: Sequence[Shape], *, tf32: bool) -> None:
        self._module = module
        self._inputs = [torch.from_numpy(array).cuda() for array in random_inputs(input_shapes)]
        self._tf32 = tf32

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """See `Engine.run`."""
        with tf32_allowed(self._tf32), torch.inference_mode():
            outputs = self._module(*(torch.from_numpy(array).cuda() for array in inputs))
        return [item.cpu().numpy() for item in ([outputs] if isinstance(outputs, Tensor) else outputs)]

    def call(self) -> None:
        """See `Engine.call`."""
        with tf32_allowed(self._tf32), torch.inference_mode():
            self._module(*self._inputs)
        torch.cuda.synchronize()

    def time_ms(self) -> float:
        """Time one call between two CUDA events."""
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with tf32_allowed(self._tf32), torch.inference_mode():
            started.record()
            self._module(*self._inputs)
            ended.record()
        torch.cuda.synchronize()
        return float(started.elapsed_time(ended))


@latency_backends.register("torch")
class TorchBackend(LatencyBackend):
    """PyTorch in eager mode on the CPU, float32."""

    name = "torch"

    @classmethod
    def available(cls) -> str | None:
        """See `LatencyBackend.available`; PyTorch is always there."""
        return None

    def version(self) -> str:
        """See `LatencyBackend.version`."""
        return torch.__version__

    def prepare(self, module: nn.Module, input_shapes: Sequence[Shape], *, threads: int) -> Engine:
        """See `LatencyBackend.prepare`; the module is copied, so later changes to it do not reach the engine."""
        self.require_available()
        check_shapes(input_shapes)
        check_threads(threads)
        return self._engine(copy.deepcopy(module).cpu().eval(), input_shapes, threads)

    def _engine(self, module: nn.Module, input_shapes: Sequence[Shape], threads: int) -> Engine:
        return TorchEngine(module, input_shapes, threads)


@latency_backends.register("torch_compiled")
class CompiledTorchBackend(TorchBackend):
    """PyTorch compiled by Inductor on the CPU, float32; every network takes tens of seconds to compile."""

    name = "torch_compiled"

    @classmethod
    def available(cls) -> str | None:
        """See `LatencyBackend.available`; Inductor needs a C++ compiler."""
        return why_not()

    def _engine(self, module: nn.Module, input_shapes: Sequence[Shape], threads: int) -> Engine:
        return _compile(module, lambda compiled: TorchEngine(compiled, input_shapes, threads))


@latency_backends.register("torch_cuda")
class CudaTorchBackend(TorchBackend):
    """PyTorch in eager mode on the first CUDA device, float32 or TF32, timed by CUDA events."""

    name = "torch_cuda"
    precisions: ClassVar[tuple[str, ...]] = ("float32", "tf32")

    @classmethod
    def available(cls) -> str | None:
        """See `LatencyBackend.available`."""
        if torch.cuda.is_available():
            return None
        return "no CUDA device; needs an NVIDIA GPU with its driver and `pip install torch` with CUDA"

    def device(self) -> str:
        """See `LatencyBackend.device`."""
        return torch.cuda.get_device_name(0)

    def clock_mhz(self) -> float | None:
        """See `LatencyBackend.clock_mhz`."""
        return cuda_clock_mhz()

    def _engine(self, module: nn.Module, input_shapes: Sequence[Shape], threads: int) -> Engine:
        return CudaEngine(module.cuda(), input_shapes, tf32=self.precision == "tf32")


@latency_backends.register("torch_cuda_compiled")
class CompiledCudaTorchBackend(CudaTorchBackend):
    """PyTorch compiled by Inductor on the first CUDA device, float32 or TF32, timed by CUDA events."""

    name = "torch_cuda_compiled"

    @classmethod
    def available(cls) -> str | None:
        """See `LatencyBackend.available`; beside the device, Inductor needs Triton and a C++ compiler."""
        reason = super().available() or why_not()
        if reason is None and find_spec("triton") is None:
            reason = "triton not installed, which Inductor writes kernels for GPUs in; run `pip install triton`"
        return reason

    def _engine(self, module: nn.Module, input_shapes: Sequence[Shape], threads: int) -> Engine:
        tf32 = self.precision == "tf32"
        return _compile(module.cuda(), lambda compiled: CudaEngine(compiled, input_shapes, tf32=tf32))


def _compile(module: nn.Module, make: Callable[[nn.Module], Engine]) -> Engine:
    # Dynamo keeps compiled code per function, not per module: without a reset a table of hundreds of operators hits
    # its limit of versions of one forward, after which it would run eagerly and its times would be another engine's.
    torch.compiler.reset()
    try:
        compiled = torch.compile(module, fullgraph=True, dynamic=False)
        assert isinstance(compiled, nn.Module)
        engine = make(compiled)
        # Compiling happens in the first call: here, where a refusal is told as one, and never in a timed call. With the
        # threads of the timed calls, since Inductor writes their number into the code.
        engine.time_ms()
    except RuntimeError as err:
        why = (str(err).strip() or type(err).__name__).splitlines()[0]
        raise BackendError(f"torch.compile refuses {type(module).__name__}: {why}") from err
    return engine
