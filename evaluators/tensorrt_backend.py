"""TensorRT on NVIDIA GPUs, in both its flavours: ``tensorrt`` (NVIDIA's own index) and ``tensorrt_rtx`` (on PyPI).

They share an interface, so one class serves both, but they are different engines: each has a name of its own, a
table of one refuses times of the other, and an engine file says which flavour and version it is of.

An engine is built from ONNX. Building needs no GPU with the RTX flavour, which compiles for named generations of GPUs
and finishes on the machine that runs it; ``tensorrt`` builds and times kernels on the GPU itself. Networks are strongly
typed: the types in the model decide the precision, so 16 and 8 bits are made there (`glioma_nas.model_precision`).

Reference: TensorRT, https://docs.nvidia.com/deeplearning/tensorrt and /tensorrt-rtx (engine compatibility, IProfiler).
"""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import torch

from glioma_nas.engine_files import EngineLabel, cached_engine, engine_cache_folder, load_engine, save_engine
from glioma_nas.errors import BackendError, did_you_mean
from glioma_nas.files import write_bytes
from glioma_nas.latency_backend import Array, Engine, OnnxBackend, check_shapes, check_threads, random_inputs
from glioma_nas.latency_devices import cuda_clock_mhz
from glioma_nas.latency_records import Shape
from glioma_nas.registry import latency_backends

_logger = logging.getLogger(__name__)

CURRENT_GPU = "current"
_WORKSPACE_BYTES = 2 << 30
BUILDER_SETTINGS = ("strongly typed", "no TF32", f"workspace {_WORKSPACE_BYTES} B", "detailed names")
"""What `TensorRtBackend` tells every builder; part of what an engine is known by, so change both together."""


class TensorRtEngine(Engine):
    """An execution context with its buffers on the first CUDA device, timed by CUDA events."""

    def __init__(self, library: Any, engine: Any, logger: Any, input_shapes: Sequence[Shape]) -> None:
        self._library, self._engine, self._logger = library, engine, logger
        self._stream = torch.cuda.Stream()
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        modes = {name: engine.get_tensor_mode(name) for name in names}
        inputs = [name for name in names if modes[name] == library.TensorIOMode.INPUT]
        if len(inputs) != len(input_shapes):
            raise BackendError(f"the engine takes {len(inputs)} inputs, {len(input_shapes)} shapes were given")
        arrays = dict(zip(inputs, random_inputs(input_shapes), strict=True))
        self._inputs = {name: torch.from_numpy(array).cuda() for name, array in arrays.items()}
        self._context = open_context(engine, self._inputs, logger)
        self._outputs = {
            name: torch.empty(tuple(self._context.get_tensor_shape(name)), dtype=torch.float32, device="cuda")
            for name in names
            if name not in self._inputs
        }
        bind(self._context, self._outputs)

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """See `Engine.run`."""
        for tensor, array in zip(self._inputs.values(), inputs, strict=True):
            tensor.copy_(torch.from_numpy(array))
        self.call()
        return [tensor.cpu().numpy() for tensor in self._outputs.values()]

    def call(self) -> None:
        """See `Engine.call`."""
        self._enqueue(self._context)
        self._stream.synchronize()

    def time_ms(self) -> float:
        """Time one call between two CUDA events on the engine's stream."""
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        started.record(self._stream)
        self._enqueue(self._context)
        ended.record(self._stream)
        self._stream.synchronize()
        return float(started.elapsed_time(ended))

    def layer_times_ms(self, runs: int) -> dict[str, float]:
        """See `Engine.layer_times_ms`; the times are those that TensorRT gives its IProfiler."""
        recorder = _layer_recorder(self._library)
        context = open_context(self._engine, self._inputs, self._logger, profiler=recorder)
        bind(context, self._outputs)
        for _ in range(runs + 1):
            self._enqueue(context)
            self._stream.synchronize()
        return {name: median(values[1:]) for name, values in recorder.times.items()}

    def inspect(self) -> dict[str, Any]:
        """See `Engine.inspect`; the engine inspector's kernels, formats and precisions."""
        inspector = self._engine.create_engine_inspector()
        inspector.execution_context = self._context
        found = json.loads(inspector.get_engine_information(self._library.LayerInformationFormat.JSON))
        assert isinstance(found, dict)
        return found

    def _enqueue(self, context: Any) -> None:
        if not context.execute_async_v3(self._stream.cuda_stream):
            raise BackendError(f"the engine stopped: {self._logger.last_error()}")


def open_context(engine: Any, inputs: Mapping[str, torch.Tensor], logger: Any, *, profiler: Any = None) -> Any:
    """Make an execution context of a TensorRT engine and bind its inputs.

    A profiler slows every call down, and a context that had one cannot be relied on to lose it: layer times are taken
    in a context of their own, so that calls that are timed later run as they did before.

    Args:
        engine: The deserialised engine.
        inputs: Name → tensor that the context reads from.
        logger: What TensorRT told.
        profiler: An IProfiler; none for a context that is timed as a whole.

    Raises:
        BackendError: The engine refuses a shape.
    """
    context = engine.create_execution_context()
    if profiler is not None:
        context.profiler = profiler
    for name, tensor in inputs.items():
        if not context.set_input_shape(name, tuple(tensor.shape)):
            raise BackendError(f"the engine refuses shape {tuple(tensor.shape)} for '{name}': {logger.last_error()}")
    bind(context, inputs)
    return context


def bind(context: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Tell an execution context where its tensors lie."""
    for name, tensor in tensors.items():
        context.set_tensor_address(name, tensor.data_ptr())


class TensorRtBackend(OnnxBackend):
    """What both flavours share; subclasses name their library.

    Attributes:
        library: Python module of the flavour.
        install: How it is installed.
    """

    precisions: ClassVar[tuple[str, ...]] = ("float32", "float16", "int8")
    symmetric_int8 = True
    file_suffix = ".plan"
    library: ClassVar[str] = ""
    install: ClassVar[str] = ""

    @classmethod
    def buildable(cls) -> str | None:
        """Return None if engines can be built here, else why not, with the pip line."""
        missing = [package for package in ("onnx", cls.library) if find_spec(package) is None]
        return f"{' and '.join(missing)} not installed; run `{cls.install}`" if missing else None

    @classmethod
    def available(cls) -> str | None:
        """See `LatencyBackend.available`: running an engine needs a GPU."""
        return cls.buildable() or cls._without_gpu()

    @classmethod
    def _without_gpu(cls) -> str | None:
        if torch.cuda.is_available():
            return None
        return (
            f"{cls.library} is installed, but there is no CUDA device to run engines on; "
            "needs an NVIDIA GPU with its driver and `pip install torch` with CUDA"
        )

    def version(self) -> str:
        """See `LatencyBackend.version`."""
        return str(self._module().__version__)

    def device(self) -> str:
        """See `LatencyBackend.device`."""
        return torch.cuda.get_device_name(0)

    def clock_mhz(self) -> float | None:
        """See `LatencyBackend.clock_mhz`."""
        return cuda_clock_mhz()

    def load(self, model: bytes, input_shapes: Sequence[Shape], *, threads: int) -> Engine:
        """See `OnnxBackend.load`; the engine is built once for each model, and kept in the cache."""
        self.require_available()
        check_shapes(input_shapes)
        check_threads(threads)
        plan, label = self.build(model, input_shapes, cache=engine_cache_folder())
        return self.open(plan, label, input_shapes)

    def build(
        self,
        model: bytes,
        input_shapes: Sequence[Shape],
        *,
        gpus: Sequence[str] = (CURRENT_GPU,),
        max_batch: int | None = None,
        cache: Path | None = None,
    ) -> tuple[bytes, EngineLabel]:
        """Build an engine of an ONNX model.

        Args:
            model: Serialised ONNX model in this backend's precision.
            input_shapes: Shape of each input, the one to be fastest for.
            gpus: Generations the engine is for, such as ``SM75`` and ``SM120``, or ``current``; RTX flavour only.
            max_batch: Largest batch it accepts, where the model leaves the batch open; none: that of the shapes.
            cache: Folder of engines built before.

        Returns:
            The engine, and what it is of.

        Raises:
            BackendError: The library is missing or cannot parse or build the model; an operator or GPU it does not
                know is named.
        """
        reason = self.buildable()
        if reason is not None:
            raise BackendError(f"latency backend '{self.name}' cannot build engines here: {reason}")
        check_shapes(input_shapes)
        label = EngineLabel.of(
            model,
            flavour=self.name,
            version=self.version(),
            precision=self.precision,
            gpus=tuple(self.device() if gpu == CURRENT_GPU and torch.cuda.is_available() else gpu for gpu in gpus),
            input_shapes=input_shapes,
            max_batch=max_batch,
            settings=BUILDER_SETTINGS,
        )
        plan = cached_engine(
            cache, label, lambda: self._build(model, input_shapes, gpus=gpus, max_batch=max_batch, cache=cache)
        )
        return plan, label

    def write_file(
        self, model: bytes, path: Path, input_shape: Shape, *, max_batch: int, gpus: Sequence[str] = ()
    ) -> None:
        """See `OnnxBackend.write_file`: the engine in ``path``, what it is of beside it; built once, as for `load`."""
        plan, label = self.build(
            model,
            [input_shape],
            max_batch=max_batch,
            gpus=tuple(gpus) or (CURRENT_GPU,),
            cache=engine_cache_folder(),
        )
        save_engine(path, plan, label)

    def read_file(self, path: Path, input_shape: Shape, *, threads: int) -> Engine:
        """See `OnnxBackend.read_file`."""
        plan, label = load_engine(path)
        return self.open(plan, label, [input_shape])

    def open(self, plan: bytes, label: EngineLabel, input_shapes: Sequence[Shape]) -> TensorRtEngine:
        """Load a built engine onto the GPU.

        Raises:
            BackendError: It is of the other flavour or another version, damaged, or there is no GPU.
        """
        label.require(flavour=self.name, version=self.version())
        label.require_content(plan)
        self.require_available()
        library, logger = self._module(), self._logger()
        engine = library.Runtime(logger).deserialize_cuda_engine(plan)
        if engine is None:
            raise BackendError(f"{self.name} {self.version()} cannot load the engine: {logger.last_error()}")
        return TensorRtEngine(library, engine, logger, input_shapes)

    def _build(
        self,
        model: bytes,
        input_shapes: Sequence[Shape],
        *,
        gpus: Sequence[str],
        max_batch: int | None,
        cache: Path | None,
    ) -> bytes:
        library, logger = self._module(), self._logger()
        builder = library.Builder(logger)
        network = builder.create_network(1 << int(library.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = library.OnnxParser(network, logger)
        if not parser.parse(model):
            raise BackendError(f"{self.name} {self.version()} cannot parse the model: {_parser_errors(parser)}")
        config = builder.create_builder_config()
        config.clear_flag(library.BuilderFlag.TF32)  # TF32 rounds the inputs of float32 convolutions to 10 bits
        config.set_memory_pool_limit(library.MemoryPoolType.WORKSPACE, _WORKSPACE_BYTES)
        # Keeps the names of the model's operators in the engine, to which layer times are mapped back.
        config.profiling_verbosity = library.ProfilingVerbosity.DETAILED
        self._choose_gpus(library, config, gpus)
        profile = builder.create_optimization_profile()
        for index, shape in enumerate(input_shapes):
            largest = (max(max_batch or shape[0], shape[0]), *shape[1:])
            smallest = (1 if max_batch else shape[0], *shape[1:])
            profile.set_shape(network.get_input(index).name, smallest, tuple(shape), largest)
        config.add_optimization_profile(profile)
        timings = self._timing_cache(cache)
        if timings is not None:
            open_timing_cache(config, timings)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise BackendError(f"{self.name} {self.version()} cannot build the engine: {logger.last_error()}")
        if timings is not None:
            write_bytes(timings, bytes(config.get_timing_cache().serialize()))
        return bytes(plan)

    def _choose_gpus(self, library: Any, config: Any, gpus: Sequence[str]) -> None:
        if tuple(gpus) == (CURRENT_GPU,):
            return
        known = getattr(library, "ComputeCapability", None)
        if known is None:
            raise BackendError(f"{self.name} builds for the GPU it runs on only; leave out the GPUs {', '.join(gpus)}")
        config.num_compute_capabilities = len(gpus)
        for index, gpu in enumerate(gpus):
            if gpu not in known.__members__ or gpu == "NONE":
                names = [name for name in known.__members__ if name.startswith("SM")]
                raise BackendError(f"{self.name} knows no GPU generation '{gpu}': {did_you_mean(gpu, names)}")
            config.set_compute_capability(known.__members__[gpu], index)

    def _timing_cache(self, cache: Path | None) -> Path | None:
        """Return where the builder keeps what it timed; the RTX flavour times no kernels when it builds, so nowhere."""
        return None

    def _module(self) -> Any:  # the library has no types
        return importlib.import_module(self.library)

    def _logger(self) -> Any:  # a class made from a base that is known at run time only
        library = self._module()

        class Logger(library.ILogger):  # type: ignore[name-defined]  # as above
            def __init__(self) -> None:
                library.ILogger.__init__(self)
                self.errors: list[str] = []

            def log(self, severity: Any, message: str) -> None:
                if severity in (library.ILogger.ERROR, library.ILogger.INTERNAL_ERROR):
                    self.errors.append(message)

            def last_error(self) -> str:
                return " ".join(self.errors[0].split()) if self.errors else "it does not say why"

        return Logger()


@latency_backends.register("tensorrt")
class TensorRtProperBackend(TensorRtBackend):
    """TensorRT, one CUDA device; builds engines on the GPU it runs on and times their kernels there."""

    name = "tensorrt"
    library = "tensorrt"
    install = "pip install onnx tensorrt --extra-index-url https://pypi.nvidia.com"

    @classmethod
    def buildable(cls) -> str | None:
        """See `LatencyBackend.buildable`: this flavour times kernels on the GPU when it builds."""
        return super().buildable() or cls._without_gpu()

    def write_file(
        self, model: bytes, path: Path, input_shape: Shape, *, max_batch: int, gpus: Sequence[str] = ()
    ) -> None:
        """See `OnnxBackend.write_file`; for the GPU it is built on, whatever ``gpus`` says of the other flavour."""
        super().write_file(model, path, input_shape, max_batch=max_batch)

    def _timing_cache(self, cache: Path | None) -> Path | None:
        if cache is None:
            return None
        return cache / f"timing_{self.version()}_{self.device().replace(' ', '_').replace('/', '_')}.cache"


@latency_backends.register("tensorrt_rtx")
class TensorRtRtxBackend(TensorRtBackend):
    """TensorRT for RTX, one CUDA device; builds engines without a GPU, for SM75 to SM121."""

    name = "tensorrt_rtx"
    library = "tensorrt_rtx"
    install = "pip install onnx tensorrt-rtx-cu13"


def open_timing_cache(config: Any, path: Path) -> None:
    """Give a builder's configuration what was timed before; a similar network then builds in a fraction of the time.

    A cache that is damaged, or of another version or GPU, is started anew.

    Args:
        config: TensorRT's builder configuration.
        path: The cache; need not exist.
    """
    known = path.read_bytes() if path.is_file() else b""
    for content in (known, b""):
        timings = config.create_timing_cache(content)
        if timings is not None and config.set_timing_cache(timings, ignore_mismatch=False):
            return
        _logger.warning("%s: timing cache is of another version or GPU, or damaged; started anew", path)


def _layer_recorder(library: Any) -> Any:  # as for the logger
    class Recorder(library.IProfiler):
        def __init__(self) -> None:
            library.IProfiler.__init__(self)
            self.times: dict[str, list[float]] = {}

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.times.setdefault(layer_name, []).append(ms)

    return Recorder()


def _parser_errors(parser: Any) -> str:
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    told = [
        f"operator {error.node_operator()} of '{error.node_name()}': {error.desc()}"
        for error in errors
        if error.node_operator()
    ]
    return "; ".join(told or [error.desc() for error in errors][:1]) or "it does not say why"
