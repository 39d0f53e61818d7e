"""The files that a trained network is delivered as, each proved to compute what PyTorch computes or refused.

``onnx`` for ONNX Runtime, ``openvino`` (IR), ``tensorrt`` and ``tensorrt_rtx`` (engines), ``torch_export`` (PyTorch's
own exchange format, without TorchScript), ``safetensors`` (weights alone). ``onnx_int8``, ``openvino_int8`` and so on
compute in 8-bit integers calibrated on training slices, ``tensorrt_float16`` in 16-bit floats. All but ``onnx_int8``
leave the batch size open. What cannot be run on the machine that exports,
such as a GPU's engine without a GPU, is marked as not compared, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from glioma_nas.config import ExportConfig
from glioma_nas.engine_files import label_path
from glioma_nas.errors import BackendError, did_you_mean
from glioma_nas.files import atomic_path, write_bytes
from glioma_nas.latency_backend import Array, Engine, OnnxBackend, open_onnx_backend
from glioma_nas.model_precision import to_int8
from glioma_nas.onnx_export import export_onnx, simplify_onnx
from glioma_nas.parity import Parity, compare
from glioma_nas.registry import latency_backends

_ENGINES = {
    "openvino": ("float32", "int8"),
    "tensorrt": ("float32", "float16", "int8"),
    "tensorrt_rtx": ("float32", "float16", "int8"),
}

# Format → backend and precision of an engine's own file.
_NATIVE = {
    name if precision == "float32" else f"{name}_{precision}": (name, precision)
    for name, precisions in _ENGINES.items()
    for precision in precisions
}

FORMATS = ("onnx", "onnx_int8", *_NATIVE, "torch_export", "safetensors")

MAX_BATCH = 32


@dataclass(frozen=True)
class ExportedFile:
    """A network in one format.

    Attributes:
        path: The file; what belongs to it lies beside it under the same stem.
        engine: It, loaded and ready to be compared; none where there is nothing to run or it cannot be run here.
        not_compared: Why there is no engine.
    """

    path: Path
    engine: Engine | None
    not_compared: str = ""

    def remove(self) -> None:
        """Delete the file and what belongs to it: an IR's weights, an engine's label."""
        for part in (self.path, self.path.with_suffix(".bin"), label_path(self.path)):
            part.unlink(missing_ok=True)


@dataclass(frozen=True)
class ExportRequest:
    """What is to be exported.

    Attributes:
        network: In evaluation mode, on the CPU.
        input_shape: (1, C, H, W).
        opset: ONNX operator set.
        threads: Threads of the engines it is compared with.
        calibration: Training slices (N, C, H, W) that decide the scales of 8-bit integers.
        gpus: GPU generations that a ``tensorrt_rtx`` engine is built for.
    """

    network: nn.Module
    input_shape: tuple[int, int, int, int]
    opset: int
    threads: int
    calibration: Array
    gpus: tuple[str, ...]


@contextmanager
def kept_only_whole(exported: ExportedFile) -> Iterator[None]:
    """Delete a file, with what belongs to it, if the block fails: one that cannot be loaded, run or trusted."""
    try:
        yield
    except BaseException:
        exported.remove()
        raise


def check_formats(formats: Sequence[str]) -> None:
    """Make sure that every format is known and that what writes it is installed.

    Raises:
        BackendError: One is not; the message holds the pip line.
    """
    for kind in formats:
        if kind not in FORMATS:
            raise BackendError(f"export.formats: unknown format '{kind}': {did_you_mean(kind, FORMATS)}")
        if kind in _NATIVE:
            reason = latency_backends.get(_NATIVE[kind][0]).buildable()
            if reason is not None:
                raise BackendError(f"export.formats: '{kind}' cannot be written here: {reason}")


def export_file(request: ExportRequest, kind: str, stem: Path) -> ExportedFile:
    """Write a network in one format.

    Args:
        request: The network.
        kind: One of `FORMATS`.
        stem: Path without suffix.

    Raises:
        BackendError: The format is unknown, what writes it is not installed, or it cannot express the network.
    """
    writers: dict[str, Callable[[ExportRequest, Path], ExportedFile]] = {
        "onnx": _write_onnx,
        "onnx_int8": _write_int8,
        "torch_export": _write_torch_export,
        "safetensors": _write_safetensors,
    }
    check_formats([kind])
    if kind in _NATIVE:
        return _write_native(request, stem, *_NATIVE[kind])
    return writers[kind](request, stem)


def judge(
    network: nn.Module, exported: ExportedFile, images: Sequence[Array], limits: ExportConfig, *, reduced: bool
) -> Parity | str:
    """Compare a file's engine with PyTorch; delete the file if the engine fails or is refused.

    Args:
        network: What it was made of.
        exported: The file.
        images: Slices to compare on, each float32 (C, H, W).
        limits: The tolerances.
        reduced: Whether it computes in fewer bits than 32.

    Returns:
        How far it is from PyTorch; or why it is not compared, or why comparing it says nothing.

    Raises:
        BackendError: See `glioma_nas.parity.compare` and `glioma_nas.parity.Parity.require`.
    """
    if exported.engine is None:
        return exported.not_compared
    with kept_only_whole(exported):
        found = compare(network, exported.engine, images)
        empty = found.no_evidence(reduced=reduced)
        if empty is not None and found.mask_dice == 1:
            return empty
        found.require(limits, engine=exported.path.name, reduced=reduced)
    return found


def is_reduced(kind: str) -> bool:
    """Tell whether a format computes in fewer than 32 bits."""
    return kind.endswith(("_int8", "_float16"))


def _onnx_of(request: ExportRequest) -> bytes:
    model = export_onnx(request.network, [request.input_shape], opset=request.opset, dynamic_batch=True)
    return simplify_onnx(model)


def _write_onnx(request: ExportRequest, stem: Path) -> ExportedFile:
    return _written(stem.with_name(stem.name + ".onnx"), _onnx_of(request), request)


def _written(path: Path, model: bytes, request: ExportRequest) -> ExportedFile:
    """Write an ONNX model that ONNX Runtime takes; one that it refuses leaves no file."""
    engine = open_onnx_backend("onnxruntime").load(model, [request.input_shape], threads=request.threads)
    write_bytes(path, model)
    return ExportedFile(path, engine)


def _write_int8(request: ExportRequest, stem: Path) -> ExportedFile:
    # Fixed sizes first: the quantiser leaves operators alone whose shapes it does not know.
    model = to_int8(export_onnx(request.network, [request.input_shape], opset=request.opset), request.calibration)
    return _written(stem.with_name(stem.name + "_int8.onnx"), model, request)


def _write_native(request: ExportRequest, stem: Path, name: str, precision: str) -> ExportedFile:
    backend = latency_backends.get(name)()
    assert isinstance(backend, OnnxBackend)
    backend.precision = precision
    ending = "" if precision == "float32" else f"_{precision}"
    path = stem.with_name(stem.name + ending + backend.file_suffix)
    model = backend.convert(_onnx_of(request), request.calibration)
    with kept_only_whole(ExportedFile(path, None)):
        backend.write_file(model, path, request.input_shape, max_batch=MAX_BATCH, gpus=request.gpus)
        reason = backend.available()
        if reason is not None:
            return ExportedFile(path, None, reason)
        return ExportedFile(path, backend.read_file(path, request.input_shape, threads=request.threads))


def _write_torch_export(request: ExportRequest, stem: Path) -> ExportedFile:
    path = stem.with_name(stem.name + ".pt2")
    # An example batch of 1 would be taken for a constant.
    example = torch.zeros((2, *request.input_shape[1:]))
    try:
        with torch.no_grad():
            program = torch.export.export(
                request.network, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=MAX_BATCH)},)
            )
    except (RuntimeError, torch._dynamo.exc.TorchDynamoException, ValueError) as err:
        raise BackendError(f"torch.export refuses the network: {str(err).strip().splitlines()[0]}") from err
    with atomic_path(path) as temporary:
        torch.export.save(program, temporary)
    with kept_only_whole(ExportedFile(path, None)):
        return ExportedFile(path, _ProgramEngine(torch.export.load(path).module()))


def _write_safetensors(request: ExportRequest, stem: Path) -> ExportedFile:
    from safetensors.torch import save_file

    path = stem.with_name(stem.name + ".safetensors")
    state = {name: tensor.contiguous() for name, tensor in request.network.state_dict().items()}
    with atomic_path(path) as temporary:
        save_file(state, temporary)
    return ExportedFile(path, None, "weights alone: nothing to run")


class _ProgramEngine(Engine):
    # An exported program, run by PyTorch; compared, never timed.
    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        with torch.no_grad():
            return [np.asarray(self._module(*(torch.from_numpy(array) for array in inputs)).numpy())]

    def call(self) -> None:
        raise BackendError("an exported program is compared, not timed; time the backend 'torch'")
