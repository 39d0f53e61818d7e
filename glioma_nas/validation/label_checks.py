"""Check the label columns: codes, spelling, ranges, classes, and what the WHO's rules exclude."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from glioma_nas.cohort import Case, Cohort
from glioma_nas.config import MarkerConfig
from glioma_nas.errors import did_you_mean
from glioma_nas.validation.findings import Finding

_CODES: Mapping[str, frozenset[str]] = {
    "idh": frozenset({"mutant", "wildtype"}),
    "codel_1p19q": frozenset({"codeleted", "intact"}),
    "mgmt": frozenset({"methylated", "unmethylated"}),
    "grade": frozenset({"G1", "G2", "G3", "G4"}),
}
_MAX_WORDS = 12
_MIN_FOR_FRACTIONS = 5


def check_labels(cohort: Cohort, markers: Mapping[str, MarkerConfig], n_folds: int) -> list[Finding]:
    """Check every label column, and those that markers use more closely.

    Args:
        cohort: The cases.
        markers: Of the configuration; empty when only a sheet was given.
        n_folds: Folds that every class must reach.
    """
    findings: list[Finding] = []
    used = {marker.column for marker in markers.values()}
    for column in cohort.label_columns:
        values = {case.case_id: case.labels[column] for case in cohort.cases if column in case.labels}
        findings += _spelling(column, values)
        findings += _codes(column, values, used)
        if column.lower().startswith("ki67"):
            findings += _ki67(column, values)
    for name, marker in markers.items():
        findings += _classes(cohort, name, marker, n_folds)
    return [*findings, *_who_rules(cohort.cases)]


def _spelling(column: str, values: Mapping[str, str]) -> list[Finding]:
    spellings: defaultdict[str, set[str]] = defaultdict(set)
    for value in values.values():
        spellings["".join(filter(str.isalnum, value.lower()))].add(value)
    return [
        Finding(
            "error",
            "label-spelling",
            f"{column} spells one value in {len(names)} ways: {', '.join(sorted(names))}",
            "spell it one way; each spelling counts as a class of its own",
            column=column,
        )
        for names in spellings.values()
        if len(names) > 1
    ]


def _codes(column: str, values: Mapping[str, str], used: set[str]) -> list[Finding]:
    allowed = _CODES.get(column)
    if allowed is None:
        return []
    unknown = Counter(value for value in values.values() if value not in allowed)
    return [
        Finding(
            "error" if column in used else "warning",
            "label-code",
            f"{column} is '{value}' in {count} case{'s' if count > 1 else ''}",
            f"use one of {', '.join(sorted(allowed))}, or an empty cell when unknown",
            column=column,
        )
        for value, count in unknown.most_common(_MAX_WORDS)
    ]


def _ki67(column: str, values: Mapping[str, str]) -> list[Finding]:
    findings = []
    numbers: list[float] = []
    for case_id, value in values.items():
        number = _number(value)
        if number is None or not 0 <= number <= 100:
            findings.append(
                Finding(
                    "error",
                    "ki67-range",
                    f"{column} is '{value}'",
                    "give the index as a number from 0 to 100 (per cent), without signs",
                    case_id,
                    column,
                )
            )
        else:
            numbers.append(number)
    if len(numbers) >= _MIN_FOR_FRACTIONS and max(numbers) <= 1:
        findings.append(
            Finding("error", "ki67-range", f"{column} never exceeds 1", "give per cent, not fractions", column=column)
        )
    return findings


def _classes(cohort: Cohort, name: str, marker: MarkerConfig, n_folds: int) -> list[Finding]:
    column = marker.column
    if column not in cohort.label_columns:
        remedy = did_you_mean(column, cohort.label_columns)
        return [Finding("error", "no-label", f"marker '{name}' needs column '{column}'", remedy, column=column)]
    positive: set[str] = set()
    known: set[str] = set()
    for case in cohort.cases:
        if column not in case.labels:
            continue
        known.add(case.patient_id)
        value = case.labels[column]
        number = _number(value)
        if (marker.positive is not None and value.lower() == marker.positive.strip().lower()) or (
            marker.threshold is not None and number is not None and number >= marker.threshold
        ):
            positive.add(case.patient_id)
    fewest = min(len(positive), len(known) - len(positive))
    needed = max(2, n_folds)
    if fewest >= needed:
        return []
    text = f"marker '{name}' has {len(positive)} positive and {len(known) - len(positive)} negative patients"
    if fewest == 0:
        return [Finding("error", "one-class", text, "correct the labels, or the marker's 'positive'", column=column)]
    remedy = f"a run refuses fewer than {needed} of a class: lower folds.n_folds, or add patients"
    return [Finding("error", "rare-class", text, remedy, column=column)]


def _who_rules(cases: Sequence[Case]) -> list[Finding]:
    return [
        Finding(
            "warning",
            "label-conflict",
            "1p/19q codeleted with IDH wildtype, which the WHO classification of 2021 does not know",
            "look into the pathology report",
            case.case_id,
            "codel_1p19q",
        )
        for case in cases
        if case.labels.get("idh") == "wildtype" and case.labels.get("codel_1p19q") == "codeleted"
    ]


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
