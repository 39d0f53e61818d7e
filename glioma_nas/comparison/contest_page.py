"""The page of a comparison: what each strategy found, how sure that is, and who is on the front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from glioma_nas.config import RunConfig
from glioma_nas.report.document import (
    Bullets,
    Column,
    Figures,
    Headline,
    Picture,
    Section,
    Table,
    interval,
    number,
    plural,
    show_number,
    text,
)
from glioma_nas.report.figures import GREY, SERIES, Figure, chart
from glioma_nas.report.study_page import rows_of, study_page


def render_contest(
    runs: pd.DataFrame, summary: pd.DataFrame, facts: Mapping[str, Any], front: Sequence[int], config: RunConfig
) -> str:
    """Return the page as self-contained HTML.

    Args:
        runs: One row a search.
        summary: One row a strategy.
        facts: ``environment``, ``patients``, ``training patients``, ``steps`` or ``minutes``, ``scoring``,
            ``reference_ms``, ``without_limit``, ``trainings``, ``ranking``, ``failed``.
        front: Rows of ``runs`` on the Pareto front.
        config: The base configuration.
    """
    return study_page(
        "Search strategies compared",
        config,
        [
            _strategies(runs, summary, front, float(facts["reference_ms"])),
            _runs(runs, facts, front),
            _ranking(facts),
            _limits(facts, config),
        ],
        subtitle="glioma_nas comparison",
        facts=[("Space", str(config.search.space))],
        headlines=[_headline(row) for row in rows_of(summary.nlargest(3, "dice"))],
    )


def _headline(row: Mapping[str, Any]) -> Headline:
    return Headline(
        str(row["strategy"]),
        f"Dice {show_number(row['dice'], 3)}",
        f"{show_number(row['latency_ms'], 2)} ms, {plural(int(row['seeds']), 'seed')}",
    )


def _strategies(runs: pd.DataFrame, summary: pd.DataFrame, front: Sequence[int], reference_ms: float) -> Section:
    section = Section("strategies", "Strategies")
    rows = rows_of(summary)
    over_seeds = "Means over seeds, with the 95 % interval of the mean over seeds (Student's t; none for one seed). "
    gpu = summary.search_peak_gpu_mb.notna().any()
    section.add(
        Table(
            "comparison",
            over_seeds + "Every network was trained alike, without distillation, and scored on the same test patients. "
            "Latency is measured, all networks taking turns. Hypervolume: share of the rectangle up to "
            f"{show_number(reference_ms, 2)} ms (1.1 times the slowest run) and Dice 1 that the runs of one seed "
            "dominate.",
            (
                text("strategy", "Strategy"),
                number("seeds", "Seeds"),
                *_with_interval("dice", "Dice", 3),
                *_with_interval("latency_ms", "Latency, ms", 2),
                *_with_interval("hypervolume", "Hypervolume", 3),
            ),
            rows,
        ),
        Table(
            "cost",
            over_seeds + "Size of the networks, and what their search took in a process of its own. Scoring steps are "
            "optimiser steps on single networks before they are scored, beside the budget.",
            (
                text("strategy", "Strategy"),
                *_with_interval("macs_g", "GMAC", 3),
                *_with_interval("params_m", "Parameters, M", 3),
                number("steps", "Steps"),
                number("scored_networks", "Networks scored"),
                number("scoring_steps", "Scoring steps"),
                *_with_interval("search_s", "Search, s", 0),
                *_with_interval("search_peak_mb", "Peak, MB", 0),
                *(_with_interval("search_peak_gpu_mb", "GPU peak, MB", 0) if gpu else ()),
            ),
            rows,
        ),
    )
    section.add(
        Figures(
            "Every run; those that no other run beats in both are joined.", [Picture(front_chart(runs, list(front)))]
        )
    )
    return section


def _with_interval(column: str, heading: str, digits: int) -> tuple[Column, Column]:
    return number(column, heading, digits), interval(f"{column}_low", f"{column}_high", digits)


def front_chart(runs: pd.DataFrame, front: Sequence[int]) -> Figure:
    """Draw Dice against latency, one colour a strategy, and the Pareto front as a line."""
    names = list(dict.fromkeys(runs.strategy))
    best = runs.iloc[list(front)]
    alt = "; ".join(f"{row.strategy}: Dice {row.dice:.3f} at {row.latency_ms:.2f} ms" for row in best.itertuples())
    with chart("pareto", f"On the front: {alt}") as drawing:
        axes = drawing.axes
        axes.step(best.latency_ms, best.dice, where="post", color=GREY, lw=1.0, zorder=1)
        for position, name in enumerate(names):
            own = runs[runs.strategy == name]
            axes.scatter(
                own.latency_ms,
                own.dice,
                s=26,
                color=SERIES[position % len(SERIES)],
                marker="osD^vP*X"[(position // len(SERIES)) % 8],
                label=name,
                zorder=2,
            )
        axes.set_xlabel("latency, ms (median)")
        axes.set_ylabel("Dice")
        axes.legend()
    figure = drawing.figure
    assert figure is not None
    return figure


def _runs(runs: pd.DataFrame, facts: Mapping[str, Any], front: Sequence[int]) -> Section:
    section = Section("runs", "Every run")
    rows = [
        {**row, "front": "yes" if index in set(front) else ""}
        for index, row in zip(runs.index, rows_of(runs), strict=True)
    ]
    columns = (
        text("strategy", "Strategy"),
        number("seed", "Seed"),
        number("dice", "Dice", 3),
        number("latency_ms", "Median, ms", 2),
        number("latency_p95_ms", "p95, ms", 2),
        number("macs_g", "GMAC", 3),
        number("params_m", "Parameters, M", 3),
        number("steps", "Steps"),
        number("search_s", "Search, s"),
        number("search_peak_mb", "Peak, MB"),
        text("front", "On the front"),
    )
    section.add(Table("runs", "One row a search.", columns, rows))
    if facts["failed"]:
        why = (text("strategy", "Strategy"), number("seed", "Seed"), text("reason", "Why"))
        caption = f"Searches that failed, n = {len(facts['failed'])}; nothing else on this page counts them."
        section.add(Table("failed", caption, why, facts["failed"]))
    return section


def _ranking(facts: Mapping[str, Any]) -> Section:
    section = Section("ranking", "Do supernets rank networks rightly?")
    if not facts["ranking"]:
        section.add_missing("Rank correlation of inherited and own weights (--rank-networks N trains N networks)")
        return section
    columns = (
        text("strategy", "Strategy"),
        number("seed", "Seed"),
        number("n", "Networks"),
        number("tau", "Kendall's τ", 2),
        number("p", "p", 3),
    )
    caption = (
        "Networks drawn at random, the same for all: Dice with each supernet's weights on the patients that guide the "
        "search, against Dice on the test patients when trained alone, once. No τ where all networks scored alike."
    )
    section.add(Table("ranking", caption, columns, facts["ranking"]))
    return section


def _limits(facts: Mapping[str, Any], config: RunConfig) -> Section:
    section = Section("limits", "How to read it")
    if facts["minutes"] is None:
        budget = f"{facts['steps']} optimiser steps of batch {config.search.batch_size} for every search. A step of a "
        budget += "supernet passes several times, a step of a trial once; times and memory stand in the table"
    else:
        budget = f"{facts['minutes']:g} minutes of training for every search, shared evenly by its epochs, batches of "
        budget += f"{config.search.batch_size}. Scoring networks comes on top; the table has steps and whole times"
    scoring = facts["scoring"]
    items = [
        f"Budget: {budget}.",
        "Single networks with inherited weights are treated alike by every strategy before it scores them: "
        f"finetune_steps {scoring['finetune_steps']}, recalibration_batches {scoring['recalibration_batches']}.",
        f"Split: searched and trained on {plural(facts['training patients'], 'patient')}, scored on "
        f"{plural(facts['patients'], 'other')} whom no search has seen. Seeds change the search and the training, not "
        "the split.",
        f"Engine: {facts['environment']}.",
    ]
    if facts["trainings"] > 1:
        items.append(f"The Dice of a run is the mean of {facts['trainings']} trainings of its network, seeds apart.")
    if facts["without_limit"]:
        items.append(f"Not bound by latency_limit_ms, for want of such an option: {', '.join(facts['without_limit'])}.")
    section.add(Bullets(tuple(items)))
    return section
