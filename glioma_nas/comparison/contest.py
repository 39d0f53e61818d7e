"""Search with every strategy and seed, train what was found alike, time all networks in turns, sum up."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from glioma_nas.comparison.budget import scoring_options, search_steps, used_steps, without_limit
from glioma_nas.comparison.cells import Cell, made_from
from glioma_nas.comparison.contest_page import render_contest
from glioma_nas.comparison.networks import scores_on_test_patients, timed_networks, trained_network
from glioma_nas.comparison.ranking import rank_supernets
from glioma_nas.comparison.searching import search_apart
from glioma_nas.comparison.summary import reference_ms, summarise_contest
from glioma_nas.config import RunConfig
from glioma_nas.errors import GliomaNasError, ResourceError
from glioma_nas.files import read_json, write_json, write_text
from glioma_nas.latency_backend import open_backend
from glioma_nas.pareto import pareto_front
from glioma_nas.pipeline import Pipeline
from glioma_nas.prepared import PreparedCohort
from glioma_nas.progress import Progress
from glioma_nas.stages.search import ROLES, SEARCH_FOLD

SHARED_FOLDER = "shared"
RANKING_FOLDER = "ranking"
RUNS_FILE = "runs.csv"
SUMMARY_FILE = "comparison.csv"
FRONT_FILE = "pareto.csv"
RANKING_FILE = "ranking.csv"
PAGE_FILE = "report.html"

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Failure:
    """One search of the comparison that gave no network, or whose network cannot be compared.

    Attributes:
        strategy: Registered name.
        seed: Seed of search and training.
        reason: What went wrong, in one line.
    """

    strategy: str
    seed: int
    reason: str


@dataclass(frozen=True)
class Comparison:
    """What a comparison gave.

    Attributes:
        summary: One row a strategy, as in ``comparison.csv``.
        failures: What failed and is missing there.
    """

    summary: pd.DataFrame
    failures: tuple[Failure, ...]


def compare_strategies(
    config: RunConfig, cells: Sequence[Cell], out: Path, progress: Progress, *, n_trainings: int = 1
) -> Comparison:
    """Run the comparison; what is done is taken over, so an interrupted one continues.

    The split is the one of ``config``, the same for all seeds: architectures are searched on the training patients of
    fold 0, networks are trained on them from scratch without distillation, and scored on the fold's test patients.
    A search that fails does not end the others; the same command tries it again.

    Args:
        config: The base configuration.
        cells: See `glioma_nas.comparison.cells.plan`.
        out: Gets ``shared/`` (preprocess and latency), a folder for each cell, ``runs.csv``, ``comparison.csv``,
            ``pareto.csv``, ``comparison.json``, ``report.html``, and ``ranking.csv`` where supernets were ranked.
        progress: Where to report.
        n_trainings: Trainings of every network found; a run's Dice is their mean.

    Raises:
        ResourceError: Every search failed.
    """
    Pipeline(config, out / SHARED_FOLDER, progress).run(("preprocess", "latency"))
    inputs = {stage: (out / SHARED_FOLDER / stage).resolve() for stage in ("preprocess", "latency")}
    cells = made_from(inputs, cells)
    cohort = PreparedCohort.load(inputs["preprocess"])
    rows: dict[str, dict[str, Any]] = {}
    networks: dict[str, nn.Module] = {}
    failures: dict[str, Failure] = {}
    with progress.task("comparison", len(cells)) as task:
        for cell in cells:
            try:
                rows[cell.name], networks[cell.name] = _run_cell(cell, inputs, cohort, progress, n_trainings)
            except Exception as err:  # noqa: BLE001 - whatever one strategy does, the others can still be compared
                failures[cell.name] = _failure(cell, err)
                progress.note(f"{cell.name} failed: {failures[cell.name].reason}")
            task.advance()
    timed, refused = timed_networks(networks, config, progress)
    failures |= {cell.name: _failure(cell, refused[cell.name]) for cell in cells if cell.name in refused}
    finished = [cell for cell in cells if cell.name in timed]
    if not finished:
        raise ResourceError(f"every search failed, the first one with: {next(iter(failures.values())).reason}")
    table = pd.DataFrame([{**rows[cell.name], **timed[cell.name]} for cell in finished])
    ranking = rank_supernets(finished, config, inputs, out / RANKING_FOLDER, progress)
    summary, front = summarise_contest(table), pareto_front(table.latency_ms, table.dice)
    write_text(out / RUNS_FILE, table.to_csv(index=False))
    write_text(out / SUMMARY_FILE, summary.to_csv(index=False))
    write_text(out / FRONT_FILE, table.iloc[front].to_csv(index=False))
    if ranking:
        write_text(out / RANKING_FILE, pd.DataFrame(ranking).to_csv(index=False))
    backend = open_backend(config.latency.backend, config.latency.precision)
    facts = {
        "environment": backend.environment(threads=config.latency.threads).describe(),
        "patients": len({case.patient_id for case in cohort.select(cohort.folds.test(SEARCH_FOLD))}),
        "training patients": len({case.patient_id for case in cohort.select(cohort.folds.train(SEARCH_FOLD))}),
        "steps": None if cells[0].minutes else search_steps(config),
        "minutes": cells[0].minutes,
        "trainings": n_trainings,
        "scoring": scoring_options(config),
        "without_limit": without_limit(config, list(dict.fromkeys(cell.strategy for cell in cells))),
        "reference_ms": reference_ms(table),
        "ranking": ranking,
        "failed": [asdict(failure) for failure in failures.values()],
    }
    write_json(out / "comparison.json", facts)
    write_text(out / PAGE_FILE, render_contest(table, summary, facts, front, config))
    return Comparison(summary, tuple(failures.values()))


def _run_cell(
    cell: Cell, inputs: Mapping[str, Path], cohort: PreparedCohort, progress: Progress, n_trainings: int
) -> tuple[dict[str, Any], nn.Module]:
    cost = search_apart(cell.config, inputs, cell.folder / "search", epoch_s=cell.epoch_s)
    networks = [trained_network(cell, inputs, progress, training=number) for number in range(n_trainings)]
    scores = [scores_on_test_patients(cell, cohort, network) for network in networks]
    found = read_json(cell.folder / "search" / "search.json")
    row = {
        "strategy": cell.strategy,
        "seed": cell.seed,
        "steps": found.get("steps", used_steps(cell.config)),
        "scoring_steps": scoring_steps(found),
        "scored_networks": scored_networks(found),
        "dice": sum(score["dice"] for score in scores) / n_trainings,
        "n_patients": scores[0]["n_patients"],
        "trainings": n_trainings,
        "search_s": cost["wall_s"],
        "search_peak_mb": cost["peak_mb"],
        "search_peak_gpu_mb": cost["peak_gpu_mb"],
    }
    return row, networks[0]


def _failure(cell: Cell, err: Exception) -> Failure:
    if not isinstance(err, GliomaNasError):  # our own errors say all there is to say
        text = "".join(traceback.format_exception(err))
        write_text(cell.folder / "error.txt", text)
        _logger.warning("%s failed:\n%s", cell.name, text)
    lines = str(err).removeprefix(f"{cell.name}: ").strip().splitlines()
    return Failure(cell.strategy, cell.seed, lines[-1] if lines else type(err).__name__)


def scoring_steps(found: Mapping[str, Any]) -> int:
    """Return the optimiser steps that a search spent beside its budget, on candidates before it scored them.

    Args:
        found: What the search stage returned.
    """
    return int(found["finetune_steps"]) * scored_networks(found)


def scored_networks(found: Mapping[str, Any]) -> int:
    """Return how many networks a search scored with inherited weights, those of its evolution left out; see above."""
    return sum(len(found[role]["candidates"]) for role in ROLES)
