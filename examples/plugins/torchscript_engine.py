"""A latency backend in one file: PyTorch's traced and frozen graph, as C++ programs load it.

``plugins: [torchscript_engine.py]`` and ``latency: {backend: torchscript}``. Warm-up, repetition and statistics are the
same for every backend, so a backend only says how to prepare a network and how to call it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn

from glioma_nas.latency_backend import Array, Engine, LatencyBackend, check_shapes, check_threads, random_inputs
from glioma_nas.latency_records import Shape
from glioma_nas.registry import latency_backends


class TorchScriptEngine(Engine):
    """A traced network with the inputs of its timed calls."""

    def __init__(self, module: nn.Module, input_shapes: Sequence[Shape], threads: int) -> None:
        self._threads = threads
        self._inputs = [torch.from_numpy(array) for array in random_inputs(input_shapes)]
        with torch.inference_mode():
            self._graph = torch.jit.freeze(torch.jit.trace(module, tuple(self._inputs)))

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """See `Engine.run`."""
        with torch.inference_mode():
            return [self._graph(*(torch.from_numpy(array) for array in inputs)).numpy()]

    def call(self) -> None:
        """See `Engine.call`."""
        with torch.inference_mode():
            self._graph(*self._inputs)

    def time_ms(self) -> float:
        """Time one call with this engine's number of threads."""
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            return super().time_ms()
        finally:
            torch.set_num_threads(before)


@latency_backends.register("torchscript")
class TorchScriptBackend(LatencyBackend):
    """PyTorch's traced and frozen graph on the CPU, float32."""

    name = "torchscript"

    @classmethod
    def available(cls) -> str | None:
        """See `LatencyBackend.available`; it comes with PyTorch."""
        return None

    def version(self) -> str:
        """See `LatencyBackend.version`."""
        return torch.__version__

    def prepare(self, module: nn.Module, input_shapes: Sequence[Shape], *, threads: int) -> Engine:
        """See `LatencyBackend.prepare`; the caller's module stays as it is."""
        check_shapes(input_shapes)
        check_threads(threads)
        return TorchScriptEngine(copy.deepcopy(module).cpu().eval(), input_shapes, threads)
