"""What the out-of-fold predictions of several classifiers say about a marker: figures, comparisons, honest words.

One row is one patient everywhere. The classifier of interest is compared with each baseline by DeLong's paired test,
corrected by Holm for their number, and is said to beat a baseline only when that test says so.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from glioma_nas.binary_statistics import binary_report, brier, wilson_interval
from glioma_nas.calibration import calibration_slope, reliability
from glioma_nas.marker_evaluator import patient_level
from glioma_nas.markers import MarkerCase
from glioma_nas.report.document import show_p
from glioma_nas.roc_analysis import Comparison, Estimate, paired_delong, roc_curve
from glioma_nas.seeding import numpy_generator
from glioma_nas.significance import holm, permutation_p_value, significant
from glioma_nas.subgroups import age_groups, subgroup_rows

SIGNIFICANCE = 0.05
BASELINE_WORDS = {
    "age_sex": "age and sex alone",
    "tumour_volume": "tumour volume alone",
    "radiomics": "radiomics features with logistic regression",
}
_MARGINS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3)


@dataclass(frozen=True)
class Versus:
    """A classifier beside one baseline, or beside another classifier of interest.

    Attributes:
        classifier: Name of the classifier.
        baseline: Registered name, or the other classifier's.
        comparison: AUC of the classifier minus that of the baseline.
        p_holm: Its p-value, corrected for the number of comparisons made.
    """

    classifier: str
    baseline: str
    comparison: Comparison
    p_holm: float

    @property
    def beats(self) -> bool:
        """Whether the classifier's AUC is higher beyond chance."""
        return self.comparison.difference > 0 and self.p_holm < SIGNIFICANCE

    @property
    def is_clear(self) -> bool:
        """Whether the two AUCs differ beyond chance, either way."""
        return self.p_holm < SIGNIFICANCE

    def sentence(self) -> str:
        """Say in words which is better, and how surely."""
        c = self.comparison
        words = BASELINE_WORDS.get(self.baseline, self.baseline)
        numbers = (
            f"AUC difference {c.difference:+.3f}, 95 % interval {c.low:+.3f} to {c.high:+.3f}, paired DeLong with Holm "
            f"p {show_p(self.p_holm, equals='= ')}, n = {c.n} patients"
        )
        if self.beats:
            return f"The model beats {words} ({numbers})."
        if c.difference < 0 and self.p_holm < SIGNIFICANCE:
            return f"The model does not beat {words}; it is worse ({numbers})."
        return f"The model does not beat {words} beyond chance ({numbers})."

    def as_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {**self.comparison.as_json(), "p_holm": significant(self.p_holm), "beats": self.beats}


@dataclass(frozen=True)
class Analysis:
    """Everything said about one marker.

    Attributes:
        classifiers: The classifiers of interest; all others are their baselines.
        patients: Classifier → one row a patient.
        reports: Classifier → figure → estimate.
        versus: One comparison for each classifier and baseline, corrected together.
        between: One for each pair of classifiers of interest, the later one first, corrected together.
        permutation_p: Classifier → p-value against shuffled labels.
    """

    classifiers: tuple[str, ...]
    patients: Mapping[str, pd.DataFrame]
    reports: Mapping[str, Mapping[str, Estimate]]
    versus: Sequence[Versus]
    between: Sequence[Versus]
    permutation_p: Mapping[str, float]

    def statement(self, classifier: str) -> str:
        """Say in one paragraph what was found with one of the classifiers of interest."""
        own = self.reports[classifier]["auc"]
        within = self.reports[classifier].get("auc_within_folds")
        text = (
            f"out-of-fold AUC {own.value:.3f} (95 % interval {own.low:.3f} to {own.high:.3f}; {own.n} patients, "
            f"{own.n_positive} positive, folds pooled; permutation p = {self.permutation_p[classifier]:.3f})."
        )
        if within is not None:
            text += f" Within test folds {within.value:.3f} ({within.low:.3f} to {within.high:.3f})."
        return " ".join([text, *(item.sentence() for item in self.versus if item.classifier == classifier)])


def analyse(
    frames: Mapping[str, pd.DataFrame],
    *,
    classifiers: Sequence[str],
    seed: int,
    marker: str,
    bootstrap_samples: int,
    permutation_samples: int,
) -> Analysis:
    """Compute everything from out-of-fold predictions of the same patients.

    Args:
        frames: Classifier → rows as `glioma_nas.marker_evaluator.MarkerEvaluator.cross_validate` returns them.
        classifiers: Those of interest; all others are their baselines.
        seed: The run's seed.
        marker: Name of the marker, for the draws.
        bootstrap_samples: Draws of each interval.
        permutation_samples: Shuffles of each permutation test.

    Raises:
        LabelError: Fewer than two patients of a class.
    """
    patients = {name: patient_level(frame) for name, frame in frames.items()}
    reports = {}
    permutation_p = {}
    for name, rows in patients.items():
        folds = rows["fold"].tolist()
        reports[name] = binary_report(
            rows["label"],
            rows["probability"],
            rows["threshold"],
            samples=bootstrap_samples,
            # The same draws for all: their intervals then differ by the predictions alone.
            generator=numpy_generator(seed, "classify", marker, "bootstrap"),
            groups=folds,
        )
        permutation_p[name] = permutation_p_value(
            rows["label"],
            rows["probability"],
            samples=permutation_samples,
            generator=numpy_generator(seed, "classify", marker, "permutation"),
            groups=folds,
        )
    against_baselines = [(name, other) for name in classifiers for other in patients if other not in classifiers]
    between = [(later, earlier) for earlier, later in itertools.combinations(classifiers, 2)]
    return Analysis(
        tuple(classifiers),
        patients,
        reports,
        _compared(patients, against_baselines),
        _compared(patients, between),
        permutation_p,
    )


def _compared(patients: Mapping[str, pd.DataFrame], pairs: Sequence[tuple[str, str]]) -> list[Versus]:
    found = [
        paired_delong(patients[name]["label"], patients[name]["probability"], patients[other]["probability"])
        for name, other in pairs
    ]
    adjusted = holm([comparison.p_value for comparison in found])
    return [Versus(*pair, *rest) for pair, rest in zip(pairs, zip(found, adjusted, strict=True), strict=True)]


def describe_patients(rows: pd.DataFrame, cases: Sequence[MarkerCase], labels: Mapping[str, Mapping[str, str]]) -> Any:
    """Add to one row a patient what subgroups are made of: ``sex``, ``age`` in two groups, and the sheet's columns.

    Args:
        rows: One row a patient.
        cases: The cases; of several of one patient the first counts.
        labels: Case id → the sheet's other columns.
    """
    first = {case.patient_id: case for case in reversed(cases)}
    ordered = [first[patient] for patient in rows["patient_id"]]
    sexes: Any = [case.sex for case in ordered]  # pandas' types do not allow unknown ones
    described = rows.assign(sex=sexes, age=age_groups([case.age for case in ordered]))
    for column in dict.fromkeys(name for case in ordered for name in labels[case.case_id]):
        if column not in described:
            described[column] = [labels[case.case_id].get(column) for case in ordered]
    return described


def subgroup_table(described: pd.DataFrame, columns: Sequence[str]) -> tuple[pd.DataFrame, list[str]]:
    """Return one row a subgroup, and the columns that the sheet lacks."""
    present = [column for column in columns if column in described]
    rows = pd.DataFrame(subgroup_rows(described, present))
    return rows, [column for column in columns if column not in present]


def reliability_table(analysis: Analysis) -> pd.DataFrame:
    """Return the reliability curve of every classifier, one row a bin."""
    return pd.DataFrame(
        {"classifier": name, **asdict(item)}
        for name, rows in analysis.patients.items()
        for item in reliability(rows["label"], rows["probability"])
    )


def abstention_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Return what is gained by making no call near the threshold: coverage and accuracy for growing margins."""
    distance = (rows["probability"] - rows["threshold"]).abs()
    right = (rows["probability"] >= rows["threshold"]) == (rows["label"] == 1)
    table = []
    for margin in _MARGINS:
        called = distance >= margin
        n, hits = int(called.sum()), int((called & right).sum())
        low, high = wilson_interval(hits, n) if n else (None, None)
        share = hits / n if n else None
        table.append({"margin": margin, "n_called": n, "n": len(rows), "accuracy": share, "low": low, "high": high})
    return pd.DataFrame(table)


def roc_table(analysis: Analysis) -> pd.DataFrame:
    """Return the ROC curve of every classifier, one row a point."""
    rows = []
    for name, patients in analysis.patients.items():
        for false_rate, true_rate, threshold in zip(
            *roc_curve(patients["label"], patients["probability"]), strict=True
        ):
            rows.append(
                {
                    "classifier": name,
                    "false_positive_rate": false_rate,
                    "true_positive_rate": true_rate,
                    # The curve starts above every probability; CSV has no infinity that all readers know.
                    "threshold": threshold if np.isfinite(threshold) else None,
                }
            )
    return pd.DataFrame(rows)


def before_temperature(frame: pd.DataFrame) -> dict[str, float | None]:
    """Return Brier score and calibration slope of the probabilities before temperature scaling."""
    raw = patient_level(frame.assign(probability=frame["probability_uncalibrated"]))
    slope = calibration_slope(raw["label"], raw["probability"])
    return {
        "brier": round(brier(raw["label"], raw["probability"]), 4),
        "calibration_slope": None if slope is None else round(slope, 4),
    }


def json_rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Return a table as plain data; what is not known is none, floats are rounded to four digits."""
    rows = []
    for record in table.to_dict("records"):
        row: dict[str, Any] = {}
        for key, value in record.items():
            plain = value.item() if isinstance(value, np.generic) else value
            if isinstance(plain, float):
                plain = round(plain, 4) if np.isfinite(plain) else None
            row[str(key)] = plain
        rows.append(row)
    return rows
