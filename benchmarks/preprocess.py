"""Time preprocessing of one patient with raw scans, step by step, and measure what it gets right.

A patient of four thick-slice sequences with skull (the phantom head of `glioma_nas.testing.head_phantoms`), three of
them displaced by known motions. One process, one thread, and its processor time, so that a busy machine does not
count; on an idle one it is the wall-clock time. The chains take turns, and the median of the rounds counts:

    python benchmarks/preprocess.py --rounds 3
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before anything loads a numerical library

import numpy as np

from glioma_nas.case_preparation import Recipe, prepare_case
from glioma_nas.cohort import Case
from glioma_nas.config import PreprocessConfig
from glioma_nas.grids import IDENTITY, rotation_about
from glioma_nas.images import Affine
from glioma_nas.prepared import PreparedCase
from glioma_nas.registry import preprocess_steps
from glioma_nas.testing.head_phantoms import HEAD_CENTRE_MM, head_grid, make_head, write_raw_patient

SEQUENCES = ("t1ce", "flair", "t1", "t2")
MOTIONS = {
    "flair": rotation_about(HEAD_CENTRE_MM, (6.0, 0.0, 0.0), (4.62, 4.62, 4.62)),
    "t2": rotation_about(HEAD_CENTRE_MM, (0.0, -4.243, 4.243), (0.0, -8.0, 0.0)),
    "t1": rotation_about(HEAD_CENTRE_MM, (2.0, 1.0, -2.0), (1.0, 2.0, -2.0)),
}
CHAINS = {
    name: ("orient", "register", name, "n4", "zscore", "crop_pad", "resize")
    for name in ("strip_template", "strip_deepbet")
}
SPACING_MM = (0.9, 0.9, 5.0)


@contextmanager
def timed_steps(names: tuple[str, ...]) -> Iterator[Mapping[str, float]]:
    """Collect the seconds that each step's `apply` takes."""
    seconds: dict[str, float] = defaultdict(float)
    originals = {name: preprocess_steps.get(name).apply for name in names}

    def timed(name: str) -> Any:
        def apply(self: Any, volumes: Any, config: Any) -> Any:
            started = time.process_time()
            try:
                return originals[name](self, volumes, config)
            finally:
                seconds[name] += time.process_time() - started

        return apply

    for name in names:
        preprocess_steps.get(name).apply = timed(name)
    try:
        yield seconds
    finally:
        for name, original in originals.items():
            preprocess_steps.get(name).apply = original


def error_mm(found: Affine, true: Affine, points: np.ndarray) -> np.ndarray:
    """Return how far the found motion misses the true one at each point."""
    return np.linalg.norm(((found - true) @ points)[:3], axis=0)


def dice(first: np.ndarray, second: np.ndarray) -> float:
    """Return the Dice coefficient of two masks."""
    return float(2 * (first & second).sum() / (first.sum() + second.sum()))


def main() -> None:
    """Print one table of times and one of what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    affine, shape = head_grid(SPACING_MM)
    still = make_head("t1ce", affine=affine, shape=shape)
    inside = np.argwhere(still.brain)[::997]
    points = affine @ np.vstack([inside.T, np.ones(len(inside))])
    totals: dict[str, list[float]] = defaultdict(list)
    steps: dict[str, dict[str, list[float]]] = {chain: defaultdict(list) for chain in CHAINS}
    quality: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = write_raw_patient(folder / "raw", spacing_mm=SPACING_MM, motions=MOTIONS, mask_on="flair")
        mask = paths.pop("mask")
        for round_number in range(rounds + 1):  # the first one loads libraries and the network, and does not count
            for chain, names in CHAINS.items():
                config = PreprocessConfig(steps=names, mask_sequence="flair")
                out = folder / chain
                with timed_steps(names) as seconds:
                    started = time.process_time()
                    prepare_case(Case("P", "P", paths, mask), out, Recipe(SEQUENCES, config, (1,)))
                    total = time.process_time() - started
                if round_number:
                    totals[chain].append(total)
                    for step, value in seconds.items():
                        steps[chain][step].append(value)
        for chain in CHAINS:
            case = PreparedCase.load(folder / chain)
            prepared = case.mask()
            assert prepared is not None
            back = case.to_native(prepared.astype(np.float32)) >= 0.5
            truth = make_head("flair", affine=affine, shape=shape, motion=MOTIONS["flair"]).tumour
            brain = (case.images() != 0).any(axis=1).astype(np.float32)
            stripped = case.to_native(brain, "t1ce") >= 0.5
            errors = {
                sequence: error_mm(case.scans[sequence].motion, MOTIONS.get(sequence, IDENTITY), points)
                for sequence in MOTIONS
            }
            quality[chain] = [
                f"{dice(stripped, still.brain):.3f}",
                *(f"{error.mean():.2f} ({error.max():.2f})" for error in errors.values()),
                f"{dice(back, truth):.3f}",
            ]
    size = "×".join(map(str, shape))
    print(
        f"4 sequences of {size} voxels, {SPACING_MM} mm; {platform.machine()}, 1 thread; "
        f"processor time in s, median of {rounds}\n"
    )
    shown = ["register", "strip", "n4", "all other steps", "reading, writing, sheet", "whole patient"]
    print(f"| chain | {' | '.join(shown)} |\n|---|{'---:|' * len(shown)}")
    for chain in CHAINS:
        medians = {step: statistics.median(values) for step, values in steps[chain].items()}
        whole = statistics.median(totals[chain])
        others = sum(value for step, value in medians.items() if step not in ("register", chain, "n4"))
        cells = [medians["register"], medians[chain], medians["n4"], others, whole - sum(medians.values()), whole]
        print(f"| {chain} | {' | '.join(f'{value:.1f}' for value in cells)} |")
    heads = ["brain, Dice", *(f"{sequence}, mm: mean (max)" for sequence in MOTIONS), "mask back on FLAIR, Dice"]
    print(f"\n| chain | {' | '.join(heads)} |\n|---|{'---:|' * len(heads)}")
    for chain, cells_of_chain in quality.items():
        print(f"| {chain} | {' | '.join(cells_of_chain)} |")


if __name__ == "__main__":
    main()
