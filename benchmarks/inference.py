"""Time networks side by side: one process, one engine, one call each a round, so that slow spells hit all alike.

    python benchmarks/inference.py --size 224 --architecture runs/demo/search/student.json

prints a markdown table: median, 95th percentile, and how many times as long a network takes as the first one, round by
round, with the 5th and 95th percentile of those ratios.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import nn

from glioma_nas import registry
from glioma_nas.architecture import Architecture
from glioma_nas.errors import GliomaNasError
from glioma_nas.latency_backend import open_backend
from glioma_nas.latency_timing import ratio, summarise, time_engines
from glioma_nas.network_size import network_size

BASELINES = ("monai_unet", "monai_basic_unet", "unet_thesis")


def build(names: list[str], architectures: list[Path], channels: int) -> dict[str, nn.Module]:
    """Build the networks with random weights, which take as long as trained ones."""
    torch.manual_seed(0)
    networks: dict[str, nn.Module] = {}
    for path in architectures:
        record = Architecture.load(path)
        space = registry.search_spaces.get(record.space)(**record.space_options())
        networks[f"{path.stem} {record.id}"] = space.derive(record)
    for name in names:
        networks[name] = registry.networks.get(name)(channels, 2)
    return {name: network.eval() for name, network in networks.items()}


def table(networks: dict[str, nn.Module], args: argparse.Namespace) -> str:
    """Time the networks and render the result as markdown."""
    shape = (args.batch, args.channels, args.size, args.size)
    backend = open_backend(args.backend)
    engines = {name: backend.prepare(network, [shape], threads=args.threads) for name, network in networks.items()}
    times = time_engines(engines, warmup_runs=args.warmup, runs=args.runs)
    first = next(iter(networks))
    lines = [
        f"{backend.environment(threads=args.threads).describe()}; input {'×'.join(map(str, shape))}, "
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


def main() -> int:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", default=list(BASELINES), help="registered networks")
    parser.add_argument(
        "--architecture", nargs="*", type=Path, default=[], help="architecture records (JSON), timed first"
    )
    parser.add_argument("--backend", default="onnxruntime")
    parser.add_argument("--size", type=int, default=224, help="side of the slices, pixels")
    parser.add_argument("--channels", type=int, default=2, help="sequences; an architecture brings its own")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--runs", type=int, default=30)
    args = parser.parse_args()
    try:
        print(table(build(args.networks, args.architecture, args.channels), args))
    except GliomaNasError as err:
        print(err, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
