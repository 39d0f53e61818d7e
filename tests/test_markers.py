from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from glioma_nas.config import MarkerConfig
from glioma_nas.errors import CohortError, ConfigError, ImageError, LabelError, LeakageError, StorageError
from glioma_nas.folds import Folds
from glioma_nas.marker_evaluator import build_evaluator, load_evaluator, patient_level
from glioma_nas.marker_study import ClassifierSettings
from glioma_nas.markers import (
    MetadataEncoder,
    check_folds_hold_both_classes,
    check_out_of_fold,
    choose_slices,
    cut_case,
    encode_labels,
)
from glioma_nas.slice_batches import BalancedSampler, augment
from glioma_nas.testing.classifier_suite import ClassifierSuite, phantom_cases, phantom_folds

SHEET = Path("cohort.csv")
IDH = MarkerConfig(column="idh", positive="mutant")
KI67 = MarkerConfig(column="ki67", threshold=10)
SETTINGS = ClassifierSettings(sequences=("t1ce", "flair"), epochs=3, batch_size=8, image_size_px=32)


@dataclass
class Row:
    case_id: str
    labels: dict[str, str] = field(default_factory=dict)
    patient_id: str = ""

    def __post_init__(self):
        self.patient_id = self.patient_id or self.case_id


def rows(*values, column="idh"):
    return [Row(f"c{index}", {column: value} if value is not None else {}) for index, value in enumerate(values)]


class TestAgeSexClassifier(ClassifierSuite):
    classifier = "age_sex"


def test_labels_of_words_are_one_for_the_positive_value_and_leave_out_unknown():
    cases = rows("mutant", "Wildtype", None, " MUTANT ", "wildtype", "unknown")
    assert encode_labels(cases, "idh", IDH, sheet=SHEET) == {"c0": 1, "c1": 0, "c3": 1, "c4": 0}


def test_labels_of_numbers_are_one_from_the_threshold_on():
    cases = rows("9.99", "10", "35", "2", "NA", column="ki67")
    assert encode_labels(cases, "ki67", KI67, sheet=SHEET) == {"c0": 0, "c1": 1, "c2": 1, "c3": 0}


@pytest.mark.parametrize(
    ("values", "config", "message"),
    [
        ((None, None), IDH, r"cohort\.csv: marker 'idh', column 'idh': the sheet lacks the column"),
        (("wildtype", "wildtype"), IDH, "positive class 'mutant' does not occur"),
        (("mutant", "mutant", "mutant"), IDH, "all 3 patients with a known value are of one class"),
        (
            ("mutant", "wildtype", "mutant", "wildtpye", "wildtype"),
            IDH,
            r"unknown value 'wildtpye' \(first in case c3\)",
        ),
        (("mutant", "wildtype", "wildtype"), IDH, "1 positive patients are fewer than 2 folds"),
        (
            ("12%", "3", "11"),
            replace_column := KI67.model_copy(update={"column": "idh"}),
            "unknown value '12%' in case c0",
        ),
        (("inf", "3", "11"), replace_column, "unknown value 'inf' in case c0"),
        (("1", "3", "2"), replace_column, "are of one class"),
    ],
)
def test_labels_are_refused_when_they_cannot_be_used(values, config, message):
    with pytest.raises(LabelError, match=message):
        encode_labels(rows(*values), "idh", config, sheet=SHEET)


def test_absent_column_is_refused_with_the_nearest_name():
    cases = [Row("a", {"idh_status": "mutant"}), Row("b", {"idh_status": "wildtype"})]
    with pytest.raises(LabelError, match="did you mean 'idh_status'"):
        encode_labels(cases, "idh", IDH.model_copy(update={"column": "idh_stats"}), sheet=SHEET)


def test_labels_are_refused_when_a_class_has_fewer_patients_than_folds():
    cases = rows(*["mutant"] * 6, *["wildtype"] * 4)
    with pytest.raises(LabelError, match="4 negative patients are fewer than 5 folds"):
        encode_labels(cases, "idh", IDH, sheet=SHEET, n_folds=5)


def test_patients_are_counted_not_cases():
    cases = rows("mutant", "mutant", "wildtype", "wildtype")
    cases[3].patient_id = cases[2].patient_id
    with pytest.raises(LabelError, match="1 negative patients"):
        encode_labels(cases, "idh", IDH, sheet=SHEET)


def test_labels_are_refused_when_cases_of_a_patient_disagree():
    cases = rows("mutant", "wildtype", "mutant", "wildtype")
    cases[1].patient_id = cases[0].patient_id
    with pytest.raises(LabelError, match="cases of patient c0 hold different values"):
        encode_labels(cases, "idh", IDH, sheet=SHEET)


def test_folds_are_refused_when_a_training_side_holds_one_class():
    folds = Folds(0, ((("a", "b"), ("c",)), (("c",), ("a", "b"))))
    with pytest.raises(LabelError, match=r"training side of fold 1 .* add its column to folds\.stratify_by"):
        check_folds_hold_both_classes(folds, {"a": 0, "b": 1, "c": 1}, "idh")


def test_masks_are_refused_when_the_network_saw_the_patient():
    record = {"network": "student", "fold": 1, "train_patients": ["c0", "c2"]}
    check_out_of_fold({"c1": record}, [Row("c1")], source=Path("provenance.json"))
    with pytest.raises(
        LeakageError, match="case c0: its mask was made by network 'student' of fold 1, which was trained"
    ):
        check_out_of_fold({"c0": record}, [Row("c0")], source=Path("provenance.json"))


def test_masks_are_refused_when_nobody_knows_whom_the_network_saw():
    with pytest.raises(LeakageError, match=r"provenance\.json: case c0: it is not recorded"):
        check_out_of_fold({}, [Row("c0")], source=Path("provenance.json"))


@pytest.mark.parametrize("trained_on", [[12, 13], "12,13", {"12": True}])
def test_masks_are_refused_when_training_patients_are_no_list_of_text(trained_on):
    record = {"network": "nnunet", "train_patients": trained_on}
    with pytest.raises(LeakageError, match=r"case 12: train_patients is .*; give a list of patient ids as text"):
        check_out_of_fold({"12": record}, [Row("12")], source=Path("provenance.json"))


def test_slices_with_the_largest_tumour_area_are_chosen():
    mask = np.zeros((6, 4, 4), dtype=np.uint8)
    for index, area in enumerate([0, 3, 1, 3, 8, 0]):
        mask[index].flat[:area] = 1
    assert choose_slices(mask, 2) == ((1, 4), False)
    assert choose_slices(mask, 3) == ((1, 3, 4), False)
    # Slices without tumour are never taken while there is one with it.
    assert choose_slices(mask, 6) == ((1, 2, 3, 4), False)


@pytest.mark.parametrize(("n", "count", "expected"), [(10, 4, (3, 4, 5, 6)), (3, 8, (0, 1, 2)), (5, 2, (1, 2))])
def test_middle_slices_are_chosen_when_the_mask_is_empty(n, count, expected):
    assert choose_slices(np.zeros((n, 4, 4)), count) == (expected, True)


@dataclass
class Prepared:
    stack: np.ndarray
    present: tuple[str, ...] = ("t1", "t1ce", "flair")
    case_id: str = "c0"
    patient_id: str = "p0"
    age: float | None = 40.0
    sex: str | None = "F"
    labels: dict[str, str] = field(default_factory=dict)
    spacing_mm: tuple[float, float, float] = (2.0, 2.0, 5.0)

    def images(self):
        return self.stack


ORDER = ("t1", "t1ce", "flair")


def prepared():
    stack = np.zeros((5, 3, 8, 8), dtype=np.float32)
    stack += np.arange(3, dtype=np.float32)[None, :, None, None] + 10 * np.arange(5)[:, None, None, None]
    return Prepared(stack)


def cut(case, mask, **changes):
    arguments = {"order": ORDER, "sequences": ("flair", "t1ce"), "slices_per_case": 2, "image_size_px": 8, **changes}
    return cut_case(case, mask, **arguments)


def test_cut_case_takes_the_right_slices_and_channels():
    mask = np.zeros((5, 8, 8), dtype=np.uint8)
    mask[3, 2:6, 2:6] = 1
    mask[1, 2:4, 2:4] = 1
    case = cut(prepared(), mask, label=1)
    assert case.slices == (1, 3)
    assert case.images[:, :, 0, 0].tolist() == [[12.0, 11.0], [32.0, 31.0]]
    assert (case.images.dtype, case.mask.dtype) == (np.float32, np.uint8)
    np.testing.assert_array_equal(case.mask, mask[[1, 3]])
    assert (case.age, case.sex, case.label, case.mask_empty) == (40.0, "F", 1, False)


def test_cut_case_resizes_images_and_mask_alike():
    mask = np.zeros((5, 8, 8), dtype=np.uint8)
    mask[2, :4, :] = 1
    case = cut(prepared(), mask, image_size_px=4)
    assert case.images.shape == (1, 2, 4, 4)
    np.testing.assert_allclose(case.images[0, 0], 22.0, rtol=1e-6)
    assert case.mask[0].tolist() == [[1] * 4, [1] * 4, [0] * 4, [0] * 4]


def test_cut_case_says_when_the_mask_is_empty():
    case = cut(prepared(), np.zeros((5, 8, 8), dtype=np.uint8))
    assert (case.mask_empty, case.slices) == (True, (1, 2))


def test_cut_case_is_refused_when_a_sequence_is_missing_unless_zero_is_asked_for():
    case = replace(prepared(), present=("t1", "t1ce"))
    mask = np.ones((5, 8, 8), dtype=np.uint8)
    with pytest.raises(CohortError, match="case c0 lacks sequence 'flair'"):
        cut(case, mask)
    assert not cut(case, mask, zero_missing=True).images[:, 0].any()


def test_cut_case_is_refused_when_a_sequence_was_not_prepared():
    with pytest.raises(CohortError, match="sequence 't2' was not prepared: Allowed: flair, t1, t1ce"):
        cut(prepared(), np.ones((5, 8, 8)), sequences=("t2",))


def test_cut_case_is_refused_when_the_mask_lies_on_another_grid():
    with pytest.raises(ImageError, match=r"case c0: the mask has shape \(5, 8, 9\)"):
        cut(prepared(), np.ones((5, 8, 9)))


def test_metadata_are_age_per_hundred_and_sex_with_training_mean_for_unknown():
    train = [replace(case, age=age) for case, age in zip(phantom_cases(3), (30.0, 50.0, None), strict=True)]
    encoder = MetadataEncoder.of(train)
    assert encoder.mean_age_years == 40.0
    people = [replace(train[0], age=63.0, sex="M"), replace(train[0], age=None, sex="F"), replace(train[0], sex=None)]
    np.testing.assert_allclose(encoder(people), [[0.63, 0.0], [0.4, 1.0], [0.3, 0.5]], rtol=1e-6)


def test_metadata_are_fifty_years_when_no_training_age_is_known():
    assert MetadataEncoder.of([replace(case, age=None) for case in phantom_cases(2)]).mean_age_years == 50.0


def test_sampler_draws_classes_alike_and_depends_on_seed_and_epoch_only():
    cases = [case for index, case in enumerate(phantom_cases(12)) if index % 2 == 0 or index == 1]
    sampler = BalancedSampler(cases, length=40, seed=1)
    first = list(sampler)
    assert [cases[index].label for index, _, _ in first] == [0, 1] * 20
    sampler.set_epoch(1)
    assert list(sampler) != first
    again = BalancedSampler(cases, length=40, seed=1)
    again.set_epoch(1)
    assert list(again) == list(sampler)


def test_augmentation_moves_image_and_mask_together():
    import torch

    mask = torch.zeros(1, 32, 32)
    mask[:, 8:20, 6:14] = 1
    moved, moved_mask = augment(mask.clone() * 2, mask, torch.Generator().manual_seed(7))
    assert set(moved_mask.unique().tolist()) == {0.0, 1.0}
    assert not torch.equal(moved_mask, mask)
    # The image was twice the mask, so it still is, but for gain and the soft edge.
    assert float((moved[moved_mask == 1] > 0.8).float().mean()) == 1.0
    assert float((moved[moved_mask == 0] > 1.2).float().mean()) == 0.0


def test_cross_validation_is_refused_when_a_patient_stands_on_both_sides(tmp_path):
    cases = phantom_cases(8)
    cases[7] = replace(cases[7], patient_id=cases[0].patient_id)
    with pytest.raises(LeakageError, match="fold 0: patient patient000 stands on both sides"):
        build_evaluator("age_sex", SETTINGS, {}).cross_validate(cases, phantom_folds(cases), folder=tmp_path)


def test_cross_validation_is_refused_when_a_case_has_no_label(tmp_path):
    cases = phantom_cases(8)
    cases[2] = replace(cases[2], label=None)
    with pytest.raises(LabelError, match="case002 has no label"):
        build_evaluator("age_sex", SETTINGS, {}).cross_validate(cases, phantom_folds(cases), folder=tmp_path)


def test_cross_validation_is_refused_when_folder_holds_other_labels(tmp_path):
    cases = phantom_cases(8)
    evaluator = build_evaluator("age_sex", SETTINGS, {})
    evaluator.cross_validate(cases, phantom_folds(cases), folder=tmp_path)
    flipped = [replace(case, label=1 - case.label) for case in cases]
    with pytest.raises(StorageError, match="was made from other cases or labels; delete"):
        evaluator.cross_validate(flipped, phantom_folds(cases), folder=tmp_path)


class PowerCut(Exception):
    pass


class CutAfter:
    """A progress on which the current fails after some batches."""

    def __init__(self, batches):
        self.left = batches

    def task(self, description, total):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        return None

    def advance(self, steps=1, /, **figures):
        self.left -= steps
        if self.left < 0:
            raise PowerCut

    def note(self, text):
        pass


def test_interrupted_training_continues_to_the_same_result(tmp_path):
    cases = phantom_cases(12)
    evaluator = build_evaluator("idh", SETTINGS, {})
    whole = evaluator.cross_validate(cases, phantom_folds(cases), folder=tmp_path / "whole", seed=2)
    with pytest.raises(PowerCut):
        evaluator.cross_validate(cases, phantom_folds(cases), folder=tmp_path / "cut", seed=2, progress=CutAfter(2))
    assert (tmp_path / "cut" / "fold0" / "inner" / "fold0" / "training" / "last.ckpt").is_file()
    resumed = evaluator.cross_validate(cases, phantom_folds(cases), folder=tmp_path / "cut", seed=2)
    assert resumed.equals(whole)
    assert not (tmp_path / "cut" / "fold0" / "training" / "last.ckpt").exists()


def test_patient_level_is_the_mean_over_cases_of_a_patient(tmp_path):
    cases = phantom_cases(8)
    # The second case of patient 0 stands in the same fold.
    cases[1] = replace(cases[1], patient_id=cases[0].patient_id, label=cases[0].label)
    cases += [replace(case, case_id=f"x{case.case_id}", patient_id=f"x{case.patient_id}") for case in cases[2:4]]
    frame = build_evaluator("age_sex", SETTINGS, {}).cross_validate(cases, phantom_folds(cases), folder=tmp_path)
    patients = patient_level(frame).set_index("patient_id")
    assert patients.loc["patient000", "n_cases"] == 2
    expected = frame[frame["patient_id"] == "patient000"]["probability"].mean()
    assert patients.loc["patient000", "probability"] == pytest.approx(expected)
    assert len(patients) == 9


def test_patient_level_is_refused_when_a_patient_was_tested_in_two_folds(tmp_path):
    cases = phantom_cases(8)
    frame = build_evaluator("age_sex", SETTINGS, {}).cross_validate(cases, phantom_folds(cases), folder=tmp_path)
    frame["patient_id"] = "one"
    with pytest.raises(LeakageError, match="patient one was tested in several folds"):
        patient_level(frame)


def test_age_sex_finds_age_when_age_decides(tmp_path):
    cases = [replace(case, age=30.0 + 30.0 * case.label + index % 3) for index, case in enumerate(phantom_cases(24))]
    frame = build_evaluator("age_sex", SETTINGS, {}).cross_validate(cases, phantom_folds(cases), folder=tmp_path)
    assert ((frame["probability"] >= frame["threshold"]) == (frame["label"] == 1)).all()


def test_stored_classifiers_are_refused_when_absent(tmp_path):
    with pytest.raises(StorageError, match=r"classifier\.json: no such file"):
        load_evaluator(tmp_path)
    with pytest.raises(StorageError, match="holds no finished fold"):
        build_evaluator("age_sex", SETTINGS, {}).predict_folds(tmp_path, phantom_cases(2))


def test_evaluate_is_refused_without_a_study():
    with pytest.raises(ConfigError, match=r"needs a MarkerStudy"):
        build_evaluator("idh", SETTINGS, {}).evaluate(None)
