"""A marker that leaves no trace but goes with IDH, as MGMT does, looks predictable until IDH is held fixed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from glioma_nas.binary_statistics import bootstrap_interval
from glioma_nas.marker_evaluator import build_evaluator, patient_level
from glioma_nas.marker_study import ClassifierSettings
from glioma_nas.roc_analysis import auc_within, delong
from glioma_nas.testing.classifier_suite import phantom_cases, phantom_folds

N_PATIENTS = 240


def cases_with_mgmt(*, trace):
    """Return cases labelled by MGMT, and patient → IDH; tumours of IDH-mutant patients are brighter.

    MGMT is methylated in 85 % of mutants and 42 % of wildtypes, as in the synthetic cohort. ``trace`` is how much
    brighter it makes the tumour in the second sequence.
    """
    generator = np.random.default_rng(5)
    cases, idh = [], {}
    for case in phantom_cases(N_PATIENTS, n_slices=1, signal=2.0):
        idh[case.patient_id] = case.label
        methylated = int(generator.random() < (0.85 if case.label else 0.42))
        images = case.images.copy()
        images[:, 1] += trace * methylated * case.mask
        cases.append(replace(case, images=images, label=methylated))
    return cases, idh


def areas(folder, *, trace):
    """Return the AUC's interval over all patients and the one over pairs of patients of the same IDH status."""
    cases, idh = cases_with_mgmt(trace=trace)
    evaluator = build_evaluator("radiomics", ClassifierSettings(sequences=("t1ce", "flair")), {})
    patients = patient_level(evaluator.cross_validate(cases, phantom_folds(cases), folder=folder, tune=False))
    status = np.asarray([idh[patient] for patient in patients["patient_id"]])
    whole = delong(patients["label"], patients["probability"])
    held = bootstrap_interval(
        patients["label"],
        [patients["probability"], status],
        auc_within,
        samples=300,
        generator=np.random.default_rng(0),
    )
    return (whole.low, whole.high), held


@pytest.mark.parametrize(("trace", "found"), [(0.0, False), (0.3, True)])
def test_marker_that_goes_with_idh_is_found_beyond_idh_only_when_it_leaves_a_trace(tmp_path, trace, found):
    (low, _), (low_same_idh, high_same_idh) = areas(tmp_path, trace=trace)
    assert low > 0.5  # by way of IDH alone
    assert high_same_idh - low_same_idh < 0.2
    assert (low_same_idh > 0.5) is found
    assert found or high_same_idh > 0.5
