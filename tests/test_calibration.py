from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glioma_nas.binary_statistics import average_precision
from glioma_nas.calibration import (
    TEMPERATURE_RANGE,
    apply_temperature,
    calibration_intercept,
    calibration_slope,
    fit_temperature,
    log_odds,
    reliability,
    sigmoid,
)
from glioma_nas.errors import LabelError
from glioma_nas.marker_analysis import Versus
from glioma_nas.roc_analysis import Comparison, auc, auc_variance, paired_delong
from glioma_nas.significance import holm, permutation_p_value
from glioma_nas.subgroups import age_groups, subgroup_rows


def drawn(n=4000, *, sharpness=1.0, shift=0.0, seed=0):
    """Labels that follow σ(z), and reported probabilities σ(sharpness·z + shift)."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, 1.5, n)
    labels = (generator.random(n) < sigmoid(logits)).astype(int)
    return labels, sigmoid(sharpness * logits + shift)


def test_temperature_undoes_known_overconfidence():
    labels, probabilities = drawn(sharpness=3.0)
    assert fit_temperature(labels, probabilities) == pytest.approx(3.0, rel=0.1)


def test_temperature_minimises_the_likelihood_on_a_grid():
    labels, probabilities = drawn(60, sharpness=2.0, seed=4)

    def loss(temperature):
        p = apply_temperature(probabilities, temperature)
        return -np.mean(labels * np.log(p) + (1 - labels) * np.log(1 - p))

    found = fit_temperature(labels, probabilities)
    assert loss(found) <= min(loss(value) for value in np.geomspace(*TEMPERATURE_RANGE, 400)) + 1e-6


def test_temperature_stays_in_its_range_when_separation_is_perfect():
    assert fit_temperature([0, 0, 1, 1], [0.2, 0.4, 0.6, 0.8]) == pytest.approx(TEMPERATURE_RANGE[0], rel=0.05)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.001, 0.999), min_size=2, max_size=10), st.floats(0.2, 10))
def test_temperature_keeps_ranks_and_one_half(values, temperature):
    moved = apply_temperature(values, temperature)
    assert (np.diff(moved[np.argsort(values, kind="stable")]) >= 0).all()
    assert apply_temperature([0.5], temperature)[0] == pytest.approx(0.5)


def test_slope_and_intercept_find_the_known_miscalibration():
    labels, probabilities = drawn(20_000, sharpness=2.0)
    assert calibration_slope(labels, probabilities) == pytest.approx(0.5, abs=0.03)
    labels, probabilities = drawn(20_000, shift=0.7)
    assert calibration_intercept(labels, probabilities) == pytest.approx(-0.7, abs=0.06)


def test_slope_agrees_with_scikit_learn():
    from sklearn.linear_model import LogisticRegression

    labels, probabilities = drawn(80, sharpness=1.7, seed=2)
    model = LogisticRegression(C=np.inf, tol=1e-10).fit(log_odds(probabilities)[:, None], labels)
    assert calibration_slope(labels, probabilities) == pytest.approx(float(model.coef_[0, 0]), rel=1e-4)


def test_slope_does_not_exist_when_classes_are_separated_or_probabilities_equal():
    assert calibration_slope([0, 0, 1, 1], [0.1, 0.2, 0.8, 0.9]) is None
    assert calibration_slope([0, 1, 0, 1], [0.4] * 4) is None


def test_intercept_is_zero_when_the_mean_is_right():
    assert calibration_intercept([0, 1, 1, 0], [0.5] * 4) == pytest.approx(0.0, abs=1e-9)


def test_reliability_counts_every_patient_once_and_brackets_the_share():
    labels, probabilities = drawn(53)
    bins = reliability(labels, probabilities)
    assert sum(item.n for item in bins) == 53
    assert sum(item.n * item.observed for item in bins) == pytest.approx(labels.sum())
    assert all(item.low <= item.observed <= item.high for item in bins)
    assert [item.predicted for item in bins] == sorted(item.predicted for item in bins)


def test_reliability_is_one_bin_when_all_probabilities_are_equal():
    (only,) = reliability([0, 1, 1, 1], [0.6] * 4)
    assert (only.n, only.observed) == (4, 0.75)


@pytest.mark.parametrize("function", [fit_temperature, calibration_slope, calibration_intercept, average_precision])
def test_one_class_is_refused(function):
    with pytest.raises(LabelError, match="all 3 labels are of one class"):
        function([1, 1, 1], [0.1, 0.2, 0.3])


def test_average_precision_agrees_with_scikit_learn_when_scores_tie():
    from sklearn.metrics import average_precision_score

    generator = np.random.default_rng(1)
    for _ in range(20):
        labels = np.append(generator.integers(0, 2, 30), [0, 1])
        scores = np.round(generator.random(32), 1)
        assert average_precision(labels, scores) == pytest.approx(average_precision_score(labels, scores))


def test_average_precision_of_useless_scores_is_the_share_of_positives():
    assert average_precision([0, 1, 0, 0], [0.3] * 4) == 0.25


def test_holm_equals_hand_values_and_never_exceeds_one():
    assert holm([0.01, 0.02, 0.03]) == pytest.approx([0.03, 0.04, 0.04])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_agrees_with_its_definition_by_steps():
    values = [0.04, 0.001, 0.3, 0.012]
    order = np.argsort(values)
    slow = [0.0] * 4
    for rank, index in enumerate(order):
        slow[index] = min(1.0, max((4 - earlier) * values[order[earlier]] for earlier in range(rank + 1)))
    assert holm(values) == pytest.approx(slow)


@pytest.mark.parametrize(("p_holm", "words"), [(0.0004, "p < 0.001"), (0.0214, "p = 0.021")])
def test_sentence_never_says_that_p_is_zero(p_holm, words):
    found = Versus("idh", "age_sex", Comparison(0.2, 0.1, 0.3, p_holm, 50, 25), p_holm)
    assert words in found.sentence() and "0.000" not in found.sentence()


def test_permutation_p_value_is_smallest_when_separation_is_perfect():
    labels, scores = [0] * 10 + [1] * 10, list(range(20))
    assert permutation_p_value(labels, scores, samples=99, generator=np.random.default_rng(0)) == 0.01


def test_permutation_p_value_is_uniform_without_signal():
    generator = np.random.default_rng(5)
    values = []
    for _ in range(120):
        labels = np.append(generator.integers(0, 2, 22), [0, 1])
        values.append(permutation_p_value(labels, generator.random(24), samples=39, generator=generator))
    assert 0.4 < np.mean(values) < 0.6
    assert np.mean(np.asarray(values) <= 0.05) < 0.13


def test_permutation_within_folds_takes_no_evidence_from_a_shift_between_folds():
    # All positives are in one fold with high scores, but inside the folds nothing is ordered.
    labels = [0, 0, 0, 0, 0, 1, 1, 1, 1, 0]
    scores = [0.1] * 5 + [0.9] * 5
    folds = [0] * 5 + [1] * 5
    generator = np.random.default_rng(0)
    assert permutation_p_value(labels, scores, samples=199, generator=generator, groups=folds) == 1.0
    assert permutation_p_value(labels, scores, samples=199, generator=generator) < 0.05


def independent_delong(labels, first, second):
    """Return both areas and their covariance matrix from the kernel matrix of the 1988 paper, with np.cov."""
    labels = np.asarray(labels)
    v10, v01, areas = [], [], []
    for scores in (np.asarray(first, dtype=float), np.asarray(second, dtype=float)):
        gap = scores[labels == 1][:, None] - scores[labels == 0][None, :]
        kernel = np.heaviside(gap, 0.5)
        areas.append(kernel.mean())
        v10.append(kernel.mean(axis=1))
        v01.append(kernel.mean(axis=0))
    covariance = np.cov(v10) / len(v10[0]) + np.cov(v01) / len(v01[0])
    return areas, covariance


@pytest.mark.parametrize("digits", [1, 8])
@pytest.mark.parametrize("n", [12, 300])
def test_delong_agrees_with_an_independent_implementation(digits, n):
    from scipy.stats import norm

    generator = np.random.default_rng(n + digits)
    labels = np.append(generator.integers(0, 2, n), [0, 0, 1, 1])
    first = np.round(generator.random(n + 4) + 0.4 * labels, digits)
    second = np.round(0.5 * first + generator.random(n + 4), digits)
    areas, covariance = independent_delong(labels, first, second)
    assert auc(labels, first) == pytest.approx(areas[0], abs=1e-12)
    assert auc_variance(labels, second)[1] == pytest.approx(covariance[1, 1], rel=1e-9)
    z = (areas[0] - areas[1]) / np.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    assert paired_delong(labels, first, second).p_value == pytest.approx(2 * norm.sf(abs(z)), rel=1e-6)


def test_subgroups_count_unknown_apart_and_leave_out_what_is_too_small():
    import pandas as pd

    patients = pd.DataFrame(
        {
            "label": [1, 1, 0, 0, 1, 0],
            "probability": [0.9, 0.8, 0.1, 0.7, 0.6, 0.2],
            "threshold": [0.5] * 6,
            "sex": ["M", "M", "M", "M", "F", None],
        }
    )
    rows = {row["value"]: row for row in subgroup_rows(patients, ["sex"])}
    assert (rows["M"]["n"], rows["M"]["auc"], rows["M"]["specificity"]) == (4, 1.0, 0.5)
    assert (rows["F"]["auc"], rows["F"]["specificity"], rows["F"]["sensitivity"]) == (None, None, 1.0)
    assert rows["unknown"]["n"] == 1


def test_ages_are_split_at_the_median_of_those_known():
    assert age_groups([30, 50, None, 70]) == ["below 50 years", "50 years or more", "unknown", "50 years or more"]
    assert age_groups([None, None]) == ["unknown", "unknown"]
