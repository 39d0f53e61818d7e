"""Molecular markers: how well images and predicted masks foretell them, always beside age and sex alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from glioma_nas.config import MarkerConfig, RunConfig
from glioma_nas.marker_analysis import BASELINE_WORDS
from glioma_nas.marker_evaluator import patient_level
from glioma_nas.report.charts import probability_chart, roc_chart
from glioma_nas.report.document import (
    Caution,
    Column,
    Facts,
    Figures,
    Paragraph,
    Picture,
    Row,
    Section,
    Subheading,
    Table,
    interval,
    number,
    p_value,
    plural,
    show_interval,
    show_number,
    show_p,
    text,
)
from glioma_nas.report.figures import Figure, png_uri
from glioma_nas.report.records import MarkerRecords, RunRecords
from glioma_nas.report.reliability_chart import reliability_chart
from glioma_nas.roc_analysis import paired_delong
from glioma_nas.seeding import numpy_generator

BASELINE = "age and sex"
_HEADINGS = {
    "auc": "AUC",
    "auc_within_folds": "AUC within folds",
    "pr_auc": "PR-AUC",
    "kappa": "Cohen's κ",
    "mcc": "Matthews' correlation",
    "brier": "Brier score (lower is better)",
}


def metric_heading(metric: str) -> str:
    """Return a metric's name as tables show it.

    >>> metric_heading("pr_auc"), metric_heading("balanced_accuracy")
    ('PR-AUC', 'Balanced accuracy')
    """
    return _HEADINGS.get(metric, metric.replace("_", " ").capitalize())


def build(records: RunRecords, config: RunConfig) -> Section:
    """Describe every configured marker."""
    section = Section("markers", "Molecular markers")
    if not config.classify.markers:
        section.add(Paragraph("This run has no markers configured."))
        return section
    for name, marker in config.classify.markers.items():
        _add_marker(section, name, marker, records.markers[name], config)
    if config.classify.subtype is not None:
        add_subtype(section, records.manifests.get("classify", {}).get("results", {}).get("subtype"))
    return section


def add_subtype(section: Section, summary: Mapping[str, Any] | None) -> None:
    """Say how many patients got an integrated subtype, and how many of them the known markers confirm."""
    if summary is None:
        section.add_missing("Integrated subtype")
        return
    section.add(
        Subheading("Integrated subtype"),
        Caution(summary["disclaimer"]),
        Facts(
            (
                ("Rules", summary["rules"]),
                ("Called from probability", f"{summary['tau']:g}"),
                ("Patients", str(summary["n_patients"])),
                ("Called", str(summary["n_called"])),
                (
                    "As the known markers say",
                    f"{summary['n_agree_with_known_markers']} of {summary['n_comparable']} that can be compared",
                ),
                ("Left out, a marker not predicted", str(summary["n_left_out_marker_not_predicted"])),
            )
        ),
        Table(
            "subtypes",
            "What was called, and how often the known markers lead to the same call; from out-of-fold probabilities. "
            "One row for each patient is in classify/subtype.csv.",
            (
                text("call", "Call"),
                number("n", "Patients"),
                number("mean_probability", "Mean probability", 2),
                Column("As the known markers say", _agreement, numeric=True),
            ),
            summary["outcomes"],
        ),
    )
    if summary["next_tests"]:
        counts = ", ".join(f"{name} in {plural(n, 'patient')}" for name, n in summary["next_tests"].items())
        section.add(Paragraph(f"Most informative next test: {counts}."))


def _agreement(row: Row) -> str:
    if row["n_comparable"] is None:
        return "-"
    return f"{row['n_agree_with_known_markers']} of {row['n_comparable']}"


def baseline_sentence(found: MarkerRecords) -> tuple[str, bool] | None:
    """Compare the image model with age and sex on the same patients.

    Returns:
        A sentence, and whether the model beats the baseline; none when one of the two was not measured, or a class has
        fewer than two patients. It beats it when the p-value corrected by Holm says so, as in the table of baselines;
        without a recorded p-value, when the whole interval of the difference is above 0.
    """
    if found.predictions is None or found.baseline_predictions is None:
        return None
    both = patient_level(found.predictions).merge(
        patient_level(found.baseline_predictions), on="patient_id", suffixes=("", "_baseline")
    )
    positive = int((both["label"] == 1).sum())
    if min(positive, len(both) - positive) < 2:
        return None
    gap = paired_delong(both["label"], both["probability"], both["probability_baseline"])
    words = (
        f"AUC difference {show_number(gap.difference, 3)} (95 % interval {show_interval(gap.low, gap.high, 3)}, "
        f"DeLong, paired, n = {gap.n} patients)"
    )
    recorded = found.summary.get("auc_minus_baseline")
    if gap.low > 0 and (recorded is None or recorded["beats"]):
        return f"The image model beats {BASELINE} alone: {words}.", True
    if gap.low > 0 and recorded is not None:
        corrected = f"corrected by Holm for the number of baselines p {show_p(recorded['p_holm'], equals='= ')}"
        return f"The image model is not shown to beat {BASELINE} alone: {words}; {corrected}.", False
    if gap.difference > 0:
        return f"The image model is not shown to beat {BASELINE} alone: {words}; the interval includes 0.", False
    return f"The image model does not beat {BASELINE} alone: {words}.", False


def _add_marker(section: Section, name: str, marker: MarkerConfig, found: MarkerRecords, config: RunConfig) -> None:
    section.add(Subheading(name))
    rule = f"'{marker.positive}'" if marker.positive is not None else f"at least {marker.threshold:g}"
    section.add(
        Facts(
            (
                ("Positive class", f"{marker.column}: {rule}"),
                ("Classifier", marker.classifier),
                ("Sequences", ", ".join(marker.sequences)),
                ("Masks", str(found.summary.get("masks", "out-of-fold predictions of the student"))),
                *_left_out(found.summary),
            )
        )
    )
    if not found.metrics:
        section.add_missing(f"Metrics of {name}")
    if not found.baseline_metrics:
        section.add_missing(f"Baseline of {name} from {BASELINE}")
    comparison = baseline_sentence(found)
    if comparison is not None:
        sentence, beats = comparison
        section.add(Paragraph(sentence) if beats else Caution(sentence))
    curves = _curves(found)
    if curves:
        captions = {
            legend: _auc_caption(found.metrics if legend == "image model" else found.baseline_metrics)
            for legend in curves
        }
        patients = len(next(iter(curves.values()))[0])
        pictures = [Picture(roc_chart(name, curves, captions), "ROC curves with DeLong intervals.")]
        if found.predictions is not None:
            pictures.append(_probabilities(name, config, patient_level(found.predictions)))
        section.add(Figures(f"{name}: out-of-fold predictions, n = {patients} patients.", pictures))
    else:
        section.add_missing(f"ROC curve of {name}")
    if found.metrics or found.baseline_metrics:
        section.add(_table(name, found))
    _add_details(section, name, found)


def calls_sentence(calls: Mapping[str, Any]) -> str:
    """Say for how many patients a call is made and how often it is right; see `uncertainty.called_patients`."""
    asked = f"each classifier asked about the patient, altered copies: {calls['tta_copies']}"
    if not calls["n_called"]:
        return f"No call is made for any of {plural(int(calls['n_patients']), 'patient')} ({asked})."
    return (
        f"A call is made for {calls['n_called']} of {plural(int(calls['n_patients']), 'patient')}, and is right for "
        f"{calls['n_right']} of these ({show_number(calls['accuracy_of_called'], 3)}, 95 % interval "
        f"{show_interval(calls['low'], calls['high'], 3)}, Wilson; {asked}, no call where the answers lie on both "
        "sides of the threshold)."
    )


def _add_details(section: Section, name: str, found: MarkerRecords) -> None:
    summary = found.summary
    versus = summary.get("auc_minus_baselines") or {}
    rows: list[Row] = [
        {
            "baseline": BASELINE_WORDS.get(other, other),
            "auc": summary["baselines"][other]["auc"]["value"],
            "auc_low": summary["baselines"][other]["auc"]["low"],
            "auc_high": summary["baselines"][other]["auc"]["high"],
            "n": gap["n"],
            **{key: gap[key] for key in ("difference", "low", "high", "p_holm")},
            "verdict": "beaten" if gap["beats"] else "not beaten",
        }
        for other, gap in versus.items()
    ]
    if rows:
        columns = [
            text("baseline", "Baseline"),
            number("auc", "AUC", 3),
            interval("auc_low", "auc_high", 3),
            number("difference", "Model minus baseline", 3),
            interval("low", "high", 3),
            p_value("p_holm", "p (Holm)"),
            number("n", "n"),
            text("verdict", "Verdict"),
        ]
        caption = f"{name}: the image model against each baseline, paired DeLong, p-values corrected by Holm."
        section.add(Table(f"baselines_{name}", caption, columns, rows))
    calls = summary.get("calls")
    if calls:
        section.add(Paragraph(calls_sentence(calls)))
    if summary.get("reliability"):
        chart = reliability_chart(
            name, [row for row in summary["reliability"] if row["classifier"] == summary["classifier"]]
        )
        words = "Observed share of positive patients by predicted probability, with Wilson intervals; dotted: perfect."
        section.add(Figures(f"{name}: reliability after temperature scaling, out-of-fold.", [Picture(chart, words)]))
    if summary.get("subgroups"):
        columns = [
            text("column", "Column"),
            text("value", "Value"),
            number("n", "n"),
            number("n_positive", "Positive"),
            number("auc", "AUC", 3),
            interval("auc_low", "auc_high", 3),
            number("sensitivity", "Sensitivity", 3),
            interval("sensitivity_low", "sensitivity_high", 3),
            number("specificity", "Specificity", 3),
            interval("specificity_low", "specificity_high", 3),
        ]
        caption = (
            f"{name}: subgroups, one prediction for each patient. Small groups say where to look, not what is so; "
            "an AUC needs two patients of each class."
        )
        section.add(Table(f"subgroups_{name}", caption, columns, summary["subgroups"]))
    maps = [row for row in summary.get("grad_cam") or [] if row["png"] in found.pictures]
    if maps:
        pictures = []
        for row in maps:
            png = found.pictures[row["png"]]
            alt = f"Grad-CAM of {row['case_id']}, {row['why']}"
            figure = Figure(f"grad_cam_{name}_{row['case_id']}", png_uri(png), png, alt, 640)
            similarity = show_number(row["similarity_with_randomised_weights"], 2) or "not defined"
            pictures.append(
                Picture(figure, f"{row['case_id']}, {row['why']}. Similarity with randomised weights: {similarity}.")
            )
        section.add(
            Figures(
                f"{name}: where the network of the fold that held the patient out looked (Grad-CAM). A map that hardly "
                "changes when weights are randomised (similarity near 1) explains nothing.",
                pictures,
            )
        )


def _left_out(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    counts = (
        ("Left out, label unknown", "n_left_out_label_unknown"),
        ("Left out, sequence missing", "left_out_sequence_missing"),
        ("Zero channel, sequence missing", "zero_channel_for_missing_sequence"),
        ("Middle slices, predicted mask empty", "middle_slices_because_mask_empty"),
        ("Age unknown", "n_age_unknown"),
        ("Sex unknown", "n_sex_unknown"),
    )
    facts = []
    for term, key in counts:
        value = summary.get(key)
        count = len(value) if isinstance(value, dict | list) else value
        if count:
            facts.append((term, plural(int(count), "case")))
    return facts


def _probabilities(name: str, config: RunConfig, patients: pd.DataFrame) -> Picture:
    chart = probability_chart(
        name,
        patients["label"].astype(int).tolist(),
        patients["probability"].tolist(),
        patients["threshold"].tolist(),
        numpy_generator(config.seed, "report", "probability", name),
    )
    caption = (
        "Every dot is a patient by true class; filled: called positive with the threshold of its fold; line: median."
    )
    return Picture(chart, caption)


def _curves(found: MarkerRecords) -> dict[str, tuple[list[int], list[float]]]:
    curves = {}
    for legend, frame in (("image model", found.predictions), (BASELINE, found.baseline_predictions)):
        if frame is None:
            continue
        patients: pd.DataFrame = patient_level(frame)
        if patients["label"].nunique() == 2:
            curves[legend] = (patients["label"].astype(int).tolist(), patients["probability"].tolist())
    return curves


def _auc_caption(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    auc = metrics.get("auc", {})
    value = show_number(auc.get("value"), 2)
    if value is None:
        return "AUC not measured"
    ends = show_interval(auc.get("low"), auc.get("high"), 2)
    return f"AUC {value}" + (f" ({ends})" if ends else "")


def _table(name: str, found: MarkerRecords) -> Table:
    rows: list[Row] = []
    for metric in dict.fromkeys([*found.metrics, *found.baseline_metrics]):
        model, baseline = found.metrics.get(metric, {}), found.baseline_metrics.get(metric, {})
        any_of_both = model or baseline
        rows.append(
            {
                "metric": metric,
                "split": any_of_both.get("split"),
                "n": any_of_both.get("n"),
                "n_positive": any_of_both.get("n_positive"),
                "method": any_of_both.get("method"),
                **{key: model.get(key) for key in ("value", "low", "high")},
                **{f"baseline_{key}": baseline.get(key) for key in ("value", "low", "high", "n")},
            }
        )
    columns = [
        Column("Metric", lambda row: metric_heading(row["metric"])),
        number("value", "Image model", 3),
        interval("low", "high", 3),
        number("baseline_value", BASELINE.capitalize(), 3),
        interval("baseline_low", "baseline_high", 3),
        number("n", "n"),
        number("n_positive", "Positive"),
        text("split", "Split"),
    ]
    if any(row["method"] for row in rows):
        columns.append(text("method", "Interval"))
    caption = (
        f"{name}: image model beside {BASELINE} alone, one prediction for each patient; thresholds were chosen on "
        "training folds. n counts patients."
    )
    return Table(f"marker_{name}", caption, columns, rows)
