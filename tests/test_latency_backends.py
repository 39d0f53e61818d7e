from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from torch import nn

from glioma_nas import registry
from glioma_nas.errors import BackendError, UnknownNameError
from glioma_nas.evaluators.torch_backend import tf32_allowed
from glioma_nas.latency_backend import (
    Array,
    Engine,
    LatencyBackend,
    describe_backends,
    open_backend,
    open_onnx_backend,
    random_inputs,
)
from glioma_nas.latency_devices import gpu_clock_mhz, run_queue_wait_ms
from glioma_nas.latency_records import Shape
from glioma_nas.latency_timing import (
    Times,
    median_interval,
    ratio,
    summarise,
    time_engines,
    time_in_turns,
    time_until_stable,
)
from glioma_nas.model_precision import to_float16, to_int8, unquantised_convolutions
from glioma_nas.onnx_export import export_onnx
from glioma_nas.testing.latency_suite import LatencyBackendSuite


class SleepingEngine(Engine):
    def __init__(self, seconds: float, log: list[str] | None = None, name: str = "") -> None:
        self.seconds, self.log, self.name = seconds, log, name

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        return list(inputs)

    def call(self) -> None:
        if self.log is not None:
            self.log.append(self.name)
        time.sleep(self.seconds)


class SleepingBackend(LatencyBackend):
    name: ClassVar[str] = "sleeping"

    @classmethod
    def available(cls) -> str | None:
        return None

    def version(self) -> str:
        return "1"

    def prepare(self, module: nn.Module, input_shapes: Sequence[Shape], *, threads: int) -> Engine:
        return SleepingEngine(0.02)


class AbsentBackend(SleepingBackend):
    name: ClassVar[str] = "absent"

    @classmethod
    def available(cls) -> str | None:
        return "nosuchengine not installed; run `pip install nosuchengine`"


class ClockedEngine(SleepingEngine):
    def __init__(self, times_ms: Sequence[float]) -> None:
        super().__init__(0.0)
        self.times_ms = list(times_ms)

    def time_ms(self) -> float:
        return self.times_ms.pop(0)


class TestOnnxRuntime(LatencyBackendSuite):
    def backend(self) -> LatencyBackend:
        return registry.latency_backends.get("onnxruntime")()


class TestOpenVino(LatencyBackendSuite):
    def backend(self) -> LatencyBackend:
        return registry.latency_backends.get("openvino")()


class TestTorch(LatencyBackendSuite):
    def backend(self) -> LatencyBackend:
        return registry.latency_backends.get("torch")()


@pytest.mark.gpu
class TestTorchCuda(LatencyBackendSuite):
    def backend(self) -> LatencyBackend:
        return registry.latency_backends.get("torch_cuda")()


@pytest.mark.gpu
class TestCompiledTorchCuda(LatencyBackendSuite):
    def backend(self) -> LatencyBackend:
        return registry.latency_backends.get("torch_cuda_compiled")()


def test_engine_that_sleeps_a_known_time_is_measured_right() -> None:
    record = SleepingBackend().measure(nn.Identity(), [(1, 1)], warmup_runs=1, runs=9, threads=1)
    # sleep never returns early; how late it returns is the machine's business, but half of nine calls late by as much
    # again would be another fault.
    assert 20.0 <= record.median_ms < 40.0
    assert record.n == 9


def test_median_and_p95_are_those_of_the_timed_calls_without_warmup() -> None:
    engine = ClockedEngine([1000.0, 1000.0, *range(1, 22)])
    times = time_engines({"clocked": engine}, warmup_runs=2, runs=21)["clocked"]
    record = summarise(times, warmup_runs=2, input_shapes=[(1, 1)])
    assert (record.median_ms, record.p95_ms, record.n) == (11.0, 20.0, 21)


def _counted(engine: ClockedEngine, monkeypatch: pytest.MonkeyPatch, waits_ms: Sequence[float] = (0.0,)) -> Times:
    """Time an engine while the system says that each call in turn waited so long for a processor."""
    waits = itertools.cycle(waits_ms)
    waited = [0.0]
    calls = itertools.count()

    def wait() -> float:
        if next(calls) % 2:  # the second reading of a call
            waited[0] += next(waits)
        return waited[0]

    monkeypatch.setattr("glioma_nas.latency_timing.run_queue_wait_ms", wait)
    return time_until_stable(engine, warmup_runs=0, runs=10, max_runs=100)


def test_timing_goes_on_until_the_median_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(_counted(ClockedEngine([5.0] * 100), monkeypatch).times_ms) == 10
    # Two levels in turn: the interval of the median reaches from one to the other however long it is timed.
    assert len(_counted(ClockedEngine([1.0, 9.0] * 50), monkeypatch).times_ms) == 100
    # One call says nothing of how well it is known, however often it is asked.
    monkeypatch.setattr("glioma_nas.latency_timing.run_queue_wait_ms", lambda: 0.0)
    single = time_until_stable(ClockedEngine([5.0] * 100), warmup_runs=0, runs=1, max_runs=100)
    assert len(single.times_ms) == 6
    # The first calls were slow; their weight falls until the median is known well enough.
    assert 10 < len(_counted(ClockedEngine([9.0] * 5 + [1.0] * 95), monkeypatch).times_ms) < 100


def test_calls_that_waited_for_a_processor_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    # Every second call takes twice as long, since it stood waiting for half of the time.
    taken = _counted(ClockedEngine([2.0, 1.0] * 50), monkeypatch, waits_ms=(1.0, 0.0))
    assert set(taken.times_ms) == {1.0}
    assert taken.disturbed == pytest.approx(0.5)


def test_disturbed_calls_count_when_there_are_no_others_and_the_record_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = _counted(ClockedEngine([2.0] * 100), monkeypatch, waits_ms=(1.0,))
    assert len(taken.times_ms) == 100
    assert taken.disturbed == 1.0


def test_waiting_for_a_processor_is_seen() -> None:
    if run_queue_wait_ms() is None:
        pytest.skip("this system does not tell for how long threads waited")
    # More threads that compute than processors: somebody has to wait.
    before = run_queue_wait_ms()
    script = "import time; e = time.monotonic() + 0.6\nwhile time.monotonic() < e: pass"
    others = [subprocess.Popen([sys.executable, "-c", script]) for _ in range(2 * (os.cpu_count() or 1))]
    while any(process.poll() is None for process in others):
        sum(range(10_000))
    after = run_queue_wait_ms()
    assert before is not None and after is not None
    assert after - before > 20


def test_interval_of_the_median_covers_it_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    intervals = [median_interval(rng.exponential(size=40)) for _ in range(2000)]
    covered = np.mean([low <= np.log(2) <= high for low, high in intervals])
    assert 0.93 < covered < 0.99


def test_record_says_how_well_the_median_is_known() -> None:
    record = open_backend("torch").measure(
        nn.Conv2d(1, 1, 3), [(1, 1, 8, 8)], warmup_runs=0, runs=5, max_runs=20, threads=1
    )
    assert 5 <= record.n <= 20
    assert record.median_low_ms is not None and record.median_high_ms is not None
    assert record.median_low_ms <= record.median_ms <= record.median_high_ms
    assert record.clock_mhz is None or record.clock_mhz > 0


def test_engines_take_turns_and_the_order_rotates() -> None:
    log: list[str] = []
    time_engines({name: SleepingEngine(0.0, log, name) for name in "abc"}, warmup_runs=1, runs=3)
    assert "".join(log) == "abc" + "abc" + "bca" + "cab"


def test_engines_take_turns_until_every_median_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glioma_nas.latency_timing.run_queue_wait_ms", lambda: 0.0)
    steady, restless = ClockedEngine([5.0] * 50), ClockedEngine([1.0, 9.0] * 25)
    assert len(time_in_turns({"a": steady}, warmup_runs=0, runs=10, max_runs=50)["a"].times_ms) == 10
    taken = time_in_turns({"a": steady, "b": restless}, warmup_runs=0, runs=10, max_runs=40)
    assert {name: len(times.times_ms) for name, times in taken.items()} == {"a": 40, "b": 40}


def test_round_that_was_disturbed_for_one_engine_counts_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two readings a call, two engines a round: the first engine waits in every second round.
    waits = itertools.cycle([0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    waited = itertools.accumulate(waits)
    monkeypatch.setattr("glioma_nas.latency_timing.run_queue_wait_ms", lambda: next(waited))
    engines = {"a": ClockedEngine([2.0, 1.0] * 30), "b": ClockedEngine([8.0, 4.0] * 30)}
    taken = time_in_turns(engines, warmup_runs=0, runs=6, max_runs=60)
    assert len(taken["a"].times_ms) == len(taken["b"].times_ms) >= 6
    assert ratio(taken["b"].times_ms, taken["a"].times_ms).median == 4.0
    assert taken["b"].disturbed == 0.0 and taken["a"].disturbed is not None and 0 < taken["a"].disturbed < 1


def test_few_calls_have_no_interval() -> None:
    for n in (1, 5):
        record = summarise([2.0] * n, warmup_runs=0, input_shapes=[(1, 1)])
        assert (record.median_low_ms, record.median_high_ms) == (None, None)
    record = summarise([2.0] * 6, warmup_runs=0, input_shapes=[(1, 1)])
    assert (record.median_low_ms, record.median_high_ms) == (2.0, 2.0)


def test_ratio_is_taken_round_by_round() -> None:
    # The second round was slow for both: the ratio does not notice.
    found = ratio([2.0, 20.0, 2.0], [1.0, 10.0, 1.0])
    assert (found.median, found.p5, found.p95) == (2.0, 2.0, 2.0)


def test_missing_backend_is_an_error_with_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.latency_backends._entries, "absent", registry.Entry("absent", AbsentBackend, "a test"))
    for use in (lambda: AbsentBackend().environment(threads=1), lambda: open_backend("absent")):
        with pytest.raises(BackendError, match=r"'absent' cannot be used here: .*pip install nosuchengine"):
            use()


def test_format_that_the_processor_lacks_is_refused_instead_of_mislabelled(monkeypatch: pytest.MonkeyPatch) -> None:
    openvino = pytest.importorskip("openvino")
    monkeypatch.setattr(openvino.Core, "get_property", lambda *asked: ["FP32", "INT8"])
    with pytest.raises(BackendError, match=r"'openvino' cannot compute in 'bfloat16' here: .*it has FP32, INT8"):
        open_backend("openvino", "bfloat16")
    assert open_backend("openvino", "int8").precision == "int8"
    monkeypatch.setattr(openvino.Core, "get_property", lambda *asked: ["FP32", "BF16"])
    assert open_backend("openvino", "bfloat16").environment(threads=1).precision == "bfloat16"


def test_unknown_backend_suggests_a_name() -> None:
    with pytest.raises(UnknownNameError, match=r"did you mean 'onnxruntime'"):
        open_backend("onnxruntim")


def test_description_lists_every_registered_backend() -> None:
    rows = {status.name: (status.state, status.detail) for status in describe_backends()}
    assert set(rows) == set(registry.latency_backends.names()) >= {"onnxruntime", "torch"}
    assert rows["torch"] == ("ok", torch.__version__)
    assert all(state == "ok" or "pip install" in detail for state, detail in rows.values())
    rtx = registry.latency_backends.get("tensorrt_rtx")
    if rtx.available() is not None:
        assert rows["tensorrt_rtx"][0] == ("missing" if rtx.buildable() else "builds only")


def test_precision_an_engine_lacks_is_refused_with_those_it_has() -> None:
    with pytest.raises(BackendError, match=r"'torch' does not compute in 'int8': Allowed: float32"):
        open_backend("torch", "int8")


def test_backend_that_runs_no_onnx_is_refused_where_onnx_is_needed() -> None:
    with pytest.raises(BackendError, match=r"'torch' runs no ONNX models; those that do: onnxruntime, openvino"):
        open_onnx_backend("torch")


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(8, 4, 3, padding=1), nn.Sigmoid()
    ).eval()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "precision", "tolerance"),
    [("onnxruntime", "int8", 0.03), ("openvino", "int8", 0.03), ("openvino", "bfloat16", 0.02)],
)
def test_reduced_precision_is_near_and_yet_not_float32(name: str, precision: str, tolerance: float) -> None:
    network = _network()
    (image,) = random_inputs([(1, 2, 32, 32)])
    try:
        backend = open_backend(name, precision)
    except BackendError as err:
        pytest.skip(str(err))
    assert backend.environment(threads=1).precision == precision
    with torch.inference_mode():
        expected = network(torch.from_numpy(image)).numpy()
    difference = np.abs(backend.prepare(network, [(1, 2, 32, 32)], threads=1).run([image])[0] - expected).max()
    assert 1e-5 < difference < tolerance


def test_half_precision_model_keeps_its_float32_ends() -> None:
    model = to_float16(export_onnx(_network(), [(1, 2, 8, 8)], opset=17))
    graph = onnx.load_from_string(model).graph
    assert {item.type.tensor_type.elem_type for item in (*graph.input, *graph.output)} == {onnx.TensorProto.FLOAT}
    assert {item.data_type for item in graph.initializer} >= {onnx.TensorProto.FLOAT16}


@pytest.mark.parametrize("n_images", [1, 3, 4])
def test_model_of_a_larger_batch_is_quantised_on_batches_of_its_size(n_images: int) -> None:
    model = export_onnx(_network(), [(3, 2, 8, 8)], opset=17)
    images = np.random.default_rng(0).standard_normal((n_images, 2, 8, 8), dtype=np.float32)
    kinds = {node.op_type for node in onnx.load_from_string(to_int8(model, images)).graph.node}
    assert "QuantizeLinear" in kinds


def test_transposed_convolution_is_quantised_as_the_others_are() -> None:
    shapes = [(1, 4, 8, 8)]
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(6, 3, 2, stride=2)).eval()
    model = export_onnx(network, shapes, opset=17)
    images = np.random.default_rng(0).standard_normal((4, 4, 8, 8), dtype=np.float32)
    assert len(unquantised_convolutions(model)) == 2
    for symmetric in (False, True):
        quantised = to_int8(model, images, symmetric=symmetric)
        assert not unquantised_convolutions(quantised)
        given = open_onnx_backend("onnxruntime").load(quantised, shapes, threads=1).run([images[:1]])[0]
        with torch.inference_mode():
            expected = network(torch.from_numpy(images[:1])).numpy()
        assert 1e-5 < np.abs(given - expected).max() < 0.1


class TwoInputs(nn.Module):
    """A head in small: a coarse and a fine input of different sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(6, 4, 1)

    def forward(self, fine: torch.Tensor, coarse: torch.Tensor) -> torch.Tensor:
        return self.fine(fine) + nn.functional.interpolate(self.coarse(coarse), scale_factor=2)


def test_model_of_two_inputs_is_quantised_on_slices_for_each() -> None:
    shapes = [(1, 2, 8, 8), (1, 6, 4, 4)]
    torch.manual_seed(0)
    network = TwoInputs().eval()
    model = export_onnx(network, shapes, opset=17)
    rng = np.random.default_rng(0)
    fine, coarse = (rng.standard_normal((4, *shape[1:]), dtype=np.float32) for shape in shapes)
    quantised = to_int8(model, [fine, coarse])
    assert unquantised_convolutions(model) and not unquantised_convolutions(quantised)
    given = open_onnx_backend("onnxruntime").load(quantised, shapes, threads=1).run([fine[:1], coarse[:1]])[0]
    with torch.inference_mode():
        expected = network(torch.from_numpy(fine[:1]), torch.from_numpy(coarse[:1])).numpy()
    assert 1e-5 < np.abs(given - expected).max() < 0.1
    for wrong in (fine, [fine], [fine, coarse[:2]]):
        with pytest.raises(BackendError, match=r"model of 2 inputs is calibrated on as many arrays"):
            to_int8(model, wrong)


def test_quantising_needs_slices() -> None:
    model = export_onnx(_network(), [(1, 2, 8, 8)], opset=17)
    with pytest.raises(BackendError, match=r"no slices to calibrate the 8-bit model on"):
        to_int8(model, np.zeros((0, 2, 8, 8), np.float32))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_layer_times_name_the_operators_of_the_model(name: str) -> None:
    times = open_backend(name).prepare(_network(), [(1, 2, 32, 32)], threads=1).layer_times_ms(3)
    assert all(value >= 0 for value in times.values())
    # A convolution that was fused with its activation may carry the name of either.
    assert any(layer.startswith(("/0/", "/1/")) for layer in times), times
    assert any(layer.startswith("/2/AveragePool") for layer in times), times


@pytest.mark.slow
def test_inspection_tells_kernel_and_precision_of_every_layer() -> None:
    shape = (1, 2, 32, 32)
    layers = open_backend("openvino", "int8").prepare(_network(), [shape], threads=1).inspect()["Layers"]
    convolutions = [layer for layer in layers if any("Conv" in name for name in layer["MadeOf"])]
    assert {layer["Precision"] for layer in convolutions} & {"u8", "i8"}, layers
    assert all(layer["Name"] for layer in layers)
    with pytest.raises(BackendError, match="does not tell what its layers are"):
        open_backend("onnxruntime").prepare(_network(), [shape], threads=1).inspect()


def test_engine_without_layer_times_says_so() -> None:
    with pytest.raises(BackendError, match="does not tell how long its layers take"):
        open_backend("torch").prepare(_network(), [(1, 2, 8, 8)], threads=1).layer_times_ms(1)


@pytest.mark.slow
def test_compiled_torch_computes_and_times_the_same_network() -> None:
    backend = registry.latency_backends.get("torch_compiled")()
    if backend.available() is not None:
        pytest.skip(backend.available())
    # Compiling takes a while for every operator, so one is enough.
    (image,) = random_inputs([(1, 2, 16, 16)])
    captured = torch._dynamo.utils.counters["stats"]
    before = captured["unique_graphs"]
    engine = backend.prepare(nn.Sigmoid(), [(1, 2, 16, 16)], threads=1)
    # Compiled by now, and not in the first timed call.
    compiled = captured["unique_graphs"]
    assert engine.time_ms() > 0
    assert captured["unique_graphs"] == compiled > before
    np.testing.assert_allclose(engine.run([image])[0], 1 / (1 + np.exp(-image)), atol=1e-6)


class Undecided(nn.Module):
    """Does one thing or the other depending on values, which cannot be captured in one piece."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image + 1 if image.sum() > 0 else image - 1


@pytest.mark.slow
def test_network_that_cannot_be_compiled_is_refused_when_the_engine_is_made() -> None:
    backend = registry.latency_backends.get("torch_compiled")()
    if backend.available() is not None:
        pytest.skip(backend.available())
    with pytest.raises(BackendError, match=r"torch\.compile refuses Undecided: "):
        backend.prepare(Undecided(), [(1, 2)], threads=1)


def test_compiler_that_fails_without_a_word_is_told_by_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError

    backend = registry.latency_backends.get("torch_compiled")()
    if backend.available() is not None:
        pytest.skip(backend.available())
    monkeypatch.setattr("torch.compile", fail)
    with pytest.raises(BackendError, match=r"torch\.compile refuses Sigmoid: RuntimeError"):
        backend.prepare(nn.Sigmoid(), [(1, 2)], threads=1)


def test_compiling_for_a_gpu_needs_more_than_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = registry.latency_backends.get("torch_cuda_compiled")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "no CUDA device" in backend.available()
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setenv("PATH", "")
    assert "no C++ compiler" in backend.available()


def test_torch_engine_gives_the_thread_count_back() -> None:
    before = torch.get_num_threads()
    open_backend("torch").measure(nn.Conv2d(1, 1, 3), [(1, 1, 8, 8)], warmup_runs=0, runs=1, threads=before + 1)
    assert torch.get_num_threads() == before


def test_engine_is_not_changed_by_later_training_of_the_module() -> None:
    module = nn.Conv2d(1, 1, 1)
    for name in ("torch", "onnxruntime"):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
        engine = open_backend(name).prepare(module, [(1, 1, 2, 2)], threads=1)
        nn.init.zeros_(module.weight)
        assert engine.run([torch.full((1, 1, 2, 2), 3.0).numpy()])[0].max() == pytest.approx(3.0)


def test_file_that_is_no_onnx_model_is_refused() -> None:
    for name, engine in (("onnxruntime", "ONNX Runtime"), ("openvino", "OpenVINO")):
        with pytest.raises(BackendError, match=rf"{engine} .* refuses the model"):
            open_onnx_backend(name).load(b"not a model", [(1, 1)], threads=1)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_operator_an_engine_does_not_know_is_refused_by_its_name(name: str) -> None:
    node = helper.make_node("NoSuchOperator", ["image"], ["logits"])
    ends = [helper.make_tensor_value_info(end, onnx.TensorProto.FLOAT, [1, 1]) for end in ("image", "logits")]
    model = helper.make_model(
        helper.make_graph([node], "g", ends[:1], ends[1:]), opset_imports=[helper.make_opsetid("", 17)]
    )
    with pytest.raises(BackendError, match=r"refuses the model: .*NoSuchOperator"):
        open_onnx_backend(name).load(model.SerializeToString(), [(1, 1)], threads=1)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_shapes_for_another_number_of_inputs_are_refused(name: str) -> None:
    model = export_onnx(nn.Identity(), [(1, 1)], opset=17)
    with pytest.raises(BackendError, match=r"takes 1 inputs, 2 shapes were given"):
        open_onnx_backend(name).load(model, [(1, 1), (1, 1)], threads=1)


def test_float32_on_a_gpu_is_not_rounded_to_tf32_unless_that_is_asked_for() -> None:
    def flags() -> tuple[bool, bool]:
        return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32

    before = flags()
    for allowed in (False, True):
        with tf32_allowed(allowed):
            assert flags() == (allowed, allowed)
        assert flags() == before
    for name in ("torch_cuda", "torch_cuda_compiled"):
        assert registry.latency_backends.get(name).precisions == ("float32", "tf32")


@pytest.mark.gpu
def test_tf32_and_float32_on_a_gpu_differ() -> None:
    if (reason := registry.latency_backends.get("torch_cuda").available()) is not None:
        pytest.skip(reason)
    network, shape = nn.Conv2d(64, 64, 3), (1, 64, 32, 32)
    (image,) = random_inputs([shape])
    with torch.inference_mode():
        expected = network(torch.from_numpy(image)).numpy()
    exact, rounded = (
        np.abs(open_backend("torch_cuda", name).prepare(network, [shape], threads=1).run([image])[0] - expected).max()
        for name in ("float32", "tf32")
    )
    assert exact < 1e-5 < rounded


def test_gpu_clock_is_asked_for_by_the_identifier_of_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\n[ "$1" = --id=GPU-abc ] && echo 1980 || echo "No devices were found"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert gpu_clock_mhz("abc") == gpu_clock_mhz("GPU-abc") == 1980.0
    assert gpu_clock_mhz("0") is None
