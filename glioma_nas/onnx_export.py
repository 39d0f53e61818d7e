"""Write a network as an ONNX model that onnx itself accepts.

The TorchScript-based exporter is used on purpose: it needs no further package, gives one self-contained file and takes
a fraction of a second for an operator, which matters when a table holds hundreds of them.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence

import torch
from torch import nn
from torch.jit import TracerWarning  # type: ignore[attr-defined]  # public, yet missing from its __all__

from glioma_nas.errors import BackendError
from glioma_nas.latency_records import Shape

INPUT_NAME = "image"
OUTPUT_NAME = "logits"
BATCH_AXIS = "batch"


def export_onnx(
    module: nn.Module,
    input_shapes: Sequence[Shape],
    *,
    opset: int,
    dynamic_batch: bool = False,
    fold_batch_norm: bool = True,
) -> bytes:
    """Export ``module`` in evaluation mode with float32 inputs and one output.

    Args:
        module: The network; its training mode is as before afterwards.
        input_shapes: Shape of each input, batch first. One input is called ``image``, several ``image_0``, ``image_1``.
        opset: ONNX operator set.
        dynamic_batch: Leave the batch size open; all other sizes stay fixed.
        fold_batch_norm: Put batch normalisation into the convolution before it; without, it stays for comparisons.

    Returns:
        The serialised model; its output is called ``logits``.

    Raises:
        BackendError: The network holds an operator that ONNX cannot express, or onnx refuses the result.
    """
    import onnx

    device = next((tensor.device for tensor in (*module.parameters(), *module.buffers())), torch.device("cpu"))
    inputs = tuple(torch.zeros(shape, device=device) for shape in input_shapes)
    names = input_names(len(inputs))
    axes = {name: {0: BATCH_AXIS} for name in (*names, OUTPUT_NAME)} if dynamic_batch else None
    buffer = io.BytesIO()
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with warnings.catch_warnings():
            # The exporter announces its successor, that sizes become constants, that instance norm keeps using the
            # statistics of the image, and that a padding is not folded; all of it is meant here.
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            warnings.filterwarnings("ignore", category=TracerWarning)
            warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.onnx")
            torch.onnx.export(
                module,
                inputs,
                buffer,  # type: ignore[arg-type]  # this exporter writes to memory too; its signature says files only
                input_names=names,
                output_names=[OUTPUT_NAME],
                dynamic_axes=axes,
                opset_version=opset,
                dynamo=False,
                training=torch.onnx.TrainingMode.EVAL if fold_batch_norm else torch.onnx.TrainingMode.PRESERVE,
            )
    except (torch.onnx.errors.OnnxExporterError, torch.onnx.errors.UnsupportedOperatorError, ValueError) as err:
        first_line = str(err).strip().splitlines()[0]
        raise BackendError(
            f"{type(module).__name__} cannot be exported to ONNX opset {opset}: {first_line}; "
            "replace the operator or choose another export.opset"
        ) from err
    finally:
        for part, training in modes.items():
            part.training = training
    model = buffer.getvalue()
    try:
        onnx.checker.check_model(onnx.load_from_string(model), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as err:
        raise BackendError(
            f"{type(module).__name__}: onnx refuses the exported model: {str(err).strip().splitlines()[0]}"
        ) from err
    return model


def simplify_onnx(model: bytes) -> bytes:
    """Return a model that computes the same with fewer operators: constants folded, what has no effect removed.

    ONNX Runtime does as much by itself when it loads a model, and is no faster for it; other engines, and people who
    read the graph, are spared it.

    Args:
        model: Serialised ONNX model; sizes that it leaves open stay open.

    Raises:
        BackendError: onnx refuses the result.
    """
    import onnx
    import onnxslim

    slim = onnxslim.slim(onnx.load_from_string(model))
    try:
        onnx.checker.check_model(slim, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as err:
        raise BackendError(f"onnx refuses the simplified model: {str(err).strip().splitlines()[0]}") from err
    simplified: bytes = slim.SerializeToString()
    return simplified


def input_names(n_inputs: int) -> list[str]:
    """Return the names an exported model gives its inputs."""
    return [INPUT_NAME] if n_inputs == 1 else [f"{INPUT_NAME}_{index}" for index in range(n_inputs)]
