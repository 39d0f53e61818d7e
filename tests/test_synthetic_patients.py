"""Synthetic patients: labels that go together as designed, and the same person whatever the cohort's size."""

from __future__ import annotations

import math
from collections import Counter
from statistics import NormalDist

import numpy as np
import pytest

from glioma_nas.synthetic.measurement import auc, auc_within
from glioma_nas.synthetic.patients import GROUPS, Group, SyntheticPatient, draw_patient

PEOPLE = [draw_patient(number, 0) for number in range(1, 1401)]


def group(name: str) -> list[SyntheticPatient]:
    return [patient for patient in PEOPLE if patient.group == name]


def share(people: list[SyntheticPatient], attribute: str, value: object) -> float:
    return float(np.mean([getattr(patient, attribute) == value for patient in people]))


def test_patients_do_not_depend_on_the_size_of_the_cohort() -> None:
    assert draw_patient(7, 0) == PEOPLE[6]
    assert PEOPLE[6].case_id == "SYN-0007"
    assert draw_patient(7, 1) != PEOPLE[6]


def test_groups_have_their_shares() -> None:
    counts = Counter(patient.group for patient in PEOPLE)
    assert {name: round(100 * n / len(PEOPLE)) for name, n in counts.items()} == {
        "oligodendroglioma": 21,
        "astrocytoma": 36,
        "glioblastoma": 43,
    }


@pytest.mark.parametrize(
    ("name", "age", "deviation", "grades"),
    [
        ("oligodendroglioma", 46, 13, (54, 45, 1)),
        ("astrocytoma", 38, 11, (48, 41, 11)),
        ("glioblastoma", 60, 12, (2, 19, 78)),
    ],
)
def test_age_and_grade_follow_the_group(name: str, age: int, deviation: int, grades: tuple[int, ...]) -> None:
    people = group(name)
    ages = [patient.age_years for patient in people]
    assert np.mean(ages) == pytest.approx(age, abs=2)
    assert np.std(ages) == pytest.approx(deviation, abs=2)
    assert min(ages) >= 18
    assert max(ages) <= 85
    for grade, per_cent in zip((2, 3, 4), grades, strict=True):
        assert 100 * share(people, "grade", grade) == pytest.approx(per_cent, abs=6)


def age_tells_idh(n_patients: int, seed: int) -> float:
    people = [draw_patient(number, seed) for number in range(1, n_patients + 1)]
    return auc(
        np.array([patient.age_years for patient in people]), np.array([not patient.is_mutant for patient in people])
    )


def test_age_alone_tells_idh_as_designed() -> None:
    # P(wildtype is older) of two normal ages, over both kinds of mutants by their shares; cutting ages changes little.
    def older(name: Group) -> float:
        mean, deviation = GROUPS[name].age_years
        wildtype_mean, wildtype_deviation = GROUPS["glioblastoma"].age_years
        return NormalDist().cdf((wildtype_mean - mean) / math.hypot(deviation, wildtype_deviation))

    designed = (3 * older("oligodendroglioma") + 5 * older("astrocytoma")) / 8
    assert designed == pytest.approx(0.865, abs=0.005)
    assert age_tells_idh(1400, 0) == pytest.approx(designed, abs=0.01)


@pytest.mark.parametrize(("n_patients", "deviation"), [(84, 0.02), (238, 0.01)])
def test_age_tells_idh_as_designed_in_cohorts_of_every_seed(n_patients: int, deviation: float) -> None:
    # Independent ages would scatter by 0.05 and 0.026.
    areas = np.array([age_tells_idh(n_patients, seed) for seed in range(10)])
    assert np.mean(areas) == pytest.approx(0.865, abs=0.01)
    assert np.std(areas) < deviation
    assert 0.80 <= min(areas) <= max(areas) <= 0.90


def test_age_of_one_patient_is_chance_although_those_of_a_cohort_are_even() -> None:
    first = [
        next(draw_patient(n, seed) for n in range(1, 15) if not draw_patient(n, seed).is_mutant) for seed in range(200)
    ]
    ages = [patient.age_years for patient in first]
    assert (np.mean(ages), np.std(ages)) == (pytest.approx(60, abs=2.5), pytest.approx(12, abs=2))
    # What the age does not decide must not go with it: among wildtypes neither grade nor MGMT does.
    wildtype = group("glioblastoma")
    ages_of = np.array([patient.age_years for patient in wildtype], dtype=float)
    for told in (
        [p.grade == 4 for p in wildtype],
        [p.mgmt == "methylated" for p in wildtype],
        [p.sex == "M" for p in wildtype],
    ):
        assert auc(ages_of, np.array(told)) == pytest.approx(0.5, abs=0.06)


def test_signs_on_images_have_their_shares() -> None:
    assert share(group("astrocytoma"), "t2_flair_mismatch", True) == pytest.approx(0.40, abs=0.06)
    for other in ("oligodendroglioma", "glioblastoma"):
        assert share(group(other), "t2_flair_mismatch", True) == pytest.approx(0.01, abs=0.015)
    enhancing = [patient for patient in PEOPLE if patient.enhancement != "none"]
    high = [patient for patient in group("glioblastoma") if patient.grade == 4]
    low = [patient for patient in PEOPLE if patient.is_mutant and patient.grade < 4 and not patient.t2_flair_mismatch]
    assert len(set(high) & set(enhancing)) / len(high) > 0.95
    assert len(set(low) & set(enhancing)) / len(low) == pytest.approx(0.2, abs=0.05)
    assert share(high, "enhancement", "ring") > 0.8
    for mutants in (group("oligodendroglioma"), group("astrocytoma")):
        assert share(mutants, "lobe", "frontal") > 0.45 > 0.36 > share(group("glioblastoma"), "lobe", "frontal")


def test_mgmt_depends_on_idh_alone() -> None:
    assert share(group("glioblastoma"), "mgmt", "methylated") == pytest.approx(0.42, abs=0.05)
    astrocytoma, oligodendroglioma = (
        share(group(name), "mgmt", "methylated") for name in ("astrocytoma", "oligodendroglioma")
    )
    assert astrocytoma == pytest.approx(0.85, abs=0.05)
    assert oligodendroglioma == pytest.approx(astrocytoma, abs=0.06)
    mutants = [patient for patient in PEOPLE if patient.is_mutant]
    for grade in (2, 3):
        assert share([p for p in mutants if p.grade == grade], "mgmt", "methylated") == pytest.approx(0.85, abs=0.06)


@pytest.mark.parametrize(
    "attribute", ["group", "grade", "enhancement", "t2_flair_mismatch", "lobe", "ki67_percent", "site", "age_years"]
)
def test_nothing_that_is_drawn_goes_with_mgmt_beyond_idh(attribute: str) -> None:
    values = [getattr(patient, attribute) for patient in PEOPLE]
    methylated = np.array([patient.mgmt == "methylated" for patient in PEOPLE])
    idh = [patient.idh for patient in PEOPLE]
    # Numbers rank by themselves; of words each against all others.
    ranked = (
        [values] if not isinstance(values[0], str) else [[v == word for v in values] for word in sorted(set(values))]
    )
    for scores in ranked:
        assert 0.45 <= auc_within(np.array(scores, dtype=float), methylated, idh) <= 0.55


def test_ki67_is_log_normal_about_the_median_of_its_grade() -> None:
    for grade, median in ((2, 3), (3, 8), (4, 25)):
        values = np.log([patient.ki67_percent for patient in PEOPLE if patient.grade == grade])
        assert np.exp(np.median(values)) == pytest.approx(median, rel=0.15)
        assert np.std(values) == pytest.approx(0.5, abs=0.08)


def test_molecular_markers_agree_with_the_who_rules() -> None:
    for patient in PEOPLE:
        high = "deleted" in patient.cdkn2a or "present" in (patient.mvp, patient.necrosis)
        if patient.group == "astrocytoma":
            assert (patient.grade == 4) == high
        if patient.group == "oligodendroglioma":
            assert patient.atrx == "retained"
        if patient.is_mutant:
            assert (patient.egfr, patient.chr7_10) == ("not_amplified", "intact")
        elif patient.grade == 4:
            assert "present" in (patient.mvp, patient.necrosis)
        assert patient.h3 == "wildtype"
    assert share(group("astrocytoma"), "atrx", "lost") > 0.8
    assert share(group("oligodendroglioma"), "tertp", "mutant") > 0.9
    molecular = [
        p for p in group("glioblastoma") if "mutant" in p.tertp or p.egfr == "amplified" or "altered" in p.chr7_10
    ]
    assert len(molecular) / len(group("glioblastoma")) > 0.85


@pytest.mark.parametrize("n", [8, 12, 24])
def test_small_cohorts_hold_both_classes(n: int) -> None:
    for seed in range(20):
        counts = Counter(draw_patient(number, seed).idh for number in range(1, n + 1))
        assert min(counts["mutant"], counts["wildtype"]) >= max(1, n // 8)
