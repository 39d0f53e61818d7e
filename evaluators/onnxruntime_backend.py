"""ONNX Runtime on the CPU: the default engine for tables and networks.

Reference: ONNX Runtime, https://onnxruntime.ai/docs/performance/tune-performance/threading.html
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from glioma_nas.errors import BackendError
from glioma_nas.latency_backend import Array, Engine, OnnxBackend, check_shapes, check_threads, random_inputs
from glioma_nas.latency_records import Shape
from glioma_nas.onnx_export import BATCH_AXIS
from glioma_nas.registry import latency_backends


class OnnxRuntimeEngine(Engine):
    """A session with the inputs of its timed calls."""

    def __init__(self, session: Any, input_shapes: Sequence[Shape]) -> None:
        self._session = session
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


@latency_backends.register("onnxruntime")
class OnnxRuntimeBackend(OnnxBackend):
    """ONNX Runtime, CPU, float32, all graph optimisations, operators one after another."""

    name = "onnxruntime"

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
        try:
            session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as err:
            # The library's own exception classes derive from RuntimeError only in some versions.
            if not type(err).__module__.startswith("onnxruntime"):
                raise
            raise BackendError(
                f"ONNX Runtime {self.version()} refuses the model: {str(err).strip().splitlines()[0]}"
            ) from err
        return OnnxRuntimeEngine(session, input_shapes)
