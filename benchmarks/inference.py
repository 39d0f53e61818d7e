"""Time networks side by side: one process, one call each a round, so that slow spells hit all alike.

    python benchmarks/inference.py
    python benchmarks/inference.py --engines onnxruntime openvino openvino:int8 --networks unet_thesis icnet
    python benchmarks/inference.py --run runs/mine --engines onnxruntime onnxruntime:int8 --patient-slices 20

prints a markdown table for each engine: median, 95th percentile, and how many times as long a network takes as the
first one, round by round, with the 5th and 95th percentile of those ratios. All networks on all engines take turns in
one loop. The first network is that of the thesis' tables 4-3 and 4-4, beside this file; then come the students of
finished runs (``--run``), built for the size that is timed, and the registered networks. Weights are random: they take
as long as trained ones.

With ``--patient-slices`` a whole patient is timed as well, in batches, and the result is patients per second. A run
whose networks are trained also gets a table of the Dice that each engine's outlines reach with the experts' masks, on
the test patients of fold 0 and with the weights, size and sequences of the run; 8 bits are calibrated on its training
patients.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from torch import nn

from glioma_nas import registry
from glioma_nas.architecture import Architecture
from glioma_nas.cli.application import shown_progress
from glioma_nas.engine_scores import expert_dice
from glioma_nas.errors import BackendError, GliomaNasError
from glioma_nas.latency_backend import Array, Engine, LatencyBackend, OnnxBackend, open_backend
from glioma_nas.latency_records import Shape
from glioma_nas.latency_timing import ratio, summarise, time_engines
from glioma_nas.network_size import network_size
from glioma_nas.new_patients.frozen_run import FrozenRun
from glioma_nas.onnx_export import export_onnx
from glioma_nas.stages.export import parity_slices
from glioma_nas.trained_networks import load_network, network_names

TABLE_NETWORK = Path(__file__).with_name("table_4_3_and_4_4.json")

DICE_FOLD = 0


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


def build(args: argparse.Namespace) -> dict[str, nn.Module]:
    """Build the networks with random weights, for the size and number of sequences that are timed."""
    torch.manual_seed(0)
    networks: dict[str, nn.Module] = {}
    records = [(path.stem, path) for path in args.architecture]
    records += [(f"student of {run.resolve().name}", run / "search" / "student.json") for run in args.run]
    for name, path in records:
        record = Architecture.load(path)
        options = {**record.space_options(), "in_channels": args.channels, "image_size_px": args.size}
        space = registry.search_spaces.get(record.space)(**options)
        networks[f"{name} {record.id}"] = space.derive(record.sample())
    for name in registry.networks.names() if args.networks is None else args.networks:
        networks[name] = registry.networks.get(name)(args.channels, 2)
    return {name: network.eval() for name, network in networks.items()}


def tables(networks: Mapping[str, nn.Module], args: argparse.Namespace) -> list[str]:
    """Time the networks on all engines, a slice (or batch) each, and render a table for each engine."""
    shape = (args.batch, args.channels, args.size, args.size)
    backends = {engine: opened(engine) for engine in args.engines}
    engines = {
        f"{engine}|{name}": backend.prepare(network, [shape], threads=args.threads)
        for engine, backend in backends.items()
        for name, network in networks.items()
    }
    with shown_progress() as progress:
        times = time_engines(engines, warmup_runs=args.warmup, runs=args.runs, progress=progress)
    sizes = {name: network_size(network, (1, *shape[1:])) for name, network in networks.items()}
    first = next(iter(networks))
    found = []
    for engine, backend in backends.items():
        lines = [
            f"{backend.environment(threads=args.threads).describe()}; input {'×'.join(map(str, shape))}, "
            f"{args.runs} alternating rounds after {args.warmup} warm-up calls",
            "",
            f"| network | median ms | p95 ms | slices/s | × {first} (5-95 %) | parameters (M) | GMAC |",
            "|---|---:|---:|---:|---:|---:|---:|",
        ]
        for name in networks:
            taken = times[f"{engine}|{name}"]
            record = summarise(taken, warmup_runs=args.warmup, input_shapes=[shape])
            relative = ratio(taken, times[f"{engine}|{first}"])
            lines.append(
                f"| {name} | {record.median_ms:.2f} | {record.p95_ms:.2f} | {1000 * args.batch / record.median_ms:.1f} "
                f"| {relative.median:.2f} ({relative.p5:.2f}-{relative.p95:.2f}) "
                f"| {sizes[name].params_m:.3f} | {sizes[name].macs_g:.3f} |"
            )
        found.append("\n".join(lines))
    return found


def patient_tables(networks: Mapping[str, nn.Module], args: argparse.Namespace) -> list[str]:
    """Time a whole patient in batches of several sizes on all engines and render patients per second."""
    backends = {engine: opened(engine) for engine in args.engines}
    engines: dict[str, Engine] = {}
    for engine, backend in backends.items():
        for name, network in networks.items():
            for batch in args.batches:
                shape: Shape = (batch, args.channels, args.size, args.size)
                prepared = backend.prepare(network, [shape], threads=args.threads)
                engines[f"{engine}|{name}|{batch}"] = InBatches(prepared, -(-args.patient_slices // batch))
    with shown_progress() as progress:
        times = time_engines(engines, warmup_runs=1, runs=args.patient_runs, progress=progress)
    found = []
    for engine, backend in backends.items():
        lines = [
            f"{backend.environment(threads=args.threads).describe()}; a patient of {args.patient_slices} slices of "
            f"{args.channels}×{args.size}×{args.size}, {args.patient_runs} alternating rounds after 1 warm-up",
            "",
            f"| network | {' | '.join(f'batch {batch}: ms (p95), patients/s' for batch in args.batches)} |",
            "|---|" + "---:|" * len(args.batches),
        ]
        for name in networks:
            cells = []
            for batch in args.batches:
                record = summarise(times[f"{engine}|{name}|{batch}"], warmup_runs=1, input_shapes=[])
                cells.append(f"{record.median_ms:.0f} ({record.p95_ms:.0f}), {1000 / record.median_ms:.2f}")
            lines.append(f"| {name} | {' | '.join(cells)} |")
        found.append("\n".join(lines))
    return found


def dice_table(folder: Path, args: argparse.Namespace) -> str:
    """Score a run's trained networks by the outlines of each engine and render the result as markdown."""
    run = FrozenRun.open(folder)
    config, folds = run.config, run.cohort.folds
    train, test = (run.cohort.select(ids) for ids in (folds.train(DICE_FOLD), folds.test(DICE_FOLD)))
    side, channels = config.preprocess.image_size_px, config.cohort.channels
    shape: Shape = (1, len(channels), side, side)
    calibration = np.stack(parity_slices(train, channels, config.export.calibration_slices))
    networks = {
        name: load_network(config, run.folder / "search", run.folder / "train", DICE_FOLD, name)
        for name in network_names(config)
    }
    lines = []
    for name, network in networks.items():
        exact = mean(expert_dice(open_backend("torch").prepare(network, [shape], threads=args.threads), test, channels))
        cells = []
        for engine in args.engines:
            prepared = calibrated(opened(engine), network, shape, calibration, args.threads)
            reached = expert_dice(prepared, test, channels)
            cells.append(f"{mean(reached):.4f} ({mean(reached) - exact:+.4f})")
        lines.append(f"| {name} | {exact:.4f} | {' | '.join(cells)} |")
    n = sum(case.native_mask() is not None for case in test)
    return "\n".join(
        [
            f"{folder.resolve().name}: mean Dice with the experts' masks on each scan's own grid, weights of fold "
            f"{DICE_FOLD}, its {n} test cases; input {'×'.join(map(str, shape))}; in brackets the difference from "
            "PyTorch in float32",
            "",
            f"| network | PyTorch, float32 | {' | '.join(args.engines)} |",
            "|---|---:|" + "---:|" * len(args.engines),
            *lines,
        ]
    )


def calibrated(backend: LatencyBackend, network: nn.Module, shape: Shape, images: Array, threads: int) -> Engine:
    """Make an engine that is to be used, not only timed: 8 bits are calibrated on real slices."""
    if backend.precision != "int8":
        return backend.prepare(network, [shape], threads=threads)
    if not isinstance(backend, OnnxBackend):
        raise BackendError(f"latency backend '{backend.name}' cannot be calibrated on slices; leave int8 out")
    model = export_onnx(network, [shape], opset=backend.opset)
    return backend.load(backend.convert(model, images), [shape], threads=threads)


def opened(engine: str) -> LatencyBackend:
    """Open ``NAME`` or ``NAME:PRECISION``."""
    name, _, precision = engine.partition(":")
    return open_backend(name, precision or None)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", help="registered networks [default: all]")
    parser.add_argument(
        "--architecture", nargs="*", type=Path, default=[TABLE_NETWORK], help="architecture records, timed first"
    )
    parser.add_argument("--run", nargs="*", type=Path, default=[], help="finished run folders, for their students")
    parser.add_argument(
        "--engines", nargs="+", default=["onnxruntime"], help="latency backends, NAME or NAME:PRECISION"
    )
    parser.add_argument("--size", type=int, default=224, help="side of the slices, pixels")
    parser.add_argument("--channels", type=int, default=2, help="sequences")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--runs", type=int, default=30, help="rounds; 0 for none")
    parser.add_argument("--patient-slices", type=int, default=0, help="time a patient of so many slices too")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 20], help="batch sizes of a patient's slices")
    parser.add_argument("--patient-runs", type=int, default=5)
    parser.add_argument("--no-dice", action="store_true", help="leave the Dice of the runs' engines out")
    args = parser.parse_args(arguments)
    try:
        networks = build(args)
        if args.runs:
            print("\n\n".join(tables(networks, args)), end="\n\n", flush=True)
        if args.patient_slices:
            print("\n\n".join(patient_tables(networks, args)), end="\n\n", flush=True)
        for run in [] if args.no_dice else args.run:
            print(dice_table(run, args), end="\n\n", flush=True)
    except GliomaNasError as err:
        print(err, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
