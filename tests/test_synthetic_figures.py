"""The figures designed into the synthetic cohort, measured on scans of a fixed seed."""

from __future__ import annotations

import numpy as np
import pytest

from glioma_nas.synthetic.measurement import (
    auc,
    auc_within,
    cross_validated_scores,
    image_features,
)
from glioma_nas.synthetic.patients import METHYLATED, draw_patient
from glioma_nas.synthetic.scans import draw_scans

N_PATIENTS = 84  # six whole blocks
SEED = 0
PEOPLE = [draw_patient(number, SEED) for number in range(1, N_PATIENTS + 1)]
WILDTYPE = np.array([not patient.is_mutant for patient in PEOPLE])


@pytest.fixture(scope="module")
def features() -> np.ndarray:
    return np.array([image_features(draw_scans(patient, SEED, size_px=48)) for patient in PEOPLE])


def test_age_tells_idh_as_designed() -> None:
    ages = np.array([patient.age_years for patient in PEOPLE])
    assert 0.80 <= auc(ages, WILDTYPE) <= 0.90


@pytest.mark.slow
def test_images_tell_idh_as_designed(features: np.ndarray) -> None:
    scores = cross_validated_scores(features, WILDTYPE, SEED)
    assert 0.80 <= auc(scores, WILDTYPE) <= 0.93


@pytest.mark.slow
def test_images_tell_nothing_of_mgmt_beyond_idh(features: np.ndarray) -> None:
    # One draw of the labels has a standard error of 0.06; their mean has none to speak of.
    generator = np.random.default_rng(0)
    shares = np.where(WILDTYPE, METHYLATED[False], METHYLATED[True])
    areas = []
    for _ in range(30):
        methylated = generator.random(N_PATIENTS) < shares
        scores = cross_validated_scores(features, methylated, SEED, repeats=1)
        areas.append(auc_within(scores, methylated, [patient.idh for patient in PEOPLE]))
    assert 0.45 <= np.mean(areas) <= 0.55


def test_auc_within_strata_ignores_what_the_stratum_tells() -> None:
    stratum = ["a"] * 4 + ["b"] * 4
    positive = np.array([0, 0, 0, 1, 0, 1, 1, 1], dtype=bool)
    scores = np.array([0.0, 0, 0, 0, 1, 1, 1, 1])
    assert auc(scores, positive) == pytest.approx((3 * 3 + 0.5 * (3 * 1 + 1 * 3)) / 16)
    assert auc_within(scores, positive, stratum) == 0.5
