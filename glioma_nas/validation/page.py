"""Set a validation as one HTML page; every text in it is escaped by the report's template."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from glioma_nas import __version__
from glioma_nas.report.document import Column, Headline, Paragraph, Row, Section, Table, number, plural, text
from glioma_nas.report.page import Page, render
from glioma_nas.validation.findings import SEVERITIES, Finding, grouped
from glioma_nas.validation.validating import Validation

_MAX_ROWS = 2000
_MAX_NAMES = 8


def validation_page(validation: Validation) -> str:
    """Return the page."""
    counts = {severity: validation.count(severity) for severity in SEVERITIES}
    n_cases = len(validation.cohort.cases)
    clean = n_cases - len({item.case_id for item in validation.findings if item.severity == "error" and item.case_id})
    return render(
        Page(
            title="Cohort check",
            subtitle="Every byte of every file, every cell of the sheet",
            facts=[
                ("Cohort", validation.cohort.sheet.name),
                ("Read as", validation.format),
                ("Sequences", ", ".join(validation.sequences) or "none"),
                ("glioma_nas", __version__),
            ],
            disclaimer="Research use only. A cohort without findings may still hold wrong labels or wrong masks: look.",
            headlines=[
                Headline(
                    "Cases", str(n_cases), plural(len({c.patient_id for c in validation.cohort.cases}), "patient")
                ),
                Headline("Files", str(validation.n_files), "read to the last byte"),
                Headline("Errors", str(counts["error"]), f"{clean} of {plural(n_cases, 'case')} without"),
                Headline("Warnings", str(counts["warning"]), plural(counts["note"], "note")),
            ],
            sections=[_summary(validation), _inventory(validation), _every_finding(validation), _files(validation)],
        )
    )


def shown_cases(names: Sequence[str]) -> str:
    """Name the first few cases and count the others."""
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(names[:_MAX_NAMES]) + more


def _summary(validation: Validation) -> Section:
    section = Section("summary", "What to do")
    if not validation.findings:
        section.add(Paragraph("Nothing was found."))
        return section
    rows: list[Row] = [
        {
            "severity": group.severity,
            "finding": group.code,
            "count": group.count,
            "cases": shown_cases(group.cases) or "the cohort",
            "message": group.message,
            "remedy": group.remedy,
        }
        for group in grouped(validation.findings)
    ]
    columns = (
        text("severity", "Severity"),
        text("finding", "Finding"),
        number("count", "Times"),
        text("cases", "Cases"),
        text("message", "First of them"),
        text("remedy", "What to do"),
    )
    caption = f"Findings by kind, n = {len(validation.findings)}. Errors stop or spoil a run, warnings may."
    section.add(Table("findings_by_kind", caption, columns, rows))
    return section


def _inventory(validation: Validation) -> Section:
    section = Section("inventory", "What there is")
    rows: list[Row] = []
    for column in (*validation.cohort.sequences, "mask"):
        files = [facts for report in validation.reports for facts in report.files if facts.column == column]
        read = [facts for facts in files if facts.spacing_mm]
        slices = [min(facts.shape) for facts in read]
        thickness = [max(facts.spacing_mm) for facts in read]
        orientations = Counter(facts.orientation for facts in read)
        rows.append(
            {
                "column": column,
                "n": len(files),
                "missing": len(validation.reports) - len(files),
                "slices": _span(slices, 0),
                "thickness": _span(thickness, 2),
                "orientations": ", ".join(f"{name} {count}" for name, count in orientations.most_common()) or "none",
            }
        )
    columns = (
        text("column", "Files"),
        number("n", "Cases"),
        number("missing", "Missing"),
        text("slices", "Fewest voxels along an axis"),
        text("thickness", "Largest voxel side, mm"),
        text("orientations", "Stored as"),
    )
    section.add(
        Table("inventory", f"Files of {plural(len(validation.reports), 'case')}; smallest to largest.", columns, rows)
    )
    labels: list[Row] = []
    for name in validation.cohort.label_columns:
        values = Counter(case.labels[name] for case in validation.cohort.cases if name in case.labels)
        common = ", ".join(f"{value} {count}" for value, count in values.most_common(_MAX_NAMES))
        more = f" and {len(values) - _MAX_NAMES} other values" if len(values) > _MAX_NAMES else ""
        unknown = len(validation.cohort.cases) - values.total()
        labels.append({"column": name, "values": (common + more) or "none", "unknown": unknown})
    if labels:
        known = (text("column", "Column"), text("values", "Values and cases"), number("unknown", "Unknown"))
        section.add(Table("labels", "Label columns of the sheet.", known, labels))
    return section


def _every_finding(validation: Validation) -> Section:
    section = Section("findings", "Every finding")
    rows = [_finding_row(finding) for finding in validation.findings[:_MAX_ROWS]]
    columns = (
        text("severity", "Severity"),
        Column("Case", lambda row: row["case_id"] or "cohort"),
        Column("File or column", lambda row: row["column"] or ""),
        text("message", "Finding"),
        text("remedy", "What to do"),
    )
    if rows:
        section.add(Table("findings", f"Findings, {len(rows)} of {len(validation.findings)}.", columns, rows))
    if len(validation.findings) > len(rows):
        section.add(Paragraph("The others are in validation.json."))
    if not rows:
        section.add(Paragraph("None."))
    return section


def _finding_row(finding: Finding) -> Row:
    return finding.as_row()


def _files(validation: Validation) -> Section:
    section = Section("files", "Every file")
    rows: list[Row] = [
        {
            "case_id": report.case_id,
            "column": facts.column,
            "shape": " × ".join(map(str, facts.shape)) or None,
            "spacing": " × ".join(f"{side:.3g}" for side in facts.spacing_mm) or None,
            "orientation": facts.orientation or None,
            "dtype": facts.dtype or None,
            "range": None if facts.low is None else f"{facts.low:.4g} … {facts.high:.4g}",
            "zero": None if facts.zero_share is None else f"{100 * facts.zero_share:.0f} %",
        }
        for report in validation.reports
        for facts in report.files
    ]
    columns = (
        text("case_id", "Case"),
        text("column", "File"),
        text("shape", "Voxels"),
        text("spacing", "Spacing, mm"),
        text("orientation", "Stored as"),
        text("dtype", "Type"),
        text("range", "Values"),
        text("zero", "Zero"),
    )
    section.add(Table("files", f"Files, {min(len(rows), _MAX_ROWS)} of {len(rows)}.", columns, rows[:_MAX_ROWS]))
    return section


def _span(values: Sequence[float], digits: int) -> str:
    if not values:
        return "none"
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return low if low == high else f"{low} to {high}"
