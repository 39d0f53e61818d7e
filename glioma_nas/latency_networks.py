"""Measure random networks of a search space, for a calibration; resumable, since it takes minutes."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np

from glioma_nas.errors import BackendError, StorageError
from glioma_nas.files import canonical_json, read_json, sha256_text, write_json
from glioma_nas.latency_backend import LatencyBackend
from glioma_nas.latency_calibration import MeasuredNetwork
from glioma_nas.latency_records import Environment, LatencyRecord, LatencyTable, Shape
from glioma_nas.progress import Progress, Silent
from glioma_nas.seeding import derive_seed, isolated_torch_rng

FORMAT_VERSION = 2


@dataclasses.dataclass(frozen=True)
class MeasuredNetworks:
    """Networks measured in one place.

    Attributes:
        environment: The conditions of all.
        networks: Their operators and medians.
        records: Everything measured of each, in the same order.
    """

    environment: Environment
    networks: tuple[MeasuredNetwork, ...]
    records: tuple[LatencyRecord, ...]


def random_sample(space: Any, seed: int, index: int) -> dict[str, Any]:
    """Draw one network of an NNI model space, every choice uniformly and independently of the others."""
    state = np.random.RandomState(derive_seed(seed, "random network", index) % 2**32)  # what NNI's mutables take
    sample: dict[str, Any] = {}
    for mutable in space.simplify().values():
        mutable.random(sample, state)
    return sample


def measure_random_networks(
    space: Any,  # an NNI model space; NNI's classes are untyped
    backend: LatencyBackend,
    *,
    path: Path,
    n: int,
    seed: int,
    input_shape: Shape,
    warmup_runs: int,
    runs: int,
    threads: int,
    max_runs: int | None = None,
    time_limit_s: float | None = None,
    progress: Progress | None = None,
) -> int:
    """Measure the first ``n`` random networks that belong to ``seed``; those that ``path`` holds are not repeated.

    Args:
        space: The search space; has ``freeze``.
        backend: The engine.
        path: JSON file; written after every network.
        n: How many networks in all.
        seed: Which ones.
        input_shape: Batch first.
        warmup_runs: Untimed calls of each network.
        runs: Timed calls of each network at least.
        threads: Threads inside one operator.
        max_runs: Timed calls at most, until the median stands still; none: exactly ``runs``.
        time_limit_s: Stop after the network that is being measured when this has passed; call again to go on.
        progress: Where to report.

    Returns:
        How many of the ``n`` are measured now.

    Raises:
        StorageError: The file holds networks of other draws.
        BackendError: It holds times of another device or engine; the engine refuses a network.
    """
    environment = backend.environment(threads=threads)
    conditions = {"seed": seed, "space": space_hash(space), "input_shape": list(input_shape)}
    records: dict[int, LatencyRecord] = {}
    if path.exists():
        known = _read(path)
        LatencyTable(known.environment).require_same_environment(environment)
        if known.conditions != conditions:
            raise StorageError(f"{path}: holds networks of another seed or search space; choose another folder")
        records = known.records
    missing = [index for index in range(n) if index not in records]
    started = time.monotonic()
    with (progress or Silent()).task("measuring random networks", len(missing)) as task:
        for index in missing:
            with isolated_torch_rng(seed, "random network", index):
                network = space.freeze(random_sample(space, seed, index)).eval()
            records[index] = backend.measure(
                network, [input_shape], warmup_runs=warmup_runs, runs=runs, max_runs=max_runs, threads=threads
            )
            write_json(
                path,
                {
                    "format": FORMAT_VERSION,
                    "environment": dataclasses.asdict(environment),
                    **conditions,
                    "networks": {str(key): dataclasses.asdict(records[key]) for key in sorted(records)},
                },
            )
            task.advance(latency_ms=records[index].median_ms)
            if time_limit_s is not None and time.monotonic() - started > time_limit_s:
                break
    return sum(index in records for index in range(n))


def measured_networks(space: Any, path: Path, n: int) -> MeasuredNetworks:
    """Read what `measure_random_networks` wrote: the first ``n`` networks with their operators, stem and head.

    Raises:
        StorageError: The file is missing or damaged, of another search space, or holds fewer networks.
    """
    known = _read(path)
    if known.conditions["space"] != space_hash(space):
        raise StorageError(f"{path}: holds networks of another search space; measure again in another folder")
    lacking = [index for index in range(n) if index not in known.records]
    if lacking:
        raise StorageError(
            f"{path}: {n - len(lacking)} of {n} networks are measured; run the same command again to go on"
        )
    seed = known.conditions["seed"]
    records = tuple(known.records[index] for index in range(n))
    networks = tuple(
        MeasuredNetwork(tuple(space.network_specs(random_sample(space, seed, index))), record.median_ms)
        for index, record in enumerate(records)
    )
    return MeasuredNetworks(known.environment, networks, records)


def space_hash(space: Any) -> str:
    """Return what tells two spaces' random draws apart: a hash of every choice and of the options of its layers."""
    choices = {label: [str(value) for value in mutable.values] for label, mutable in space.simplify().items()}
    options = space.layout.options() if hasattr(space, "layout") else {}
    return sha256_text(canonical_json({"choices": choices, "options": options}))[:16]


@dataclasses.dataclass(frozen=True)
class _Known:
    environment: Environment
    conditions: dict[str, Any]
    records: dict[int, LatencyRecord]


def _read(path: Path) -> _Known:
    data = read_json(path)
    try:
        if data["format"] != FORMAT_VERSION:
            raise StorageError(f"{path}: measured networks of another format than {FORMAT_VERSION}; measure again")
        return _Known(
            Environment(**data["environment"]),
            {key: data[key] for key in ("seed", "space", "input_shape")},
            {
                int(key): LatencyRecord(
                    **{**value, "input_shapes": tuple(tuple(shape) for shape in value["input_shapes"])}
                )
                for key, value in data["networks"].items()
            },
        )
    except BackendError as err:
        raise StorageError(f"{path}: {err}; delete it and measure again") from err
    except (KeyError, TypeError, ValueError, AttributeError) as err:
        raise StorageError(f"{path}: not measured networks ({err!r}); delete it and measure again") from err
