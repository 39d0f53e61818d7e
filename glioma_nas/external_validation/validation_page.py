"""One page about a run on patients from elsewhere."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from glioma_nas import __version__
from glioma_nas.external_validation.drift import LARGE
from glioma_nas.new_patients.frozen_run import FrozenRun
from glioma_nas.report.document import (
    Bullets,
    Caution,
    Facts,
    Headline,
    Paragraph,
    Section,
    Table,
    interval,
    number,
    plural,
    show_interval,
    show_number,
    text,
)
from glioma_nas.report.page import Page, render
from glioma_nas.report.provenance_section import DISCLAIMER

WORST_CASES = 5


def render_validation(
    results: Mapping[str, Any], table: pd.DataFrame, drift: Sequence[Mapping[str, Any]], run: FrozenRun
) -> str:
    """Return the page as self-contained HTML.

    Args:
        results: What ``validation.json`` will hold.
        table: One row a case.
        drift: See `glioma_nas.external_validation.drift.drift_rows`.
        run: The run.
    """
    now = datetime.datetime.now(datetime.UTC)
    return render(
        Page(
            title=f"{results['cohort']}: external validation of {results['run']}",
            subtitle="glioma_nas external validation",
            facts=[
                ("Made", f"{now:%d %B %Y, %H:%M} UTC".removeprefix("0")),
                ("Cohort", f"{plural(results['n_patients'], 'patient')}, {plural(results['n_cases'], 'case')}"),
                ("Network", f"{results['network']}, mean of {plural(len(run.networks), 'fold')}"),
                ("glioma_nas", __version__),
            ],
            disclaimer=DISCLAIMER,
            headlines=_headlines(results),
            sections=[_segmentation(results, table), _markers(results), _drift(drift), _flow(results)],
        )
    )


def _headlines(results: Mapping[str, Any]) -> list[Headline]:
    shown = []
    dice = results["segmentation"].get("dice")
    if dice:
        own = show_number(results["out_of_fold_dice"], 3)
        ends = show_interval(dice["low"], dice["high"], 3)
        shown.append(Headline("Dice", show_number(dice["value"], 3) or "", f"{ends}; in the run {own}"))
    for name, marker in results["markers"].items():
        if "metrics" in marker:
            found, own = marker["metrics"]["auc"], show_number(marker["in_the_run"]["value"], 2)
            ends = show_interval(found["low"], found["high"], 2)
            shown.append(Headline(f"AUC, {name}", show_number(found["value"], 2) or "", f"{ends}; in the run {own}"))
    return shown


def _segmentation(results: Mapping[str, Any], table: pd.DataFrame) -> Section:
    section = Section("segmentation", "Segmentation")
    scores = results["segmentation"]
    if not scores:
        section.add_missing("Dice and distance: no case of this cohort has an expert mask")
        return section
    rows = [{"what": {"dice": "Dice", "hd95_mm": "HD95, mm"}[key], **value} for key, value in scores.items()]
    section.add(
        Table(
            "segmentation",
            "Mean over patients on each scan's own grid, with a percentile bootstrap over patients.",
            (text("what", "Figure"), number("value", "Mean", 3), interval("low", "high", 3), number("n", "n")),
            rows,
        )
    )
    if results["sites"]:
        section.add(
            Table(
                "sites",
                "The same by site.",
                (
                    text("site", "Site"),
                    number("n_cases", "Cases"),
                    number("dice_value", "Dice", 3),
                    interval("dice_low", "dice_high", 3),
                ),
                results["sites"],
            )
        )
    worst = table.dropna(subset=["dice"]).sort_values("dice").head(WORST_CASES)
    columns = (
        text("case_id", "Case"),
        number("dice", "Dice", 3),
        number("hd95_mm", "HD95, mm", 1),
        number("volume_true_ml", "Expert, ml", 1),
        number("volume_predicted_ml", "Predicted, ml", 1),
    )
    rows = [{str(key): value for key, value in row.items()} for row in worst.to_dict("records")]
    section.add(Table("worst", "The cases it does worst on.", columns, rows))
    return section


def _markers(results: Mapping[str, Any]) -> Section:
    section = Section("markers", "Molecular markers")
    for name, marker in results["markers"].items():
        section.add(Paragraph(f"{name}, at the thresholds the run chose on its own training patients:"))
        if "metrics" not in marker:
            section.add_missing(f"{name}: {marker['not_measured']}")
            continue
        again = marker.get("recalibration", {})
        after = again.get("metrics", {})
        rows = [
            {
                "what": key.replace("_", " "),
                **value,
                **{f"after_{part}": after.get(key, {}).get(part) for part in ("value", "low", "high")},
            }
            for key, value in marker["metrics"].items()
        ]
        columns = [text("what", "Figure"), number("value", "Value", 3), interval("low", "high", 3), number("n", "n")]
        if after:
            columns += [number("after_value", "Re-calibrated", 3), interval("after_low", "after_high", 3)]
        section.add(Table(f"marker-{name}", f"Patients of this cohort, {name}.", columns, rows))
        if after:
            section.add(
                Paragraph(
                    f"Re-calibrated on {again['on']} ({plural(again['n_fitted'], 'patient')}, not scored): log-odds "
                    f"times {again['slope']:.2f} plus {again['intercept']:.2f}."
                )
            )
        elif "not_measured" in again:
            section.add_missing(f"re-calibration on {again['on']}: {again['not_measured']}")
    if not results["markers"]:
        section.add_missing("Markers: the run has no classifier")
    return section


def _drift(rows: Sequence[Mapping[str, Any]]) -> Section:
    section = Section("drift", "How these patients differ")
    large = [row for row in rows if row["shift"] is not None and abs(row["shift"]) >= LARGE]
    if large:
        names = ", ".join(str(row["figure"]) for row in large[:4])
        section.add(Caution(f"{plural(len(large), 'figure')} shifted by half a standard deviation or more: {names}."))
    columns = (
        text("figure", "Figure"),
        number("run", "Run", 2),
        number("new", "Here", 2),
        number("n_run", "n run"),
        number("n_new", "n here"),
        number("shift", "Shift", 2),
    )
    caption = (
        "Means of the run's patients and of these; intensities are normalised and inside the brain. Shift: "
        "standardised mean difference with pooled standard deviation."
    )
    section.add(Table("drift", caption, columns, rows))
    return section


def _flow(results: Mapping[str, Any]) -> Section:
    section = Section("flow", "Who was scored")
    items = [*results["not_read"], *(f"{name}: {why}" for name, why in results["left_out"].items())]
    same = results["same_patient_ids"]
    if same:
        names = f"{', '.join(same[:5])}{', …' if len(same) > 5 else ''}"
        section.add(
            Caution(
                f"{plural(len(same), 'patient id')} stand in the run too ({names}). Their scans differ, but should "
                "they be the same people, the figures say nothing about new patients."
            )
        )
    section.add(Facts((("Scored", str(results["n_cases"])), ("Left out", str(len(items))))))
    if items:
        section.add(Bullets(tuple(items)))
    return section
