"""The cohort: who was included, which sequences they have, how labels, age and sex are spread, and the folds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from glioma_nas.config import RunConfig, indicated_by
from glioma_nas.prepared import PreparedCase
from glioma_nas.quality_control import flags
from glioma_nas.report.characteristics import MAX_VALUES, UNKNOWN, characteristics_table, flow_table, label_value
from glioma_nas.report.document import Column, Facts, Paragraph, Row, Section, Table, number, plural, text
from glioma_nas.report.records import RunRecords


def build(records: RunRecords, config: RunConfig) -> Section:
    """Describe cohort and folds."""
    section = Section("cohort", "Cohort")
    cases = list(records.cohort.cases.values())
    patients = {case.patient_id for case in cases}
    with_mask = sum(case.has_mask for case in cases)
    section.add(
        Facts(
            (
                ("Patients", str(len(patients))),
                ("Cases", str(len(cases))),
                ("Cases with an expert mask", str(with_mask)),
                ("Cases excluded", str(len(records.cohort.excluded))),
                ("Sequences of the networks", ", ".join(config.cohort.sequences)),
                ("When a case lacks one", missing_rule(config)),
                ("Slice size", f"{config.preprocess.image_size_px} × {config.preprocess.image_size_px} px"),
            )
        ),
        flow_table(records, config),
        characteristics_table(records, config),
        _demographics(cases, config),
        _sequences(records, cases),
    )
    if records.cohort.excluded:
        section.add(
            Table(
                "excluded",
                f"Cases left out of every analysis, n = {len(records.cohort.excluded)}.",
                (text("case_id", "Case"), text("reason", "Reason")),
                [{"case_id": item.case_id, "reason": item.reason} for item in records.cohort.excluded],
            )
        )
    else:
        section.add(Paragraph("No case of the sheet was excluded."))
    section.add(_folds(records, config))
    _add_quality(section, cases)
    return section


def missing_rule(config: RunConfig) -> str:
    """Say in words what was done with sequences that a case lacks."""
    rules = {
        "error": "the run stops; none is missing",
        "exclude": "the case is left out",
        "zero": "its channel is zero",
        "indicator": "its channel is zero, and a channel for each sequence says whether it is there",
        "drop": f"it is dropped from the whole run: {', '.join(config.cohort.dropped_sequences) or 'none was'}",
    }
    return rules[config.cohort.missing_sequence]


def _demographics(cases: Sequence[PreparedCase], config: RunConfig) -> Table:
    rows = [_describe("all cases", "", cases)]
    # Age and sex can stand in for a marker, so they are shown for the markers; other columns are in the table by part.
    for column in dict.fromkeys(marker.column for marker in config.classify.markers.values()):
        groups: dict[str, list[PreparedCase]] = {}
        for case in cases:
            groups.setdefault(label_value(case, column, config), []).append(case)
        if len(groups) > MAX_VALUES:
            continue
        for value in sorted(groups, key=lambda name: (name == UNKNOWN, name)):
            rows.append(_describe(column, value, groups[value]))
    columns = (
        Column("Label", lambda row: row["label"] if row["first"] else ""),
        text("value", "Value"),
        number("cases", "Cases"),
        number("patients", "Patients"),
        Column("Age, median (quartiles)", _show_age, numeric=True),
        number("age_known", "Age known"),
        number("female", "Female"),
        number("male", "Male"),
        number("sex_unknown", "Sex unknown"),
    )
    seen: set[str] = set()
    marked = []
    for row in rows:
        marked.append({**row, "first": row["label"] not in seen})
        seen.add(row["label"])
    caption = f"Age (years) and sex by the classes of the markers, n = {plural(len(cases), 'case')}."
    return Table("demographics", caption, columns, marked)


def _describe(label: str, value: str, cases: Sequence[PreparedCase]) -> Row:
    ages = [case.age for case in cases if case.age is not None and math.isfinite(case.age)]
    low, middle, high = np.percentile(ages, [25, 50, 75]).tolist() if ages else (None, None, None)
    sexes = Counter(case.sex for case in cases)
    return {
        "label": label,
        "value": value,
        "cases": len(cases),
        "patients": len({case.patient_id for case in cases}),
        "age_median": middle,
        "age_quartile_1": low,
        "age_quartile_3": high,
        "age_known": len(ages),
        "female": sexes["F"],
        "male": sexes["M"],
        "sex_unknown": sexes[None],
    }


def _show_age(row: Row) -> str:
    if row["age_median"] is None:
        return UNKNOWN
    return f"{row['age_median']:.0f} ({row['age_quartile_1']:.0f} to {row['age_quartile_3']:.0f})"


def _sequences(records: RunRecords, cases: Sequence[PreparedCase]) -> Table:
    rows = []
    for sequence in records.cohort.sequences:
        if indicated_by(sequence) is not None:
            continue
        present = sum(sequence in case.present for case in cases)
        rows.append({"sequence": sequence, "present": present, "missing": len(cases) - present})
    columns = (text("sequence", "Sequence"), number("present", "Present"), number("missing", "Missing"))
    return Table("sequences", f"Sequences, n = {plural(len(cases), 'case')}.", columns, rows)


def _folds(records: RunRecords, config: RunConfig) -> Table:
    cohort = records.cohort
    known = {name for case in cohort.cases.values() for name in case.labels}
    wanted = [*(config.folds.stratify_by or ()), *(marker.column for marker in config.classify.markers.values())]
    shown = [name for name in dict.fromkeys(wanted) if name in known]
    rows = []
    for fold in range(cohort.folds.n):
        train = [cohort.cases[name] for name in cohort.folds.train(fold) if name in cohort.cases]
        test = [cohort.cases[name] for name in cohort.folds.test(fold) if name in cohort.cases]
        row: dict[str, Any] = {
            "fold": fold,
            "train_patients": len({case.patient_id for case in train}),
            "train_cases": len(train),
            "test_patients": len({case.patient_id for case in test}),
            "test_cases": len(test),
        }
        for name in shown:
            counts = Counter(label_value(case, name, config) for case in test)
            order = sorted(counts, key=lambda value: (value == UNKNOWN, value))
            row[f"test_{name}"] = "; ".join(f"{value} {counts[value]}" for value in order)
        rows.append(row)
    columns = (
        number("fold", "Fold"),
        number("train_patients", "Train patients"),
        number("train_cases", "Train cases"),
        number("test_patients", "Test patients"),
        number("test_cases", "Test cases"),
        *(text(f"test_{name}", f"{name} in test") for name in shown),
    )
    caption = f"Folds, drawn by patient with seed {cohort.folds.seed}; hash {cohort.folds.hash[:16]}."
    return Table("folds", caption, columns, rows)


def _add_quality(section: Section, cases: Sequence[PreparedCase]) -> None:
    if not cases or not all("brain_ml" in case.quality for case in cases):
        section.add_missing("Quality control of the prepared scans")
        return
    raised = {name: found for name, found in flags({case.case_id: case.quality for case in cases}).items() if found}
    if not raised:
        section.add(Paragraph(f"Quality control raised no flag, n = {plural(len(cases), 'case')}."))
        return
    rows = [{"case_id": name, "flag": flag} for name, found in raised.items() for flag in found]
    caption = (
        f"Quality control: {len(raised)} of {plural(len(cases), 'case')} flagged. A flag asks somebody to look at the "
        "contact sheet (preprocess/qc.html) and changes nothing."
    )
    section.add(Table("quality_flags", caption, (text("case_id", "Case"), text("flag", "Flag")), rows))
