"""Run all checks over a cohort, in parallel over its cases, and write what they found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glioma_nas.cohort import Cohort, examine_cohort
from glioma_nas.config import CohortConfig, MarkerConfig
from glioma_nas.errors import CohortError, did_you_mean
from glioma_nas.files import write_json, write_text
from glioma_nas.progress import Progress, Silent
from glioma_nas.validation.case_checks import CaseTask, check_case
from glioma_nas.validation.cohort_checks import check_copies, check_geometry, check_persons
from glioma_nas.validation.findings import SEVERITIES, CaseReport, Finding, Severity, split_remedy
from glioma_nas.validation.label_checks import check_labels
from glioma_nas.worker_pool import KILLED, outcomes

PAGE = "validation.html"
RECORD = "validation.json"


@dataclass(frozen=True)
class Demands:
    """What a run asks of the cohort beside its files being sound.

    Attributes:
        sequences: Sequences every case should have; empty for those the cohort has.
        markers: Markers whose labels are needed.
        n_folds: Folds every class should reach.
        one_grid: Whether the files of a case must lie on one grid.
    """

    sequences: tuple[str, ...] = ()
    markers: Mapping[str, MarkerConfig] = field(default_factory=dict)
    n_folds: int = 5
    one_grid: bool = True


@dataclass(frozen=True)
class Validation:
    """The outcome.

    Attributes:
        cohort: The cases that could be read from the sheet.
        format: What it is written as.
        sequences: Sequences that were asked for.
        reports: One for each case, in the cohort's order.
        findings: Of all cases and of the cohort, the worst first.
    """

    cohort: Cohort
    format: str
    sequences: tuple[str, ...]
    reports: tuple[CaseReport, ...]
    findings: tuple[Finding, ...]

    @property
    def n_errors(self) -> int:
        """Number of findings that stop or spoil a run."""
        return self.count("error")

    @property
    def n_files(self) -> int:
        """Number of files that were read."""
        return sum(len(report.files) for report in self.reports)

    def count(self, severity: Severity) -> int:
        """Return the number of findings of one severity."""
        return sum(finding.severity == severity for finding in self.findings)

    def as_record(self) -> dict[str, Any]:
        """Return plain data: counts, findings, and the facts of every file."""
        return {
            "cohort": self.cohort.sheet.name,
            "format": self.format,
            "n_cases": len(self.cohort.cases),
            "n_patients": len({case.patient_id for case in self.cohort.cases}),
            "n_files": self.n_files,
            "sequences": list(self.sequences),
            "counts": {severity: self.count(severity) for severity in SEVERITIES},
            "findings": [finding.as_row() for finding in self.findings],
            "files": [
                {"case_id": report.case_id, **facts.as_row()} for report in self.reports for facts in report.files
            ],
        }


def validate_cohort(
    config: CohortConfig, demands: Demands | None = None, *, workers: int = 1, progress: Progress | None = None
) -> Validation:
    """Read every byte of a cohort and check it.

    Args:
        config: Where the cohort is and how it is read.
        demands: What a run asks of it.
        workers: Processes; the result does not depend on them.
        progress: Where to report.

    Raises:
        CohortError: The sheet or folder as a whole cannot be read.
    """
    demands = demands or Demands()
    reading = examine_cohort(config, strict=False)
    cohort = reading.cohort
    wanted = demands.sequences or cohort.sequences
    findings = [
        Finding("error", "unusable-row", what, remedy, problem.case_id)
        for problem in reading.problems
        for what, remedy in [split_remedy(problem.message)]
    ]
    findings += [Finding("note", "reading", note, "nothing, if that is right") for note in reading.notes]
    findings += [
        Finding("error", "no-sequence", f"no case has {name}", did_you_mean(name, cohort.sequences), column=name)
        for name in wanted
        if name not in cohort.sequences
    ]
    if not cohort.cases and not findings:
        raise CohortError(f"{config.sheet}: holds no rows below the header; add one line for each case")
    # Without a configuration nobody has said yet what to do about it.
    missing: Severity = "error" if demands.sequences and config.missing_sequence == "error" else "warning"
    present = tuple(name for name in wanted if name in cohort.sequences)
    tasks = [CaseTask(case, present, missing, config.mask_labels, demands.one_grid) for case in cohort.cases]
    reports: dict[int, CaseReport] = {}
    with (progress or Silent()).task("validate", len(tasks)) as task:
        for index, report in outcomes(check_case, tasks, workers=workers, killed=_killed):
            reports[index] = report
            task.advance()
    ordered = tuple(reports[index] for index in range(len(tasks)))
    findings += [finding for report in ordered for finding in report.findings]
    findings += [*check_copies(ordered), *check_geometry(ordered), *check_persons(cohort.cases)]
    findings += check_labels(cohort, demands.markers, demands.n_folds)
    findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    return Validation(cohort, reading.format, wanted, ordered, tuple(findings))


def _killed(task: CaseTask) -> CaseReport:
    what, remedy = split_remedy(KILLED)
    case = task.case
    return CaseReport(case.case_id, case.patient_id, (), (Finding("error", "killed", what, remedy, case.case_id),))


def write_validation(validation: Validation, folder: Path) -> Path:
    """Write ``validation.json`` and ``validation.html`` into ``folder``; return the page."""
    from glioma_nas.validation.page import validation_page

    write_json(folder / RECORD, validation.as_record())
    write_text(folder / PAGE, validation_page(validation))
    return folder / PAGE
