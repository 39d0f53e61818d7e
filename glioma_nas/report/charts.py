"""The charts of the report: search, training, segmentation, latency and ROC curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from glioma_nas.pareto import pareto_front
from glioma_nas.report.figures import GREY, INK, LINE_STYLES, MUTED, SERIES, Drawing, Figure, chart
from glioma_nas.report.intervals import PatientEstimate
from glioma_nas.report.label_placement import NamedPoint, place_names
from glioma_nas.roc_analysis import roc_curve

_FAR_APART = 6
"""Ratio of the slowest to the fastest latency above which a linear axis would crowd the fast networks."""


@dataclass(frozen=True)
class _Panel:
    """One chart of the search history: which columns it draws and how it is labelled."""

    name: str
    title: str
    unit: str
    columns: Mapping[str, str]


_SEARCH_PANELS = (
    _Panel(
        "search_loss",
        "Loss",
        "loss",
        {
            "loss_weights": "weights",
            "loss_architecture_teacher": "architecture, teacher",
            "loss_architecture_student": "architecture, student",
        },
    ),
    _Panel("search_latency", "Expected latency of the student", "ms", {"expected_latency_ms": "expected latency"}),
    _Panel(
        "search_entropy",
        "Entropy of the choices",
        "share of the uniform choice's",
        {"entropy_operator": "operator", "entropy_scale": "scale", "entropy_width": "width"},
    ),
    _Panel("search_dice", "Dice of the supernet", "Dice", {"dice_validation": "Dice"}),
)


@dataclass(frozen=True)
class NetworkPoint:
    """One network in the plane of accuracy and latency."""

    network: str
    dice: PatientEstimate
    latency_ms: float


def colour_of(networks: Sequence[str]) -> dict[str, str]:
    """Give each network one colour, the same in every chart; the student has the first."""
    ordered = sorted(networks, key=lambda name: (name != "student", name != "teacher", networks.index(name)))
    return {name: SERIES[min(position, len(SERIES) - 1)] for position, name in enumerate(ordered)}


def search_charts(history: pd.DataFrame) -> list[Figure]:
    """Draw the curves of the search; a column that is absent or empty is left out.

    Args:
        history: See `glioma_nas.report.records.RunRecords.search_history`.
    """
    figures = []
    for panel in _SEARCH_PANELS:
        columns = [name for name in panel.columns if name in history.columns and history[name].notna().any()]
        if not columns:
            continue
        alt = f"{panel.title} by epoch of the search, {len(history)} epochs"
        with chart(panel.name, alt, height_in=2.7) as drawing:
            axes = drawing.axes
            _mark_pretraining(drawing, history)
            for name, colour, style in zip(columns, SERIES, LINE_STYLES, strict=False):
                known = history[history[name].notna()]
                marker = "o" if len(known) < 3 else None
                axes.plot(
                    known["epoch"], known[name], style, color=colour, marker=marker, ms=3, label=panel.columns[name]
                )
            axes.set_xlim(float(history["epoch"].min()) - 0.5, float(history["epoch"].max()) + 0.5)
            axes.set_title(panel.title)
            axes.set_xlabel("epoch")
            axes.set_ylabel(panel.unit)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            if len(columns) > 1:
                axes.legend()
        figures.append(drawing.figure)
    return figures


def training_charts(histories: Mapping[tuple[str, int], pd.DataFrame], colours: Mapping[str, str]) -> list[Figure]:
    """Draw loss and validation Dice by epoch: one thin line for each fold, the mean over folds thick.

    Args:
        histories: (network, fold) → columns ``epoch``, ``loss`` and perhaps ``dice_validation``.
        colours: Network → colour.
    """
    figures = []
    for column, title in (("loss", "Training loss"), ("dice_validation", "Validation Dice")):
        shown = {
            key: frame for key, frame in histories.items() if column in frame.columns and frame[column].notna().any()
        }
        if not shown:
            continue
        networks = list(dict.fromkeys(network for network, _ in shown))
        with chart(f"training_{column}", f"{title} by epoch of {', '.join(networks)}", height_in=2.7) as drawing:
            for network in networks:
                folds = [
                    frame.set_index("epoch")[column].dropna() for (name, _), frame in shown.items() if name == network
                ]
                for fold in folds:
                    drawing.axes.plot(fold.index, fold, color=colours[network], lw=0.6, alpha=0.45)
                average = pd.concat(folds, axis=1).mean(axis=1).sort_index()
                drawing.axes.plot(average.index, average, color=colours[network], lw=1.9, label=network)
            drawing.axes.set_title(title)
            drawing.axes.set_xlabel("epoch")
            drawing.axes.set_ylabel("Dice" if column == "dice_validation" else "loss")
            drawing.axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            drawing.axes.legend()
        figures.append(drawing.figure)
    return figures


def dice_chart(
    values: Mapping[str, Sequence[float]], colours: Mapping[str, str], generator: np.random.Generator
) -> Figure:
    """Draw every case's Dice as a dot beside a box of the quartiles.

    Args:
        values: Network → Dice of each case, in [0, 1].
        colours: Network → colour.
        generator: Scatters the dots sideways.
    """
    counts = ", ".join(f"{name} n = {len(dice)}" for name, dice in values.items())
    height = max(1.6, 0.9 + 0.55 * len(values))
    with chart("dice_by_case", f"Dice of each case by network: {counts}", width_in=4.6, height_in=height) as drawing:
        axes = drawing.axes
        for row, (name, dice) in enumerate(values.items()):
            axes.boxplot(
                dice,
                positions=[row],
                orientation="horizontal",
                widths=0.5,
                showfliers=False,
                boxprops={"color": colours[name]},
                whiskerprops={"color": colours[name]},
                capprops={"color": colours[name]},
                medianprops={"color": colours[name], "linewidth": 2.4},
            )
            jitter = row + generator.uniform(-0.16, 0.16, len(dice))
            axes.scatter(dice, jitter, s=9, color=colours[name], alpha=0.55, linewidths=0, zorder=3)
        axes.set_yticks(range(len(values)), [f"{name}\nn = {len(dice)}" for name, dice in values.items()])
        axes.invert_yaxis()
        axes.set_xlim(-0.02, 1.02)
        axes.set_xlabel("Dice of a case (out-of-fold)")
        axes.grid(axis="y", visible=False)
    return drawing.figure


def tradeoff_chart(
    points: Sequence[NetworkPoint],
    colours: Mapping[str, str],
    *,
    size_in: tuple[float, float] = (4.6, 3.0),
) -> Figure:
    """Draw mean Dice with its interval against the median latency, one point a network; a line joins the Pareto front.

    The axis of latency is logarithmic where latencies lie far apart.

    Args:
        points: The networks.
        colours: Network → colour.
        size_in: Width and height of the picture.
    """
    alt = "; ".join(f"{point.network}: Dice {point.dice.value:.3f} at {point.latency_ms:.1f} ms" for point in points)
    with chart("accuracy_latency", alt, width_in=size_in[0], height_in=size_in[1]) as drawing:
        axes = drawing.axes
        latencies = [point.latency_ms for point in points]
        if max(latencies) > _FAR_APART * min(latencies):
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
        front = [points[index] for index in pareto_front(latencies, [point.dice.value for point in points])]
        if len(front) > 1:
            steps = [(point.latency_ms, point.dice.value) for point in front]
            axes.step(*zip(*steps, strict=True), where="post", color=GREY, lw=1.0, zorder=1)
        named = []
        for point in sorted(points, key=lambda point: point.latency_ms):
            estimate, colour = point.dice, colours.get(point.network, GREY)
            low, high = estimate.low, estimate.high
            error = None if low is None or high is None else [[estimate.value - low], [high - estimate.value]]
            axes.errorbar(point.latency_ms, estimate.value, yerr=error, fmt="o", ms=6, color=colour, capsize=3, lw=1.2)
            ends = (estimate.value if low is None else low, estimate.value if high is None else high)
            named.append(NamedPoint(point.network, point.latency_ms, estimate.value, *ends, colour))
        axes.margins(x=0.22, y=0.12)
        if axes.get_xscale() == "linear":
            axes.set_xlim(left=0)
        axes.set_xlabel("median latency, ms (left is faster)")
        axes.set_ylabel("mean Dice, 95 % interval")
        place_names(drawing, named)
    return drawing.figure


def roc_chart(
    marker: str, curves: Mapping[str, tuple[Sequence[int], Sequence[float]]], captions: Mapping[str, str]
) -> Figure:
    """Draw ROC curves, the image model first and its baseline second.

    Args:
        marker: Name of the marker.
        curves: Legend → labels (0 or 1) and probabilities of the same cases.
        captions: Legend → what is added to it, such as the AUC.
    """
    alt = f"ROC curves of {marker}: " + "; ".join(f"{name} {captions[name]}" for name in curves)
    with chart(f"roc_{marker}", alt, width_in=3.8, height_in=3.7) as drawing:
        axes = drawing.axes
        axes.plot([0, 1], [0, 1], color=MUTED, lw=0.8, ls=(0, (2, 3)))
        for (name, (labels, scores)), colour, style in zip(curves.items(), SERIES, LINE_STYLES, strict=False):
            false_rate, true_rate, _ = roc_curve(labels, scores)
            axes.plot(false_rate, true_rate, style, color=colour, label=f"{name}\n{captions[name]}")
        axes.set_xlim(-0.01, 1.01)
        axes.set_ylim(-0.01, 1.01)
        axes.set_aspect("equal")
        axes.set_xlabel("1 - specificity")
        axes.set_ylabel("sensitivity")
        axes.legend(loc="lower right")
    return drawing.figure


def probability_chart(
    marker: str,
    labels: Sequence[int],
    probabilities: Sequence[float],
    thresholds: Sequence[float],
    generator: np.random.Generator,
) -> Figure:
    """Draw the predicted probability of every patient, apart for both true classes.

    Args:
        marker: Name of the marker.
        labels: 0 or 1 for each patient.
        probabilities: In [0, 1].
        thresholds: The one its fold chose on training patients; a dot above it was called positive.
        generator: Scatters the dots sideways.
    """
    truth, values = np.asarray(labels), np.asarray(probabilities, dtype=np.float64)
    called = values >= np.asarray(thresholds, dtype=np.float64)
    alt = f"Predicted probability of {marker}, {int((truth == 0).sum())} negative, {int(truth.sum())} positive patients"
    with chart(f"probability_{marker}", alt, width_in=3.8, height_in=3.7) as drawing:
        axes = drawing.axes
        for group in (0, 1):
            for positive, filled in ((True, True), (False, False)):
                chosen = (truth == group) & (called == positive)
                place = group + generator.uniform(-0.22, 0.22, int(chosen.sum()))
                face = SERIES[group] if filled else "none"
                axes.scatter(place, values[chosen], s=20, facecolors=face, edgecolors=SERIES[group], linewidths=0.9)
            inside = values[truth == group]
            if inside.size:
                axes.hlines(float(np.median(inside)), group - 0.32, group + 0.32, color=INK, lw=1.4)
        names = [f"{name}\nn = {int((truth == group).sum())}" for group, name in ((0, "negative"), (1, "positive"))]
        axes.set_xticks([0, 1], names)
        axes.set_xlim(-0.5, 1.5)
        axes.set_ylim(-0.02, 1.02)
        axes.grid(axis="x", visible=False)
        axes.set_ylabel("predicted probability")
    return drawing.figure


def _mark_pretraining(drawing: Drawing, history: pd.DataFrame) -> None:
    pretraining = history.loc[history["phase"] == "pretrain", "epoch"]
    if pretraining.empty or len(pretraining) == len(history):
        return
    boundary = float(pretraining.max()) + 0.5
    drawing.axes.axvline(boundary, color=INK, lw=0.8, ls=(0, (1, 2)))
    drawing.axes.annotate(
        "pretraining ends",
        (boundary, 0),
        (3, 5),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        rotation=90,
        fontsize=7,
        color=MUTED,
    )
