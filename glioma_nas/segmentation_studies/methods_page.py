"""The page of table 4-5: every method with its interval, its speed, and the source's figures beside."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Any

import pandas as pd

from glioma_nas import __version__
from glioma_nas.config import RunConfig
from glioma_nas.latency_records import Environment
from glioma_nas.report.charts import NetworkPoint, colour_of, tradeoff_chart
from glioma_nas.report.document import (
    Bullets,
    Figures,
    Picture,
    Section,
    Table,
    interval,
    number,
    plural,
    text,
)
from glioma_nas.report.intervals import PatientEstimate
from glioma_nas.report.page import Page, render
from glioma_nas.report.provenance_section import DISCLAIMER


def render_methods(table: pd.DataFrame, conditions: Mapping[str, Any], config: RunConfig, n_seeds: int) -> str:
    """Return the page as self-contained HTML.

    Args:
        table: See `glioma_nas.segmentation_studies.methods_study.methods_table`.
        conditions: ``environment`` and ``input_shape`` of the latencies.
        config: The configuration.
        n_seeds: Seeds.
    """
    now = datetime.datetime.now(datetime.UTC)
    clean = table.astype(object).where(table.notna(), None)
    rows = [{str(key): value for key, value in row.items()} for row in clean.to_dict("records")]
    section = Section("methods", "Methods")
    section.add(
        Table(
            "table-4-5",
            "Out-of-fold, every network with the same folds and budget; the student is distilled from its teacher. "
            "Dice: mean over patients on each scan's own grid, averaged over seeds first, with a bootstrap interval "
            "over patients. p: Wilcoxon's signed-rank test against the student, Holm's adjustment. HD95: median over "
            "cases. The source's columns are printed figures from its own patients and GPU.",
            (
                text("network", "Network"),
                number("n_patients", "n"),
                number("dice", "Dice", 3),
                interval("dice_low", "dice_high", 3),
                number("dice_seeds_sd", "SD over seeds", 3),
                number("p_holm", "p", 3),
                number("hd95_mm", "HD95, mm", 1),
                number("speed_hz", "Speed, Hz", 1),
                number("times_student", "× student's time", 2),
                number("macs_g", "GMAC", 2),
                number("params_m", "Parameters, M", 2),
                number("source_dice", "Source: Dice", 3),
                number("source_speed_hz", "Source: Hz", 1),
                number("source_times_student", "Source: × time", 2),
            ),
            rows,
        )
    )
    points = [
        NetworkPoint(
            row["network"],
            PatientEstimate(row["dice"], row["dice_low"], row["dice_high"], row["n_patients"]),
            row["latency_ms"],
        )
        for row in rows
    ]
    chart = tradeoff_chart(points, colour_of([point.network for point in points]))
    section.add(Figures("Dice against latency; up and to the left is better.", [Picture(chart)]))
    limits = Section("limits", "How to read it")
    shape = "×".join(str(side) for side in conditions["input_shape"])
    limits.add(
        Bullets(
            (
                f"Engine: {Environment(**conditions['environment']).describe()}, input {shape}; networks took turns.",
                f"{plural(n_seeds, 'seed')}; every seed draws its own folds and searches its own architecture.",
                "The architecture was searched on the training patients of fold 0: test patients of the other folds "
                "were among them, for the searched networks alone. Fold 0 by itself stands in each run's own report.",
            )
        )
    )
    return render(
        Page(
            title="Table 4-5: segmentation networks",
            subtitle="glioma_nas study",
            facts=[
                ("Made", f"{now:%d %B %Y, %H:%M} UTC".removeprefix("0")),
                ("Cohort", config.cohort.sheet.name),
                ("Folds", f"{config.folds.n_folds}, by patient"),
                ("glioma_nas", __version__),
            ],
            disclaimer=DISCLAIMER,
            headlines=[],
            sections=[section, limits],
        )
    )
