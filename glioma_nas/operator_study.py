"""Table 4-1: what kinds of convolution cost on a given engine, on the input the thesis measured them with.

Its zoomed convolution prints a quarter of the parameters; they stay equal. Its "FLOPs" are multiply-accumulate
operations. Its latencies are those of TensorRT on a GTX 1080 Ti.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from glioma_nas import registry
from glioma_nas.latency_backend import LatencyBackend
from glioma_nas.latency_records import LatencyRecord
from glioma_nas.latency_timing import Ratio, ratio, time_in_turns
from glioma_nas.network_size import network_size
from glioma_nas.progress import Progress

INPUT_SHAPE = (1, 256, 32, 64)

THESIS_LATENCY_MS = {"conv3x3": 0.15, "grouped_conv": 0.13, "dilated_conv": 0.25, "zoomed_conv": 0.09}
"""Operator → latency that table 4-1 prints, milliseconds."""


@dataclass(frozen=True)
class OperatorCost:
    """One row.

    Attributes:
        operator: Registered name.
        latency: Times in milliseconds, and how they were taken.
        relative: Times the plain convolution's, round by round.
        macs_g: Multiply-accumulate operations, 10⁹.
        params_m: Parameters of the convolution and its batch norm, millions.
        relative_receptive_field: Side of the receptive field, times that of the plain convolution.
        thesis_relative: Times the plain convolution's, as table 4-1 prints it.
    """

    operator: str
    latency: LatencyRecord
    relative: Ratio
    macs_g: float
    params_m: float
    relative_receptive_field: float
    thesis_relative: float


def operator_costs(
    backend: LatencyBackend,
    *,
    warmup_runs: int,
    runs: int,
    threads: int,
    max_runs: int | None = None,
    progress: Progress | None = None,
) -> list[OperatorCost]:
    """Time the four convolutions of table 4-1 in turn, 256 channels in and out, and count the rest.

    Args:
        backend: The engine.
        warmup_runs: Untimed calls of each.
        runs: Rounds at least.
        threads: Threads inside one operator.
        max_runs: Rounds at most, until every median stands still; none: exactly ``runs``.
        progress: Where to report.
    """
    modules: dict[str, nn.Module] = {
        name: registry.operators.get(name)(INPUT_SHAPE[1], INPUT_SHAPE[1], 1).eval() for name in THESIS_LATENCY_MS
    }
    engines = {name: backend.prepare(module, [INPUT_SHAPE], threads=threads) for name, module in modules.items()}
    taken = time_in_turns(engines, warmup_runs=warmup_runs, runs=runs, max_runs=max_runs, progress=progress)
    clock_mhz = backend.clock_mhz()
    space = registry.search_spaces.get("nasbranet")("tiny", operators=tuple(modules))
    fields = {
        spec.operator: figures.receptive_field_px
        for spec, figures in space.operator_figures().items()
        if spec.stride == 1
    }
    rows = []
    for name, module in modules.items():
        record = taken[name].record(warmup_runs=warmup_runs, input_shapes=[INPUT_SHAPE], clock_mhz=clock_mhz)
        size = network_size(module, INPUT_SHAPE)
        rows.append(
            OperatorCost(
                name,
                record,
                ratio(taken[name].times_ms, taken["conv3x3"].times_ms),
                size.macs_g,
                size.params_m,
                fields[name] / fields["conv3x3"],
                THESIS_LATENCY_MS[name] / THESIS_LATENCY_MS["conv3x3"],
            )
        )
    return rows
