"""Does a search find what was planted? On the synthetic cohort, with operators whose worth is known by construction.

    python benchmarks/planted_truth.py --out runs/planted --seeds 3

Three questions, each over all seeds:

* ``planted``: the space offers a convolution, a zoomed one, one that gives *noise*, and a *slow*
  one, the same function as the convolution at several times its cost. How often does each stand in the student?
* ``lambda``: with λ raised twice, does the measured latency of the student fall, and is λ = 0 the most accurate?
* ``baseline``: `co_search` against `random_with_shared_weights`, as many optimiser steps each.

A student is trained from scratch on all training patients of fold 0 and scored on its test patients, whom neither
search nor training has seen; its latency is measured in PyTorch, one thread, batch 1, the networks of one question
taking turns.
What is finished is kept in ``--out``: the same command goes on where it was cut off.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from glioma_nas import registry
from glioma_nas.config import parse_config
from glioma_nas.evaluators.latency_table import LatencyTableProfiler
from glioma_nas.evaluators.segmentation import SegmentationEvaluator
from glioma_nas.files import read_json, write_json
from glioma_nas.latency_backend import open_backend
from glioma_nas.latency_building import build_table
from glioma_nas.nni_bridge import explore
from glioma_nas.pipeline import Pipeline
from glioma_nas.prepared import PreparedCohort
from glioma_nas.progress import Silent
from glioma_nas.search_spaces.operators import Conv3x3
from glioma_nas.seeding import derive_seed, isolated_torch_rng
from glioma_nas.slices import SliceDataset
from glioma_nas.synthetic_cohort import write_synthetic_cohort

SEQUENCES = ("t1ce", "flair")
IMAGE_SIZE_PX = 64
BATCH = 8
REPEATS = 6
OPERATORS = ("conv3x3", "zoomed_conv", "noise", "slow")
LAMBDAS = (0.0, 0.01, 1.0)
T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # two-sided 95 % quantile of Student's t for n values


@registry.operators.register("noise")
class Noise(Conv3x3):
    """Useless by construction: the cost of a convolution, and noise that knows nothing of the input.

    Zeros would not do: batch norm in the next cell undoes whatever weight they take from a mixture, so that no search
    by mixtures could tell them from a part of the operator beside them.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C_in, H, W) to noise (N, C_out, H/stride, W/stride)."""
        output = super().forward(x)
        return torch.randn_like(output) + 0.0 * output


@registry.operators.register("slow")
class Slow(Conv3x3):
    """Slow by construction: the very function of conv3x3, computed several times and averaged."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C_in, H, W) to (N, C_out, H/stride, W/stride)."""
        total = super().forward(x)
        for _ in range(REPEATS - 1):
            total = total + super().forward(x)
        return total / REPEATS


def prepare(out: Path, n_patients: int) -> Path:
    """Write the synthetic cohort and preprocess it; returns the prepared folder."""
    sheet = write_synthetic_cohort(out / "cohort", n_patients, 0)
    config = parse_config(
        {
            "cohort": {"sheet": str(sheet), "sequences": list(SEQUENCES)},
            "preprocess": {"crop_size_px": 112, "image_size_px": IMAGE_SIZE_PX, "workers": 1},
            "folds": {"n_folds": 3},
        },
        source="benchmark",
        folder=out,
    )
    Pipeline(config, out / "run", Silent()).run(["preprocess"])
    return out / "run" / "preprocess"


def make_space(operators: tuple[str, ...], seed: int) -> Any:
    """Build the searched space, its first weights drawn from the seed."""
    with isolated_torch_rng(seed, "space"):
        return registry.search_spaces.get("nasbranet")(
            "small", n_layers=5, widths=(4, 8), end_widths=(4, 8), operators=operators, image_size_px=IMAGE_SIZE_PX,
            in_channels=len(SEQUENCES), n_classes=2, head_channels=16,
        )  # fmt: skip


def search(args: argparse.Namespace, name: str, operators: tuple[str, ...], seed: int, options: dict[str, Any]) -> Any:
    """Run one search; returns the student's record and the seconds it took."""
    folder = args.out / "searches" / name
    result = folder / "student.json"
    started = time.monotonic()
    if not result.is_file():
        space = make_space(operators, seed)
        table = build_table(
            [*space.operator_specs(), *space.fixed_part_specs()],
            open_backend("torch", "float32"),
            path=args.out / "table.json",
            warmup_runs=3, runs=15, threads=1, space=space,
        )  # fmt: skip
        strategy = registry.strategies.get(options.pop("strategy"))(
            profiler=LatencyTableProfiler(space, table), seed=seed, **options
        )
        evaluator = SegmentationEvaluator(
            str(args.prepared), SEQUENCES, folder=str(folder), epochs=args.epochs, steps_per_epoch=args.steps,
            batch_size=BATCH, learning_rate=0.05, seed=seed,
        )  # fmt: skip
        started = time.monotonic()
        explore(space, evaluator, strategy)
        strategy.found["student"].save(result)
        write_json(folder / "seconds.json", {"seconds": time.monotonic() - started})
        (folder / "last.ckpt").unlink(missing_ok=True)
    return make_space(operators, seed), read_json(result)["choices"], read_json(folder / "seconds.json")["seconds"]


def retrain(args: argparse.Namespace, name: str, space: Any, choices: dict[str, Any], seed: int) -> tuple[Any, float]:
    """Train a student from scratch; returns it and its Dice on the test patients of fold 0."""
    folder = args.out / "students" / name
    with isolated_torch_rng(seed, "student"):
        network = space.derive(choices)
    evaluator = SegmentationEvaluator(
        str(args.prepared), SEQUENCES, folder=str(folder), split="train", epochs=args.train_epochs,
        steps_per_epoch=args.train_steps, batch_size=BATCH, learning_rate=0.05, loss="dice_ce", auxiliary_weight=0.4,
        schedule="poly", seed=derive_seed(seed, "retrain"),
    )  # fmt: skip
    evaluator.evaluate(network)
    cohort = PreparedCohort.load(args.prepared)
    cases = [cohort.cases[case] for case in cohort.folds.test(0)]
    loader = torch.utils.data.DataLoader(SliceDataset(cases, SEQUENCES, augment=False, seed=0), batch_size=BATCH)
    return network.eval(), float(evaluator.module.score(network.eval(), loader))


@torch.no_grad()
def measure_ms(networks: dict[str, nn.Module], rounds: int = 60) -> dict[str, float]:
    """Return each network's median latency in ms; they take turns, so that slow spells hit all alike."""
    image = torch.randn(1, len(SEQUENCES), IMAGE_SIZE_PX, IMAGE_SIZE_PX)
    times: dict[str, list[float]] = {name: [] for name in networks}
    for _ in range(rounds):
        for name, network in networks.items():
            started = time.perf_counter()
            network(image)
            times[name].append(1000 * (time.perf_counter() - started))
    return {name: statistics.median(values[5:]) for name, values in times.items()}


def interval(values: list[float]) -> str:
    """Render the mean and its 95 % t-interval."""
    mean = statistics.fmean(values)
    if len(values) not in T_975:
        return f"{mean:.3f}"
    half = T_975[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:.3f} ({mean - half:.3f} to {mean + half:.3f})"


def ask_planted(args: argparse.Namespace) -> dict[str, Any]:
    """Count planted operators in the students of both strategies, without and with the latency term."""
    counts: dict[str, dict[str, int]] = {}
    for strategy in ("latency_darts", "co_search"):
        for weight in (0.0, LAMBDAS[1]):
            row = counts.setdefault(f"{strategy}, lambda {weight:g}", dict.fromkeys(OPERATORS, 0))
            for seed in range(args.seeds):
                name = f"planted-{strategy}-{weight:g}-{seed}"
                options = {"strategy": strategy, "latency_weight": weight, **args.options}
                space, choices, _ = search(args, name, OPERATORS, seed, options)
                for step in space.plan(choices).steps:
                    row[step.operator] += 1
    return {"operators of the students' cells": counts}


def ask_lambda(args: argparse.Namespace) -> dict[str, Any]:
    """Raise λ twice and measure the students."""
    networks, dice = {}, {}
    for weight in LAMBDAS:
        for seed in range(args.seeds):
            name = f"lambda-{weight:g}-{seed}"
            options = {"strategy": "latency_darts", "latency_weight": weight, **args.options}
            space, choices, _ = search(args, name, args.operators, seed, options)
            networks[name], dice[name] = retrain(args, name, space, choices, seed)
    latencies = measure_ms(networks)
    return {
        f"lambda {weight:g}": {
            "measured_ms": [round(latencies[f"lambda-{weight:g}-{seed}"], 3) for seed in range(args.seeds)],
            "dice": [round(dice[f"lambda-{weight:g}-{seed}"], 4) for seed in range(args.seeds)],
            "mean_ms": interval([latencies[f"lambda-{weight:g}-{seed}"] for seed in range(args.seeds)]),
            "mean_dice": interval([dice[f"lambda-{weight:g}-{seed}"] for seed in range(args.seeds)]),
        }
        for weight in LAMBDAS
    }


def ask_baseline(args: argparse.Namespace) -> dict[str, Any]:
    """Compare co_search with the best of random networks over a supernet trained for as many steps."""
    networks, rows = {}, {}
    for seed in range(args.seeds):
        for strategy in ("co_search", "random_with_shared_weights"):
            name = f"baseline-{strategy}-{seed}"
            options: dict[str, Any] = {
                "strategy": strategy,
                "recalibration_batches": 2,
                "n_candidates": 12,
            }
            if strategy == "co_search":
                options = {"strategy": strategy, **args.options, "latency_weight": LAMBDAS[1]}
            space, choices, seconds = search(args, name, args.operators, seed, options)
            networks[name], dice = retrain(args, name, space, choices, seed)
            rows[name] = {"dice": dice, "search_s": round(seconds, 1)}
    for name, latency_ms in measure_ms(networks).items():
        rows[name] |= {"measured_ms": latency_ms, "target": rows[name]["dice"] * latency_ms**-0.07}
    differences = {
        figure: interval(
            [
                rows[f"baseline-co_search-{seed}"][figure] - rows[f"baseline-random_with_shared_weights-{seed}"][figure]
                for seed in range(args.seeds)
            ]
        )
        for figure in ("dice", "measured_ms", "target", "search_s")
    }
    return {"runs": rows, "co_search minus random, paired by seed": differences}


def main() -> None:
    """Answer the questions and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/planted"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--patients", type=int, default=12)
    parser.add_argument("--epochs", type=int, default=8, help="epochs of a search, of which 3 pretrain")
    parser.add_argument("--steps", type=int, default=8, help="optimiser steps of a search epoch")
    parser.add_argument("--train-epochs", type=int, default=6)
    parser.add_argument("--train-steps", type=int, default=20)
    parser.add_argument("--questions", nargs="+", default=["lambda", "baseline", "planted"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    args.prepared = prepare(args.out, args.patients)
    args.operators = ("skip", "conv3x3", "conv3x3_x2", "zoomed_conv")
    args.options = {
        "pretrain_epochs": 3,
        "pretrain_widths": ("max", "min"),
        "search_widths": ("sampled", "min"),
        "architecture_learning_rate": 0.05,
        "latency_coefficients": (1.0, 1.0, 1.0),
        "finetune_steps": 10,
        "recalibration_batches": 2,
    }
    ask = {"planted": ask_planted, "lambda": ask_lambda, "baseline": ask_baseline}
    for question in args.questions:
        answer = ask[question](args)
        write_json(args.out / f"{question}.json", answer)
        print(json.dumps({question: answer}, indent=2), flush=True)


if __name__ == "__main__":
    main()
