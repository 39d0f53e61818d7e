"""Where the time of one network goes: its cells timed inside it by the engine's own profiler, beside the table.

An engine fuses operators and names what it made of them after one or several of theirs. The exporter names operators
by the path of their module (``/s2_l1_keep/body/…``), so a layer belongs to the part of the network that its name holds.
What belongs to none, such as changes of layout, or to several, is listed by itself.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from glioma_nas.architecture import Architecture
from glioma_nas.errors import BackendError
from glioma_nas.latency_backend import Engine, LatencyBackend
from glioma_nas.latency_records import Environment, LatencyRecord, LatencyTable
from glioma_nas.latency_timing import time_until_stable
from glioma_nas.onnx_export import OUTPUT_NAME

ELSEWHERE = "layout and others"

_REGION = "ForeignNode["
_NOT_A_NAME = re.compile(r"[^0-9A-Za-z_]+")


@dataclass(frozen=True)
class PartTime:
    """What one part of a network takes.

    Attributes:
        part: ``stem``, ``head``, the name of a cell, several of them that the engine made one layer of, or what belongs
            to none.
        operator: Registered operator of a cell.
        latency_ms: Inside the network, with the engine's profiler on.
        share: Of the sum of all parts.
        table_ms: What the latency table says; none without one.
    """

    part: str
    operator: str
    latency_ms: float
    share: float
    table_ms: float | None


@dataclass(frozen=True)
class NetworkProfile:
    """A network's latency and that of its parts.

    Attributes:
        latency: The whole network, without a profiler.
        environment: The conditions.
        rows: Parts in the order of the network.
        engine: The engine, for a closer look.
    """

    latency: LatencyRecord
    environment: Environment
    rows: tuple[PartTime, ...]
    engine: Engine


def profile_network(
    space: Any,  # an NNI model space; NNI's classes are untyped
    architecture: Architecture,
    backend: LatencyBackend,
    *,
    table: LatencyTable | None,
    warmup_runs: int,
    runs: int,
    threads: int,
    max_runs: int | None = None,
) -> NetworkProfile:
    """Time a network and its parts at batch 1.

    Args:
        space: The space the architecture is of.
        architecture: The network.
        backend: The engine.
        table: Table of the same engine, for comparison; its times of another engine are refused.
        warmup_runs: Untimed calls of the whole network before.
        runs: Timed calls of the whole network at least, and calls with the profiler on.
        threads: Threads inside one operator.
        max_runs: Timed calls at most, until the median stands still; none: exactly ``runs``.

    Raises:
        BackendError: The engine does not tell what its layers take; the table is of another device or engine.
    """
    environment = backend.environment(threads=threads)
    if table is not None:
        table.require_same_environment(environment)
    layout, plan = space.layout, space.plan(architecture)
    shape = (1, layout.in_channels, layout.image_size_px, layout.image_size_px)
    engine = backend.prepare(space.derive(architecture), [shape], threads=threads)
    taken = time_until_stable(engine, warmup_runs=warmup_runs, runs=runs, max_runs=max_runs)
    whole = taken.record(warmup_runs=warmup_runs, input_shapes=[shape], clock_mhz=backend.clock_mhz())
    specs = space.network_specs(architecture)
    names = ["stem", *(step.name for step in plan.steps), "head"]
    times = part_times(engine.layer_times_ms(runs), names)
    operators = ["", *(step.operator for step in plan.steps), ""]
    total = sum(times.values())
    if total <= 0:
        raise BackendError(f"{backend.name} tells of no layer that took any time; profile with another --backend")
    rows = [
        PartTime(
            name,
            operator,
            times.get(name, 0.0),
            times.get(name, 0.0) / total,
            table.lookup(spec) if table is not None else None,
        )
        for name, operator, spec in zip(names, operators, specs, strict=True)
    ]
    rows += [PartTime(name, "", value, value / total, None) for name, value in times.items() if name not in names]
    return NetworkProfile(whole, environment, tuple(rows), engine)


def part_times(layer_times_ms: Mapping[str, float], parts: Collection[str]) -> dict[str, float]:
    """Add up layer times by the part of the network that a layer's name belongs to.

    A layer made of operators of several parts belongs to none of them: it is listed by itself, under their names, in
    the order in which they stand in its name. TensorRT names a region that it hands to another compiler by its first
    and last operator alone; it is listed as everything from the one's part to the other's.

    Args:
        layer_times_ms: Layer → milliseconds; see `glioma_nas.latency_backend.Engine.layer_times_ms`.
        parts: Names of the modules that are told apart; the output belongs to ``head``.

    Returns:
        Part → milliseconds.

    >>> part_times({"/s2_l1_keep/body/0/Conv + /s2_l1_keep/Relu": 2.0, "logits_nchwc": 1.0, "Reorder": 0.5},
    ...            ["s2_l1_keep", "head"])
    {'s2_l1_keep': 2.0, 'head': 1.0, 'layout and others': 0.5}
    >>> part_times({"/stem/Conv + /s2_l1_keep/Conv": 2.0, "{ForeignNode[/stem/Relu.../head/Resize]}": 5.0},
    ...            ["stem", "s2_l1_keep", "head"])
    {'stem + s2_l1_keep': 2.0, 'stem … head': 5.0}
    """
    times: dict[str, float] = {}
    for name, value in layer_times_ms.items():
        found = list(dict.fromkeys(piece for piece in _NOT_A_NAME.split(name) if piece in parts))
        if not found:
            found = ["head" if OUTPUT_NAME in name else ELSEWHERE]
        part = (" … " if _REGION in name else " + ").join(found)
        times[part] = times.get(part, 0.0) + value
    return times
