"""Time networks side by side: one process, one call each a round, so that slow spells hit all alike.

    python benchmarks/inference.py
    python benchmarks/inference.py --engines onnxruntime openvino openvino:int8 --networks unet_thesis icnet
    python benchmarks/inference.py --architecture runs/demo/search/student.json --patient-slices 20 --batches 1 4 20

prints a markdown table for each engine: median, 95th percentile, and how many times as long a network takes as the
first one, round by round, with the 5th and 95th percentile of those ratios. The first network is that of the thesis'
tables 4-3 and 4-4, beside this file. With ``--patient-slices`` a whole patient is timed, in batches, and the result is
patients per second. Weights are random: they take as long as trained ones.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from glioma_nas import registry
from glioma_nas.architecture import Architecture
from glioma_nas.errors import GliomaNasError
from glioma_nas.latency_backend import Array, Engine, LatencyBackend, open_backend
from glioma_nas.latency_records import Shape
from glioma_nas.latency_timing import ratio, summarise, time_engines
from glioma_nas.network_size import network_size

TABLE_NETWORK = Path(__file__).with_name("table_4_3_and_4_4.json")


class InBatches(Engine):
    """Run a patient's slices through an engine, batch by batch; the last batch is padded to the engine's size."""

    def __init__(self, engine: Engine, calls: int) -> None:
        self._engine = engine
        self._calls = calls

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """See `Engine.run`."""
        return self._engine.run(inputs)

    def call(self) -> None:
        """See `Engine.call`."""
        for _ in range(self._calls):
            self._engine.call()

    def time_ms(self) -> float:
        """Add up the engine's own times of its calls."""
        return sum(self._engine.time_ms() for _ in range(self._calls))


def build(names: list[str], architectures: list[Path], channels: int) -> dict[str, nn.Module]:
    """Build the networks with random weights."""
    torch.manual_seed(0)
    networks: dict[str, nn.Module] = {}
    for path in architectures:
        record = Architecture.load(path)
        space = registry.search_spaces.get(record.space)(**record.space_options())
        networks[f"{path.stem} {record.id}"] = space.derive(record)
    for name in names:
        networks[name] = registry.networks.get(name)(channels, 2)
    return {name: network.eval() for name, network in networks.items()}


def table(networks: dict[str, nn.Module], engine: str, args: argparse.Namespace) -> str:
    """Time the networks on one engine, a slice each, and render the result as markdown."""
    backend, label = opened(engine)
    shape = (args.batch, args.channels, args.size, args.size)
    engines = {name: backend.prepare(network, [shape], threads=args.threads) for name, network in networks.items()}
    times = time_engines(engines, warmup_runs=args.warmup, runs=args.runs)
    first = next(iter(networks))
    lines = [
        f"{label(args.threads)}; input {'×'.join(map(str, shape))}, "
        f"{args.runs} alternating rounds after {args.warmup} warm-up calls",
        "",
        f"| network | median ms | p95 ms | slices/s | × {first} (5-95 %) | parameters (M) | GMAC |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, network in networks.items():
        record = summarise(times[name], warmup_runs=args.warmup, input_shapes=[shape])
        relative, size = ratio(times[name], times[first]), network_size(network, (1, *shape[1:]))
        lines.append(
            f"| {name} | {record.median_ms:.2f} | {record.p95_ms:.2f} | {1000 * args.batch / record.median_ms:.1f} "
            f"| {relative.median:.2f} ({relative.p5:.2f}-{relative.p95:.2f}) "
            f"| {size.params_m:.3f} | {size.macs_g:.3f} |"
        )
    return "\n".join(lines)


def patient_table(networks: dict[str, nn.Module], engine: str, args: argparse.Namespace) -> str:
    """Time a whole patient in batches of several sizes and render patients per second as markdown."""
    backend, label = opened(engine)
    engines: dict[str, Engine] = {}
    for name, network in networks.items():
        for batch in args.batches:
            shape: Shape = (batch, args.channels, args.size, args.size)
            prepared = backend.prepare(network, [shape], threads=args.threads)
            engines[f"{name}|{batch}"] = InBatches(prepared, -(-args.patient_slices // batch))
    times = time_engines(engines, warmup_runs=1, runs=args.patient_runs)
    lines = [
        f"{label(args.threads)}; a patient of {args.patient_slices} slices of {args.channels}×{args.size}×{args.size}, "
        f"{args.patient_runs} alternating rounds after 1 warm-up",
        "",
        f"| network | {' | '.join(f'batch {batch}: ms (p95), patients/s' for batch in args.batches)} |",
        "|---|" + "---:|" * len(args.batches),
    ]
    for name in networks:
        cells = []
        for batch in args.batches:
            record = summarise(times[f"{name}|{batch}"], warmup_runs=1, input_shapes=[])
            cells.append(f"{record.median_ms:.0f} ({record.p95_ms:.0f}), {1000 / record.median_ms:.2f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def opened(engine: str) -> tuple[LatencyBackend, Callable[[int], str]]:
    """Open ``NAME`` or ``NAME:PRECISION``; the second value describes it for a number of threads."""
    name, _, precision = engine.partition(":")
    backend = open_backend(name, precision or None)
    return backend, lambda threads: backend.environment(threads=threads).describe()


def main() -> int:
    """Parse the command line and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", help="registered networks [default: all]")
    parser.add_argument(
        "--architecture", nargs="*", type=Path, default=[TABLE_NETWORK], help="architecture records, timed first"
    )
    parser.add_argument(
        "--engines", nargs="+", default=["onnxruntime"], help="latency backends, NAME or NAME:PRECISION"
    )
    parser.add_argument("--size", type=int, default=224, help="side of the slices, pixels")
    parser.add_argument("--channels", type=int, default=2, help="sequences; an architecture brings its own")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--patient-slices", type=int, default=0, help="time a patient of so many slices instead")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 20], help="batch sizes of a patient's slices")
    parser.add_argument("--patient-runs", type=int, default=5)
    args = parser.parse_args()
    try:
        names = registry.networks.names() if args.networks is None else args.networks
        networks = build(names, args.architecture, args.channels)
        for engine in args.engines:
            print((patient_table if args.patient_slices else table)(networks, engine, args), end="\n\n", flush=True)
    except GliomaNasError as err:
        print(err, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
