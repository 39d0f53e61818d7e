"""Turn a float32 ONNX model into one that computes in 16-bit floats, or in 8-bit integers calibrated on real slices.

A model in 8 bits holds explicit quantise and dequantise operators around every convolution (the QDQ form). ONNX
Runtime, OpenVINO and TensorRT all read it. Weights get one scale for each output channel, activations one for each
tensor, from the smallest and largest value seen.

Reference: Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference,
CVPR 2018.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from glioma_nas.errors import BackendError
from glioma_nas.latency_backend import Array

_CONVOLUTIONS = ("Conv", "ConvTranspose")


def to_float16(model: bytes) -> bytes:
    """Return ``model`` with weights and activations in 16-bit floats; its inputs and outputs stay float32."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # weights too small for 16 bits are rounded; parity decides whether it matters
        converted = convert_float_to_float16(onnx.load_from_string(model), keep_io_types=True)
    data: bytes = converted.SerializeToString()
    return data


def to_int8(model: bytes, images: Array | Sequence[Array], *, symmetric: bool = False) -> bytes:
    """Return ``model`` with its convolutions in 8-bit integers.

    Args:
        model: Serialised ONNX model in float32.
        images: Slices (N, C, H, W), float32, whose activations decide the scales; of training cases, never of those
            that the result is judged on. For a model of several inputs as many arrays of the same N.
        symmetric: Signed activations around zero and biases left in floats, which TensorRT requires; else unsigned
            ones with an offset, which use all 256 values behind a ReLU.

    Raises:
        BackendError: There are no slices, or for another number of inputs; ONNX Runtime cannot quantise the model, or
            leaves a convolution of it in floats.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    given_images = [images] if isinstance(images, np.ndarray) else list(images)
    inputs = onnx.load_from_string(model).graph.input
    if len(inputs) != len(given_images) or len({len(each) for each in given_images}) > 1:
        raise BackendError(
            f"a model of {len(inputs)} inputs is calibrated on as many arrays of slices, "
            f"{[len(each) for each in given_images]} slices were given"
        )
    if len(given_images[0]) == 0:
        raise BackendError("no slices to calibrate the 8-bit model on; give at least one (export.calibration_slices)")
    sizes = [item.type.tensor_type.shape.dim[0].dim_value or 1 for item in inputs]
    batches = zip(*(_batches(each, size) for each, size in zip(given_images, sizes, strict=True)), strict=True)

    class Slices(CalibrationDataReader):
        def get_next(self) -> dict[str, Array] | None:
            batch = next(batches, None)
            return None if batch is None else dict(zip([item.name for item in inputs], batch, strict=True))

    with tempfile.TemporaryDirectory(prefix="glioma_nas_") as folder, warnings.catch_warnings(), _quiet():
        warnings.simplefilter("ignore")  # advice on symbolic shapes, which a model of fixed sizes does not have
        given, prepared, done = (str(Path(folder) / f"{name}.onnx") for name in ("given", "prepared", "done"))
        Path(given).write_bytes(model)
        try:
            quant_pre_process(given, prepared, skip_symbolic_shape=True)
            quantize_static(
                prepared,
                done,
                Slices(),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QInt8 if symmetric else QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                op_types_to_quantize=list(_CONVOLUTIONS),
                extra_options={
                    "ActivationSymmetric": symmetric,
                    "WeightSymmetric": True,
                    "QuantizeBias": not symmetric,
                },
            )
        except (ValueError, RuntimeError) as err:
            raise BackendError(
                f"ONNX Runtime cannot quantise the model: {(str(err).strip() or type(err).__name__).splitlines()[0]}"
            ) from err
        quantised = Path(done).read_bytes()
    loose = unquantised_convolutions(quantised)
    if loose:
        raise BackendError(
            f"ONNX Runtime leaves {len(loose)} convolutions in floats ({', '.join(loose[:3])}), so the model would not "
            "compute in 8 bits; export another format"
        )
    return quantised


def unquantised_convolutions(model: bytes) -> list[str]:
    """Return the names of a model's convolutions whose input or weights are not dequantised from 8 bits."""
    import onnx

    graph = onnx.load_from_string(model).graph
    dequantised = {name for node in graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    return [
        node.name for node in graph.node if node.op_type in _CONVOLUTIONS and not dequantised.issuperset(node.input[:2])
    ]


def _batches(images: Array, size: int) -> Iterator[Array]:
    """Yield the slices in batches of the size that the model was made for; the last one is filled up with the first."""
    for start in range(0, len(images), size):
        chosen = np.arange(start, start + size) % len(images)
        yield np.ascontiguousarray(images[chosen], dtype=np.float32)


@contextmanager
def _quiet() -> Iterator[None]:
    # The quantiser tells its progress, and advice that does not concern us, to the root logger.
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logging.root.setLevel(level)
