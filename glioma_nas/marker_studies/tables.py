"""The rows of the published tables: which classifier each is, and what the source printed for it.

The source's figures are of its own 263 patients and are shown beside ours to compare trends. Some of its rows are
impossible (accuracy above both sensitivity and specificity): they are shown as printed and marked.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

FIGURES = ("accuracy", "sensitivity", "specificity", "auc", "kappa")


@dataclass(frozen=True)
class StudyRow:
    """One row of a table.

    Attributes:
        label: What the page and files call it.
        classifier: Registered name.
        options: Of the classifier, apart from what the preset adds.
        published: Figure → what the source printed.
        backbone: ``resnet`` or ``resnest``, whose size the preset decides; none for classifiers with presets.
    """

    label: str
    classifier: str
    options: Mapping[str, Any]
    published: Mapping[str, float] = field(default_factory=dict)
    backbone: str | None = None

    def full_options(self, preset: str) -> dict[str, Any]:
        """Return the classifier's options at a preset, ``small`` or ``full``."""
        if self.backbone is None:
            return {**self.options, "preset": preset}
        return {**self.options, "backbone": f"small_{self.backbone}" if preset == "small" else f"{self.backbone}50"}

    @property
    def is_impossible(self) -> bool:
        """Whether the printed accuracy lies outside the printed sensitivity and specificity."""
        if not {"accuracy", "sensitivity", "specificity"} <= set(self.published):
            return False
        low, high = sorted((self.published["sensitivity"], self.published["specificity"]))
        return not low <= self.published["accuracy"] <= high


@dataclass(frozen=True)
class StudyTable:
    """One published table.

    Attributes:
        name: Of the command.
        title: Heading of the page.
        marker: The marker it is about, when the command line names none.
        rows: In the source's order.
        notes: What a reader must know.
    """

    name: str
    title: str
    marker: str
    rows: Sequence[StudyRow]
    notes: Sequence[str] = ()


def _printed(*values: float) -> dict[str, float]:
    return dict(zip(FIGURES, values, strict=False))


def _idh(label: str, backbone: str, mode: str, *values: float) -> StudyRow:
    return StudyRow(label, "idh", {"mode": mode, "metadata": False}, _printed(*values), backbone)


def _fusion(label: str, fusion: str, *values: float) -> StudyRow:
    return StudyRow(label, "idh", {"mode": "MIX", "fusion": fusion, "metadata": False}, _printed(*values), "resnest")


# Multi-scale loss, Merge-IN, metadata: 000, 001 … 111; accuracy and AUC.
_ABLATION = (
    (0.735, 0.766),
    (0.736, 0.768),
    (0.742, 0.773),
    (0.743, 0.774),
    (0.746, 0.778),
    (0.748, 0.781),
    (0.750, 0.785),
    (0.752, 0.788),
)

TABLES: Mapping[str, StudyTable] = {
    table.name: table
    for table in (
        StudyTable(
            "table-3-2",
            "Table 3-2: backbone and input mode",
            "idh",
            (
                _idh("ResNet, IMG", "resnet", "IMG", 0.646, 0.578, 0.435, 0.654),
                _idh("ResNeSt, IMG", "resnest", "IMG", 0.687, 0.616, 0.454, 0.677),
                _idh("ResNet, ROI", "resnet", "ROI", 0.697, 0.617, 0.476, 0.702),
                _idh("ResNeSt, ROI", "resnest", "ROI", 0.734, 0.624, 0.563, 0.754),
                _idh("ResNet, MIX", "resnet", "MIX", 0.728, 0.618, 0.577, 0.742),
                _idh("ResNeSt, MIX", "resnest", "MIX", 0.766, 0.734, 0.715, 0.842),
            ),
            ("Images and masks only, without age and sex, as in the source.",),
        ),
        StudyTable(
            "table-3-3",
            "Table 3-3: fusion of the sequences",
            "idh",
            (
                _fusion("early", "early", 0.766, 0.734, 0.715, 0.842),
                _fusion("late", "late", 0.736, 0.725, 0.691, 0.824),
                _fusion("middle-1", "middle1", 0.779, 0.784, 0.644, 0.871),
                _fusion("middle-2", "middle2", 0.779, 0.784, 0.644, 0.871),
            ),
            ("The source prints one row for its two middle fusions; it stands beside both.",),
        ),
        StudyTable(
            "table-5-2",
            "Table 5-2: networks for Ki67",
            "ki67",
            (
                StudyRow(
                    "ResNet",
                    "idh",
                    {"mode": "MIX", "metadata": False},
                    _printed(0.691, 0.693, 0.689, 0.724, 0.422),
                    "resnet",
                ),
                StudyRow(
                    "ResNeSt",
                    "idh",
                    {"mode": "MIX", "metadata": False},
                    _printed(0.724, 0.734, 0.715, 0.764, 0.451),
                    "resnest",
                ),
                StudyRow("CentralNet", "central_net", {}, _printed(0.725, 0.745, 0.705, 0.762, 0.450)),
                StudyRow("KiNet", "kinet", {}, _printed(0.752, 0.755, 0.749, 0.788, 0.472)),
            ),
            ("As in the source, KiNet alone sees age and sex; the others see both sequences and the mask.",),
        ),
        StudyTable(
            "table-5-3",
            "Table 5-3: ablation of KiNet",
            "ki67",
            tuple(
                StudyRow(
                    f"multi-scale loss {scale}, Merge-IN {merge}, metadata {meta}",
                    "kinet",
                    {"multi_scale": bool(scale), "merge_in": bool(merge), "metadata": bool(meta)},
                    {"accuracy": accuracy, "auc": auc},
                )
                for (scale, merge, meta), (accuracy, auc) in zip(
                    itertools.product((0, 1), repeat=3), _ABLATION, strict=True
                )
            ),
        ),
    )
}
