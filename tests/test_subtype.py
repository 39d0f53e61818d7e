from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glioma_nas.errors import ConfigError, LabelError
from glioma_nas.plugins.cns5_rules import MARKERS, RULES
from glioma_nas.plugins.subtype import DISCLAIMER, STATES, Cns5Rules
from glioma_nas.registry import subtypes

A, W = "altered", "wildtype"
MUTANT, WILD = {"idh": A}, {"idh": W, "h3": W}
ABSENT = dict.fromkeys(("tertp", "egfr", "chr7_10", "mvp", "necrosis"), W)

# One row of evidence for each rule and conflict, written from METHOD §10.
GOLDEN = {
    "h3_altered": [{"h3": A}, {"h3": A, "idh": A, "codel_1p19q": A}],
    "conflict_codeletion_without_idh_mutation": [{"idh": W, "codel_1p19q": A}],
    "conflict_codeletion_with_atrx_loss": [{**MUTANT, "codel_1p19q": A, "atrx": A}, {"codel_1p19q": A, "atrx": A}],
    "conflict_idh_mutation_with_egfr": [{**MUTANT, "codel_1p19q": W, "egfr": A}],
    "conflict_idh_mutation_with_chr7_10": [{**MUTANT, "codel_1p19q": W, "chr7_10": A}],
    "oligodendroglioma": [{**MUTANT, "codel_1p19q": A}, {**MUTANT, "codel_1p19q": A, "necrosis": A, "tertp": A}],
    "astrocytoma_grade_4": [
        {**MUTANT, "codel_1p19q": W, "cdkn2a": A},
        {**MUTANT, "atrx": A, "mvp": A},
        {**MUTANT, "codel_1p19q": W, "necrosis": A, "cdkn2a": W},
    ],
    "astrocytoma_grade_2_or_3": [{**MUTANT, "atrx": A, "cdkn2a": W, "mvp": W, "necrosis": W}],
    "astrocytoma_grade_open": [{**MUTANT, "codel_1p19q": W}, {**MUTANT, "atrx": A, "mvp": W}],
    "idh_mutant_nos": [MUTANT, {**MUTANT, "atrx": W}, {**MUTANT, "cdkn2a": A}],
    "glioblastoma": [{**WILD, marker: A} for marker in ABSENT],
    "idh_wildtype_nec": [{**WILD, **ABSENT}],
    "idh_wildtype_nos": [{"idh": W}, WILD, {**WILD, **ABSENT, "egfr": "unknown"}, {"idh": W, "tertp": A}],
    "idh_unknown_nos": [{}, {"atrx": A}, {"necrosis": A}],
}
DIAGNOSES = {
    "oligodendroglioma": ("oligodendroglioma, IDH-mutant and 1p/19q-codeleted", "2 or 3"),
    "astrocytoma_grade_4": ("astrocytoma, IDH-mutant", "4"),
    "astrocytoma_grade_2_or_3": ("astrocytoma, IDH-mutant", "2 or 3"),
    "idh_mutant_nos": ("diffuse glioma, IDH-mutant, NOS", ""),
    "glioblastoma": ("glioblastoma, IDH-wildtype", "4"),
    "idh_unknown_nos": ("diffuse glioma, NOS", ""),
}


@pytest.mark.parametrize(("name", "states"), [(name, states) for name in GOLDEN for states in GOLDEN[name]])
def test_rule_decides_its_golden_case(name, states):
    rule = Cns5Rules().decide(states)
    assert rule.name == name
    if name in DIAGNOSES:
        assert (rule.diagnosis, rule.grade) == DIAGNOSES[name]


def test_every_rule_has_a_golden_case():
    assert {rule.name for rule in RULES} == set(GOLDEN)


@pytest.mark.parametrize("name", [name for name in GOLDEN if name.startswith("conflict")])
def test_conflict_is_withheld(name):
    found = Cns5Rules().integrate(GOLDEN[name][0])
    assert found.call is None and "contradict" in found.reason
    assert found.next_test is None
    assert DISCLAIMER in found.text()


def test_every_combination_of_states_is_decided_by_exactly_one_rule():
    core = ("h3", "idh", "codel_1p19q", "atrx", "egfr", "cdkn2a")
    for combination in itertools.product(STATES, repeat=len(core)):
        assert Cns5Rules().decide(dict(zip(core, combination, strict=True))) in RULES


def test_probabilities_are_added_up_over_joint_states():
    found = Cns5Rules(tau=0.5).integrate({"h3": W, "tertp": A}, {"idh": 0.8, "codel_1p19q": 0.75})
    assert found.probabilities["oligodendroglioma, IDH-mutant and 1p/19q-codeleted"] == pytest.approx(0.6)
    assert found.probabilities["astrocytoma, IDH-mutant"] == pytest.approx(0.2)
    assert found.probabilities["glioblastoma, IDH-wildtype"] == pytest.approx(0.05)
    assert found.probabilities["withheld: 1p/19q codeletion with IDH wildtype"] == pytest.approx(0.15)
    assert (found.call, found.grade) == ("oligodendroglioma, IDH-mutant and 1p/19q-codeleted", "2 or 3")


def test_nothing_is_called_below_tau():
    evidence = ({"codel_1p19q": W}, {"idh": 0.65})
    assert Cns5Rules(tau=0.6).integrate(*evidence).call == "astrocytoma, IDH-mutant"
    found = Cns5Rules(tau=0.7).integrate(*evidence)
    assert found.call is None
    assert "has probability 0.65, below 0.7" in found.reason


def test_measured_marker_outweighs_its_prediction():
    found = Cns5Rules().integrate({"idh": W, "h3": W, "egfr": A}, {"idh": 0.99})
    assert found.probabilities == {"glioblastoma, IDH-wildtype": 1.0}


def test_next_test_is_the_one_with_the_largest_mutual_information():
    # IDH-mutant with intact 1p/19q and nothing else open but ATRX, which changes nothing, and CDKN2A, which does.
    measured = {**dict.fromkeys(MARKERS, W), "idh": A}
    del measured["cdkn2a"], measured["atrx"]
    found = Cns5Rules().integrate(measured, {"cdkn2a": 0.5, "atrx": 0.5})
    assert found.next_test == "cdkn2a"
    assert found.next_test_bits == pytest.approx(1.0)


def test_next_test_bits_equal_hand_value():
    measured = {**dict.fromkeys(MARKERS, W), "idh": A}
    del measured["cdkn2a"]
    found = Cns5Rules().integrate(measured, {"cdkn2a": 0.2})
    assert found.next_test_bits == pytest.approx(-0.2 * math.log2(0.2) - 0.8 * math.log2(0.8))


def test_nothing_is_left_to_test_when_all_is_measured():
    found = Cns5Rules().integrate({**dict.fromkeys(MARKERS, W), "idh": A})
    assert (found.call, found.next_test) == ("astrocytoma, IDH-mutant", None)


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(MARKERS)), st.floats(0, 1), max_size=5))
def test_outcome_probabilities_sum_to_one_and_information_is_never_negative(predicted):
    found = Cns5Rules().integrate({}, predicted)
    assert sum(found.probabilities.values()) == pytest.approx(1.0)
    assert found.next_test_bits >= 0
    assert list(found.probabilities.values()) == sorted(found.probabilities.values(), reverse=True)


@pytest.mark.parametrize(
    ("measured", "predicted", "error", "message"),
    [
        ({"idhh": A}, {}, ConfigError, "unknown marker 'idhh': did you mean 'idh'"),
        ({"idh": "mutant"}, {}, LabelError, "state of 'idh' is 'mutant'"),
        ({}, {"idh": 1.2}, LabelError, "probability of 'idh' is 1.2"),
        ({}, {"idh": float("nan")}, LabelError, "probability of 'idh' is nan"),
        ({}, {"egf": 0.2}, ConfigError, "unknown marker 'egf': did you mean 'egfr'"),
    ],
)
def test_evidence_that_cannot_be_used_is_refused(measured, predicted, error, message):
    with pytest.raises(error, match=message):
        Cns5Rules().integrate(measured, predicted)


@pytest.mark.parametrize("tau", [0, -0.1, 1.5])
def test_tau_out_of_range_is_refused(tau):
    with pytest.raises(ConfigError, match="tau is"):
        Cns5Rules(tau=tau)


def test_report_says_how_many_were_called_and_repeats_the_disclaimer():
    from glioma_nas.report.document import Section
    from glioma_nas.report.marker_section import add_subtype
    from glioma_nas.report.page import Page, render

    section = Section("markers", "Markers")
    numbers = {"n_patients": 40, "n_called": 31, "n_comparable": 29, "n_agree_with_known_markers": 24}
    counts = {"n": 31, "mean_probability": 0.8, "n_comparable": 29, "n_agree_with_known_markers": 24}
    outcomes = [
        {"call": "astrocytoma, IDH-mutant", **counts},
        {"call": "none", "n": 9, "mean_probability": 0.5, "n_comparable": None, "n_agree_with_known_markers": None},
    ]
    lists = {"outcomes": outcomes, "next_tests": {"atrx": 3, "tertp": 1}}
    add_subtype(
        section,
        {
            "rules": "cns5_2021",
            "tau": 0.6,
            "n_left_out_marker_not_predicted": 2,
            "disclaimer": DISCLAIMER,
            **numbers,
            **lists,
        },
    )
    html = render(Page("t", "s", (), "d", (), [section]))
    assert "24 of 29 that can be compared" in html and DISCLAIMER in html
    assert "astrocytoma, IDH-mutant" in html and "atrx in 3 patients, tertp in 1 patient" in html
    add_subtype(section, None)
    assert section.missing == ["Integrated subtype"]


def test_rules_are_registered_with_a_description():
    entry = next(entry for entry in subtypes.entries() if entry.name == "cns5_2021")
    assert "CNS5" in entry.summary
