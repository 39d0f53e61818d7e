"""OpenVINO on the CPU: about twice as fast as ONNX Runtime on x86 processors, in float32, bfloat16 or 8-bit integers.

Reference: OpenVINO, https://docs.openvino.ai (performance hints and inference precision of the CPU plugin).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import numpy as np

from glioma_nas.errors import BackendError, StorageError
from glioma_nas.latency_backend import Array, Engine, OnnxBackend, check_shapes, check_threads, random_inputs
from glioma_nas.latency_records import Shape
from glioma_nas.registry import latency_backends

_INFERENCE_TYPES = {"float32": "f32", "bfloat16": "bf16", "int8": "f32"}


class OpenVinoEngine(Engine):
    """One inference request with the inputs of its timed calls."""

    def __init__(self, request: Any, inputs: Sequence[Array], profiled: Callable[[], Any]) -> None:
        self._request = request
        self._inputs = list(inputs)
        self._profiled = profiled

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """See `Engine.run`."""
        outputs = self._request.infer(list(inputs), share_inputs=True)
        return [np.array(outputs[index], dtype=np.float32) for index in range(len(outputs))]

    def call(self) -> None:
        """See `Engine.call`."""
        self._request.infer(self._inputs, share_inputs=True, share_outputs=True)

    def layer_times_ms(self, runs: int) -> dict[str, float]:
        """See `Engine.layer_times_ms`; the model is compiled again for it, since profiling slows every call down."""
        request = self._profiled()
        request.infer(self._inputs, share_inputs=True)
        times: dict[str, list[float]] = {}
        for _ in range(runs):
            request.infer(self._inputs, share_inputs=True)
            for layer in request.profiling_info:
                if layer.status.name == "EXECUTED":
                    times.setdefault(layer.node_name, []).append(layer.real_time.total_seconds() * 1000)
        return {name: median(values) for name, values in times.items()}

    def inspect(self) -> dict[str, Any]:
        """See `Engine.inspect`; kernel, precision, layouts and the model's operators of every layer."""
        fields = {"Kernel": "primitiveType", "Precision": "runtimePrecision", "Layouts": "outputLayouts"}
        layers = []
        for node in self._request.get_compiled_model().get_runtime_model().get_ordered_ops():
            info = node.get_rt_info()
            told = {key: str(info[name].value) for key, name in fields.items() if name in info}
            made_of = str(info["originalLayersNames"].value) if "originalLayersNames" in info else ""
            layers.append({"Name": node.get_friendly_name(), **told, "MadeOf": made_of.split(",") if made_of else []})
        return {"Layers": layers}


@latency_backends.register("openvino")
class OpenVinoBackend(OnnxBackend):
    """OpenVINO, CPU, one request at a time (latency hint)."""

    name = "openvino"
    precisions: ClassVar[tuple[str, ...]] = ("float32", "bfloat16", "int8")
    file_suffix = ".xml"

    @classmethod
    def available(cls) -> str | None:
        """See `LatencyBackend.available`."""
        missing = [package for package in ("onnx", "openvino") if find_spec(package) is None]
        return f"{' and '.join(missing)} not installed; run `pip install onnx openvino`" if missing else None

    def lacking(self) -> str | None:
        """See `LatencyBackend.lacking`: bfloat16 is a hint to OpenVINO, which computes in float32 without it."""
        import openvino

        if self.precision != "bfloat16":
            return None
        has = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        return (
            None if "BF16" in has else f"this processor lacks bfloat16 (it has {', '.join(has)}); use float32 or int8"
        )

    def version(self) -> str:
        """See `LatencyBackend.version`."""
        return version("openvino")

    def load(self, model: bytes, input_shapes: Sequence[Shape], *, threads: int) -> Engine:
        """See `OnnxBackend.load`; an open batch size becomes that of ``input_shapes``."""
        return self._compile(model, input_shapes, threads)

    def write_file(
        self, model: bytes, path: Path, input_shape: Shape, *, max_batch: int, gpus: Sequence[str] = ()
    ) -> None:
        """See `OnnxBackend.write_file`: OpenVINO's IR, the graph in ``path`` and the float32 weights beside it."""
        self.require_available()
        import openvino

        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            openvino.save_model(openvino.Core().read_model(model), str(path), compress_to_fp16=False)
        except RuntimeError as err:
            raise BackendError(f"OpenVINO {self.version()} refuses the model: {_reason(str(err))}") from err

    def read_file(self, path: Path, input_shape: Shape, *, threads: int) -> Engine:
        """See `OnnxBackend.read_file`."""
        for part in (path, path.with_suffix(".bin")):
            if not part.is_file():
                raise StorageError(f"{part}: no such file; export the network again")
        return self._compile(str(path), [input_shape], threads)

    def _compile(self, model: bytes | str, input_shapes: Sequence[Shape], threads: int) -> Engine:
        self.require_available()
        check_shapes(input_shapes)
        check_threads(threads)
        import openvino

        core = openvino.Core()
        try:
            network = core.read_model(model)
            if len(network.inputs) != len(input_shapes):
                raise BackendError(
                    f"the ONNX model takes {len(network.inputs)} inputs, {len(input_shapes)} shapes were given"
                )
            network.reshape(dict(zip(network.inputs, map(list, input_shapes), strict=True)))

            def request(*, profiled: bool) -> Any:
                options = {
                    "PERFORMANCE_HINT": "LATENCY",
                    "NUM_STREAMS": "1",
                    "INFERENCE_NUM_THREADS": str(threads),
                    "INFERENCE_PRECISION_HINT": _INFERENCE_TYPES[self.precision],
                    # Timed side by side with other engines: where the threads run is left to the system.
                    "ENABLE_CPU_PINNING": "NO",
                    "PERF_COUNT": "YES" if profiled else "NO",
                }
                return core.compile_model(network, "CPU", options).create_infer_request()

            return OpenVinoEngine(request(profiled=False), random_inputs(input_shapes), lambda: request(profiled=True))
        except RuntimeError as err:
            raise BackendError(f"OpenVINO {self.version()} refuses the model: {_reason(str(err))}") from err


def _reason(message: str) -> str:
    # Around the one line that says why stand places in its source, headings and advice.
    noise = ("Exception from", "Check '", "Summary:", "To facilitate")
    lines = [line.strip() for line in message.splitlines() if line.strip() and not line.strip().startswith(noise)]
    return " ".join(lines)[:300] or " ".join(message.split())[:300]
