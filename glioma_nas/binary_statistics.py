"""Figures of a binary marker, patient by patient: accuracy, sensitivity, specificity, kappa and more, with intervals.

One row is one patient; nothing here looks at slices. Thresholds are inputs: whoever predicts chooses them on training
folds with `glioma_nas.roc_analysis.choose_threshold`.

Reference:
    Wilson, JASA 22 (1927): interval of a proportion.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import norm

from glioma_nas.calibration import calibration_intercept, calibration_slope
from glioma_nas.errors import LabelError
from glioma_nas.roc_analysis import CONFIDENCE, Estimate, auc_within, checked, delong


@dataclass(frozen=True)
class Counts:
    """Confusion counts of patients."""

    true_positive: int
    false_negative: int
    true_negative: int
    false_positive: int

    @property
    def n(self) -> int:
        """All patients."""
        return self.true_positive + self.false_negative + self.true_negative + self.false_positive


def count(labels: ArrayLike, predicted: ArrayLike) -> Counts:
    """Count agreements of labels and predicted classes, both (n,), 0 or 1."""
    truth, called = np.asarray(labels) == 1, np.asarray(predicted) == 1
    return Counts(
        int((truth & called).sum()),
        int((truth & ~called).sum()),
        int((~truth & ~called).sum()),
        int((~truth & called).sum()),
    )


def accuracy(labels: ArrayLike, predicted: ArrayLike) -> float:
    """Return the share of patients called right."""
    c = count(labels, predicted)
    return (c.true_positive + c.true_negative) / c.n


def sensitivity(labels: ArrayLike, predicted: ArrayLike) -> float:
    """Return the share of positive patients called positive."""
    c = count(labels, predicted)
    return c.true_positive / (c.true_positive + c.false_negative)


def specificity(labels: ArrayLike, predicted: ArrayLike) -> float:
    """Return the share of negative patients called negative."""
    c = count(labels, predicted)
    return c.true_negative / (c.true_negative + c.false_positive)


def balanced_accuracy(labels: ArrayLike, predicted: ArrayLike) -> float:
    """Return the mean of sensitivity and specificity."""
    return (sensitivity(labels, predicted) + specificity(labels, predicted)) / 2


def kappa(labels: ArrayLike, predicted: ArrayLike) -> float:
    """Return Cohen's kappa, (p_o - p_e) / (1 - p_e): agreement beyond what the class frequencies alone would give."""
    c = count(labels, predicted)
    observed = (c.true_positive + c.true_negative) / c.n
    positive = (c.true_positive + c.false_negative) * (c.true_positive + c.false_positive)
    negative = (c.true_negative + c.false_positive) * (c.true_negative + c.false_negative)
    expected = (positive + negative) / c.n**2
    return (observed - expected) / (1.0 - expected)


def matthews(labels: ArrayLike, predicted: ArrayLike) -> float:
    """Return Matthews' correlation coefficient; 0 when all patients are called alike."""
    c = count(labels, predicted)
    scale = float(c.true_positive + c.false_positive) * float(c.true_negative + c.false_negative)
    scale *= float(c.true_positive + c.false_negative) * float(c.true_negative + c.false_positive)
    if scale == 0:
        return 0.0
    return float((c.true_positive * c.true_negative - c.false_positive * c.false_negative) / np.sqrt(scale))


def brier(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Return the mean squared difference of label and probability; 0 is perfect, 0.25 is always saying one half."""
    return float(np.mean((np.asarray(labels, dtype=np.float64) - np.asarray(probabilities, dtype=np.float64)) ** 2))


def average_precision(labels: ArrayLike, scores: ArrayLike) -> float:
    """Return the area under the precision-recall curve, Σ (R_k - R_(k-1))·P_k over distinct scores, highest first.

    Useless scores give the share of positive patients, not one half.

    Raises:
        LabelError: One class only, or a score that is not finite.

    >>> round(average_precision([0, 1, 1], [0.4, 0.3, 0.9]), 3)
    0.833
    """
    truth, values = checked(labels, scores)
    order = np.argsort(-values, kind="stable")
    # A distinct score ends where the next one differs.
    ends = np.append(np.flatnonzero(np.diff(values[order])), truth.size - 1)
    hits = np.cumsum(truth[order])[ends]
    recall = hits / truth.sum()
    return float(np.sum(np.diff(recall, prepend=0.0) * hits / (ends + 1)))


def wilson_interval(successes: int, n: int, *, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return Wilson's interval of a proportion; unlike a bootstrap it keeps its width at 0 and n successes."""
    z = float(norm.ppf(0.5 + confidence / 2))
    share = successes / n
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * float(np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)))
    # In exact arithmetic the ends are 0 and 1 here.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return low, high


def bootstrap_interval(
    labels: ArrayLike,
    columns: Sequence[ArrayLike],
    statistic: Callable[..., float | None],
    *,
    samples: int,
    generator: np.random.Generator,
    by_class: bool = True,
    confidence: float = CONFIDENCE,
) -> tuple[float, float]:
    """Return the percentile interval of ``statistic(labels, *columns)`` over patients drawn with replacement.

    Drawn by class, as many positive and negative patients as there are: right for statistics of the classes apart,
    such as balanced accuracy. A statistic that depends on the share of positive patients needs free draws, because that
    share is an estimate too; draws of one class only are left out.

    Args:
        labels: (n,), 0 or 1, one entry a patient.
        columns: Arrays (n,) that are drawn along.
        statistic: Draws for which it returns none are left out, where it does not exist.
        samples: Number of draws.
        generator: Source of the draws.
        by_class: Draw positive and negative patients apart.
        confidence: In (0, 1).

    Raises:
        LabelError: One class only, or the statistic exists in fewer than half of the draws.
    """
    truth = np.asarray(labels, dtype=np.int64)
    arrays = [np.asarray(column) for column in columns]
    positive, negative = np.flatnonzero(truth == 1), np.flatnonzero(truth == 0)
    if not positive.size or not negative.size:
        raise LabelError(f"all {truth.size} labels are of one class: an interval needs patients of both classes")
    values = []
    for _ in range(samples):
        if by_class:
            halves = [generator.choice(positive, positive.size), generator.choice(negative, negative.size)]
            drawn = np.concatenate(halves)
        else:
            drawn = generator.integers(truth.size, size=truth.size)
            if not 0 < truth[drawn].sum() < truth.size:
                continue
        value = statistic(truth[drawn], *(array[drawn] for array in arrays))
        if value is not None:
            values.append(value)
    if 2 * len(values) < samples:
        raise LabelError(f"the statistic exists in {len(values)} of {samples} draws only; it has no interval")
    tail = (1.0 - confidence) / 2
    low, high = np.quantile(values, [tail, 1.0 - tail])
    return float(low), float(high)


def binary_report(
    labels: ArrayLike,
    probabilities: ArrayLike,
    thresholds: ArrayLike,
    *,
    samples: int,
    generator: np.random.Generator,
    groups: Sequence[Hashable] | None = None,
) -> dict[str, Estimate]:
    """Return every figure of a binary classifier, one row a patient.

    Args:
        labels: (n,), 0 or 1, at least two of each.
        probabilities: (n,), in [0, 1].
        thresholds: (n,) or a scalar; a patient is called positive when its probability is at least its threshold.
        samples: Bootstrap draws.
        generator: Source of the draws.
        groups: The test fold of each patient, for the AUC within folds; left out when none.

    Returns:
        ``auc`` (DeLong), ``auc_within_folds``, ``accuracy``, ``sensitivity``, ``specificity`` (Wilson), ``pr_auc``,
        ``balanced_accuracy``, ``kappa``, ``mcc``, ``brier``, ``calibration_slope``, ``calibration_intercept``
        (bootstrap over patients, by class where the share of positive ones does not matter). Slope and intercept are
        left out where they do not exist: the classes are separated.

    Raises:
        LabelError: Fewer than two patients of a class, or a probability that is not finite.
    """
    truth, values = checked(labels, probabilities)
    called = (values >= np.broadcast_to(np.asarray(thresholds, dtype=np.float64), values.shape)).astype(np.int64)
    n, positive = int(truth.size), int(truth.sum())
    report = {"auc": delong(truth, values)}

    def bootstrapped(
        value: float, columns: Sequence[ArrayLike], statistic: Callable[..., float | None], *, by_class: bool = False
    ) -> Estimate:
        low, high = bootstrap_interval(
            truth, columns, statistic, samples=samples, generator=generator, by_class=by_class
        )
        return Estimate(value, min(low, value), max(high, value), f"bootstrap, {samples} draws", n, positive)

    if groups is not None:
        within = auc_within(truth, values, groups)
        if within is not None:
            keys = np.asarray([str(group) for group in groups])
            report["auc_within_folds"] = bootstrapped(within, [values, keys], auc_within, by_class=True)
    c = count(truth, called)
    for name, successes, total in (
        ("accuracy", c.true_positive + c.true_negative, n),
        ("sensitivity", c.true_positive, positive),
        ("specificity", c.true_negative, n - positive),
    ):
        low, high = wilson_interval(successes, total)
        report[name] = Estimate(successes / total, low, high, "Wilson", n, positive)
    balanced = balanced_accuracy(truth, called)
    report["balanced_accuracy"] = bootstrapped(balanced, [called], balanced_accuracy, by_class=True)
    for name, statistic in (("kappa", kappa), ("mcc", matthews)):
        report[name] = bootstrapped(statistic(truth, called), [called], statistic)
    report["pr_auc"] = bootstrapped(average_precision(truth, values), [values], average_precision)
    report["brier"] = bootstrapped(brier(truth, values), [values], brier)
    for name, exists in (("calibration_slope", calibration_slope), ("calibration_intercept", calibration_intercept)):
        value = exists(truth, values)
        if value is not None:
            try:
                report[name] = bootstrapped(value, [values], exists)
            except LabelError:
                continue  # it hardly exists: nearly separated classes
    check_invariants({name: estimate.value for name, estimate in report.items()})
    return report


def check_invariants(values: dict[str, float]) -> None:
    """Assert what holds for every binary classifier: accuracy lies between sensitivity and specificity.

    Tables that break it (as published ones do) were not computed from one set of predictions.
    """
    low, high = sorted((values["sensitivity"], values["specificity"]))
    assert low - 1e-9 <= values["accuracy"] <= high + 1e-9, f"accuracy outside sensitivity and specificity: {values}"
    assert abs(values["balanced_accuracy"] - (low + high) / 2) < 1e-9, f"balanced accuracy is not their mean: {values}"
