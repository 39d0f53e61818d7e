from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest

from glioma_nas.errors import StorageError
from glioma_nas.files import read_json, write_json
from glioma_nas.marker_evaluator import MarkerEvaluator, build_evaluator, patient_level
from glioma_nas.marker_study import ClassifierSettings
from glioma_nas.marker_tuning import Tuning, choose, inner_folds
from glioma_nas.plugins.radiomics import co_occurrence, feature_names, radiomics_features, shape_features
from glioma_nas.roc_analysis import choose_threshold
from glioma_nas.testing.classifier_suite import ClassifierSuite, phantom_cases, phantom_folds
from glioma_nas.uncertainty import (
    UncertainPrediction,
    altered_copy,
    called_patients,
    out_of_fold_uncertainty,
    predict_with_uncertainty,
    with_calls,
)

SETTINGS = ClassifierSettings(sequences=("t1ce", "flair"), epochs=1, batch_size=8, image_size_px=32)


class Memoriser(MarkerEvaluator):
    """Knows its training patients by heart; of others it says 0.3 or 0.2, in the right order."""

    def options(self) -> dict[str, Any]:
        return {}

    def fit(self, cases, *, folder, label, progress, seed, device):
        write_json(folder / "heart.json", {case.patient_id: case.label for case in cases})

    def predict(self, folder, cases, *, device="cpu"):
        known = read_json(folder / "heart.json")
        brightness = [float(case.images[:, 0][case.mask == 1].mean()) for case in cases]
        return np.asarray(
            [
                (0.99 if known[case.patient_id] else 0.01) if case.patient_id in known else 0.2 + 0.1 * (bright > 1.0)
                for case, bright in zip(cases, brightness, strict=True)
            ]
        )


def test_threshold_holds_for_other_patients_although_the_classifier_memorises_its_own(tmp_path):
    cases = phantom_cases(24, signal=3.0)
    frame = Memoriser(SETTINGS).cross_validate(cases, phantom_folds(cases), folder=tmp_path)
    called = frame["probability"] >= frame["threshold"]
    # From in-sample predictions the threshold would be one half, and every patient would be called negative.
    assert (frame["probability_uncalibrated"] < 0.5).all()
    assert (called == (frame["label"] == 1)).all()


def test_nothing_is_tuned_when_only_the_ranking_counts(tmp_path):
    cases = phantom_cases(12)
    frame = Memoriser(SETTINGS).cross_validate(cases, phantom_folds(cases), folder=tmp_path, tune=False)
    assert set(frame["threshold"]) == {0.5} and set(frame["temperature"]) == {1.0}
    assert frame["probability"].equals(frame["probability_uncalibrated"])


def test_inner_classifiers_are_removed_and_the_choice_is_kept(tmp_path):
    cases = phantom_cases(12)
    Memoriser(SETTINGS).cross_validate(cases, phantom_folds(cases), folder=tmp_path)
    assert not (tmp_path / "fold0" / "inner").exists()
    tuning = Tuning.read(tmp_path / "fold0")
    assert (tuning.n_inner_folds, tuning.n_patients) == (3, 6)


def test_damaged_choice_is_refused(tmp_path):
    write_json(tmp_path / "tuning.json", {"threshold": 0.5, "mood": "good"})
    with pytest.raises(StorageError, match="not a tuning record"):
        Tuning.read(tmp_path)


def test_inner_folds_split_patients_and_keep_both_classes():
    cases = phantom_cases(14)
    cases += [replace(case, case_id=f"x{case.case_id}") for case in cases[:4]]
    splits = inner_folds(cases, 3, seed=1)
    held = [case.case_id for _, test in splits for case in test]
    assert sorted(held) == sorted(case.case_id for case in cases)
    for train, test in splits:
        assert not {case.patient_id for case in train} & {case.patient_id for case in test}
        assert {case.label for case in train} == {case.label for case in test} == {0, 1}
    assert [len(test) for _, test in inner_folds(cases, 3, seed=1)] == [len(test) for _, test in splits]


def test_inner_folds_are_fewer_when_a_class_is_small_and_none_when_it_has_one_patient():
    cases = phantom_cases(12)
    two = [case for case in cases if case.label == 0] + [case for case in cases if case.label == 1][:2]
    assert len(inner_folds(two, 3, seed=0)) == 2
    assert inner_folds(two[:-1], 3, seed=0) == []


def test_variant_with_the_larger_auc_is_chosen():
    cases = phantom_cases(8)
    labels = np.asarray([case.label for case in cases], dtype=float)
    noise = np.linspace(0.1, 0.9, 8)
    assert choose(cases, {"mean": noise, "max": 0.2 + 0.5 * labels}, n_inner_folds=3).variant == "max"
    assert choose(cases, {"mean": 0.2 + 0.5 * labels, "max": 0.2 + 0.5 * labels}, n_inner_folds=3).variant == "mean"


def test_threshold_is_chosen_on_the_means_that_are_called_later():
    cases = phantom_cases(8)
    cases += [replace(case, case_id=f"x{case.case_id}") for case in cases]
    negative, positive = iter([0.05, 0.1, 0.3, 0.5]), iter([0.45, 0.5, 0.6, 0.7])
    once = [next(positive if case.label else negative) for case in cases[:8]]
    # The second case of a positive patient is far from the first, so mean and temperature do not commute.
    twice = [value if case.label == 0 else 0.999 for value, case in zip(once, cases[:8], strict=True)]
    values = np.asarray(once + twice)
    tuning = choose(cases, {"": values}, n_inner_folds=2)
    assert tuning.temperature != 1.0
    called_later = tuning.temper(values).reshape(2, 8).mean(axis=0)
    labels = [case.label for case in cases[:8]]
    assert tuning.threshold == pytest.approx(choose_threshold(labels, called_later))
    assert tuning.threshold != pytest.approx(choose_threshold(labels, tuning.temper(values.reshape(2, 8).mean(axis=0))))


class TestTumourVolumeClassifier(ClassifierSuite):
    classifier: ClassVar[str] = "tumour_volume"


class TestRadiomicsClassifier(ClassifierSuite):
    classifier: ClassVar[str] = "radiomics"


def test_tumour_volume_finds_a_difference_in_size(tmp_path):
    cases = [
        replace(case, tumour_volume_ml=10.0 + 40.0 * case.label + index % 5)
        for index, case in enumerate(phantom_cases(24))
    ]
    frame = build_evaluator("tumour_volume", SETTINGS, {}).cross_validate(cases, phantom_folds(cases), folder=tmp_path)
    assert ((frame["probability"] >= frame["threshold"]) == (frame["label"] == 1)).all()


def test_radiomics_finds_a_difference_in_brightness(tmp_path):
    cases = phantom_cases(32, signal=2.0)
    frame = build_evaluator("radiomics", SETTINGS, {}).cross_validate(cases, phantom_folds(cases), folder=tmp_path)
    patients = patient_level(frame)
    from glioma_nas.roc_analysis import auc

    assert auc(patients["label"], patients["probability"]) > 0.9


def test_shape_features_of_disc_and_line_are_as_expected():
    rows, columns = np.mgrid[:101, :101]
    disc = (rows - 50) ** 2 + (columns - 50) ** 2 <= 30**2
    area, circularity, elongation, parts = shape_features(disc, 2.0)
    assert area == pytest.approx(np.pi * 30**2 * 4 / 100, rel=0.01)
    assert circularity == pytest.approx(1.0, abs=0.06)
    assert (elongation, parts) == (pytest.approx(1.0, abs=0.01), 1)
    line = np.zeros((101, 101), dtype=bool)
    line[50, 10:90] = True
    line[0, 0] = True
    _, _, thin, parts = shape_features(line, 2.0)
    assert thin < 0.3 and parts == 2


def test_co_occurrence_equals_hand_count():
    levels = np.asarray([[0, 1], [1, 1]])
    matrix = co_occurrence(levels, np.ones((2, 2), dtype=bool))
    # Pairs: → (0,1) (1,1); ↓ (0,1) (1,1); ↘ (0,1); ↙ (1,1). Symmetric: 12 entries.
    assert matrix[0, 1] == matrix[1, 0] == pytest.approx(3 / 12)
    assert matrix[1, 1] == pytest.approx(6 / 12)
    assert matrix.sum() == pytest.approx(1.0)


@pytest.mark.parametrize("what", ["normal", "empty mask", "one pixel", "constant", "all zero"])
def test_radiomics_features_are_finite_whatever_the_mask(what):
    case = phantom_cases(2)[1]
    mask, images = case.mask.copy(), case.images.copy()
    if what == "empty mask":
        mask[:] = 0
    if what == "one pixel":
        mask[:] = 0
        mask[0, 16, 16] = 1
    if what == "constant":
        images[:] = 1.0
    if what == "all zero":
        images[:], mask[:] = 0.0, 0
    features = radiomics_features(replace(case, images=images, mask=mask))
    assert features.shape == (len(feature_names(("t1ce", "flair"))),)
    assert np.isfinite(features).all()


def test_uncertainty_is_a_spread_over_folds_and_copies_and_repeats(tmp_path):
    cases = phantom_cases(16, signal=3.0)
    evaluator = build_evaluator("radiomics", SETTINGS, {})
    evaluator.cross_validate(cases, phantom_folds(cases), folder=tmp_path)
    new = [replace(case, label=None) for case in phantom_cases(6, seed=9, signal=3.0)]
    found = predict_with_uncertainty(evaluator, tmp_path, new, copies=3)
    assert predict_with_uncertainty(evaluator, tmp_path, new, copies=3) == found
    for item in found:
        assert item.low <= item.probability <= item.high
        assert item.n_members == 2 * 4
        assert (item.call is None) == item.abstains


@pytest.mark.parametrize(("shift", "abstains"), [((-0.01, -0.01), False), ((-0.01, 0.01), True)])
def test_members_disagree_by_the_threshold_of_their_own_fold(tmp_path, shift, abstains):
    cases = phantom_cases(16, signal=3.0)
    evaluator = build_evaluator("radiomics", SETTINGS, {})
    evaluator.cross_validate(cases, phantom_folds(cases), folder=tmp_path)
    for fold, temperature in enumerate((0.5, 5.0)):
        Tuning(temperature=temperature).write(tmp_path / f"fold{fold}")
    new = phantom_cases(2, seed=9, signal=3.0)[1:]
    members = evaluator.predict_members(tmp_path, new)[:, 0]
    assert abs(members[0] - members[1]) > 0.05
    for fold, temperature in enumerate((0.5, 5.0)):
        Tuning(float(members[fold]) + shift[fold], temperature).write(tmp_path / f"fold{fold}")
    (found,) = predict_with_uncertainty(evaluator, tmp_path, new, copies=0)
    assert found.abstains is abstains


def test_cross_validated_cases_are_judged_by_the_fold_that_never_saw_them(tmp_path):
    cases, folds = phantom_cases(16, signal=3.0), phantom_folds(phantom_cases(16, signal=3.0))
    evaluator = build_evaluator("radiomics", SETTINGS, {})
    frame = evaluator.cross_validate(cases, folds, folder=tmp_path)
    tested = dict(zip(frame["case_id"], frame["fold"], strict=True))
    alone = out_of_fold_uncertainty(evaluator, tmp_path, tested, cases, copies=0, seed=0)
    assert [alone[case_id].probability for case_id in frame["case_id"]] == pytest.approx(list(frame["probability"]))
    found = out_of_fold_uncertainty(evaluator, tmp_path, tested, cases, copies=3, seed=0)
    assert {item.n_members for item in found.values()} == {4}
    assert any(item.low < item.high for item in found.values())
    assert found == out_of_fold_uncertainty(evaluator, tmp_path, tested, cases, copies=3, seed=0)


def test_patients_are_called_when_all_their_cases_are_and_alike():
    def row(case_id, patient, label, call):
        return {"case_id": case_id, "patient_id": patient, "label": label, "call": call}

    frame = pd.DataFrame(
        [
            row("a1", "a", 1, "positive"),
            row("a2", "a", 1, "positive"),
            row("b1", "b", 0, "positive"),
            row("c1", "c", 1, "positive"),
            row("c2", "c", 1, "none"),
            row("d1", "d", 0, "negative"),
            row("d2", "d", 0, "positive"),
        ]
    )
    found = called_patients(frame, copies=4)
    assert (found["n_patients"], found["n_called"], found["n_right"]) == (4, 2, 1)
    assert found["low"] < found["accuracy_of_called"] == 0.5 < found["high"]
    nothing = called_patients(frame.assign(call="none"), copies=4)
    assert nothing["n_called"] == 0 and nothing["accuracy_of_called"] is None


def test_no_call_is_written_where_members_disagree_or_the_threshold_is_near():
    frame = pd.DataFrame({"case_id": ["a", "b", "c"], "patient_id": ["a", "b", "c"], "label": [1, 1, 0]})
    found = {
        "a": UncertainPrediction("a", 0.8, 0.7, 0.9, 0.1, 0.5, 5, False),
        "b": UncertainPrediction("b", 0.6, 0.4, 0.9, 0.1, 0.5, 5, True),
        "c": UncertainPrediction("c", 0.48, 0.47, 0.49, 0.01, 0.5, 5, False),
    }
    assert list(with_calls(frame, found, margin=0.05)["call"]) == ["positive", "none", "none"]
    assert list(with_calls(frame, found, margin=0.0)["call"]) == ["positive", "none", "negative"]


def test_altered_copy_keeps_shapes_and_leaves_the_case_alone():
    case = phantom_cases(2)[0]
    before = case.images.copy()
    copy = altered_copy(case, 3)
    assert (copy.images.shape, copy.mask.shape) == (case.images.shape, case.mask.shape)
    assert not np.array_equal(copy.images, case.images)
    assert np.array_equal(case.images, before)
    assert set(np.unique(copy.mask)) <= {0, 1}
