"""ONNX Runtime on the CPU: the default engine for tables and networks.

Reference: ONNX Runtime, https://onnxruntime.ai/docs/performance/tune-performance/threading.html
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

from glioma_nas.errors import BackendError
from glioma_nas.latency_backend import Array, Engine, OnnxBackend, check_shapes, check_threads, random_inputs
from glioma_nas.latency_records import Shape
from glioma_nas.onnx_export import BATCH_AXIS
from glioma_nas.registry import latency_backends


class OnnxRuntimeEngine(Engine):
    """A session with the inputs of its timed calls."""

    def __init__(self, session: Any, input_shapes: Sequence[Shape], profiled: Callable[[str], Any]) -> None:
        self._session = session
        self._profiled = profiled
        self._names = [argument.name for argument in session.get_inputs()]
        if len(self._names) != len(input_shapes):
            raise BackendError(f"the ONNX model takes {len(self._names)} inputs, {len(input_shapes)} shapes were given")
        self._feed = dict(zip(self._names, random_inputs(input_shapes), strict=True))

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """See `Engine.run`."""
        outputs: list[Array] = self._session.run(None, dict(zip(self._names, inputs, strict=True)))
        return outputs

    def call(self) -> None:
        """See `Engine.call`."""
        self._session.run(None, self._feed)

    def layer_times_ms(self, runs: int) -> dict[str, float]:
        """See `Engine.layer_times_ms`; a second session is made for it, since profiling slows every call down."""
        with tempfile.TemporaryDirectory(prefix="glioma_nas_") as folder:
            session = self._profiled(str(Path(folder) / "profile"))
            for _ in range(runs + 1):
                session.run(None, self._feed)
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        times: dict[str, list[float]] = {}
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                times.setdefault(event["name"].removesuffix("_kernel_time"), []).append(event["dur"] / 1000)
        return {name: median(values[1:]) for name, values in times.items()}


@latency_backends.register("onnxruntime")
class OnnxRuntimeBackend(OnnxBackend):
    """ONNX Runtime, CPU, all graph optimisations, operators one after another."""

    name = "onnxruntime"
    precisions: ClassVar[tuple[str, ...]] = ("float32", "int8")

    @classmethod
    def available(cls) -> str | None:
        """See `LatencyBackend.available`."""
        missing = [package for package in ("onnx", "onnxruntime") if find_spec(package) is None]
        return f"{' and '.join(missing)} not installed; run `pip install onnx onnxruntime`" if missing else None

    def version(self) -> str:
        """See `LatencyBackend.version`."""
        return version("onnxruntime")

    def load(self, model: bytes, input_shapes: Sequence[Shape], *, threads: int) -> Engine:
        """See `OnnxBackend.load`; an open batch size becomes that of ``input_shapes``."""
        self.require_available()
        check_shapes(input_shapes)
        check_threads(threads)
        import onnxruntime

        def session(profile: str | None = None) -> Any:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            options.inter_op_num_threads = 1
            options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
            options.log_severity_level = 3
            # Several sessions are timed in turn: the idle threads of one must not spin while another runs.
            options.add_session_config_entry("session.force_spinning_stop", "1")
            # A known batch size lets the optimiser turn the sizes of every resize into constants.
            options.add_free_dimension_override_by_name(BATCH_AXIS, input_shapes[0][0])
            if profile is not None:
                options.enable_profiling = True
                options.profile_file_prefix = profile
            return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

        try:
            return OnnxRuntimeEngine(session(), input_shapes, session)
        except Exception as err:
            # The library's own exception classes derive from RuntimeError only in some versions.
            if not type(err).__module__.startswith("onnxruntime"):
                raise
            raise BackendError(
                f"ONNX Runtime {self.version()} refuses the model: {str(err).strip().splitlines()[0]}"
            ) from err
