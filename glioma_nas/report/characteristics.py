"""Who the patients are, in all and in each partition ("table 1"), and how many of the sheet came how far."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from glioma_nas.cohort import UNKNOWN_VALUES
from glioma_nas.config import RunConfig, indicated_by
from glioma_nas.prepared import PreparedCase
from glioma_nas.report.document import Table, number, plural, text
from glioma_nas.report.records import RunRecords

UNKNOWN = "unknown"
MAX_VALUES = 8  # a column with more distinct values is a measurement, not a class


def label_value(case: PreparedCase, column: str, config: RunConfig) -> str:
    """Return the class a case has in a label column; thresholds of configured markers are applied."""
    raw = str(case.labels.get(column, "")).strip()
    if raw.lower() in UNKNOWN_VALUES:
        return UNKNOWN
    for marker in config.classify.markers.values():
        if marker.column == column and marker.threshold is not None:
            try:
                value = float(raw)
            except ValueError:
                return raw
            return f"≥ {marker.threshold:g}" if value >= marker.threshold else f"< {marker.threshold:g}"
    return raw


def flow_table(records: RunRecords, config: RunConfig) -> Table:
    """Count the cases and patients from the sheet to each analysis."""
    cases = list(records.cohort.cases.values())
    rows: list[dict[str, Any]] = [_step("in the sheet", len(cases) + len(records.cohort.excluded), None)]
    reasons = Counter(
        "cannot be prepared" if item.reason.startswith("failed:") else item.reason for item in records.cohort.excluded
    )
    rows += [_step(f"left out: {reason}", -count, None) for reason, count in reasons.most_common()]
    rows.append(_step("analysed", len(cases), cases))
    rows.append(_step("with an expert mask", sum(case.has_mask for case in cases), [c for c in cases if c.has_mask]))
    if records.dice is not None:
        scored = set(records.dice.loc[records.dice["dice"].notna(), "case_id"])
        rows.append(_step("outline scored", len(scored), [case for case in cases if case.case_id in scored]))
    for name, marker in config.classify.markers.items():
        labelled = [case for case in cases if label_value(case, marker.column, config) != UNKNOWN]
        rows.append(_step(f"{name} known", len(labelled), labelled))
        predictions = records.markers[name].predictions
        if predictions is not None:
            done = set(predictions["case_id"])
            rows.append(_step(f"{name} predicted", len(done), [case for case in cases if case.case_id in done]))
    columns = (text("step", "Step"), number("cases", "Cases"), text("patients", "Patients"))
    return Table("flow", "From the sheet to each analysis.", columns, rows)


def _step(step: str, count: int, cases: Sequence[PreparedCase] | None) -> dict[str, Any]:
    # Of a case that was left out only its id is kept, so that its patient is not counted.
    patients = "not recorded" if cases is None else str(len({case.patient_id for case in cases}))
    return {"step": step, "cases": count, "patients": patients}


def characteristics_table(records: RunRecords, config: RunConfig) -> Table:
    """Describe all patients and the test patients of each fold, one row a characteristic; n counts patients.

    With several cases a patient counts with the first. No p-values: folds are drawn at random, so that differences are
    chance by construction.
    """
    cohort = records.cohort
    parts = {"all": list(cohort.cases)}
    parts.update({f"fold {fold}": list(cohort.folds.test(fold)) for fold in range(cohort.folds.n)})
    people = {
        name: _first_cases([cohort.cases[case] for case in ids if case in cohort.cases]) for name, ids in parts.items()
    }
    rows = [_row("patients", people, lambda cases: str(len(cases)))]
    rows.append(_row("age, years", people, lambda cases: _spread([case.age for case in cases], 0)))
    rows.append(
        _row("women", people, lambda cases: _share([c.sex == "F" for c in cases if c.sex is not None], len(cases)))
    )
    rows.append(
        _row("tumour volume, ml", people, lambda cases: _spread([c.quality.get("tumour_ml") for c in cases], 1))
    )
    rows.append(_row("slice distance, mm", people, lambda cases: _spread([float(c.spacing_mm[2]) for c in cases], 1)))
    rows.append(_row("pixel, mm", people, lambda cases: _spread([float(c.spacing_mm[0]) for c in cases], 2)))
    for name in cohort.sequences:
        if indicated_by(name) is None:
            rows.append(_row(f"{name} missing", people, _missing(name)))
    for column in dict.fromkeys(name for case in people["all"] for name in case.labels):
        values = {label_value(case, column, config) for case in people["all"]}
        if len(values) > MAX_VALUES:
            continue
        for value in sorted(values, key=lambda name: (name == UNKNOWN, name)):
            rows.append(_row(f"{column}: {value}", people, _having(column, value, config)))
    columns = (text("characteristic", "Characteristic"), *(text(name, name.capitalize()) for name in people))
    caption = (
        f"Characteristics by partition: all patients and the test patients of each fold, n = "
        f"{plural(len(people['all']), 'patient')}. Numbers: median (quartiles) of those known; classes: patients "
        "(share). Every patient is tested in one fold and trains in the others."
    )
    return Table("characteristics", caption, columns, rows)


def _first_cases(cases: Sequence[PreparedCase]) -> list[PreparedCase]:
    first: dict[str, PreparedCase] = {}
    for case in cases:
        first.setdefault(case.patient_id, case)
    return list(first.values())


def _row(
    characteristic: str,
    people: Mapping[str, Sequence[PreparedCase]],
    describe: Callable[[Sequence[PreparedCase]], str],
) -> dict[str, str]:
    return {"characteristic": characteristic, **{name: describe(cases) for name, cases in people.items()}}


def _missing(sequence: str) -> Callable[[Sequence[PreparedCase]], str]:
    return lambda cases: _share([sequence not in case.present for case in cases], len(cases))


def _having(column: str, value: str, config: RunConfig) -> Callable[[Sequence[PreparedCase]], str]:
    return lambda cases: _share([label_value(case, column, config) == value for case in cases], len(cases))


def _spread(values: Sequence[float | None], digits: int) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return UNKNOWN
    low, middle, high = np.percentile(known, [25, 50, 75])
    unknown = f", {len(values) - len(known)} unknown" if len(known) < len(values) else ""
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f}){unknown}"


def _share(holds: Sequence[bool], n: int) -> str:
    if not holds:
        return UNKNOWN
    unknown = f", {n - len(holds)} unknown" if len(holds) < n else ""
    return f"{sum(holds)} ({sum(holds) / len(holds):.0%}){unknown}"
