"""Set a study as one HTML page with its ROC and reliability figures, and with CentralNet's weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

from glioma_nas.calibration import reliability
from glioma_nas.config import RunConfig
from glioma_nas.files import write_bytes, write_text
from glioma_nas.marker_analysis import BASELINE_WORDS, Versus
from glioma_nas.marker_studies.runner import StudyResult, central_net_weights, slug
from glioma_nas.report.document import (
    Bullets,
    Caution,
    Column,
    Facts,
    Figures,
    Headline,
    Paragraph,
    Picture,
    Row,
    Section,
    Table,
    interval,
    number,
    p_value,
    plural,
    show_number,
    text,
)
from glioma_nas.report.figures import LINE_STYLES, MUTED, SERIES, Figure, chart
from glioma_nas.report.reliability_chart import reliability_chart
from glioma_nas.report.study_page import split_fact, study_page
from glioma_nas.roc_analysis import roc_curve

_HEADINGS = {"auc": "AUC", "kappa": "Cohen's κ"}


def write_page(result: StudyResult, config: RunConfig) -> None:
    """Write ``report.html`` and ``figures/*.png`` into the study's folder.

    Args:
        result: What the study found.
        config: The run's configuration.
    """
    pictures = [Picture(roc_figure(result), "ROC curves; the legend gives the AUC with its 95 % interval (DeLong).")]
    weights = central_net_weights(result)
    if weights is not None:
        words = "CentralNet: share of each branch in the central branch's weighted sums, mean of the folds."
        pictures.append(Picture(weights_figure(weights), words))
    reliable = [Picture(_reliability(result, name), name) for name in result.analysis.classifiers]
    for picture in [*pictures, *reliable]:
        write_bytes(result.folder / "figures" / f"{picture.figure.name}.png", picture.figure.png)
    rows = [{**row, "model": _words(row["model"])} for row in result.rows()]
    section = Section("table", result.table.title)
    section.add(_facts(result, config), _table(result, rows), Paragraph(_source_note(result)), _more_figures(rows))
    if result.analysis.versus:
        if not any(item.beats for item in result.analysis.versus):
            section.add(Caution("No model of this table beats any baseline beyond chance on this cohort."))
        section.add(Bullets([_verdict(name, result.analysis.versus) for name in result.analysis.classifiers]))
        section.add(
            _comparisons("versus_baselines", "Each row of the table against each baseline", result.analysis.versus)
        )
    section.add(
        _comparisons("between_rows", "The rows of the table against each other", result.analysis.between),
        Figures("Out-of-fold predictions, one for each patient.", pictures),
        Figures(
            "Reliability: observed share of positive patients by predicted probability, with Wilson intervals; dotted: "
            "perfect.",
            reliable,
        ),
    )
    headlines = [
        Headline(name, show_number(result.analysis.reports[name]["auc"].value, 3) or "", "AUC, out-of-fold")
        for name in result.analysis.classifiers[:4]
    ]
    page = study_page(
        result.table.title,
        config,
        [section],
        subtitle="Study on your cohort, the source's figures beside",
        facts=[("Marker", result.plan.name), split_fact(config)],
        headlines=headlines,
    )
    write_text(result.folder / "report.html", page)


def roc_figure(result: StudyResult) -> Figure:
    """Draw the ROC curve of every row and baseline."""
    alt = f"ROC curves of {result.table.title}"
    with chart("roc", alt, width_in=7.6, height_in=4.2) as drawing:
        axes = drawing.axes
        axes.plot([0, 1], [0, 1], color=MUTED, lw=0.8, ls=(0, (2, 3)))
        for index, (name, rows) in enumerate(result.analysis.patients.items()):
            false_rate, true_rate, _ = roc_curve(rows["label"], rows["probability"])
            # Baselines dotted; more rows than colours go on in the next style.
            style = ":" if name not in result.analysis.classifiers else LINE_STYLES[index // len(SERIES)]
            auc = result.analysis.reports[name]["auc"]
            label = f"{_words(name)}: {auc.value:.2f} ({auc.low:.2f} to {auc.high:.2f})"
            axes.plot(false_rate, true_rate, style, color=SERIES[index % len(SERIES)], lw=1.4, label=label)
        axes.set_xlabel("1 - specificity")
        axes.set_ylabel("sensitivity")
        axes.set_aspect("equal")
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=6.5)
    return drawing.figure


def _reliability(result: StudyResult, name: str) -> Figure:
    rows = result.analysis.patients[name]
    return reliability_chart(slug(name), [asdict(item) for item in reliability(rows["label"], rows["probability"])])


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


def _words(name: str) -> str:
    return BASELINE_WORDS.get(name, name)


def _facts(result: StudyResult, config: RunConfig) -> Facts:
    plan = result.plan
    auc = next(iter(result.analysis.reports.values()))["auc"]
    items = [
        ("Marker", f"{plan.name}, column {plan.config.column}"),
        ("Patients", f"{auc.n}, of them {auc.n_positive} positive"),
        ("Split", f"{result.n_folds} folds by patient; thresholds and temperatures from inner folds"),
        ("Masks", plan.masks.words),
        ("Sequences", ", ".join(plan.config.sequences)),
        ("Training", f"preset {result.preset}, {plural(config.classify.epochs, 'epoch')}, seed {config.seed}"),
        ("Left out", f"{plural(plan.n_label_unknown, 'case')} with unknown label"),
    ]
    if plan.lacking:
        term = "Zero channel" if config.cohort.feeds_zeros else "Left out as well"
        items.append((term, f"{plural(len(plan.lacking), 'case')} without a sequence of the marker"))
    return Facts(items)


def _table(result: StudyResult, rows: Sequence[Row]) -> Table:
    columns = [text("model", "Model")]
    for figure in ("auc", "accuracy", "sensitivity", "specificity", "kappa"):
        printed = f"{figure}_in_source"
        columns += [
            number(figure, _HEADINGS.get(figure, figure.capitalize()), 3),
            interval(f"{figure}_low", f"{figure}_high", 3),
        ]
        if any(row[printed] is not None for row in rows):
            columns.append(_where_it_exists(number(printed, "Source", 3)))
    caption = (
        "One prediction for each patient. Intervals: DeLong (AUC), Wilson (accuracy, sensitivity, specificity), "
        "bootstrap over patients (κ). Source: what the thesis printed for its own 263 patients."
    )
    return Table("study", caption, columns, rows)


def _where_it_exists(column: Column) -> Column:
    """Return the column with a dash where there is no figure: nobody failed to measure it."""
    return replace(column, show=lambda row: column.show(row) or "-")


def _more_figures(rows: Sequence[Row]) -> Table:
    columns = [text("model", "Model")]
    for figure, heading in (
        ("auc_within_folds", "AUC within folds"),
        ("pr_auc", "PR-AUC"),
        ("balanced_accuracy", "Balanced accuracy"),
        ("brier", "Brier"),
        ("calibration_slope", "Calibration slope"),
    ):
        shown = (number(figure, heading, 3), interval(f"{figure}_low", f"{figure}_high", 3))
        columns += [_where_it_exists(column) for column in shown]
    columns.append(p_value("permutation_p", "Permutation p"))
    caption = (
        "The same predictions. Within folds: over pairs of patients of the same test fold. Intervals: bootstrap over "
        "patients. A slope is absent where the classes are separated."
    )
    return Table("more_figures", caption, columns, rows)


def _verdict(name: str, versus: Sequence[Versus]) -> str:
    own = [item for item in versus if item.classifier == name]
    beaten = [_words(item.baseline) for item in own if item.beats]
    others = [_words(item.baseline) for item in own if not item.beats]
    said = f"beats {', '.join(beaten)}" if beaten else ""
    if others:
        said += f"{'; ' if said else ''}does not beat {', '.join(others)} beyond chance"
    return f"{name}: {said}."


def _comparisons(name: str, what: str, items: Sequence[Versus]) -> Table:
    rows = [
        {
            "model": item.classifier,
            "other": _words(item.baseline),
            **item.as_json(),
            "clear": ("better" if item.beats else "worse") if item.is_clear else "no",
        }
        for item in items
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
        f"{what}: DeLong's paired test on the same patients, p-values corrected by Holm for "
        f"{plural(len(rows), 'pair')}. One seed: that trainings vary by their draws is not in these p-values."
    )
    return Table(name, caption, columns, rows)


def _source_note(result: StudyResult) -> str:
    impossible = [row.label for row in result.table.rows if row.is_impossible]
    notes = list(result.table.notes)
    if impossible:
        notes.append(
            f"In the source the accuracy of {', '.join(impossible)} lies outside its sensitivity and specificity, "
            "which cannot be: compare trends, not these figures. Every row of ours is checked for it."
        )
    return " ".join(notes) or "The source's figures are of another cohort: compare trends."
