"""Does a search find what was planted? On the synthetic cohort, with operators whose worth is known by construction.

    python benchmarks/planted_truth.py --out runs/planted

About 25 minutes of one idle core with the defaults; it says how much is left. Two questions, each over three seeds:

* ``lambda``: the space offers a convolution, a zoomed one, a skip, one that gives *noise*, and a *slow* one, the same
  function as the convolution at several times its cost. With λ raised twice, does the measured latency of the student
  fall, is λ = 0 the most accurate, and how often does each operator stand in the student?
* ``baseline``: is the student of `co_search` better than the best network of `random_with_shared_weights`?

How the second is kept fair. Both start from the same supernet with the same first weights, take as many optimiser steps
of it on the same patients, and as many forward-backward passes: `co_search` 3 a step while it pretrains and 5 while it
searches, which takes as many epochs, the baseline 4 a step. Both fine-tune every candidate for the same number of steps
before they score it, and rank by the same target; the baseline scores twelve networks, `co_search` six (three pairs of
branches of teacher and student). A pass along one random path costs less than one through mixtures, so the baseline
also runs with three times the steps, about the processor time of `co_search`: ``random, more steps``. All students are
then trained alike, without a teacher.

A student is trained from scratch on all training patients of fold 0 and scored on its test patients, whom neither
search nor training has seen. Latency is measured in PyTorch, one thread, batch 1, all networks of a question taking
turns, once: an optimising engine would merge the repeats of the slow operator.
What is finished is kept in ``--out``, the latencies included: the same command goes on where it was cut off, and prints
the same answers when all is done.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glioma_nas import registry
from glioma_nas.comparison.summary import mean_interval
from glioma_nas.config import parse_config
from glioma_nas.console import make_progress
from glioma_nas.evaluators.latency_table import LatencyTableProfiler
from glioma_nas.evaluators.segmentation import SegmentationEvaluator
from glioma_nas.files import canonical_json, read_json, sha256_text, write_json
from glioma_nas.latency_backend import open_backend
from glioma_nas.latency_building import build_table
from glioma_nas.latency_timing import time_engines
from glioma_nas.nni_bridge import explore
from glioma_nas.pipeline import Pipeline
from glioma_nas.prepared import PreparedCohort
from glioma_nas.progress import Silent, Task
from glioma_nas.search_spaces.operators import Conv3x3
from glioma_nas.seeding import derive_seed, isolated_torch_rng
from glioma_nas.slices import SliceDataset
from glioma_nas.synthetic_cohort import write_synthetic_cohort

SEQUENCES = ("t1ce", "flair")
IMAGE_SIZE_PX = 64
BATCH = 8
REPEATS = 6
PLANTED = ("skip", "conv3x3", "zoomed_conv", "noise", "slow")
PLAIN = ("skip", "conv3x3", "conv3x3_x2", "zoomed_conv")
LAMBDAS = (0.0, 0.01, 1.0)
EXPONENT = -0.07
FINETUNE_STEPS = 10
MORE_STEPS = 3
SEARCH = {
    "pretrain_widths": ("max", "min"),
    "search_widths": ("sampled", "min"),
    "architecture_learning_rate": 0.05,
    "latency_coefficients": (1.0, 1.0, 1.0),
}
SCORING = {"finetune_steps": FINETUNE_STEPS, "recalibration_batches": 2, "target_exponents": (EXPONENT, EXPONENT)}
CONTESTANTS = ("co_search", "random", "random, more steps")


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
    sheet = write_synthetic_cohort(out / "cohort", n_patients, 0, missing_t1ce_fraction=0.0)
    config = parse_config(
        {
            "cohort": {"sheet": str(sheet), "sequences": list(SEQUENCES)},
            "preprocess": {"crop_size_px": 112, "image_size_px": IMAGE_SIZE_PX, "workers": 1},
            "folds": {"n_folds": 2},
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


def find(
    args: argparse.Namespace,
    name: str,
    operators: tuple[str, ...],
    seed: int,
    strategy: str,
    options: Mapping[str, Any],
    *,
    steps: int,
) -> dict[str, Any]:
    """Search, train what was found, score it; what an earlier call finished is read back.

    Returns:
        ``choices`` of the student, ``dice`` on the test patients, ``search_cpu_s`` and ``train_cpu_s``.
    """
    folder = args.out / name.replace(", ", "-").replace(" ", "-")
    result = folder / "result.json"
    if result.is_file():
        return dict(read_json(result))
    # Begun anew rather than resumed: the time of the last part would be taken for that of the whole.
    shutil.rmtree(folder, ignore_errors=True)
    space = make_space(operators, seed)
    table = build_table(
        [*space.operator_specs(), *space.fixed_part_specs()],
        open_backend("torch", "float32"),
        path=args.out / "table.json",
        warmup_runs=3, runs=15, threads=1, space=space,
    )  # fmt: skip
    found = registry.strategies.get(strategy)(profiler=LatencyTableProfiler(space, table), seed=seed, **options)
    evaluator = SegmentationEvaluator(
        str(args.prepared), SEQUENCES, folder=str(folder / "search"), epochs=args.epochs, steps_per_epoch=steps,
        batch_size=BATCH, learning_rate=0.05, seed=seed,
    )  # fmt: skip
    started = time.process_time()
    explore(space, evaluator, found)
    searched = time.process_time()
    choices = dict(found.found["student"].choices)
    dice = train(args, folder / "student", make_space(operators, seed), choices, seed)
    record = {
        "choices": choices,
        "dice": dice,
        "search_cpu_s": round(searched - started, 1),
        "train_cpu_s": round(time.process_time() - searched, 1),
    }
    shutil.rmtree(folder)
    write_json(result, record)
    return record


def train(args: argparse.Namespace, folder: Path, space: Any, choices: Mapping[str, Any], seed: int) -> float:
    """Train a student from scratch; returns its Dice on the test patients of fold 0."""
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
    with isolated_torch_rng(seed, "test"):  # the noisy operator draws
        return float(evaluator.module.score(network.eval(), loader))


def measure_ms(networks: Mapping[str, tuple[tuple[str, ...], Mapping[str, Any]]]) -> dict[str, float]:
    """Return the median latency in ms of each network, given by the operators of its space and its choices."""
    backend, shape = open_backend("torch", "float32"), (1, len(SEQUENCES), IMAGE_SIZE_PX, IMAGE_SIZE_PX)
    engines = {
        name: backend.prepare(make_space(operators, 0).derive(choices), [shape], threads=1)
        for name, (operators, choices) in networks.items()
    }
    times = time_engines(engines, warmup_runs=10, runs=100)
    return {name: statistics.median(values) for name, values in times.items()}


def spread(values: list[float]) -> dict[str, Any]:
    """Return the mean and its 95 % t-interval, none for one value."""
    low, high = mean_interval(torch.tensor(values, dtype=torch.float64).numpy())
    return {"mean": statistics.fmean(values), "low": low, "high": high, "each": values}


def ask_lambda(args: argparse.Namespace, task: Task) -> dict[str, Any]:
    """Raise λ twice, measure the students and count the operators in them."""
    runs: dict[str, dict[str, Any]] = {}
    for weight in LAMBDAS:
        for seed in range(args.seeds):
            options = {**SEARCH, **SCORING, "pretrain_epochs": args.epochs // 2, "latency_weight": weight}
            name = f"lambda-{weight:g}-{seed}"
            runs[name] = find(args, name, PLANTED, seed, "latency_darts", options, steps=args.steps)
            task.advance(3)
    latencies = measure_ms({name: (PLANTED, run["choices"]) for name, run in runs.items()})
    answer: dict[str, Any] = {}
    for weight in LAMBDAS:
        names = [f"lambda-{weight:g}-{seed}" for seed in range(args.seeds)]
        steps = [step for name in names for step in make_space(PLANTED, 0).plan(runs[name]["choices"]).steps]
        answer[f"lambda {weight:g}"] = {
            "measured_ms": spread([latencies[name] for name in names]),
            "dice": spread([runs[name]["dice"] for name in names]),
            "operators": {operator: sum(step.operator == operator for step in steps) for operator in PLANTED},
            "share of the widest": sum(step.width == 8 for step in steps) / len(steps),
        }
    for low, high in ((LAMBDAS[0], LAMBDAS[1]), (LAMBDAS[1], LAMBDAS[2])):
        pair = f"lambda {high:g} minus {low:g}, paired by seed"
        answer[pair] = {
            figure: spread(
                [
                    answer[f"lambda {high:g}"][figure]["each"][seed] - answer[f"lambda {low:g}"][figure]["each"][seed]
                    for seed in range(args.seeds)
                ]
            )
            for figure in ("measured_ms", "dice")
        }
    return answer


def ask_baseline(args: argparse.Namespace, task: Task) -> dict[str, Any]:
    """Compare co_search with the best of random networks over a supernet trained for as many steps, and for more."""
    # co_search passes 3 times a step in the first half and 5 times in the second.
    blind = {**SCORING, "paths": 4, "n_candidates": 12}
    guided = {**SEARCH, **SCORING, "pretrain_epochs": args.epochs // 2, "latency_weight": LAMBDAS[1]}
    runs: dict[str, dict[str, Any]] = {}
    for seed in range(args.seeds):
        for contestant in CONTESTANTS:
            strategy, options = (
                ("co_search", guided) if contestant == "co_search" else ("random_with_shared_weights", blind)
            )
            steps = args.steps * (MORE_STEPS if contestant == "random, more steps" else 1)
            name = f"baseline-{contestant}-{seed}"
            runs[name] = find(args, name, PLAIN, seed, strategy, options, steps=steps)
            task.advance(3 if contestant == "random" else 6)
    latencies = measure_ms({name: (PLAIN, run["choices"]) for name, run in runs.items()})
    for name, run in runs.items():
        run |= {"measured_ms": latencies[name], "target": run["dice"] * latencies[name] ** EXPONENT}
    figures = ("dice", "measured_ms", "target", "search_cpu_s")
    answer: dict[str, Any] = {
        contestant: {
            figure: spread([runs[f"baseline-{contestant}-{seed}"][figure] for seed in range(args.seeds)])
            for figure in figures
        }
        for contestant in CONTESTANTS
    }
    for contestant in CONTESTANTS[1:]:
        answer[f"co_search minus {contestant}, paired by seed"] = {
            figure: spread(
                [
                    runs[f"baseline-co_search-{seed}"][figure] - runs[f"baseline-{contestant}-{seed}"][figure]
                    for seed in range(args.seeds)
                ]
            )
            for figure in figures
        }
    return answer


QUESTIONS: dict[str, tuple[Callable[[argparse.Namespace, Task], dict[str, Any]], int]] = {
    "lambda": (ask_lambda, 9),
    "baseline": (ask_baseline, 15),
}
"""Name → function, and how much work a seed is, in units of about 17 s."""


def show(question: str, answer: Mapping[str, Any]) -> None:
    """Print an answer as rows of figures."""
    print(f"\n{question}")
    for row, figures in answer.items():
        print(f"  {row}")
        for figure, value in figures.items():
            if isinstance(value, dict) and "mean" in value:
                limits = "" if value["low"] is None else f" ({value['low']:.4f} to {value['high']:.4f})"
                each = ", ".join(f"{number:.4f}" for number in value["each"])
                print(f"    {figure:14s} {value['mean']:.4f}{limits}   each seed: {each}")
            else:
                print(f"    {figure:14s} {json.dumps(value)}")


def main() -> None:
    """Answer the questions and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/planted"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--patients", type=int, default=24, help="half of them train, the other half test")
    parser.add_argument("--epochs", type=int, default=8, help="epochs of a search, of which half pretrain")
    parser.add_argument("--steps", type=int, default=10, help="optimiser steps of a search epoch")
    parser.add_argument("--train-epochs", type=int, default=10)
    parser.add_argument("--train-steps", type=int, default=40)
    parser.add_argument("--questions", nargs="+", choices=tuple(QUESTIONS), default=list(QUESTIONS))
    args = parser.parse_args()
    if args.epochs < 2 or args.epochs % 2:
        parser.error(f"--epochs is {args.epochs}: give an even number, half of them pretrain")
    torch.set_num_threads(1)
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    own = {name: value for name, value in vars(args).items() if name not in ("out", "questions")}
    own["code"] = sha256_text(Path(__file__).read_text(encoding="utf-8"))
    settings = args.out / "settings.json"
    if settings.is_file() and canonical_json(read_json(settings)) != canonical_json(own):
        parser.error(f"{args.out} holds a run with other settings or another version; delete it or name another --out")
    write_json(settings, own)
    args.prepared = prepare(args.out, args.patients)
    with make_progress() as progress:
        work = sum(QUESTIONS[question][1] for question in args.questions) * args.seeds
        with progress.task("planted truth", work) as task:
            for question in args.questions:
                ask, units = QUESTIONS[question]
                done = args.out / f"{question}.json"
                if done.is_file():
                    task.advance(units * args.seeds)
                else:
                    write_json(done, ask(args, task))
    for question in args.questions:
        show(question, read_json(args.out / f"{question}.json"))


if __name__ == "__main__":
    main()
