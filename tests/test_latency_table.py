from __future__ import annotations

import itertools
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
from glioma_nas.latency_building import build_operator, build_table
from glioma_nas.latency_records import Environment, LatencyRecord, LatencyTable, Shape

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


def test_profiler_reads_a_table_file(profiler: Any, tmp_path: Path) -> None:
    profiler.table.save(tmp_path / "table.json")
    again = registry.evaluators.get("latency_table")(TwoCellSpace(), tmp_path / "table.json")
    assert again.profile({"op_0": "a", "op_1": "b"}) == 6.0
