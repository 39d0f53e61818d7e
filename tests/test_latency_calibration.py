"""From the table to whole networks: known coefficients are found again, and judged on networks not fitted on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nni.mutable import Categorical
from nni.nas.execution import SequentialExecutionEngine
from nni.nas.oneshot.pytorch.profiler import RangeProfilerFilter
from nni.nas.space import RawFormatModelSpace
from nni.nas.strategy import Random
from nni.nas.strategy.middleware import Chain, Filter
from test_latency_table import CountingBackend

from glioma_nas.costs import OperatorSpec
from glioma_nas.errors import BackendError, StorageError
from glioma_nas.evaluators.latency_table import LatencyTableProfiler
from glioma_nas.latency_calibration import Accuracy, Calibration, MeasuredNetwork, accuracy, calibrate
from glioma_nas.latency_networks import measure_random_networks, measured_networks, random_sample
from glioma_nas.latency_records import Environment, LatencyRecord, LatencyTable
from glioma_nas.network_profile import part_times, profile_network
from glioma_nas.report.calibration_chart import write_calibration
from glioma_nas.search_spaces.nasbranet import NASBraNet

ENVIRONMENT = Environment("d", 1, "b", "1", "float32", "2", "p")
SPECS = [OperatorSpec("conv", 8, channels, 1, 16, 16) for channels in (8, 16, 24, 32, 40)]


def table() -> LatencyTable:
    rng = np.random.default_rng(0)
    return LatencyTable(
        ENVIRONMENT,
        {spec: LatencyRecord(value, value, 3, 0) for spec, value in zip(SPECS, rng.uniform(1, 4, 5), strict=True)},
    )


def networks(latency: Callable[[list[OperatorSpec]], float], n: int = 40) -> list[MeasuredNetwork]:
    rng = np.random.default_rng(1)
    drawn = [[SPECS[index] for index in rng.integers(0, len(SPECS), rng.integers(3, 12))] for _ in range(n)]
    return [MeasuredNetwork(tuple(specs), latency(specs)) for specs in drawn]


def fit(measured: list[MeasuredNetwork], n_held_out: int = 15) -> tuple[Calibration, Any]:
    return calibrate(
        measured, table(), environment=ENVIRONMENT, n_held_out=n_held_out, space="s", options={"widths": [8]}
    )


def summed(specs: list[OperatorSpec]) -> float:
    return sum(table().lookup(spec) for spec in specs)


def test_scale_and_offset_are_found_again() -> None:
    calibration, predicted = fit(networks(lambda specs: 1.25 * summed(specs) + 3.0))
    assert calibration.table_factor == pytest.approx(1.25)
    assert calibration.intercept_ms == pytest.approx(3.0)
    assert calibration.terms_ms == {}
    assert calibration.held_out == Accuracy(0.0, 1.0, 15)
    assert len(predicted) == 40


def test_cost_of_a_call_gets_a_term_of_its_own() -> None:
    calibration, _ = fit(networks(lambda specs: 0.5 * summed(specs) + 2.0 * len(specs) + 1.0))
    assert calibration.terms_ms == {"operators": pytest.approx(2.0)}
    assert calibration.held_out.mape < 1e-6 < calibration.plain_held_out.mape


def test_noise_alone_gets_no_term() -> None:
    noise = iter(np.random.default_rng(2).uniform(0.9, 1.1, 100))
    calibration, _ = fit(networks(lambda specs: float(summed(specs) * next(noise)), 60))
    assert calibration.terms_ms == {}
    assert 0.01 < calibration.held_out.mape < 0.1


def test_held_out_networks_do_not_influence_the_fit() -> None:
    measured = networks(lambda specs: 2 * summed(specs))
    spoilt = [*measured[:25], *(dataclasses.replace(item, latency_ms=99.0) for item in measured[25:])]
    assert fit(spoilt)[0].table_factor == pytest.approx(2.0)
    assert fit(spoilt)[0].held_out.mape > 0.1


def test_accuracy_is_that_computed_by_hand() -> None:
    # Errors 10 %, 10 % and 50 %; of the three pairs two are in the right order: τ = (2 - 1)/3.
    found = accuracy(np.array([1.1, 1.8, 1.5]), np.array([1.0, 2.0, 3.0]))
    assert found == Accuracy(pytest.approx(0.7 / 3, abs=1e-6), pytest.approx(1 / 3, abs=1e-6), 3)


@pytest.mark.parametrize(("n", "held_out"), [(9, 2), (40, 1), (40, 35)])
def test_too_few_networks_are_refused(n: int, held_out: int) -> None:
    with pytest.raises(BackendError, match=r"at least 8 are needed to fit on and 2 to judge by"):
        fit(networks(summed, n), held_out)


@pytest.mark.parametrize("change", [{"device": "other"}, {"threads": 4}, {"precision": "int8"}, {"backend": "torch"}])
def test_networks_measured_elsewhere_than_the_table_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(BackendError, match="table of another device or engine"):
        calibrate(
            networks(summed),
            table(),
            environment=dataclasses.replace(ENVIRONMENT, **change),
            n_held_out=15,
            space="s",
            options={},
        )


def test_calibration_returns_from_file_and_refuses_another_device_or_space(tmp_path: Path) -> None:
    calibration, _ = fit(networks(lambda specs: summed(specs) + len(specs)))
    calibration.save(tmp_path / "calibration.json")
    loaded = Calibration.load(tmp_path / "calibration.json")
    assert loaded == calibration
    price = loaded.price(table())
    expected = calibration.table_factor * table().lookup(SPECS[0]) + calibration.terms_ms["operators"]
    assert price(SPECS[0]) == pytest.approx(expected)
    with pytest.raises(BackendError, match="table of another device"):
        loaded.price(LatencyTable(dataclasses.replace(ENVIRONMENT, device="other")))
    loaded.require_space("s", {"widths": [8]})
    for name, options in (("t", {"widths": [8]}), ("s", {"widths": [16]})):
        with pytest.raises(BackendError, match=r"calibration is of another search space"):
            loaded.require_space(name, options)


def test_damaged_calibration_is_refused_with_its_name(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    fit(networks(summed))[0].save(path)
    whole = json.loads(path.read_text())
    for broken, message in (
        ([], "not a calibration"),
        ({**whole, "format": 99}, "another format"),
        ({**whole, "terms_ms": {"moon_phase": 1.0}}, "unknown terms moon_phase"),
        ({key: value for key, value in whole.items() if key != "held_out"}, "not a calibration"),
        ({**whole, "table_factor": float("nan")}, "table_factor is no finite number"),
        ({**whole, "intercept_ms": float("inf")}, "intercept_ms is no finite number"),
        ({**whole, "terms_ms": {"operators": float("nan")}}, "operators is no finite number"),
        ({**whole, "held_out": {**whole["held_out"], "mape": float("nan")}}, r"held_out\.mape is no finite number"),
    ):
        path.write_text(json.dumps(broken))
        with pytest.raises(StorageError, match=rf"calibration\.json: .*{message}"):
            Calibration.load(path)


def test_chart_and_rows_hold_every_network(tmp_path: Path) -> None:
    measured = networks(lambda specs: summed(specs) + 1)
    calibration, predicted = fit(measured)
    records = [LatencyRecord(item.latency_ms, 2 * item.latency_ms, 12, 3, disturbed=0.1) for item in measured]
    write_calibration(tmp_path, calibration, predicted, records)
    assert (tmp_path / "calibration.png").read_bytes()[:4] == b"\x89PNG"
    rows = (tmp_path / "calibration.csv").read_text().splitlines()
    assert len(rows) == 41 and sum("held out" in row for row in rows) == 15
    first = dict(zip(rows[0].split(","), rows[1].split(","), strict=True))
    assert (first["n"], first["warmup_runs"], first["disturbed"], first["device"]) == ("12", "3", "0.1", "d")


# The thesis' space in small: whole networks, priced with stem and head ---------------------------------------------


def whole_table(space: NASBraNet) -> LatencyTable:
    specs = [*space.operator_specs(), *space.fixed_part_specs()]
    rng = np.random.default_rng(3)
    return LatencyTable(
        ENVIRONMENT,
        {
            spec: LatencyRecord(value, value, 3, 0)
            for spec, value in zip(specs, rng.uniform(1, 4, len(specs)), strict=True)
        },
    )


def of_space(space: NASBraNet, **changes: Any) -> Calibration:
    nothing = Accuracy(0.0, 1.0, 2)
    values: dict[str, Any] = {
        "environment": ENVIRONMENT,
        "space": "nasbranet",
        "options": space.layout.options(),
        "table_factor": 0.5,
        "intercept_ms": 7.0,
        "terms_ms": {"operators": 0.25},
        "fitted": nothing,
        "held_out": nothing,
        "plain_held_out": nothing,
    }
    return Calibration(**{**values, **changes})


def test_calibrated_profile_is_the_formula_over_the_parts_of_the_network() -> None:
    space = NASBraNet("tiny")
    profiler = LatencyTableProfiler(space, whole_table(space), of_space(space))
    for index in range(5):
        sample = random_sample(space, 0, index)
        specs = space.network_specs(sample)
        total = sum(whole_table(space).lookup(spec) for spec in specs)
        assert profiler.profile(sample) == pytest.approx(0.5 * total + 0.25 * len(specs) + 7.0)


def test_calibrated_expectation_of_one_network_is_its_profile() -> None:
    space = NASBraNet("tiny", skip_policy="conv")
    profiler = LatencyTableProfiler(space, whole_table(space), of_space(space))
    sample = random_sample(space, 0, 1)
    weights = {}
    for label, values in space.layout.choices.items():
        chosen = sample[label][0] if label.startswith("in_") else sample[label]
        weights[label] = torch.nn.functional.one_hot(torch.tensor(values.index(chosen)), len(values)).double()
        weights[label].requires_grad_()
    expected = profiler.expectation(weights)
    assert expected.item() == pytest.approx(profiler.profile(sample), rel=1e-6)
    expected.backward()
    assert weights["branches"].grad is not None


def test_calibration_of_another_space_is_refused() -> None:
    space = NASBraNet("tiny")
    with pytest.raises(BackendError, match=r"calibration is of another search space \(n_layers=9\)"):
        LatencyTableProfiler(
            space, whole_table(space), of_space(space, options={**space.layout.options(), "n_layers": 9})
        )


def test_calibration_of_a_space_of_another_name_is_refused() -> None:
    space = NASBraNet("tiny")
    other = dataclasses.replace(of_space(space), space="other")
    with pytest.raises(BackendError, match=r"calibration is of another search space \(space 'other'\)"):
        LatencyTableProfiler(space, whole_table(space), other)
    LatencyTableProfiler(space, whole_table(space), of_space(space))


def test_table_without_heads_is_refused_with_what_to_do() -> None:
    space = NASBraNet("tiny")
    bare = LatencyTable(ENVIRONMENT, {spec: LatencyRecord(1.0, 1.0, 3, 0) for spec in space.operator_specs()})
    with pytest.raises(BackendError, match=r"no time for operator stem_light .*glioma-nas latency build"):
        LatencyTableProfiler(space, bare)


class _Proposals(SequentialExecutionEngine):
    """Takes what a strategy proposes and trains nothing."""

    def __init__(self, n: int) -> None:
        super().__init__(max_model_count=n)
        self.samples: list[dict[str, Any]] = []

    def _run_single_model(self, model: Any) -> None:
        self.samples.append(model.sample)
        model.metrics.final = 0.5


def test_latency_bounds_what_a_built_in_strategy_of_nni_proposes() -> None:
    space = NASBraNet("tiny")
    profiler = LatencyTableProfiler(space, whole_table(space))
    middle = float(np.median([profiler.profile(random_sample(space, 0, index)) for index in range(40)]))
    accepts = RangeProfilerFilter(profiler, max=middle)
    strategy = Chain(Random(seed=0), Filter(lambda model: accepts(model.sample)))
    engine = _Proposals(8)
    strategy(RawFormatModelSpace.from_model(space), engine)
    assert len(engine.samples) == 8
    assert all(profiler.profile(sample) <= middle for sample in engine.samples)


# Measuring networks -------------------------------------------------------------------------------------------------


class ThreeWidths:
    """Networks of one convolution; NNI's interface to samples, and nothing else of a space."""

    def simplify(self) -> dict[str, Categorical]:
        return {"width": Categorical([1, 2, 3], label="width")}

    def freeze(self, sample: Mapping[str, Any]) -> torch.nn.Module:
        return torch.nn.Conv2d(2, sample["width"], 1)

    def network_specs(self, sample: Mapping[str, Any]) -> Iterator[OperatorSpec]:
        yield OperatorSpec("conv", 2, sample["width"], 1, 8, 8)


def measure(path: Path, n: int, backend: CountingBackend | None = None, **changes: Any) -> int:
    options: dict[str, Any] = {"seed": 0, "input_shape": (1, 2, 8, 8), "warmup_runs": 0, "runs": 3, "threads": 1}
    return measure_random_networks(ThreeWidths(), backend or CountingBackend(), path=path, n=n, **(options | changes))


def test_networks_are_measured_in_portions_and_never_twice(tmp_path: Path) -> None:
    path = tmp_path / "networks.json"
    backend = CountingBackend()
    assert measure(path, 6, backend, time_limit_s=0.0) == 1
    with pytest.raises(StorageError, match=r"networks\.json: 1 of 6 networks are measured; run the same command again"):
        measured_networks(ThreeWidths(), path, 6)
    assert measure(path, 6, backend) == 6
    assert len(backend.prepared) == 6
    found = measured_networks(ThreeWidths(), path, 6)
    assert found.environment == backend.environment(threads=1)
    assert [item.latency_ms for item in found.networks] == [2.0] * 6  # two input channels: two milliseconds
    assert {item.specs[0].out_channels for item in found.networks} <= {1, 2, 3}
    assert {(item.n, item.p95_ms, item.warmup_runs) for item in found.records} == {(3, 2.0, 0)}
    assert measure(tmp_path / "longer.json", 1, max_runs=20) == 1
    assert measured_networks(ThreeWidths(), tmp_path / "longer.json", 1).records[0].n > 3


def test_networks_of_another_seed_or_device_are_not_continued(tmp_path: Path) -> None:
    path = tmp_path / "networks.json"
    measure(path, 1)
    with pytest.raises(StorageError, match=r"another seed or search space"):
        measure(path, 2, seed=1)
    with pytest.raises(BackendError, match=r"another device or engine"):
        measure(path, 2, threads=2)
    path.write_text("{}")
    with pytest.raises(StorageError, match=r"not measured networks"):
        measure(path, 2)


def test_same_seed_and_index_draw_the_same_network() -> None:
    space = NASBraNet("tiny")
    assert random_sample(space, 0, 3) == random_sample(NASBraNet("tiny"), 0, 3)
    assert random_sample(space, 0, 3) != random_sample(space, 0, 4) != random_sample(space, 1, 4)


# Where the time goes ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_times_inside_a_network_are_given_to_its_cells(engine: str) -> None:
    from glioma_nas.latency_backend import open_backend

    # Large enough for every part to take a microsecond, which is what the engines count in.
    space = NASBraNet("tiny", skip_policy="conv", image_size_px=128)
    record = space.architecture(random_sample(space, 0, 0))
    found = profile_network(
        space, record, open_backend(engine), table=None, warmup_runs=2, runs=3, max_runs=9, threads=1
    )
    assert found.latency.warmup_runs == 2 and 3 <= found.latency.n <= 9
    cells = {step.name for step in space.plan(record).steps}
    rows = {row.part: row for row in found.rows}
    assert cells | {"stem", "head"} <= set(rows)
    assert all(rows[name].latency_ms > 0 for name in cells | {"stem", "head"})
    assert sum(row.share for row in found.rows) == pytest.approx(1.0)
    assert {row.operator for row in found.rows if row.part in cells} <= set(space.layout.operators)


def test_layer_of_several_parts_is_charged_to_none_of_them() -> None:
    parts = ["stem", "s2_l1_down", "s4_l2_keep", "head"]
    layers = {
        "/stem/Conv + /s2_l1_down/Conv": 1.0,
        "{ForeignNode[/s2_l1_down/Relu.../head/fuse/Conv]}": 5.0,
        "/s4_l2_keep/Conv": 2.0,
    }
    expected = {"stem + s2_l1_down": 1.0, "s2_l1_down … head": 5.0, "s4_l2_keep": 2.0}
    assert part_times(layers, parts) == expected


class Speechless(CountingBackend):
    """An engine that knows of no layers."""

    def prepare(self, module: torch.nn.Module, input_shapes: Any, *, threads: int) -> Any:
        engine = super().prepare(module, input_shapes, threads=threads)
        engine.layer_times_ms = lambda runs: {}  # type: ignore[method-assign]  # one engine of a test
        return engine


def test_engine_that_tells_of_no_layers_is_refused() -> None:
    space = NASBraNet("tiny")
    record = space.architecture(random_sample(space, 0, 0))
    with pytest.raises(BackendError, match="counting tells of no layer that took any time"):
        profile_network(space, record, Speechless(), table=None, warmup_runs=0, runs=1, threads=1)


def test_layers_that_belong_to_no_part_are_listed_by_themselves() -> None:
    layers = {"/stem/body/0/Conv": 1.0, "Reorder": 0.5, "x_/s2_l1_down/x/Relu": 2.0, "/head/fuse/Conv": 4.0}
    found = part_times(layers, ["stem", "s2_l1_down", "head"])
    assert found == {"stem": 1.0, "layout and others": 0.5, "s2_l1_down": 2.0, "head": 4.0}


def test_profile_refuses_a_table_of_another_engine() -> None:
    from glioma_nas.latency_backend import open_backend

    space = NASBraNet("tiny")
    with pytest.raises(BackendError, match="table of another device or engine"):
        profile_network(
            space,
            space.architecture(random_sample(space, 0, 0)),
            open_backend("onnxruntime"),
            table=whole_table(space),
            warmup_runs=0,
            runs=1,
            threads=1,
        )
