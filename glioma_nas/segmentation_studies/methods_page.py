"""The page of table 4-5: every method with its interval, its speed, the front, and the source's figures beside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from glioma_nas.config import RunConfig
from glioma_nas.latency_records import Environment
from glioma_nas.report.charts import NetworkPoint, colour_of, tradeoff_chart
from glioma_nas.report.document import (
    Bullets,
    Column,
    Figures,
    Picture,
    Section,
    Table,
    interval,
    number,
    plural,
    text,
)
from glioma_nas.report.figures import Figure
from glioma_nas.report.intervals import PatientEstimate
from glioma_nas.report.study_page import rows_of, split_fact, study_page


def _compared(column: Column) -> Column:
    """Return a column that compares with the reference, whose own cell stays empty."""
    return Column(
        column.heading, lambda row: "" if row["difference"] is None else column.show(row), numeric=column.numeric
    )


def dice_columns(n_seeds: int, n_trainings: int = 1) -> tuple[Column, ...]:
    """Return the columns of accuracy; one seed has no spread, nor has one training."""
    return (
        text("network", "Network"),
        number("n_patients", "n"),
        number("dice", "Dice", 3),
        interval("dice_low", "dice_high", 3),
        *([number("dice_seeds_sd", "SD over seeds", 3)] if n_seeds > 1 else []),
        *([number("dice_trainings_sd", "SD over trainings", 3)] if n_trainings > 1 else []),
        _compared(number("difference", "Difference", 3)),
        _compared(interval("difference_low", "difference_high", 3)),
        _compared(number("p_holm", "p", 4)),
        number("hd95_mm", "HD95, mm", 1),
    )


def speed_columns(rows: Sequence[Mapping[str, Any]]) -> tuple[Column, ...]:
    """Return the columns of speed and size."""
    return (
        text("network", "Network"),
        number("latency_ms", "Latency, ms", 2),
        number("latency_p95_ms", "p95, ms", 2),
        number("speed_hz", "Speed, Hz", 1),
        number("times_reference", "× student's time", 2),
        *([number("speedup", "× UNet's speed", 2)] if "speedup" in rows[0] else []),
        number("macs_g", "GMAC", 3),
        number("params_m", "Parameters, M", 3),
        Column("On the front", lambda row: "yes" if row["front"] else "no"),
    )


DICE_CAPTION = (
    "Out-of-fold: a patient is scored by networks that never saw the patient; all with the same folds and budget. "
    "Dice: mean over patients on each scan's own grid, trainings and seeds averaged first, with a bootstrap interval "
    "over patients. Difference: network minus {reference}, patient by patient, with its interval. p: Wilcoxon's "
    "signed-rank test of the same pairs, Holm's adjustment for all rows. HD95: median over cases."
)


def render_methods(
    table: pd.DataFrame,
    latencies: Sequence[Mapping[str, Any]],
    config: RunConfig,
    *,
    folds: Sequence[int],
    n_seeds: int,
    n_trainings: int = 1,
) -> tuple[str, bytes]:
    """Return the page as self-contained HTML, and its picture of the front as PNG.

    Args:
        table: See `glioma_nas.segmentation_studies.methods_study.study_methods`.
        latencies: What the networks were timed with, one for each seed.
        config: The configuration.
        folds: Folds that were used.
        n_seeds: Seeds, each with a search of its own.
        n_trainings: Trainings of every network and seed.
    """
    rows = rows_of(table)
    section = Section("methods", "Methods")
    section.add(
        Table("table-4-5-dice", DICE_CAPTION.format(reference="student"), dice_columns(n_seeds, n_trainings), rows),
        Table(
            "table-4-5-speed",
            "Batch 1, all networks in turns in one run: medians, and medians of the ratios round by round. On the "
            "front: no other network is at least as accurate and as fast, and better in one of both.",
            speed_columns(rows),
            rows,
        ),
        Table(
            "table-4-5-source",
            "The source's table 4-5, measured on its own 263 patients and GPU at 224×224; its figures and ours are "
            "comparable in order at most.",
            (
                text("network", "Network"),
                number("dice", "Dice here", 3),
                number("source_dice", "Source: Dice", 3),
                number("source_speed_hz", "Source: Hz", 1),
                number("times_reference", "× student's time here", 2),
                number("source_times_student", "Source: × time", 2),
            ),
            [row for row in rows if row["source_dice"] is not None],
        ),
    )
    figure = front_figure(rows)
    section.add(
        Figures("Dice against latency; up and to the left is better. The line joins the front.", [Picture(figure)])
    )
    sections = [section, limits(latencies, config, folds, n_seeds, n_trainings)]
    page = study_page("Table 4-5: segmentation networks", config, sections, facts=[split_fact(config)])
    return page, figure.png


def front_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw accuracy against latency of all rows, and the front."""
    points = [
        NetworkPoint(
            row["network"],
            PatientEstimate(row["dice"], row["dice_low"], row["dice_high"], row["n_patients"]),
            row["latency_ms"],
        )
        for row in rows
    ]
    return tradeoff_chart(points, colour_of([point.network for point in points]), size_in=(7.4, 4.2))


def limits(
    latencies: Sequence[Mapping[str, Any]], config: RunConfig, folds: Sequence[int], n_seeds: int, n_trainings: int = 1
) -> Section:
    """Return the section that says under what conditions the figures hold."""
    section = Section("limits", "How to read it")
    train, latency = config.train, latencies[0]
    shape = "×".join(str(side) for side in latency["input_shape"])
    steps = (
        f"{train.epochs * train.steps_per_epoch} optimiser steps" if train.steps_per_epoch else "all slices an epoch"
    )
    repeats = plural(n_seeds, "seed")
    if n_trainings > 1:
        repeats = f"{n_seeds} search{'' if n_seeds == 1 else 'es'} × {n_trainings} trainings"
    every = [parity["mask_dice"] for item in latencies for parity in item["parity"].values()]
    searched = "The architecture was searched on the training patients of fold 0"
    section.add(
        Bullets(
            (
                f"Budget of every network: {steps} ({plural(train.epochs, 'epoch')}) of {train.batch_size} slices, "
                f"{train.precision}, {repeats}. Students are distilled from the teacher, which the "
                "other networks do without; the search itself is beside the budget.",
                f"{config.folds.n_folds} folds by patient, counted from 0; used: {', '.join(map(str, folds))}.",
                f"{searched}, so its test patients are untouched by the search."
                if list(folds) == [0]
                else f"{searched}: test patients of the other folds were among them, for the searched networks alone.",
                f"Engine: {Environment(**latency['environment']).describe()}, input {shape}; networks took turns, "
                f"{next(iter(latency['networks'].values()))['n']} rounds. Every engine was compared with PyTorch "
                f"before: Dice of the two masks at least {min(every):.4f}.",
            )
        )
    )
    return section
