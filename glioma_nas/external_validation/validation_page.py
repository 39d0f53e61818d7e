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
    Figures,
    Headline,
    Paragraph,
    Picture,
    Section,
    Subheading,
    Table,
    interval,
    number,
    plural,
    sentence,
    show_interval,
    show_number,
    text,
)
from glioma_nas.report.marker_section import metric_heading
from glioma_nas.report.page import Page, render
from glioma_nas.report.provenance_section import DISCLAIMER
from glioma_nas.report.reliability_chart import reliability_chart

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
    if results["other_code"]:
        section.add(Caution(sentence(results["other_code"])))
    scores = results["segmentation"]
    if not scores:
        section.add_missing("Dice and distance: no case of this cohort has an expert mask")
        return section
    rows = [{"what": {"dice": "Dice", "hd95_mm": "HD95, mm"}[key], **value} for key, value in scores.items()]
    section.add(
        Table(
            "segmentation",
            "Over patients on each scan's own grid, with a percentile bootstrap over patients: mean Dice, median HD95. "
            "Outlines are of the mean of all folds' networks; the run's own Dice is of one network a patient.",
            (text("what", "Figure"), number("value", "Value", 3), interval("low", "high", 3), number("n", "n")),
            rows,
        )
    )
    empty = results["empty_outlines"]
    section.add(
        Paragraph(
            f"Of {plural(empty['n_scored'], 'case')} with an expert mask, {empty['n_predicted_empty']} got an empty "
            f"outline and {empty['n_expert_empty']} have an empty expert mask. HD95 does not exist there and leaves "
            "them out, so it alone would flatter; their Dice is 0, or 1 where both are empty, and counts."
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
        section.add(Subheading(name))
        if "metrics" not in marker:
            section.add_missing(f"{name}: {marker['not_measured']}")
            if marker.get("not_predicted"):
                section.add(Paragraph(_not_predicted(marker)))
            continue
        again = marker.get("recalibration", {})
        after = again.get("metrics", {})
        rows = [
            {
                "what": metric_heading(key),
                **value,
                **{f"after_{part}": after.get(key, {}).get(part) for part in ("value", "low", "high")},
            }
            for key, value in marker["metrics"].items()
        ]
        columns = [text("what", "Figure"), number("value", "Value", 3), interval("low", "high", 3), number("n", "n")]
        if after:
            columns += [number("after_value", "Re-calibrated", 3), interval("after_low", "after_high", 3)]
        section.add(
            Table(
                f"marker-{name}",
                f"{name}: patients of this cohort, at the thresholds the run chose on its own training patients.",
                columns,
                rows,
            )
        )
        section.add(Paragraph(f"{_calls(marker)} {_not_predicted(marker)}".strip()))
        if len(marker["sites"]) > 1:
            section.add(_sites(name, marker["sites"]))
        pictures = [Picture(reliability_chart(name, marker["reliability"]), "As the run gives them.")]
        if after:
            chart = reliability_chart(f"{name}_recalibrated", again["reliability"])
            pictures.append(Picture(chart, f"Re-calibrated on {again['on']}."))
        section.add(
            Figures(f"{name}: observed share of positive patients by predicted probability; dotted: perfect.", pictures)
        )
        if after:
            section.add(
                Paragraph(
                    f"Re-calibrated on {again['on']} ({plural(again['n_fitted'], 'patient')}, not scored): log-odds "
                    f"times {again['slope']:.2f} plus {again['intercept']:.2f}."
                )
            )
        elif "not_measured" in again:
            section.add_missing(f"Re-calibration on {again['on']} ({again['not_measured']})")
    if not results["markers"]:
        section.add_missing("Markers: the run has no classifier")
    return section


def _calls(marker: Mapping[str, Any]) -> str:
    calls = marker["abstention"]
    return (
        f"The run made a call for {calls['n_called']} of {plural(calls['n_cases'], 'case')} and was right in "
        f"{calls['n_right']} of them; for the others it abstained."
    )


def _not_predicted(marker: Mapping[str, Any]) -> str:
    return " ".join(
        f"{plural(count, 'case')} with a known marker stand in none of these figures, {reason}."
        for reason, count in marker["not_predicted"].items()
    )


def _sites(name: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    columns = (
        text("site", "Site"),
        number("n", "n"),
        number("n_positive", "Positive"),
        number("auc", "AUC", 3),
        interval("low", "high", 3),
    )
    return Table(f"marker-sites-{name}", f"{name} by site; an AUC needs two patients of each class.", columns, rows)


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
        "Means of the run's patients and of these. Intensities: as scanned, in the scanner's own units, and normalised "
        "inside the brain, as networks see them. Shift: standardised mean difference with pooled standard deviation."
    )
    section.add(Table("drift", caption, columns, rows))
    return section


def _flow(results: Mapping[str, Any]) -> Section:
    section = Section("flow", "Who was scored")
    items = [*results["not_read"], *(f"{name}: {why}" for name, why in results["left_out"].items())]
    if not results["patient_ids_comparable"]:
        section.add(
            Caution(
                "The run's patient ids are hashed with a salt that is not at hand, so nobody can tell by ids whether "
                "these are its own patients; identical scans are found all the same."
            )
        )
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
