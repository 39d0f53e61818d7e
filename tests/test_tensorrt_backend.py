"""TensorRT: what can be checked without a GPU is building, caching and refusing; running is marked ``gpu``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import helper
from torch import nn

from glioma_nas import registry
from glioma_nas.engine_files import EngineLabel, cached_engine, label_path, load_engine, save_engine
from glioma_nas.errors import BackendError, StorageError
from glioma_nas.evaluators.tensorrt_backend import (
    BUILDER_SETTINGS,
    TensorRtBackend,
    TensorRtProperBackend,
    open_context,
    open_timing_cache,
)
from glioma_nas.latency_backend import LatencyBackend
from glioma_nas.model_precision import to_float16, to_int8
from glioma_nas.onnx_export import export_onnx
from glioma_nas.testing.latency_suite import LatencyBackendSuite

SHAPE = (1, 2, 16, 16)


@pytest.mark.gpu
class TestTensorRtRtx(LatencyBackendSuite):
    def backend(self) -> LatencyBackend:
        return registry.latency_backends.get("tensorrt_rtx")()


@pytest.mark.gpu
class TestTensorRt(LatencyBackendSuite):
    def backend(self) -> LatencyBackend:
        return registry.latency_backends.get("tensorrt")()


@pytest.fixture
def rtx() -> TensorRtBackend:
    backend = registry.latency_backends.get("tensorrt_rtx")()
    assert isinstance(backend, TensorRtBackend)
    if (reason := backend.buildable()) is not None:
        pytest.skip(reason)
    return backend


@pytest.fixture(scope="module")
def model() -> bytes:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Upsample(scale_factor=2, mode="bilinear"),
    )
    return export_onnx(network.eval(), [SHAPE], opset=17, dynamic_batch=True)


def label(**changes: Any) -> EngineLabel:
    values = EngineLabel.of(
        b"model",
        flavour="tensorrt_rtx",
        version="1",
        precision="float32",
        gpus=("SM75",),
        input_shapes=[SHAPE],
        max_batch=None,
    )
    return dataclasses.replace(values, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
def test_engine_is_built_without_a_gpu_for_named_generations(
    rtx: TensorRtBackend, model: bytes, precision: str
) -> None:
    rtx.precision = precision
    images = torch.randn((4, *SHAPE[1:]), generator=torch.Generator().manual_seed(0)).numpy()
    plan, written = rtx.build(rtx.convert(model, images), [SHAPE], gpus=("SM75", "SM120"), max_batch=8)
    assert plan[:4] == b"vtrt" and len(plan) > 10_000
    assert (written.flavour, written.gpus, written.precision) == ("tensorrt_rtx", ("SM75", "SM120"), precision)
    assert written.version == rtx.version()


def test_engine_comes_from_the_cache_the_second_time(rtx: TensorRtBackend, model: bytes, tmp_path: Path) -> None:
    first, _ = rtx.build(model, [SHAPE], gpus=("SM75",), cache=tmp_path)
    (path,) = tmp_path.glob("*.engine")
    written = path.stat().st_mtime_ns
    second, _ = rtx.build(model, [SHAPE], gpus=("SM75",), cache=tmp_path)
    assert second == first and path.stat().st_mtime_ns == written
    rtx.build(model, [SHAPE], gpus=("SM80",), cache=tmp_path)
    assert len(list(tmp_path.glob("*.engine"))) == 2


def test_unknown_generation_is_refused_with_a_suggestion(rtx: TensorRtBackend, model: bytes) -> None:
    with pytest.raises(BackendError, match=r"knows no GPU generation 'SM90': .*SM120"):
        rtx.build(model, [SHAPE], gpus=("SM90",))


def test_operator_that_tensorrt_does_not_know_is_named(rtx: TensorRtBackend) -> None:
    node = helper.make_node("NoSuchOperator", ["image"], ["logits"])
    ends = [helper.make_tensor_value_info(end, onnx.TensorProto.FLOAT, [1, 1]) for end in ("image", "logits")]
    unknown = helper.make_model(
        helper.make_graph([node], "g", ends[:1], ends[1:]), opset_imports=[helper.make_opsetid("", 17)]
    )
    with pytest.raises(BackendError, match=r"tensorrt_rtx .* cannot parse the model: .*NoSuchOperator"):
        rtx.build(unknown.SerializeToString(), [(1, 1)], gpus=("SM75",))


def test_file_that_is_no_model_is_refused(rtx: TensorRtBackend) -> None:
    with pytest.raises(BackendError, match=r"cannot parse the model"):
        rtx.build(b"not a model", [(1, 1)], gpus=("SM75",))


def test_shape_that_is_not_positive_is_refused(rtx: TensorRtBackend, model: bytes) -> None:
    with pytest.raises(BackendError, match=r"must be a positive integer"):
        rtx.build(model, [(1, 2, 0, 16)], gpus=("SM75",))


def test_engine_of_another_version_or_flavour_is_refused_before_it_is_loaded(rtx: TensorRtBackend) -> None:
    for other in (label(version="0.1"), label(flavour="tensorrt", version=rtx.version())):
        with pytest.raises(BackendError, match=r"engine of .* cannot run with tensorrt_rtx .*; build it again"):
            rtx.open(b"", other, [SHAPE])


def test_damaged_engine_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "student.plan"
    save_engine(path, b"engine", label())
    assert load_engine(path) == (b"engine", load_engine(path)[1])
    path.write_bytes(b"engin")
    with pytest.raises(BackendError, match=r"is damaged"):
        load_engine(path)
    path.unlink()
    with pytest.raises(StorageError, match=r"student\.plan: No such file"):
        load_engine(path)


def test_label_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "student.plan"
    save_engine(path, b"engine", label())
    label_path(path).write_text(json.dumps({"flavour": "tensorrt"}))
    with pytest.raises(StorageError, match=r"student\.plan\.json: not the label of an engine"):
        load_engine(path)


def test_damaged_cache_entry_is_built_again(tmp_path: Path) -> None:
    built: list[int] = []

    def build() -> bytes:
        built.append(1)
        return b"engine"

    assert cached_engine(tmp_path, label(), build) == cached_engine(tmp_path, label(), build) == b"engine"
    assert len(built) == 1
    (path,) = tmp_path.glob("*.engine")
    path.write_bytes(b"engi")
    assert cached_engine(tmp_path, label(), build) == b"engine"
    assert len(built) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"version": "2"},
        {"precision": "int8"},
        {"gpus": ("SM80",)},
        {"max_batch": 4},
        {"model_sha256": "0"},
        {"settings": ("more workspace",)},
    ],
)
def test_cache_tells_engines_apart_by_everything_that_decides_them(change: dict[str, Any]) -> None:
    assert label(**change).key() != label().key()


def test_running_without_a_gpu_is_an_error_with_the_reason(rtx: TensorRtBackend, model: bytes) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    with pytest.raises(BackendError, match=r"'tensorrt_rtx' cannot be used here: .*no CUDA device.*pip install"):
        rtx.load(model, [SHAPE], threads=1)


def test_exported_engine_is_built_once(
    rtx: TensorRtBackend, model: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("first", "second"):
        rtx.write_file(model, tmp_path / f"{name}.plan", SHAPE, max_batch=4, gpus=("SM75",))
    (kept,) = (tmp_path / "cache" / "glioma_nas" / "engines").glob("*.engine")
    for name in ("first", "second"):
        plan, written = load_engine(tmp_path / f"{name}.plan")
        assert plan == kept.read_bytes()
        assert written.settings == BUILDER_SETTINGS


class Installed(TensorRtProperBackend):
    """TensorRT proper as it is where its library is installed; any library will do for that."""

    library = "json"


def test_flavour_that_times_kernels_cannot_build_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for reason in (Installed.buildable(), Installed.available()):
        assert reason is not None and "no CUDA device" in reason
    with pytest.raises(BackendError, match=r"'tensorrt' cannot build engines here: .*no CUDA device"):
        Installed().build(b"", [(1, 1)])
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert Installed.buildable() is None and Installed.available() is None


class BuilderConfiguration:
    """What `open_timing_cache` uses of TensorRT's builder configuration; it has none without a GPU."""

    def __init__(self, accepted: bytes) -> None:
        self.accepted = accepted
        self.timings: list[bytes] = []

    def create_timing_cache(self, content: bytes) -> bytes | None:
        return None if content.startswith(b"damaged") else content

    def set_timing_cache(self, timings: bytes, *, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        if timings not in (self.accepted, b""):
            return False
        self.timings.append(timings)
        return True


@pytest.mark.parametrize(
    ("content", "used"),
    [(None, b""), (b"ours", b"ours"), (b"of another GPU", b""), (b"damaged", b"")],
    ids=["none", "ours", "another GPU", "damaged"],
)
def test_timing_cache_is_used_where_it_fits_and_else_started_anew(
    content: bytes | None, used: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "timing.cache"
    if content is not None:
        path.write_bytes(content)
    config = BuilderConfiguration(b"ours")
    open_timing_cache(config, path)
    assert config.timings == [used]


def test_missing_flavour_is_an_error_with_the_pip_line() -> None:
    backend = registry.latency_backends.get("tensorrt")()
    if backend.buildable() is None:
        pytest.skip("TensorRT is installed")
    with pytest.raises(BackendError, match=r"'tensorrt' cannot build engines here: tensorrt not installed; run `pip"):
        backend.build(b"", [(1, 1)])


@pytest.mark.gpu
def test_layer_times_and_inspector_name_the_operators_of_the_model(rtx: TensorRtBackend, model: bytes) -> None:
    if (reason := rtx.available()) is not None:
        pytest.skip(reason)
    plan, written = rtx.build(model, [SHAPE])
    engine = rtx.open(plan, written, [SHAPE])
    assert any("/0/Conv" in name for name in engine.layer_times_ms(3))
    assert engine.inspect()["Layers"]


class Context:
    """What `open_context` and `bind` use of TensorRT's execution context; there is none without a GPU."""

    def __init__(self, *, largest: int) -> None:
        self.profiler: object = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.largest = largest

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return shape[0] <= self.largest

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address


class Contexts:
    def __init__(self) -> None:
        self.made: list[Context] = []

    def create_execution_context(self) -> Context:
        self.made.append(Context(largest=1))
        return self.made[-1]


class Silence:
    def last_error(self) -> str:
        return "the profile allows 1"


def test_profiler_has_a_context_of_its_own() -> None:
    engine, inputs, recorder = Contexts(), {"image": torch.zeros(SHAPE)}, object()
    timed = open_context(engine, inputs, Silence())
    profiled = open_context(engine, inputs, Silence(), profiler=recorder)
    assert engine.made == [timed, profiled]
    assert (timed.profiler, profiled.profiler) == (None, recorder)
    assert timed.addresses == profiled.addresses == {"image": inputs["image"].data_ptr()}
    with pytest.raises(BackendError, match=r"refuses shape \(2, 2, 16, 16\) for 'image': the profile allows 1"):
        open_context(engine, {"image": torch.zeros((2, *SHAPE[1:]))}, Silence())


def test_precision_is_made_in_the_model_itself(model: bytes) -> None:
    half = onnx.load_from_string(to_float16(model))
    assert any(item.data_type == onnx.TensorProto.FLOAT16 for item in half.graph.initializer)
    images = torch.randn((2, *SHAPE[1:]), generator=torch.Generator().manual_seed(0)).numpy()
    kinds = {node.op_type for node in onnx.load_from_string(to_int8(model, images)).graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds
