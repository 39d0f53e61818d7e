from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from nni.nas.oneshot.pytorch.profiler import RangeProfilerFilter
from torch import Tensor, nn

from glioma_nas import registry
from glioma_nas.costs import OperatorSpec
from glioma_nas.errors import BackendError
from glioma_nas.latency_backend import Array, Engine, LatencyBackend, open_backend
from glioma_nas.latency_building import build_operator, build_table, component_hash, take_known
from glioma_nas.latency_records import Environment, LatencyRecord, LatencyTable, Shape
from glioma_nas.registry import load_file
from glioma_nas.search_spaces.nasbranet import NASBraNet

SPECS = [OperatorSpec("part", channels, channels, 1, 8, 8) for channels in (4, 1, 3, 2)]


class CountingEngine(Engine):
    """Takes as many milliseconds as the module has input channels."""

    def __init__(self, channels: int) -> None:
        self.channels = channels

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        return list(inputs)

    def call(self) -> None:
        pass

    def time_ms(self) -> float:
        return float(self.channels)


class CountingBackend(LatencyBackend):
    name: ClassVar[str] = "counting"

    def __init__(self, *, stop_after: int | None = None) -> None:
        self.prepared: list[int] = []
        self.stop_after = stop_after

    @classmethod
    def available(cls) -> str | None:
        return None

    def version(self) -> str:
        return "1"

    def prepare(self, module: nn.Module, input_shapes: Sequence[Shape], *, threads: int) -> Engine:
        if len(self.prepared) == self.stop_after:
            raise KeyboardInterrupt
        channels = input_shapes[0][1]
        self.prepared.append(channels)
        return CountingEngine(channels)


class PartSpace:
    """Builds ``part`` as a 1×1 convolution and knows nothing else."""

    def build_component(self, spec: OperatorSpec) -> nn.Module | None:
        return nn.Conv2d(spec.in_channels, spec.out_channels, 1) if spec.operator == "part" else None


def _build(
    backend: LatencyBackend, path: Path, specs: Sequence[OperatorSpec] = SPECS, threads: int = 1
) -> LatencyTable:
    return build_table(specs, backend, path=path, warmup_runs=0, runs=3, threads=threads, space=PartSpace())


def test_table_holds_the_time_of_each_operator(tmp_path: Path) -> None:
    table = _build(CountingBackend(), tmp_path / "table.json", [*SPECS, SPECS[0]])
    assert [table.lookup(spec) for spec in SPECS] == [4.0, 1.0, 3.0, 2.0]
    assert len(LatencyTable.load(tmp_path / "table.json")) == 4


def test_interrupted_build_continues_where_it_stopped(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    first, second = CountingBackend(stop_after=2), CountingBackend()
    with pytest.raises(KeyboardInterrupt):
        _build(first, path)
    assert len(LatencyTable.load(path)) == 2
    table = _build(second, path)
    assert sorted([*first.prepared, *second.prepared]) == [1, 2, 3, 4]
    assert [table.lookup(spec) for spec in SPECS] == [4.0, 1.0, 3.0, 2.0]


def test_second_space_adds_only_what_is_new(tmp_path: Path) -> None:
    _build(CountingBackend(), tmp_path / "table.json", SPECS[:3])
    again = CountingBackend()
    assert len(_build(again, tmp_path / "table.json", SPECS[1:])) == 4
    assert again.prepared == [2]


def write_plugin(folder: Path, settings: str, note: str = "") -> type[nn.Module]:
    """Write a file with an operator and import it, as somebody does who edits a plugin."""
    path = folder / f"edited_{len(list(folder.glob('edited_*')))}.py"
    path.write_text(
        f"from torch import nn\n\nclass Edited(nn.Module):\n    {note!r}\n    def __init__(self, a, b, stride):\n"
        f"        super().__init__()\n        self.conv = nn.Conv2d(a, b, {settings})\n"
        "    def forward(self, image):\n        return self.conv(image)\n"
    )
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    kind: type[nn.Module] = module.Edited
    return kind


class EditedSpace(PartSpace):
    def __init__(self, kind: type[nn.Module]) -> None:
        self.kind = kind

    def build_component(self, spec: OperatorSpec) -> nn.Module | None:
        return self.kind(spec.in_channels, spec.out_channels, spec.stride)


def test_operator_whose_code_was_edited_is_measured_again(tmp_path: Path) -> None:
    path, spec = tmp_path / "table.json", SPECS[:1]

    def measured(kind: type[nn.Module]) -> int:
        backend = CountingBackend()
        build_table(spec, backend, path=path, warmup_runs=0, runs=1, threads=1, space=EditedSpace(kind))
        return len(backend.prepared)

    assert measured(write_plugin(tmp_path, "1")) == 1
    assert measured(write_plugin(tmp_path, "1", note="What it does.")) == 0, "a docstring changes no time"
    assert measured(write_plugin(tmp_path, "3, padding=1")) == 1
    assert measured(write_plugin(tmp_path, "3, padding=1")) == 0


def test_shared_table_gives_neither_disturbed_times_nor_those_of_changed_operators(tmp_path: Path) -> None:
    backend = CountingBackend()
    environment = backend.environment(threads=1)
    of_space = component_hash(build_operator(SPECS[0], PartSpace())[0])
    records = {
        SPECS[0]: LatencyRecord(4.0, 4.0, 9, 0, disturbed=0.2, component=of_space),
        SPECS[1]: LatencyRecord(1.0, 1.0, 9, 0, disturbed=0.8),
        SPECS[2]: LatencyRecord(3.0, 3.0, 9, 0, component="of another code"),
    }
    take_known(SPECS, LatencyTable(environment, records), tmp_path / "table.json", environment, PartSpace())
    assert set(LatencyTable.load(tmp_path / "table.json")) == {SPECS[0]}
    _build(backend, tmp_path / "table.json")
    assert sorted(backend.prepared) == [1, 2, 3]


def test_old_time_of_a_plugins_operator_is_not_taken(tmp_path: Path) -> None:
    """Tables from before operators were told apart by their code: ours go with the version, a stranger's does not."""
    load_file(Path(__file__).parents[1] / "examples" / "operator_plugin" / "asymmetric_conv.py")
    specs = [OperatorSpec(name, 4, 4, 1, 8, 8) for name in ("asymmetric_conv", "conv3x3")]
    environment = CountingBackend().environment(threads=1)
    known = LatencyTable(environment, {spec: LatencyRecord(1.0, 1.0, 3, 0) for spec in specs})
    take_known(specs, known, tmp_path / "table.json", environment)
    assert [spec.operator for spec in LatencyTable.load(tmp_path / "table.json")] == ["conv3x3"]


def test_operator_whose_code_starts_left_of_its_class_has_a_hash() -> None:
    class Told(nn.Identity):
        text = """
left of the class"""

    class Silent(nn.Identity):
        """Same as nothing."""

    assert len({component_hash(Told()), component_hash(Silent())}) == 2


@pytest.mark.slow
def test_operator_is_the_same_model_in_every_process() -> None:
    """What engines are cached by: a hash of the model, weights included."""
    script = (
        "import hashlib, torch; from glioma_nas.costs import OperatorSpec; from glioma_nas.latency_building import *;"
        "from glioma_nas.onnx_export import export_onnx; torch.manual_seed({seed});"
        "module, shapes = build_operator(OperatorSpec('conv3x3', 4, 8, 1, 8, 8));"
        "print(hashlib.sha256(export_onnx(module, shapes, opset=17)).hexdigest(), component_hash(module))"
    )
    commands = [[sys.executable, "-c", script.format(seed=seed)] for seed in (1, 2)]
    found = {subprocess.run(command, capture_output=True, text=True, check=True).stdout for command in commands}
    assert len(found) == 1


def test_building_an_operator_draws_from_nobody_elses_generator() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    build_operator(OperatorSpec("conv3x3", 4, 8, 1, 8, 8))
    assert torch.equal(torch.rand(1), expected)


def test_table_of_another_environment_is_not_continued(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    _build(CountingBackend(), path, threads=1)
    before = path.read_bytes()
    with pytest.raises(
        BackendError, match=r"table\.json: table of another device or engine .threads '1' in the table, '2' here"
    ):
        _build(CountingBackend(), path, threads=2)
    assert path.read_bytes() == before


def test_operator_nobody_builds_is_refused() -> None:
    with pytest.raises(BackendError, match=r"operator 'nosuch' of .* is neither registered nor built"):
        build_operator(OperatorSpec("nosuch", 1, 1, 1, 8, 8), PartSpace())


@pytest.mark.parametrize("stride", [1, 2])
def test_every_registered_operator_can_be_timed_by_every_engine(stride: int) -> None:
    names = registry.operators.names()
    assert names
    for name, backend in itertools.product(names, ("onnxruntime", "torch")):
        module, shapes = build_operator(OperatorSpec(name, 4, 8, stride, 16, 16))
        engine = open_backend(backend).prepare(module, shapes, threads=1)
        image = torch.randn(shapes[0], generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            expected = module(image)
        assert expected.shape == (1, 8, 16 // stride, 16 // stride), name
        torch.testing.assert_close(torch.from_numpy(engine.run([image.numpy()])[0]), expected, atol=1e-4, rtol=1e-4)


class TwoCellSpace:
    """Two cells that choose among the same two operators: the smallest thing with a cost model."""

    candidates: ClassVar[list[OperatorSpec]] = [OperatorSpec("a", 1, 1, 1, 8, 8), OperatorSpec("b", 1, 1, 1, 8, 8)]
    labels: ClassVar[tuple[str, str]] = ("op_0", "op_1")

    def cost_model(self, cost: Callable[[OperatorSpec], float]) -> TwoCellCost:
        return TwoCellCost([cost(spec) for spec in self.candidates], self.labels)

    def samples(self) -> Iterator[dict[str, str]]:
        for choice in itertools.product(("a", "b"), repeat=2):
            yield dict(zip(self.labels, choice, strict=True))


class TwoCellCost:
    def __init__(self, costs: list[float], labels: tuple[str, str]) -> None:
        self.costs, self.labels = costs, labels

    def of(self, sample: Mapping[str, Any]) -> float:
        return sum(self.costs["ab".index(sample[label])] for label in self.labels)

    def expectation(self, weights: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([weights[label] @ torch.tensor(self.costs) for label in self.labels]).sum()


@pytest.fixture
def profiler() -> Any:
    environment = Environment("d", 1, "b", "1", "float32", "2", "p")
    times = dict(
        zip(TwoCellSpace.candidates, (LatencyRecord(1.0, 1.0, 3, 0), LatencyRecord(5.0, 5.0, 3, 0)), strict=True)
    )
    return registry.evaluators.get("latency_table")(TwoCellSpace(), LatencyTable(environment, times))


def test_profile_sums_the_table_over_the_sample(profiler: Any) -> None:
    assert [profiler.profile(sample) for sample in TwoCellSpace().samples()] == [2.0, 6.0, 6.0, 10.0]


def test_expectation_equals_brute_force_average_and_has_a_gradient(profiler: Any) -> None:
    logits = {
        label: torch.tensor(values, requires_grad=True)
        for label, values in (("op_0", [0.3, -1.0]), ("op_1", [2.0, 0.5]))
    }
    weights = {label: values.softmax(0) for label, values in logits.items()}
    average = sum(
        (weights["op_0"]["ab".index(sample["op_0"])] * weights["op_1"]["ab".index(sample["op_1"])]).item()
        * profiler.profile(sample)
        for sample in TwoCellSpace().samples()
    )
    expected = profiler.expectation(weights)
    assert expected.item() == pytest.approx(average, rel=1e-6)
    expected.backward()
    assert all(values.grad is not None and float(values.grad.abs().sum()) > 0 for values in logits.values())


def test_profiler_serves_filters_of_nni(profiler: Any) -> None:
    accept = RangeProfilerFilter(profiler, max=6.0)
    assert [accept(sample) for sample in TwoCellSpace().samples()] == [True, True, True, False]


def test_profiler_refuses_a_table_of_another_device_than_it_is_told(profiler: Any) -> None:
    kind, table = registry.evaluators.get("latency_table"), profiler.table
    kind(TwoCellSpace(), table, environment=table.environment)
    with pytest.raises(BackendError, match=r"table of another device or engine .device 'd' in the table, 'e' here"):
        kind(TwoCellSpace(), table, environment=dataclasses.replace(table.environment, device="e"))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_int8_table_prices_every_part_of_the_space_heads_of_two_inputs_included(engine: str, tmp_path: Path) -> None:
    space = NASBraNet("tiny", operators=("skip", "conv3x3"), image_size_px=32)
    specs = [*space.operator_specs(), *space.fixed_part_specs()]
    assert any(len(build_operator(spec, space)[1]) > 1 for spec in specs)
    table = build_table(
        specs, open_backend(engine, "int8"), path=tmp_path / "t.json", warmup_runs=0, runs=1, threads=1, space=space
    )
    assert set(table) == set(specs) and table.environment.precision == "int8"


def test_profiler_reads_a_table_file(profiler: Any, tmp_path: Path) -> None:
    profiler.table.save(tmp_path / "table.json")
    again = registry.evaluators.get("latency_table")(TwoCellSpace(), tmp_path / "table.json")
    assert again.profile({"op_0": "a", "op_1": "b"}) == 6.0
