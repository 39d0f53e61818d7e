"""PyTorch itself as an engine: eager, inference mode, on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from glioma_nas.latency_backend import Array, Engine, LatencyBackend, check_shapes, check_threads, random_inputs
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
        return [outputs.numpy()] if isinstance(outputs, torch.Tensor) else [output.numpy() for output in outputs]

    def call(self) -> None:
        """See `Engine.call`."""
        with torch.inference_mode():
            self._module(*self._inputs)

    def time_ms(self) -> float:
        """Time one call; switching the number of threads is not part of it."""
        with _threads(self._count):
            return super().time_ms()


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
        check_shapes(input_shapes)
        check_threads(threads)
        return TorchEngine(copy.deepcopy(module).cpu().eval(), input_shapes, threads)
