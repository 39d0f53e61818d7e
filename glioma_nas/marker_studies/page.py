"""Set a study as one HTML page with its ROC and reliability figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from glioma_nas import __version__
from glioma_nas.calibration import reliability
from glioma_nas.files import write_bytes, write_text
from glioma_nas.marker_studies.runner import StudyResult
from glioma_nas.report.document import (
    Bullets,
    Caution,
    Column,
    Facts,
    Figures,
    Headline,
    Paragraph,
    Picture,
    Section,
    Table,
    interval,
    number,
    p_value,
    plural,
    show_number,
    text,
)
from glioma_nas.report.figures import MUTED, SERIES, Figure, chart
from glioma_nas.report.page import Page, render
from glioma_nas.roc_analysis import roc_curve

DISCLAIMER = "Research use only. Not a medical device. Imaging-based predictions do not replace a tissue diagnosis."
_STYLES = ("-", "--", "-.", ":")


def write_page(result: StudyResult, central_weights: Mapping[str, Sequence[float]] | None = None) -> None:
    """Write ``report.html`` and ``figures/*.png`` into the study's folder.

    Args:
        result: What the study found.
        central_weights: Branch → its mean share at the four stages of CentralNet, when the table has it (fig. 5-5).
    """
    pictures = [
        Picture(roc_figure(result), "ROC curves; the legend gives the AUC with its 95 % interval (DeLong)."),
        Picture(reliability_figure(result), "Observed share of positive patients by predicted probability."),
    ]
    if central_weights is not None:
        pictures.append(
            Picture(weights_figure(central_weights), "Share of each branch in the central sums, mean of folds.")
        )
    for picture in pictures:
        write_bytes(result.folder / "figures" / f"{picture.figure.name}.png", picture.figure.png)
    section = Section("table", result.table.title)
    plan = result.plan
    n = next(iter(result.analysis.reports.values()))["auc"]
    section.add(
        Facts(
            (
                ("Marker", f"{plan.name}, column {plan.config.column}"),
                ("Patients", f"{n.n}, of them {n.n_positive} positive"),
                ("Split", f"{result.n_folds} folds by patient; thresholds and temperatures from inner folds"),
                ("Masks", plan.masks.words),
                ("Sequences", ", ".join(plan.config.sequences)),
                ("Preset", result.preset),
                ("Left out", f"{plural(plan.n_label_unknown, 'case')} with unknown label"),
            )
        ),
        _table(result),
        _between(result),
        Figures("Out-of-fold predictions, one for each patient.", pictures),
    )
    sentences = [f"{item.classifier}: {item.sentence()}" for item in result.analysis.versus]
    if result.analysis.versus and not any(item.beats for item in result.analysis.versus):
        section.add(Caution("No model of this table beats any baseline beyond chance on this cohort."))
    section.add(Bullets(sentences), Paragraph(_source_note(result)))
    headlines = [
        Headline(name, show_number(result.analysis.reports[name]["auc"].value, 3) or "", "AUC, out-of-fold")
        for name in result.analysis.classifiers[:4]
    ]
    page = Page(
        result.table.title,
        "Study on your cohort, the source's figures beside",
        (("glioma_nas", __version__), ("Marker", plan.name)),
        DISCLAIMER,
        headlines,
        [section],
    )
    write_text(result.folder / "report.html", render(page))


def roc_figure(result: StudyResult) -> Figure:
    """Draw the ROC curve of every row and baseline."""
    alt = f"ROC curves of {result.table.title}"
    with chart("roc", alt, width_in=7.6, height_in=4.2) as drawing:
        axes = drawing.axes
        axes.plot([0, 1], [0, 1], color=MUTED, lw=0.8, ls=(0, (2, 3)))
        for index, (name, rows) in enumerate(result.analysis.patients.items()):
            false_rate, true_rate, _ = roc_curve(rows["label"], rows["probability"])
            style = ":" if name not in result.analysis.classifiers else _STYLES[index // len(SERIES)]
            auc = result.analysis.reports[name]["auc"]
            label = f"{name}: {auc.value:.2f} ({auc.low:.2f} to {auc.high:.2f})"
            axes.plot(false_rate, true_rate, style, color=SERIES[index % len(SERIES)], lw=1.4, label=label)
        axes.set_xlabel("1 - specificity")
        axes.set_ylabel("sensitivity")
        axes.set_aspect("equal")
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=6.5)
    return drawing.figure


def reliability_figure(result: StudyResult) -> Figure:
    """Draw the reliability curve of every row of the table, with Wilson's interval for each bin."""
    with chart("reliability", f"Reliability of {result.table.title}", width_in=4.2, height_in=4.2) as drawing:
        axes = drawing.axes
        axes.plot([0, 1], [0, 1], color=MUTED, lw=0.8, ls=(0, (2, 3)))
        for index, name in enumerate(result.analysis.classifiers):
            rows = result.analysis.patients[name]
            bins = reliability(rows["label"], rows["probability"])
            observed = [item.observed for item in bins]
            ends = [
                [item.observed - item.low for item in bins],
                [item.high - item.observed for item in bins],
            ]
            axes.errorbar(
                [item.predicted for item in bins],
                observed,
                yerr=ends,
                fmt="o-",
                ms=3,
                lw=1,
                capsize=2,
                color=SERIES[index % len(SERIES)],
                label=name,
            )
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(-0.02, 1.02)
        axes.set_xlabel("predicted probability")
        axes.set_ylabel("observed share")
        axes.legend(fontsize=6.5)
    return drawing.figure


def weights_figure(weights: Mapping[str, Sequence[float]]) -> Figure:
    """Draw what each branch weighs at the four stages of CentralNet, as fig. 5-5 does."""
    with chart("central_net_weights", "CentralNet: share of each branch by stage", height_in=2.8) as drawing:
        axes = drawing.axes
        for offset, (name, shares) in enumerate(weights.items()):
            places = [stage + 0.25 * (offset - 1) for stage in range(1, len(shares) + 1)]
            axes.bar(places, shares, width=0.23, color=SERIES[offset], label=name)
        axes.set_xticks(range(1, 5), [f"stage {stage}" for stage in range(1, 5)])
        axes.set_ylabel("share of the weighted sum")
        axes.set_ylim(0, 1.35 * max(map(max, weights.values())))
        axes.legend(ncols=3, loc="upper left")
    return drawing.figure


def _table(result: StudyResult) -> Table:
    def beside(figure: str) -> list[Column]:
        return [
            number(figure, "AUC" if figure == "auc" else figure.capitalize(), 3),
            interval(f"{figure}_low", f"{figure}_high", 3),
            Column("Source", lambda row: show_number(row.get(f"{figure}_in_source"), 3) or "-", numeric=True),
        ]

    columns = [text("model", "Model")]
    for figure in ("auc", "accuracy", "sensitivity", "specificity", "kappa"):
        columns += beside(figure)
    columns += [number("pr_auc", "PR-AUC", 3), number("brier", "Brier", 3), number("permutation_p", "Permutation p", 3)]
    caption = (
        "One prediction for each patient. Intervals: DeLong (AUC), Wilson (accuracy, sensitivity, specificity), "
        "bootstrap over patients (kappa). Source: what the thesis printed for its own 263 patients."
    )
    return Table("study", caption, columns, result.rows())


def _between(result: StudyResult) -> Table:
    rows = [
        {"model": item.classifier, "other": item.baseline, **item.as_json(), "clear": "yes" if item.is_clear else "no"}
        for item in result.analysis.between
    ]
    columns = [
        text("model", "Model"),
        text("other", "Compared with"),
        number("difference", "AUC difference", 3),
        interval("low", "high", 3),
        p_value("p_holm", "p (Holm)"),
        text("clear", "Beyond chance"),
    ]
    caption = (
        "The rows of the table against each other: DeLong's paired test on the same patients, p-values corrected by "
        f"Holm for {plural(len(rows), 'pair')}. One seed: that trainings vary by their draws is not in these p-values."
    )
    return Table("between_rows", caption, columns, rows)


def _source_note(result: StudyResult) -> str:
    impossible = [row.label for row in result.table.rows if row.is_impossible]
    notes = list(result.table.notes)
    if impossible:
        notes.append(
            f"In the source the accuracy of {', '.join(impossible)} lies outside its sensitivity and specificity, "
            "which cannot be: compare trends, not these figures. Every row of ours is checked for it."
        )
    return " ".join(notes) or "The source's figures are of another cohort: compare trends."
