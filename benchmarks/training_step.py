"""What torch.compile brings to the training of a network (``train.compile``): steps as they are and compiled, in turns.

    python benchmarks/training_step.py --architecture runs/demo/search/student.json --batch 8

prints a markdown table: median seconds of a step (forward pass, loss, backward pass, SGD), and the ratio round by round
with its 5th and 95th percentile. Compiling is timed by itself.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

import torch
from torch import nn

from glioma_nas import registry
from glioma_nas.architecture import Architecture
from glioma_nas.compilation import compile_for_training
from glioma_nas.latency_devices import cpu_name
from glioma_nas.latency_timing import ratio, summarise, time_engines
from glioma_nas.losses import segmentation_loss

TABLE_NETWORK = Path(__file__).with_name("table_4_3_and_4_4.json")


class TrainingStep:
    """One optimiser step on random slices, the same in every call."""

    def __init__(self, network: nn.Module, shape: tuple[int, int, int, int], device: str) -> None:
        self._network = network.train().to(device)
        self._images = torch.randn(shape, device=device)
        self._masks = torch.randint(2, (shape[0], *shape[2:]), device=device)
        self._loss = segmentation_loss("dice_ce")
        self._optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
        self._cuda = device.startswith("cuda")

    def time_ms(self) -> float:
        """Take a step; return how long it took, in milliseconds."""
        started = time.perf_counter()
        self._optimizer.zero_grad()
        self._loss(self._network(self._images), self._masks).backward()
        self._optimizer.step()
        if self._cuda:
            torch.cuda.synchronize()
        return 1000 * (time.perf_counter() - started)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", type=Path, default=TABLE_NETWORK, help="architecture record")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=None, help="side of the slices [default: the record's]")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    record = Architecture.load(args.architecture)
    options = record.space_options()
    side = args.size or options["image_size_px"]
    space = registry.search_spaces.get(record.space)(**{**options, "image_size_px": side})
    network = space.derive(record.sample())
    shape = (args.batch, options["in_channels"], side, side)
    compiled = copy.deepcopy(network)
    compile_for_training(compiled)
    steps = {
        "as it is": TrainingStep(network, shape, args.device),
        "compiled": TrainingStep(compiled, shape, args.device),
    }
    started = time.perf_counter()
    steps["compiled"].time_ms()
    compiling_s = time.perf_counter() - started
    times = time_engines(steps, warmup_runs=1, runs=args.rounds)
    device = cpu_name() if args.device == "cpu" else torch.cuda.get_device_name(args.device)
    print(
        f"{args.architecture.stem} {record.id}, input {'×'.join(map(str, shape))}, {device}, {args.threads} thread(s), "
        f"torch {torch.__version__}; {args.rounds} alternating rounds; first step with compiling {compiling_s:.0f} s\n"
    )
    print("| step | median s | × compiled (5-95 %) |\n|---|---:|---:|")
    for name, taken in times.items():
        found, relative = summarise(taken, warmup_runs=1, input_shapes=[shape]), ratio(taken, times["compiled"])
        print(
            f"| {name} | {found.median_ms / 1000:.3f} | {relative.median:.2f} ({relative.p5:.2f}-{relative.p95:.2f}) |"
        )


if __name__ == "__main__":
    main()
