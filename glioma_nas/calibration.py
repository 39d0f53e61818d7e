"""Do predicted probabilities mean what they say: temperature scaling, calibration slope and intercept, reliability.

One row is one patient. What is fitted to be *applied* (the temperature) is fitted on training patients only; slope,
intercept and reliability describe held-out patients and are never applied.

References:
    Guo et al., On Calibration of Modern Neural Networks, ICML 2017: temperature scaling.
    Cox, Biometrika 45 (1958); Van Calster et al., BMC Medicine 17 (2019): slope and calibration in the large.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize_scalar

from glioma_nas.roc_analysis import Floats, checked

TEMPERATURE_RANGE = (0.2, 10.0)
_CLIP = 1e-6
_MAX_STEPS = 50
_LARGEST = 50.0


def log_odds(probabilities: ArrayLike) -> Floats:
    """Return log(p/(1-p)) of probabilities (n,), which are kept 1e-6 away from 0 and 1."""
    values = np.clip(np.asarray(probabilities, dtype=np.float64), _CLIP, 1 - _CLIP)
    return np.asarray(np.log(values) - np.log1p(-values), dtype=np.float64)


def sigmoid(logits: ArrayLike) -> Floats:
    """Return 1/(1+e^-z) of logits (n,), float64, without overflow."""
    return np.asarray(0.5 * (1 + np.tanh(0.5 * np.asarray(logits, dtype=np.float64))), dtype=np.float64)


def apply_temperature(probabilities: ArrayLike, temperature: float) -> Floats:
    """Return σ(logit(p)/T): above 1 probabilities move towards one half, below 1 away from it; ranks stay.

    >>> apply_temperature([0.9], 1.0).round(3).tolist(), apply_temperature([0.9], 2.0).round(3).tolist()
    ([0.9], [0.75])
    """
    return sigmoid(log_odds(probabilities) / temperature)


def fit_temperature(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Return the T in `TEMPERATURE_RANGE` with the smallest negative log-likelihood of σ(logit(p)/T).

    Give it predictions for training patients that were *not* made by a classifier trained on them: in-sample
    probabilities are overconfident, and their temperature would be too low.

    Args:
        labels: (n,), 0 or 1.
        probabilities: (n,), in [0, 1].

    Raises:
        LabelError: One class only, or a probability that is not finite.
    """
    truth, values = checked(labels, probabilities)
    signed = np.where(truth == 1, 1.0, -1.0) * log_odds(values)
    low, high = np.log(TEMPERATURE_RANGE)
    best = minimize_scalar(lambda x: float(np.logaddexp(0, -signed * np.exp(-x)).mean()), bounds=(low, high))
    return float(np.exp(best.x))


def calibration_slope(labels: ArrayLike, probabilities: ArrayLike) -> float | None:
    """Return b of logit P(y=1) = a + b·logit(p) by maximum likelihood; 1 is ideal, below 1 means too extreme.

    None when it does not exist: the classes are separated, or all probabilities are equal.
    """
    truth, values = checked(labels, probabilities)
    logits = log_odds(values)
    found = _logistic(truth, np.column_stack([np.ones_like(logits), logits]), np.zeros_like(logits))
    return None if found is None else float(found[1])


def calibration_intercept(labels: ArrayLike, probabilities: ArrayLike) -> float | None:
    """Return a of logit P(y=1) = a + logit(p), calibration in the large; 0 is ideal, above 0 means p is too low."""
    truth, values = checked(labels, probabilities)
    found = _logistic(truth, np.ones((truth.size, 1)), log_odds(values))
    return None if found is None else float(found[0])


def _logistic(truth: np.ndarray, design: Floats, offset: Floats) -> Floats | None:
    # Newton's method; without a finite maximum the coefficients run away or the Hessian becomes singular.
    weights = np.zeros(design.shape[1])
    for _ in range(_MAX_STEPS):
        p = sigmoid(design @ weights + offset)
        hessian = design.T @ (design * (p * (1 - p))[:, None])
        try:
            step = np.linalg.solve(hessian, design.T @ (truth - p))
        except np.linalg.LinAlgError:
            return None
        weights = weights + step
        if not np.isfinite(weights).all() or np.abs(weights).max() > _LARGEST:
            return None
        if np.abs(step).max() < 1e-9:
            return np.asarray(weights, dtype=np.float64)
    return None


@dataclass(frozen=True)
class ReliabilityBin:
    """Patients of similar predicted probability.

    Attributes:
        predicted: Mean predicted probability.
        observed: Share of positive patients.
        low: Lower end of Wilson's interval of ``observed``.
        high: Its upper end.
        n: Patients.
    """

    predicted: float
    observed: float
    low: float
    high: float
    n: int


def reliability(labels: ArrayLike, probabilities: ArrayLike, *, n_bins: int = 5) -> list[ReliabilityBin]:
    """Return the reliability curve over bins of (nearly) equally many patients, from low to high probability.

    Patients of equal probability stay together, so there may be fewer bins.
    """
    from glioma_nas.binary_statistics import wilson_interval

    truth, values = checked(labels, probabilities)
    edges = np.unique(np.quantile(values, np.linspace(0, 1, n_bins + 1)))
    index = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, max(0, edges.size - 2))
    bins = []
    for number in np.unique(index):
        inside = index == number
        positive, n = int(truth[inside].sum()), int(inside.sum())
        low, high = wilson_interval(positive, n)
        bins.append(ReliabilityBin(float(values[inside].mean()), positive / n, low, high, n))
    return bins
