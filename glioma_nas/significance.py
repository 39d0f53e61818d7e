"""Is there anything at all, and does it survive looking many times: permutation test, Holm's correction.

References:
    Ojala and Garriga, JMLR 11 (2010): permutation tests for classifiers.
    Holm, Scandinavian Journal of Statistics 6 (1979).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import rankdata

from glioma_nas.roc_analysis import auc, checked


def permutation_p_value(
    labels: ArrayLike,
    scores: ArrayLike,
    *,
    samples: int,
    generator: np.random.Generator,
    groups: Sequence[Hashable] | None = None,
) -> float:
    """Return the one-sided p-value of the AUC against labels that have nothing to do with the scores.

    Labels are shuffled, within the test folds when ``groups`` are given, so that a difference between folds is no
    evidence; p = (1 + #{AUC of shuffled ≥ AUC}) / (1 + samples), never 0.

    Args:
        labels: (n,), 0 or 1.
        scores: (n,), out-of-fold predictions.
        samples: Number of shuffles.
        generator: Source of the shuffles.
        groups: The test fold of each patient.

    Raises:
        LabelError: One class only, or a score that is not finite.
    """
    truth, values = checked(labels, scores)
    keys = np.zeros(truth.size, dtype=np.int64)
    if groups is not None:
        keys = np.unique([str(group) for group in groups], return_inverse=True)[1]
    ranks = rankdata(values)
    positive = int(truth.sum())
    found = auc(truth, values)
    at_least = 0
    for _ in range(samples):
        # Sorting random numbers inside each group is a shuffle of the group.
        order = np.lexsort((generator.random(truth.size), keys))
        shuffled = np.empty_like(truth)
        shuffled[order] = truth[np.argsort(keys, kind="stable")]
        area = (ranks[shuffled == 1].sum() - positive * (positive + 1) / 2) / (positive * (truth.size - positive))
        at_least += bool(area >= found - 1e-12)
    return (1 + at_least) / (1 + samples)


def significant(value: float, digits: int = 4) -> float:
    """Round to significant digits: a small p-value stays what it is and never becomes 0.

    >>> significant(0.000012345), significant(0.51236)
    (1.234e-05, 0.5124)
    """
    return float(f"{value:.{digits}g}")


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p-values, in the order given: the chance of any false alarm stays below the level.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    adjusted = [0.0] * len(p_values)
    running = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda k: p_values[k])):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted
