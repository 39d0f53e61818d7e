"""Bootstrap intervals over patients: a patient, not a case or a slice, is what a study draws at random."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

SAMPLES = 2000


@dataclass(frozen=True)
class PatientEstimate:
    """A figure over patients with its 95 % percentile-bootstrap interval.

    Attributes:
        value: The point estimate.
        low: Lower end of the interval; none with fewer than two patients.
        high: Upper end.
        n: Patients.
    """

    value: float
    low: float | None
    high: float | None
    n: int


def estimate(
    values: Sequence[float],
    patients: Sequence[str],
    generator: np.random.Generator,
    *,
    statistic: Callable[[Floats], Floats],
    samples: int = SAMPLES,
) -> PatientEstimate | None:
    """Summarise one value for each case over patients; a patient's cases are averaged first.

    Args:
        values: One finite number for each case.
        patients: The patient of each case.
        generator: Draws the patients.
        statistic: `mean` or `median`: reduces the last axis.
        samples: Bootstrap samples.

    Returns:
        None when there is no case.

    Reference:
        Efron & Tibshirani, An Introduction to the Bootstrap, 1993, ch. 13 (percentile interval).
    """
    per_patient = patient_means(values, patients)
    if per_patient.size == 0:
        return None
    value = float(statistic(per_patient[None])[0])
    if per_patient.size < 2:
        return PatientEstimate(value, None, None, 1)
    drawn = generator.integers(per_patient.size, size=(samples, per_patient.size))
    low, high = np.percentile(statistic(per_patient[drawn]), [2.5, 97.5])
    return PatientEstimate(value, float(low), float(high), int(per_patient.size))


def mean(values: Floats) -> Floats:
    """Average over the last axis."""
    return np.asarray(values.mean(axis=-1), dtype=np.float64)


def median(values: Floats) -> Floats:
    """Take the median over the last axis."""
    return np.asarray(np.median(values, axis=-1), dtype=np.float64)


def patient_means(values: Sequence[float], patients: Sequence[str]) -> Floats:
    """Average the values of each patient; float64 (patients,), in the order of the sorted patient names."""
    groups: dict[str, list[float]] = {}
    for value, patient in zip(values, patients, strict=True):
        groups.setdefault(patient, []).append(float(value))
    return np.array([np.mean(groups[patient]) for patient in sorted(groups)], dtype=np.float64)
