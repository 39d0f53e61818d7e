from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glioma_nas.binary_statistics import (
    accuracy,
    balanced_accuracy,
    binary_report,
    bootstrap_interval,
    brier,
    check_invariants,
    kappa,
    matthews,
    sensitivity,
    specificity,
    wilson_interval,
)
from glioma_nas.errors import LabelError
from glioma_nas.marker_analysis import Versus
from glioma_nas.roc_analysis import (
    Comparison,
    auc,
    auc_variance,
    auc_within,
    choose_threshold,
    delong,
    paired_delong,
    roc_curve,
)


def slow_components(labels, scores):
    """DeLong's structural components straight from the definition, pair by pair."""
    positives = [score for label, score in zip(labels, scores, strict=True) if label == 1]
    negatives = [score for label, score in zip(labels, scores, strict=True) if label == 0]

    def psi(x, y):
        return 1.0 if x > y else 0.5 if x == y else 0.0

    v10 = [sum(psi(x, y) for y in negatives) / len(negatives) for x in positives]
    v01 = [sum(psi(x, y) for x in positives) / len(positives) for y in negatives]
    return v10, v01


def slow_covariance(labels, first, second):
    total = 0.0
    for a, b in zip(slow_components(labels, first), slow_components(labels, second), strict=True):
        mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
        total += sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True)) / (len(a) - 1) / len(a)
    return total


# 1: 0.9, 0.6, 0.4   0: 0.6, 0.4, 0.1.
# Pairs won: 0.9 wins 3; 0.6 ties, wins, wins = 2.5; 0.4 loses, ties, wins = 1.5. In all 7 of 9.
TIED_LABELS = [1, 1, 1, 0, 0, 0]
TIED_SCORES = [0.9, 0.6, 0.4, 0.6, 0.4, 0.1]


def test_auc_equals_hand_count_when_scores_tie():
    assert auc(TIED_LABELS, TIED_SCORES) == pytest.approx(7 / 9, abs=1e-15)


def test_auc_is_half_when_all_scores_are_equal():
    assert auc([0, 1, 0, 1], [0.3] * 4) == 0.5


def test_delong_variance_equals_hand_value_when_scores_tie():
    # Components of positives are 1, 5/6, 1/2 and of negatives 1/2, 5/6, 1; both have variance 7/108.
    parts = np.array([1, 5 / 6, 1 / 2])
    by_hand = 2 * parts.var(ddof=1) / 3
    value, variance = auc_variance(TIED_LABELS, TIED_SCORES)
    assert value == pytest.approx(7 / 9)
    assert variance == pytest.approx(by_hand)
    assert by_hand == pytest.approx(7 / 162)


def test_delong_interval_is_wald_and_cut_at_one():
    estimate = delong(TIED_LABELS, TIED_SCORES)
    assert estimate.low == pytest.approx(7 / 9 - 1.959963985 * np.sqrt(7 / 162))
    assert estimate.high == 1.0
    assert (estimate.n, estimate.n_positive, estimate.method) == (6, 3, "DeLong")


def test_delong_interval_keeps_its_width_when_separation_is_perfect():
    estimate = delong([0, 0, 0, 1, 1], [0.1, 0.2, 0.3, 0.8, 0.9])
    assert (estimate.value, estimate.high) == (1.0, 1.0)
    assert estimate.low == pytest.approx(0.025**0.5)


def test_delong_interval_keeps_its_width_when_ranking_is_perfectly_wrong():
    estimate = delong([1, 1, 0, 0, 0], [0.1, 0.2, 0.3, 0.8, 0.9])
    assert (estimate.value, estimate.low) == (0.0, 0.0)
    assert estimate.high == pytest.approx(1 - 0.025**0.5)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 6), st.integers(0, 6)), min_size=6, max_size=30))
def test_delong_equals_pairwise_definition(rows):
    labels = [0, 0, 1, 1] + [row[0] for row in rows]
    first = [1, 3, 2, 3] + [row[1] for row in rows]
    second = [2, 2, 5, 1] + [row[2] for row in rows]
    value, variance = auc_variance(labels, first)
    v10, _ = slow_components(labels, first)
    assert value == pytest.approx(sum(v10) / len(v10), abs=1e-12)
    assert variance == pytest.approx(slow_covariance(labels, first, first), abs=1e-12)
    paired = paired_delong(labels, first, second)
    expected = (
        slow_covariance(labels, first, first)
        + slow_covariance(labels, second, second)
        - 2 * slow_covariance(labels, first, second)
    )
    assert paired.difference == pytest.approx(auc(labels, first) - auc(labels, second), abs=1e-12)
    if expected > 1e-9 and abs(paired.low) < 1 and abs(paired.high) < 1:
        assert (paired.high - paired.low) / 2 == pytest.approx(1.959963985 * np.sqrt(expected), rel=1e-6)


def test_delong_equals_what_another_implementation_says():
    """The expected figures are those of pROC 1.18.0 on R 4.2.2: roc, var, ci and roc.test(method = "delong")."""
    index = np.arange(40)
    labels = (7 * index % 10 < 4).astype(int)
    first = 13 * index % 37 + 9 * labels
    second = (29 * index % 31 + 5 * labels) // 4  # with ties
    for scores, expected in (
        (first, (0.529947916666667, 0.00911105489193337, 0.342865736380981, 0.717030096952352)),
        (second, (0.614583333333333, 0.00866254969303543, 0.43216395955956965, 0.797002707107097)),
    ):
        found = delong(labels, scores)
        assert (found.value, auc_variance(labels, scores)[1], found.low, found.high) == pytest.approx(expected)
    compared = paired_delong(labels, first, second)
    assert compared.p_value == pytest.approx(0.505377973081311)
    assert (compared.low, compared.high) == pytest.approx((-0.333688660459245, 0.164417827125912))


@pytest.mark.parametrize(("per_class", "p_value"), [(2, 0.5), (10, 2.0**-9)])
def test_paired_delong_is_not_certain_when_its_variance_is_zero(per_class, p_value):
    labels = [0] * per_class + [1] * per_class
    perfect = np.linspace(0.1, 0.9, 2 * per_class)
    found = paired_delong(labels, perfect, np.full(2 * per_class, 0.5))
    assert found.difference == pytest.approx(0.5) and found.p_value == pytest.approx(p_value)
    assert found.low < found.difference < found.high
    same = paired_delong(labels, perfect, perfect)
    assert (same.difference, same.p_value) == (0.0, 1.0)


def test_auc_agrees_with_scikit_learn_on_random_scores():
    from sklearn.metrics import cohen_kappa_score, matthews_corrcoef, roc_auc_score

    generator = np.random.default_rng(3)
    labels = generator.integers(0, 2, 80)
    scores = np.round(generator.random(80) + 0.2 * labels, 1)
    called = (scores > 0.6).astype(int)
    assert auc(labels, scores) == pytest.approx(roc_auc_score(labels, scores))
    assert kappa(labels, called) == pytest.approx(cohen_kappa_score(labels, called))
    assert matthews(labels, called) == pytest.approx(matthews_corrcoef(labels, called))


@pytest.mark.parametrize("labels", [[1, 1, 1], [0, 0, 0]])
def test_auc_is_refused_when_one_class_only(labels):
    with pytest.raises(LabelError, match="all 3 labels are of one class"):
        auc(labels, [0.1, 0.2, 0.3])


def test_delong_is_refused_when_a_class_has_one_patient():
    with pytest.raises(LabelError, match="at least two patients of each class, got 1 positive and 2 negative"):
        delong([1, 0, 0], [0.1, 0.2, 0.3])


def test_scores_are_refused_when_not_finite():
    with pytest.raises(LabelError, match="1 of 3 scores are NaN"):
        auc([1, 0, 0], [0.1, float("nan"), 0.3])


def test_labels_are_refused_when_not_binary():
    with pytest.raises(LabelError, match="labels must be 0 or 1"):
        auc([1, 0, 2], [0.1, 0.2, 0.3])


def test_auc_within_ignores_a_shift_between_folds():
    labels = [0, 1, 0, 1]
    scores = [0.1, 0.2, 0.8, 0.9]
    assert auc(labels, scores) == 0.75
    assert auc_within(labels, scores, [0, 0, 1, 1]) == 1.0
    assert auc_within(labels, scores, [0, 1, 0, 2]) is None


# 3 true positives, 1 false negative, 4 true negatives, 2 false positives.
LABELS = [1] * 4 + [0] * 6
CALLED = [1, 1, 1, 0, 0, 0, 0, 0, 1, 1]


def test_threshold_metrics_equal_hand_values():
    assert accuracy(LABELS, CALLED) == pytest.approx(0.7)
    assert sensitivity(LABELS, CALLED) == pytest.approx(0.75)
    assert specificity(LABELS, CALLED) == pytest.approx(2 / 3)
    assert balanced_accuracy(LABELS, CALLED) == pytest.approx(17 / 24)
    # Expected agreement (4·5 + 6·5)/100 = 0.5.
    assert kappa(LABELS, CALLED) == pytest.approx(0.4)
    assert matthews(LABELS, CALLED) == pytest.approx((3 * 4 - 2 * 1) / np.sqrt(5 * 5 * 4 * 6))


def test_matthews_is_zero_when_all_are_called_alike():
    assert matthews(LABELS, [1] * 10) == 0.0


def test_brier_equals_hand_value():
    assert brier([1, 0], [0.8, 0.4]) == pytest.approx((0.04 + 0.16) / 2)


def test_wilson_interval_equals_published_value():
    # Newcombe, Statistics in Medicine 17 (1998), table I: 81 of 263, and 0 of 20.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


def test_threshold_separates_perfectly_when_possible():
    threshold = choose_threshold([0, 0, 1, 1], [0.1, 0.3, 0.7, 0.9])
    assert threshold == pytest.approx(0.5)


def test_threshold_takes_the_widest_of_equal_gaps():
    # 0.35 and 0.775 are equally good; the gap around 0.775 is wider.
    assert choose_threshold([0, 1, 0, 1], [0.2, 0.5, 0.6, 0.95]) == pytest.approx(0.775)


def test_threshold_is_half_when_all_probabilities_are_equal():
    assert choose_threshold([0, 1, 1], [0.9, 0.9, 0.9]) == 0.5


def test_roc_curve_runs_from_origin_to_corner_with_one_point_per_score():
    false_rate, true_rate, thresholds = roc_curve(TIED_LABELS, TIED_SCORES)
    assert thresholds.tolist() == [np.inf, 0.9, 0.6, 0.4, 0.1]
    assert false_rate == pytest.approx([0, 0, 1 / 3, 2 / 3, 1])
    assert true_rate == pytest.approx([0, 1 / 3, 2 / 3, 1, 1])
    assert np.trapezoid(true_rate, false_rate) == pytest.approx(7 / 9)


def test_bootstrap_interval_repeats_when_seed_is_the_same():
    def interval(seed):
        return bootstrap_interval(LABELS, [CALLED], accuracy, samples=200, generator=np.random.default_rng(seed))

    assert interval(1) == interval(1)
    low, high = interval(1)
    assert 0.3 < low < 0.7 < high <= 1.0


def test_bootstrap_draws_keep_the_size_of_each_class():
    seen = []
    bootstrap_interval(
        LABELS,
        [],
        lambda labels: seen.append(labels.sum()) or 0.0,
        samples=100,
        generator=np.random.default_rng(0),
    )
    assert set(seen) == {4}


def test_bootstrap_covers_the_truth_about_as_often_as_it_says():
    hits = 0
    for seed in range(60):
        generator = np.random.default_rng(seed)
        labels = np.array([0] * 40 + [1] * 40)
        called = generator.random(80) < np.where(labels == 1, 0.8, 0.3)
        low, high = bootstrap_interval(labels, [called], balanced_accuracy, samples=100, generator=generator)
        hits += low <= 0.75 <= high
    assert 50 <= hits <= 60


def test_calibration_in_the_large_is_as_uncertain_as_the_share_of_positives():
    labels = np.asarray([0, 1] * 40)
    values = np.where(np.arange(80) % 3, 0.45, 0.55)
    found = binary_report(labels, values, 0.5, samples=1000, generator=np.random.default_rng(0))[
        "calibration_intercept"
    ]
    # For nearly constant probabilities its standard error is that of the log-odds of a share, 1/√(n·p·(1-p)).
    assert (found.high - found.low) / 2 == pytest.approx(1.96 / np.sqrt(80 * 0.25), rel=0.15)


def test_binary_report_holds_every_figure_with_interval_and_counts():
    generator = np.random.default_rng(5)
    labels = np.array([0, 1] * 20)
    probabilities = np.clip(0.3 + 0.3 * labels + 0.2 * generator.standard_normal(40), 0, 1)
    report = binary_report(
        labels,
        probabilities,
        0.5,
        samples=100,
        generator=np.random.default_rng(0),
        groups=[index // 2 % 4 for index in range(40)],
    )
    assert set(report) == {
        "auc",
        "auc_within_folds",
        "accuracy",
        "sensitivity",
        "specificity",
        "balanced_accuracy",
        "kappa",
        "mcc",
        "brier",
        "pr_auc",
        "calibration_slope",
        "calibration_intercept",
    }
    for estimate in report.values():
        assert estimate.low <= estimate.value <= estimate.high
        assert (estimate.n, estimate.n_positive) == (40, 20)
    assert report["accuracy"].value == accuracy(labels, (probabilities >= 0.5).astype(int))


def test_binary_report_uses_the_threshold_of_each_patient():
    report = binary_report(
        [0, 0, 1, 1], [0.2, 0.8, 0.3, 0.9], [0.5, 0.85, 0.25, 0.5], samples=100, generator=np.random.default_rng(0)
    )
    assert report["accuracy"].value == 1.0
    assert report["auc"].value == 0.75


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=30))
def test_accuracy_always_lies_between_sensitivity_and_specificity(rows):
    labels = [0, 1] + [row[0] for row in rows]
    called = [0, 0] + [row[1] for row in rows]
    check_invariants(
        {
            "accuracy": accuracy(labels, called),
            "sensitivity": sensitivity(labels, called),
            "specificity": specificity(labels, called),
            "balanced_accuracy": balanced_accuracy(labels, called),
        }
    )


def test_invariants_fail_on_an_impossible_table_row():
    with pytest.raises(AssertionError, match="accuracy outside"):
        check_invariants({"accuracy": 0.766, "sensitivity": 0.70, "specificity": 0.75, "balanced_accuracy": 0.725})


def test_small_p_values_are_written_as_they_are_and_worded_as_less():
    comparison = Comparison(0.2, 0.1, 0.3, 3.21987e-9, 50, 20)
    assert comparison.as_json()["p_value"] == 3.22e-9
    versus = Versus("model", "age_sex", comparison, 6.43974e-9)
    assert versus.as_json()["p_holm"] == 6.44e-9
    assert "Holm p < 0.001" in versus.sentence()
