"""Check the cases of a cohort against each other: copies, orientations, spacings, persons."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from glioma_nas.cohort import Case
from glioma_nas.validation.findings import CaseReport, Finding

_AGE_GAP_YEARS = 15.0
_SPACING_RATIO = 3.0
_LONG_NUMBER_DIGITS = 7


def check_copies(reports: Sequence[CaseReport]) -> list[Finding]:
    """Find identical voxels, scans or masks with tumour, in two cases.

    Under two patients they are an error, since they could fall on both sides of a split.
    """
    seen: dict[str, tuple[CaseReport, str]] = {}
    findings = []
    for report in reports:
        for facts in report.files:
            if facts.voxel_hash is None or (facts.column == "mask" and not facts.high):
                continue
            if facts.voxel_hash not in seen:
                seen[facts.voxel_hash] = (report, facts.column)
                continue
            twin, column = seen[facts.voxel_hash]
            if twin.case_id == report.case_id:
                continue  # found with the case already
            same_patient = twin.patient_id == report.patient_id
            findings.append(
                Finding(
                    "warning" if same_patient else "error",
                    "duplicate" if same_patient else "duplicate-patients",
                    f"{facts.column} holds the same voxels as {column} of case {twin.case_id}, "
                    + ("of the same patient" if same_patient else "which is filed under another patient"),
                    "drop one of the cases, or give both one patient_id",
                    report.case_id,
                    facts.column,
                )
            )
    return findings


def check_geometry(reports: Sequence[CaseReport]) -> list[Finding]:
    """Tell mixed orientations, and cases whose spacing is far from the others'."""
    findings = []
    scans = [(report, facts) for report in reports for facts in report.files if facts.orientation]
    orientations = Counter(facts.orientation for _, facts in scans)
    if len(orientations) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in orientations.most_common())
        findings.append(
            Finding(
                "note",
                "mixed-orientations",
                f"files are stored in {len(orientations)} orientations: {listed}",
                "keep 'orient' the first of preprocess.steps",
            )
        )
    if scans:
        typical = np.median([np.sort(facts.spacing_mm) for _, facts in scans], axis=0)
        for report, facts in scans:
            ratio = np.sort(facts.spacing_mm) / typical
            if float(ratio.max()) > _SPACING_RATIO or float(ratio.min()) < 1 / _SPACING_RATIO:
                sides = " × ".join(f"{side:.3g}" for side in facts.spacing_mm)
                usual = " × ".join(f"{side:.3g}" for side in typical)
                findings.append(
                    Finding(
                        "warning",
                        "odd-spacing",
                        f"voxels of {sides} mm, while the cohort's median is {usual} mm (sorted)",
                        "look whether this is the same kind of scan as the others",
                        report.case_id,
                        facts.column,
                    )
                )
    return findings


def check_persons(cases: Sequence[Case]) -> list[Finding]:
    """Find patients whose cases contradict each other, and ids that look like hospital numbers or names."""
    by_patient: defaultdict[str, list[Case]] = defaultdict(list)
    for case in cases:
        by_patient[case.patient_id].append(case)
    findings = []
    for members in by_patient.values():
        sexes = {case.sex for case in members if case.sex}
        ages = [case.age for case in members if case.age is not None]
        if len(sexes) > 1:
            findings.append(_contradiction(members, "sex", "is both M and F"))
        if ages and max(ages) - min(ages) > _AGE_GAP_YEARS:
            findings.append(_contradiction(members, "age", f"differs by {max(ages) - min(ages):.0f} years"))
        for column in ("idh", "codel_1p19q", "mgmt"):
            values = {case.labels[column].lower() for case in members if column in case.labels}
            if len(values) > 1:
                findings.append(_contradiction(members, column, f"is {' and '.join(sorted(values))}"))
    if telling := [case.case_id for case in cases if _looks_identifying(case.case_id)]:
        findings.append(
            Finding(
                "warning",
                "identifying-id",
                f"{len(telling)} case ids hold a long number, as hospital numbers and dates of birth are",
                "use study numbers, or set cohort.hash_ids to true",
            )
        )
    return findings


def _contradiction(members: Sequence[Case], column: str, text: str) -> Finding:
    names = ", ".join(case.case_id for case in members)
    return Finding(
        "error",
        "contradiction",
        f"{column} {text} in cases of one patient ({names})",
        "correct the sheet, or give the cases different patient_ids",
        members[0].case_id,
        column,
    )


def _looks_identifying(case_id: str) -> bool:
    digits = "".join(char if char.isdigit() else " " for char in case_id).split()
    return any(len(run) >= _LONG_NUMBER_DIGITS for run in digits)
