"""The area under the ROC curve with DeLong's variance, the curve itself, and the choice of a threshold on it.

One row is one patient; nothing here looks at slices. Every estimate comes with an interval, the number of patients and
the number of positive ones.

References:
    DeLong, DeLong and Clarke-Pearson, Biometrics 44 (1988): variance of the area under the ROC curve.
    Sun and Xu, IEEE Signal Processing Letters 21 (2014): the same from mid-ranks, in O(n log n).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm, rankdata

from glioma_nas.errors import LabelError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

CONFIDENCE = 0.95
_NO_SPREAD = 1e-9


@dataclass(frozen=True)
class Estimate:
    """One figure with its uncertainty.

    Attributes:
        value: The figure.
        low: Lower end of the interval, never above ``value``.
        high: Upper end of the interval, never below ``value``.
        method: How the interval was made.
        n: Patients.
        n_positive: Patients of the positive class.
        confidence: Coverage the interval aims at, in (0, 1).
    """

    value: float
    low: float
    high: float
    method: str
    n: int
    n_positive: int
    confidence: float = CONFIDENCE

    def as_json(self, digits: int = 4) -> dict[str, Any]:
        """Return plain data with floats rounded to ``digits``."""
        return {key: round(item, digits) if isinstance(item, float) else item for key, item in asdict(self).items()}


@dataclass(frozen=True)
class Comparison:
    """Two classifiers on the same patients: AUC of the first minus AUC of the second.

    Attributes:
        difference: In [-1, 1].
        low: Lower end of the 95 % interval.
        high: Upper end of the 95 % interval.
        p_value: Two-sided, of the hypothesis that the areas are equal.
        n: Patients.
        n_positive: Patients of the positive class.
    """

    difference: float
    low: float
    high: float
    p_value: float
    n: int
    n_positive: int

    def as_json(self, digits: int = 4) -> dict[str, Any]:
        """Return plain data with floats rounded to ``digits`` decimals, the p-value to as many significant digits."""
        plain = {key: round(item, digits) if isinstance(item, float) else item for key, item in asdict(self).items()}
        return plain | {"p_value": float(f"{self.p_value:.{digits}g}")}


def checked(labels: ArrayLike, scores: ArrayLike) -> tuple[Ints, Floats]:
    """Return labels (n,) and scores (n,) as arrays.

    Raises:
        LabelError: They differ in length, a label is not 0 or 1, a score is not finite, or one class is absent.
    """
    truth = np.asarray(labels)
    values = np.asarray(scores, dtype=np.float64)
    if truth.ndim != 1 or values.shape != truth.shape:
        raise LabelError(
            f"labels and scores must be two equally long rows, got shapes {truth.shape} and {values.shape}"
        )
    if not np.isin(truth, (0, 1)).all():
        raise LabelError(f"labels must be 0 or 1, got {sorted({str(value) for value in truth.tolist()})}")
    if not np.isfinite(values).all():
        raise LabelError(f"{int((~np.isfinite(values)).sum())} of {values.size} scores are NaN or infinite")
    positive = int((truth == 1).sum())
    if positive in (0, truth.size):
        raise LabelError(
            f"all {truth.size} labels are of one class: sensitivity, specificity and AUC need patients of both classes"
        )
    return truth.astype(np.int64), values


def _structural_components(labels: Ints, scores: Floats) -> tuple[Floats, Floats]:
    """Return, for each positive, the share of negatives below it, and for each negative, the share of positives above.

    Ties count one half. Shapes (n_positive,) and (n_negative,).
    """
    positives, negatives = scores[labels == 1], scores[labels == 0]
    m, n = positives.size, negatives.size
    joint = rankdata(np.concatenate([positives, negatives]))
    of_positives = (joint[:m] - rankdata(positives)) / n
    of_negatives = 1.0 - (joint[m:] - rankdata(negatives)) / m
    return of_positives, of_negatives


def auc(labels: ArrayLike, scores: ArrayLike) -> float:
    """Return the area under the ROC curve, P(score⁺ > score⁻) + ½·P(score⁺ = score⁻).

    Args:
        labels: (n,), 0 or 1.
        scores: (n,), finite; higher means positive.

    Raises:
        LabelError: One class only, or a score that is not finite.

    >>> auc([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])
    0.75
    """
    truth, values = checked(labels, scores)
    return float(_structural_components(truth, values)[0].mean())


def delong(labels: ArrayLike, scores: ArrayLike, *, confidence: float = CONFIDENCE) -> Estimate:
    """Return the AUC with DeLong's interval, cut off at 0 and 1.

    A perfect (or perfectly wrong) ranking has DeLong variance 0, which is no certainty. There the interval follows from
    k = min(n⁺, n⁻) disjoint pairs: all are ordered alike with probability AUC^k, so the bound is (α/2)^(1/k).

    Args:
        labels: (n,), 0 or 1, at least two of each.
        scores: (n,), finite; higher means positive.
        confidence: In (0, 1).

    Raises:
        LabelError: Fewer than two patients of a class, or a score that is not finite.
    """
    truth, values = checked(labels, scores)
    value, variance = auc_variance(truth, values)
    positive = int(truth.sum())
    alpha = 1.0 - confidence
    if value in (0.0, 1.0):
        bound = float((alpha / 2) ** (1.0 / min(positive, truth.size - positive)))
        low, high = (bound, 1.0) if value == 1.0 else (0.0, 1.0 - bound)
        return Estimate(value, low, high, "disjoint pairs, exact", truth.size, positive, confidence)
    half = float(norm.ppf(1.0 - alpha / 2) * np.sqrt(variance))
    return Estimate(value, max(0.0, value - half), min(1.0, value + half), "DeLong", truth.size, positive, confidence)


def auc_variance(labels: ArrayLike, scores: ArrayLike) -> tuple[float, float]:
    """Return the AUC and DeLong's variance of it, S₁₀/n⁺ + S₀₁/n⁻.

    Raises:
        LabelError: Fewer than two patients of a class, or a score that is not finite.
    """
    truth, values = checked(labels, scores)
    _require_two_each(truth)
    of_positives, of_negatives = _structural_components(truth, values)
    variance = of_positives.var(ddof=1) / of_positives.size + of_negatives.var(ddof=1) / of_negatives.size
    return float(of_positives.mean()), float(variance)


def paired_delong(labels: ArrayLike, first: ArrayLike, second: ArrayLike) -> Comparison:
    """Compare two classifiers on the same patients by DeLong's paired test.

    When all patients say the same (a perfect ranking beside a constant score) the variance is 0, which is no certainty.
    There k = min(n⁺, n⁻) disjoint pairs decide: by the sign test p = 2^(1-k), and the interval follows from the share
    (α/2)^(1/k) of pairs that must differ alike, as in `delong`.

    Args:
        labels: (n,), 0 or 1, at least two of each.
        first: (n,), scores of the first classifier.
        second: (n,), scores of the second classifier.

    Raises:
        LabelError: Fewer than two patients of a class, or a score that is not finite.
    """
    truth, a = checked(labels, first)
    _, b = checked(labels, second)
    _require_two_each(truth)
    components = [
        x - y for x, y in zip(_structural_components(truth, a), _structural_components(truth, b), strict=True)
    ]
    difference = float(components[0].mean())
    # The variance of a difference of two areas is that of the paired differences of their components.
    deviation = float(np.sqrt(sum(part.var(ddof=1) / part.size for part in components)))
    positive, n = int(truth.sum()), int(truth.size)
    if deviation < _NO_SPREAD and abs(difference) > _NO_SPREAD:
        k = min(positive, n - positive)
        # All but a share of the pairs differ alike; what is known of the others is that they differ by -1 to 1.
        share = ((1.0 - CONFIDENCE) / 2) ** (1.0 / k)
        low, high = share * difference - (1.0 - share), share * difference + (1.0 - share)
        return Comparison(difference, max(-1.0, low), min(1.0, high), min(1.0, 2.0 ** (1 - k)), n, positive)
    p_value = float(2 * norm.sf(abs(difference) / deviation)) if deviation >= _NO_SPREAD else 1.0
    half = float(norm.ppf(0.5 + CONFIDENCE / 2)) * deviation
    return Comparison(difference, max(-1.0, difference - half), min(1.0, difference + half), p_value, n, positive)


def _require_two_each(labels: Ints) -> None:
    positive = int(labels.sum())
    if min(positive, labels.size - positive) < 2:
        raise LabelError(
            f"the variance of an AUC needs at least two patients of each class, got {positive} positive and "
            f"{labels.size - positive} negative"
        )


def auc_within(labels: ArrayLike, scores: ArrayLike, groups: Sequence[Hashable]) -> float | None:
    """Return the AUC over pairs of patients of the same group, for example the same test fold.

    Scores of different folds come from different networks; pooling them lets a shift between folds pass for skill or
    hide it. Comparing within folds only is free of that.

    Returns:
        In [0, 1]; none when no group holds both classes.
    """
    truth, values = checked(labels, scores)
    keys = np.asarray([str(group) for group in groups])
    ordered, pairs = 0.0, 0
    for key in np.unique(keys):
        inside = keys == key
        positive = int(truth[inside].sum())
        count = positive * (int(inside.sum()) - positive)
        if count:
            ordered += auc(truth[inside], values[inside]) * count
            pairs += count
    return ordered / pairs if pairs else None


def roc_curve(labels: ArrayLike, scores: ArrayLike) -> tuple[Floats, Floats, Floats]:
    """Return false-positive rate, true-positive rate and threshold, from (0, 0) to (1, 1), one point a distinct score.

    A patient is called positive when its score is at least the threshold; the first threshold is infinite.
    """
    truth, values = checked(labels, scores)
    thresholds = np.concatenate([[np.inf], np.unique(values)[::-1]])
    called = values[None, :] >= thresholds[:, None]
    true_positive = (called & (truth == 1)).sum(axis=1) / truth.sum()
    false_positive = (called & (truth == 0)).sum(axis=1) / (truth == 0).sum()
    return false_positive, true_positive, thresholds


def choose_threshold(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Return the threshold of the best balanced accuracy; give it training patients only.

    Candidates lie half-way between neighbouring scores. Among equally good ones the widest gap wins, which is the one
    least likely to cut differently on other patients. If all scores are equal no threshold separates: 0.5.

    Args:
        labels: (n,), 0 or 1.
        probabilities: (n,), in [0, 1].

    Raises:
        LabelError: One class only, or a probability that is not finite.
    """
    truth, values = checked(labels, probabilities)
    distinct = np.unique(values)
    if distinct.size < 2:
        return 0.5
    middles = (distinct[1:] + distinct[:-1]) / 2
    positive, negative = values[truth == 1], values[truth == 0]
    scores = [((positive >= middle).mean() + (negative < middle).mean()) / 2 for middle in middles]
    # Rounding makes candidates of equal counts equal whatever the order of the additions was.
    best = max(zip(np.round(scores, 12), np.diff(distinct), -middles, strict=True))
    return float(-best[2])
