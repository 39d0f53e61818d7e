"""Search with every strategy and seed, train what was found alike, time all networks in turns, sum up."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import kendalltau
from scipy.stats import t as student_t
from torch import nn

from glioma_nas.comparison.budget import search_steps, used_steps, with_budget
from glioma_nas.comparison.contest_page import render_contest
from glioma_nas.comparison.searching import search_apart
from glioma_nas.config import RunConfig
from glioma_nas.errors import ConfigError
from glioma_nas.files import canonical_json, read_json, sha256_file, sha256_text, write_json, write_text
from glioma_nas.latency_backend import open_backend
from glioma_nas.latency_timing import summarise, time_engines
from glioma_nas.network_size import network_size
from glioma_nas.pipeline import MANIFEST, Pipeline, StageContext
from glioma_nas.prepared import PreparedCohort
from glioma_nas.progress import Progress
from glioma_nas.segmentation_inference import predict_probability
from glioma_nas.segmentation_scores import native_outline, native_scores
from glioma_nas.stages.search import ROLES, SEARCH_FOLD
from glioma_nas.stages.train import train_network
from glioma_nas.trained_networks import WEIGHTS_FILE, load_network

SHARED_FOLDER = "shared"
RUNS_FILE = "runs.csv"
SUMMARY_FILE = "comparison.csv"
PAGE_FILE = "report.html"
_ROLE = "student"


@dataclass(frozen=True)
class Cell:
    """One search of the comparison.

    Attributes:
        strategy: Registered name.
        seed: Seed of search and training.
        config: Its configuration, at the common budget.
        folder: Where it works.
    """

    strategy: str
    seed: int
    config: RunConfig
    folder: Path

    @property
    def name(self) -> str:
        """Strategy and seed."""
        return f"{self.strategy}, seed {self.seed}"


def plan(config: RunConfig, strategies: Sequence[str], *, n_seeds: int, trials: int, out: Path) -> list[Cell]:
    """Return every search of the comparison; everything that is wrong with it is found here, before hours of work.

    Raises:
        ConfigError: A strategy stands twice, or the budget does not suffice.
        UnknownNameError: A strategy is not registered.
    """
    if len(set(strategies)) != len(strategies) or not strategies:
        raise ConfigError(f"--strategies {','.join(strategies)}: give each strategy once, at least one")
    search_steps(config)
    cells = []
    for strategy in strategies:
        for number in range(n_seeds):
            seed = config.seed + number
            own = with_budget(config, strategy, seed=seed, trials=trials)
            key = sha256_text(canonical_json(own.model_dump(mode="json")))[:12]
            cells.append(Cell(strategy, seed, own, out / strategy / f"seed{seed}-{key}"))
    return cells


def compare_strategies(config: RunConfig, cells: Sequence[Cell], out: Path, progress: Progress) -> pd.DataFrame:
    """Run the comparison; what is done is taken over, so an interrupted one continues.

    The split is the one of ``config``, the same for all seeds: architectures are searched on the training patients of
    fold 0, networks are trained on them from scratch without distillation, and scored on the fold's test patients.

    Args:
        config: The base configuration.
        cells: See `plan`.
        out: Gets ``shared/`` (preprocess and latency), a folder for each cell, ``runs.csv``, ``comparison.csv`` and
            ``report.html``.
        progress: Where to report.

    Returns:
        One row a strategy, as in ``comparison.csv``.
    """
    Pipeline(config, out / SHARED_FOLDER, progress).run(("preprocess", "latency"))
    inputs = {stage: (out / SHARED_FOLDER / stage).resolve() for stage in ("preprocess", "latency")}
    cells = made_from(inputs, cells)
    cohort = PreparedCohort.load(inputs["preprocess"])
    rows: list[dict[str, Any]] = []
    networks: dict[str, nn.Module] = {}
    with progress.task("comparison", len(cells)) as task:
        for cell in cells:
            cost = search_apart(cell.config, inputs, cell.folder / "search")
            networks[cell.name] = _trained(cell, inputs, progress)
            rows.append(
                {
                    "strategy": cell.strategy,
                    "seed": cell.seed,
                    "steps": used_steps(cell.config),
                    "scoring_steps": scoring_steps(read_json(cell.folder / "search" / "search.json")),
                    **_scored(cell, cohort, networks[cell.name]),
                    "search_s": cost["wall_s"],
                    "search_peak_mb": cost["peak_mb"],
                }
            )
            task.advance()
    for row, timed in zip(rows, _timed(networks, config, progress), strict=True):
        row.update(timed)
    table = pd.DataFrame(rows)
    summary = summarise_contest(table)
    write_text(out / RUNS_FILE, table.to_csv(index=False))
    write_text(out / SUMMARY_FILE, summary.to_csv(index=False))
    backend = open_backend(config.latency.backend, config.latency.precision)
    facts = {
        "environment": backend.environment(threads=config.latency.threads).describe(),
        "patients": len({case.patient_id for case in cohort.select(cohort.folds.test(SEARCH_FOLD))}),
        "training patients": len({case.patient_id for case in cohort.select(cohort.folds.train(SEARCH_FOLD))}),
        "steps": search_steps(config),
        "correlation": weight_sharing_correlation(cells, table),
    }
    write_json(out / "comparison.json", facts)
    write_text(out / PAGE_FILE, render_contest(table, summary, facts, pareto_front(table), config))
    return summary


def made_from(inputs: Mapping[str, Path], cells: Sequence[Cell]) -> list[Cell]:
    """Return the cells with folders that belong to these very inputs: nothing made from earlier ones is taken over.

    Args:
        inputs: Finished folders of the preprocess and latency stages; they count by their manifests.
        cells: See `plan`.
    """
    key = sha256_text(canonical_json({name: sha256_file(path / MANIFEST) for name, path in inputs.items()}))[:8]
    return [replace(cell, folder=cell.folder.with_name(f"{cell.folder.name}-{key}")) for cell in cells]


def scoring_steps(found: Mapping[str, Any]) -> int:
    """Return the optimiser steps that a search spent beside its budget, on candidates before it scored them.

    Args:
        found: What the search stage returned.
    """
    return int(found["finetune_steps"]) * sum(len(found[role]["candidates"]) for role in ROLES)


def summarise_contest(runs: pd.DataFrame) -> pd.DataFrame:
    """Return one row a strategy: mean over seeds and, from two seeds on, the 95 % interval of the mean (Student's t).

    ``hypervolume`` is the area that the strategy's own runs dominate, see `hypervolume`; its reference is the slowest
    run of all and a Dice of 0.
    """
    slowest = float(runs.latency_ms.max())
    rows = []
    for strategy, group in runs.groupby("strategy", sort=False):
        row: dict[str, Any] = {"strategy": strategy, "seeds": len(group)}
        for column in (
            "dice",
            "latency_ms",
            "macs_g",
            "params_m",
            "search_s",
            "search_peak_mb",
            "steps",
            "scoring_steps",
        ):
            values = group[column].to_numpy(dtype=np.float64)
            row[column] = float(values.mean())
            if column in ("dice", "latency_ms"):
                row[f"{column}_low"], row[f"{column}_high"] = mean_interval(values)
        points = list(zip(group.latency_ms, group.dice, strict=True))
        row["hypervolume"] = hypervolume(points, slowest_ms=slowest)
        rows.append(row)
    return pd.DataFrame(rows)


def mean_interval(values: NDArray[np.float64], *, confidence: float = 0.95) -> tuple[float | None, float | None]:
    """Return the interval of the mean by Student's t; none for one value."""
    if len(values) < 2:
        return None, None
    half = float(student_t.ppf(0.5 + confidence / 2, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
    return float(values.mean()) - half, float(values.mean()) + half


def pareto_front(runs: pd.DataFrame) -> list[int]:
    """Return the positions of the rows that no other row beats, fastest first.

    A row beats another when it is at least as fast and as accurate, and better in one of both.
    """
    latencies, dice = runs.latency_ms.to_numpy(dtype=np.float64), runs.dice.to_numpy(dtype=np.float64)
    front = []
    for index, (latency_ms, score) in enumerate(zip(latencies, dice, strict=True)):
        no_worse = (latencies <= latency_ms) & (dice >= score)
        better = (latencies < latency_ms) | (dice > score)
        if not (no_worse & better).any():
            front.append(index)
    return sorted(front, key=lambda index: float(latencies[index]))


def hypervolume(points: Sequence[tuple[float, float]], *, slowest_ms: float) -> float:
    """Return the share of the rectangle [0, slowest] × [0, 1] that points (latency in ms, Dice) dominate.

    >>> hypervolume([(2.0, 0.5), (4.0, 0.8)], slowest_ms=4.0)
    0.25
    """
    best, area, edge = 0.0, 0.0, slowest_ms
    ordered = sorted(points)
    for position, (latency_ms, dice) in enumerate(ordered):
        best = max(best, dice)
        edge = ordered[position + 1][0] if position + 1 < len(ordered) else slowest_ms
        area += best * max(edge - latency_ms, 0.0)
    return area / slowest_ms if slowest_ms > 0 else 0.0


def weight_sharing_correlation(cells: Sequence[Cell], runs: pd.DataFrame) -> dict[str, Any]:
    """Compare what the supernets said of the networks they chose with those networks trained alone.

    Returns:
        Kendall's τ over the cells whose search scored its choice with inherited weights, its p-value and n; ``tau`` is
        none for fewer than four.
    """
    inherited, alone = [], []
    for cell, dice in zip(cells, runs.dice, strict=True):
        candidates: list[Mapping[str, Any]] = read_json(cell.folder / "search" / "search.json")[_ROLE]["candidates"]
        if candidates:
            inherited.append(max(candidates, key=lambda item: float(item["target"]))["accuracy"])
            alone.append(dice)
    if len(inherited) < 4:
        return {"tau": None, "p": None, "n": len(inherited)}
    found = kendalltau(inherited, alone)
    return {"tau": float(found.statistic), "p": float(found.pvalue), "n": len(inherited)}


def _trained(cell: Cell, inputs: Mapping[str, Path], progress: Progress) -> nn.Module:
    folder = cell.folder / "train"
    network_folder = folder / f"fold{SEARCH_FOLD}" / _ROLE
    if not (network_folder / WEIGHTS_FILE).is_file():
        context = StageContext(cell.config, folder, {**inputs, "search": cell.folder / "search"}, progress)
        train_network(context, SEARCH_FOLD, _ROLE, network_folder)
    return load_network(cell.config, cell.folder / "search", folder, SEARCH_FOLD, _ROLE)


def _scored(cell: Cell, cohort: PreparedCohort, network: nn.Module) -> dict[str, Any]:
    channels, device = cell.config.cohort.channels, cell.config.device
    by_patient: dict[str, list[dict[str, Any]]] = {}
    for case in cohort.select(cohort.folds.test(SEARCH_FOLD)):
        if case.has_mask:
            probability = predict_probability(network, case.images(), case.sequences, channels, device=device)
            by_patient.setdefault(case.patient_id, []).append(native_scores(case, native_outline(case, probability)))
    dice = [float(np.mean([score["dice"] for score in scores])) for scores in by_patient.values()]
    network.to("cpu")
    return {"dice": float(np.mean(dice)), "n_patients": len(dice)}


def _timed(networks: Mapping[str, nn.Module], config: RunConfig, progress: Progress) -> list[dict[str, Any]]:
    """Time all networks by turns in one process; one row for each, in order."""
    options, side = config.latency, config.preprocess.image_size_px
    shape = (1, len(config.cohort.channels), side, side)
    backend = open_backend(options.backend, options.precision)
    engines = {name: backend.prepare(network, [shape], threads=options.threads) for name, network in networks.items()}
    warmup_runs = max(options.warmup_runs, 1)
    times = time_engines(
        engines, warmup_runs=warmup_runs, runs=options.network_runs, progress=progress, description="timing networks"
    )
    rows = []
    for name, network in networks.items():
        record = summarise(times[name], warmup_runs=warmup_runs, input_shapes=[shape])
        size = network_size(network, shape)
        rows.append(
            {
                "latency_ms": record.median_ms,
                "latency_p95_ms": record.p95_ms,
                "latency_n": record.n,
                "macs_g": size.macs_g,
                "params_m": size.params_m,
            }
        )
    return rows
