"""Intervals over patients: cases averaged first, none from one patient, the stated coverage."""

from __future__ import annotations

import numpy as np
import pytest

from glioma_nas.report.intervals import estimate, mean, patient_means


def test_estimate_averages_a_patients_cases_first() -> None:
    # Patient a: mean of 0 and 1; patient b: 1. Mean over patients 0.75, not 2/3 over cases.
    assert patient_means([0, 1, 1], ["a", "a", "b"]).tolist() == [0.5, 1.0]
    found = estimate([0, 1, 1], ["a", "a", "b"], np.random.default_rng(0), statistic=mean)
    assert found is not None
    assert (found.value, found.low, found.high, found.n) == (0.75, 0.5, 1.0, 2)


def test_estimate_has_no_interval_with_one_patient_and_is_none_without() -> None:
    generator = np.random.default_rng(0)
    one = estimate([0.5, 0.7], ["a", "a"], generator, statistic=mean)
    assert one is not None
    assert (one.value, one.low, one.high, one.n) == (pytest.approx(0.6), None, None, 1)
    assert estimate([], [], generator, statistic=mean) is None


def test_estimate_interval_covers_the_truth_about_95_times_in_100() -> None:
    generator = np.random.default_rng(1)
    patients = [str(number) for number in range(40)]
    hits = 0
    for _ in range(200):
        found = estimate(generator.normal(0, 1, 40).tolist(), patients, generator, statistic=mean, samples=400)
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= 0 <= found.high
    assert 180 <= hits <= 198
