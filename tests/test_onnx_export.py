from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from glioma_nas.config import ExportConfig
from glioma_nas.errors import BackendError
from glioma_nas.export_formats import ExportedFile, judge
from glioma_nas.latency_backend import Array, Engine, OnnxBackend, open_backend
from glioma_nas.latency_networks import random_sample
from glioma_nas.onnx_export import export_onnx, simplify_onnx
from glioma_nas.parity import Parity, compare
from glioma_nas.search_spaces.nasbranet import NASBraNet


class Threshold(nn.Module):
    """Logits (0, x - 1 + shift): pixels brighter than 1 - shift are tumour."""

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(shift))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.zeros_like(image), image - 1 + self.shift], dim=1)


class Sum(nn.Module):
    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return first + second


class Unsupported(nn.Module):
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return torch.special.airy_ai(image)


def _backend() -> OnnxBackend:
    backend = open_backend("onnxruntime")
    assert isinstance(backend, OnnxBackend)
    return backend


def _engine(module: nn.Module, shape: tuple[int, ...]):  # type: ignore[no-untyped-def]
    return _backend().load(export_onnx(module, [shape], opset=17, dynamic_batch=True), [shape], threads=1)


def test_model_has_the_promised_names_opset_and_open_batch() -> None:
    model = onnx.load_from_string(export_onnx(Threshold(), [(1, 1, 4, 6)], opset=15, dynamic_batch=True))
    assert [value.name for value in model.graph.input] == ["image"]
    assert [value.name for value in model.graph.output] == ["logits"]
    sizes = model.graph.input[0].type.tensor_type.shape.dim
    assert sizes[0].dim_param == "batch"
    assert [size.dim_value for size in sizes[1:]] == [1, 4, 6]
    assert model.opset_import[0].version == 15


def test_several_inputs_are_numbered() -> None:
    data = export_onnx(Sum(), [(1, 2), (1, 2)], opset=17)
    assert [value.name for value in onnx.load_from_string(data).graph.input] == ["image_0", "image_1"]
    engine = _backend().load(data, [(1, 2), (1, 2)], threads=1)
    assert engine.run([np.array([[1, 2]], np.float32), np.array([[10, 20]], np.float32)])[0].tolist() == [[11.0, 22.0]]


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_open_batch_computes_several_slices_as_pytorch_does(name: str) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Upsample(scale_factor=2, mode="bilinear")).eval()
    model = export_onnx(module, [(1, 2, 6, 8)], opset=17, dynamic_batch=True)
    backend = open_backend(name)
    assert isinstance(backend, OnnxBackend)
    for n in (1, 5):
        images = torch.randn((n, 2, 6, 8), generator=torch.Generator().manual_seed(n))
        with torch.inference_mode():
            expected = module(images).numpy()
        given = backend.load(model, [(n, 2, 6, 8)], threads=1).run([images.numpy()])[0]
        np.testing.assert_allclose(given, expected, atol=1e-4)


@pytest.mark.slow
def test_simplified_model_computes_the_same_with_fewer_operators() -> None:
    torch.manual_seed(0)
    space = NASBraNet("tiny", image_size_px=32, in_channels=2)
    network = space.derive(random_sample(space, 0, 0)).eval()
    model = export_onnx(network, [(1, 2, 32, 32)], opset=17, dynamic_batch=True)
    slim = simplify_onnx(model)
    plain_graph, slim_graph = (onnx.load_from_string(each).graph for each in (model, slim))
    assert len(slim_graph.node) < len(plain_graph.node)
    assert [str(end.type) for end in (*slim_graph.input, *slim_graph.output)] == [
        str(end.type) for end in (*plain_graph.input, *plain_graph.output)
    ]
    images = torch.randn((3, 2, 32, 32), generator=torch.Generator().manual_seed(0)).numpy()
    given, expected = (_backend().load(each, [images.shape], threads=1).run([images])[0] for each in (slim, model))
    np.testing.assert_allclose(given, expected, atol=1e-4)


def test_fixed_shapes_leave_no_open_size_in_the_model() -> None:
    model = onnx.load_from_string(export_onnx(Threshold(), [(2, 1, 4, 6)], opset=17))
    for value, sizes in ((model.graph.input[0], [2, 1, 4, 6]), (model.graph.output[0], [2, 2, 4, 6])):
        assert [size.dim_value for size in value.type.tensor_type.shape.dim] == sizes


def test_unsupported_operator_is_refused() -> None:
    with pytest.raises(BackendError, match=r"Unsupported cannot be exported to ONNX opset 17: .*airy"):
        export_onnx(Unsupported(), [(1, 1)], opset=17)


def test_training_mode_survives_export() -> None:
    module = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)).train()
    module[1].eval()
    export_onnx(module, [(1, 1, 4, 4)], opset=17)
    assert (module.training, module[0].training, module[1].training) == (True, True, False)


def test_equal_engine_has_no_difference_and_full_dice() -> None:
    images = [np.full((1, 2, 2), 3.0, np.float32), np.zeros((1, 2, 2), np.float32)]
    assert compare(Threshold(), _engine(Threshold(), (1, 1, 2, 2)), images) == Parity(0.0, 1.0, 4, 2)


def test_difference_and_dice_of_a_wrong_engine_are_those_computed_by_hand() -> None:
    # Pixels .7, .9, 1.1, 2: PyTorch marks two, the engine, shifted by 0.2, marks three; two in common: 2·2/(2+3).
    image = np.array([[[0.7, 0.9], [1.1, 2.0]]], np.float32)
    parity = compare(Threshold(), _engine(Threshold(0.2), (1, 1, 2, 2)), [image])
    assert parity.max_abs_logit_difference == pytest.approx(0.2, abs=1e-6)
    assert parity.mask_dice == pytest.approx(0.8)
    assert parity.tumour_px == 2


def test_engine_beyond_tolerance_is_refused() -> None:
    limits = ExportConfig()
    Parity(1e-4, 1.0, 9, 2).require(limits, engine="student.onnx")
    for parity in (Parity(0.2, 1.0, 9, 2), Parity(1e-4, 0.9, 9, 2), Parity(float("nan"), 1.0, 9, 2)):
        with pytest.raises(BackendError, match=r"student\.onnx does not compute what PyTorch computes on 2 slices"):
            parity.require(limits, engine="student.onnx")


def test_engine_of_fewer_bits_is_not_judged_by_empty_masks() -> None:
    limits, empty = ExportConfig(), Parity(0.3, 1.0, 0, 2)
    with pytest.raises(BackendError, match=r"student_int8\.onnx cannot be judged: PyTorch outlines no tumour on the 2"):
        empty.require(limits, engine="student_int8.onnx", reduced=True)
    assert Parity(0.3, 1.0, 9, 2).no_evidence(reduced=True) is None
    # In float32 the logits themselves are compared.
    Parity(1e-5, 1.0, 0, 2).require(limits, engine="student.onnx")


class Failing(Engine):
    def run(self, inputs: Sequence[Array]) -> list[Array]:
        raise BackendError("the engine stopped")

    def call(self) -> None:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("engine", "images", "message"),
    [
        (Failing(), 1, "the engine stopped"),
        (None, 1, "does not compute what PyTorch computes"),
        (None, 0, "no slices to compare"),
    ],
    ids=["stops", "differs", "no slices"],
)
def test_file_whose_engine_fails_or_differs_is_not_left_behind(
    engine: Engine | None, images: int, message: str, tmp_path: Path
) -> None:
    for name in ("student.xml", "student.bin"):
        (tmp_path / name).write_bytes(b"x")
    exported = ExportedFile(tmp_path / "student.xml", engine or _engine(Threshold(0.5), (1, 1, 2, 2)))
    slices = [np.full((1, 2, 2), 0.8, np.float32)] * images
    with pytest.raises(BackendError, match=message):
        judge(Threshold(), exported, slices, ExportConfig(), reduced=False)
    assert not list(tmp_path.iterdir())


def test_file_that_nothing_can_be_said_of_is_kept_and_said_to_be_not_compared(tmp_path: Path) -> None:
    path = tmp_path / "student_int8.onnx"
    path.write_bytes(b"x")
    exported = ExportedFile(path, _engine(Threshold(0.1), (1, 1, 2, 2)))
    found = judge(Threshold(), exported, [np.zeros((1, 2, 2), np.float32)], ExportConfig(), reduced=True)
    assert isinstance(found, str) and "outlines no tumour" in found and path.exists()
    missing = judge(Threshold(), ExportedFile(path, None, "no GPU"), [], ExportConfig(), reduced=True)
    assert missing == "no GPU" and path.exists()


def test_nan_of_an_engine_is_not_overlooked() -> None:
    images = [np.zeros((1, 2, 2), np.float32)] * 2
    images[0] = np.full((1, 2, 2), np.nan, np.float32)
    assert np.isnan(compare(Threshold(), _engine(Threshold(), (1, 1, 2, 2)), images).max_abs_logit_difference)


def test_comparison_without_slices_is_refused() -> None:
    with pytest.raises(BackendError, match=r"no slices to compare"):
        compare(Threshold(), _engine(Threshold(), (1, 1, 2, 2)), [])
