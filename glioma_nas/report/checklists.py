"""Which items of CLAIM 2024 and TRIPOD+AI a run answers by itself, which its authors must write, and which it lacks.

Three states: ``auto`` (the run's own files answer it, and ``where`` says which), ``manual`` (only the authors know) and
``missing`` (the run could have answered it and did not; ``where`` says what would).
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from glioma_nas.config import RunConfig
from glioma_nas.report.checklist_items import CLAIM_2024, TRIPOD_AI, Item
from glioma_nas.report.document import Bullets, Paragraph, Section, Table, number, text
from glioma_nas.report.further_evidence import FurtherEvidence
from glioma_nas.report.records import RunRecords

State = Literal["auto", "manual", "missing"]
STATES: tuple[State, ...] = ("auto", "manual", "missing")
CHECKLISTS: Mapping[str, tuple[str, Sequence[Item]]] = {
    "claim_2024.csv": ("CLAIM 2024", CLAIM_2024),
    "tripod_ai.csv": ("TRIPOD+AI", TRIPOD_AI),
}


@dataclass(frozen=True)
class Evidence:
    """Whether the run answers something, and where, or what would."""

    state: State
    where: str


@dataclass(frozen=True)
class Answer:
    """One item of a checklist with its state for this run."""

    item: Item
    state: State
    where: str


def answers(items: Sequence[Item], known: Mapping[str, Evidence]) -> list[Answer]:
    """Give every item its state."""
    found = []
    for item in items:
        if not item.answer:
            found.append(Answer(item, "manual", item.hint))
            continue
        evidence = known[item.answer]
        added = f"; authors: {item.hint}" if item.hint and evidence.state == "auto" else ""
        found.append(Answer(item, evidence.state, f"{evidence.where}{added}"))
    return found


def to_csv(found: Sequence[Answer]) -> str:
    """Render a checklist as CSV: number, part, topic, state, where."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(("number", "part", "topic", "state", "where"))
    writer.writerows((one.item.number, one.item.part, one.item.topic, one.state, one.where) for one in found)
    return buffer.getvalue()


def build(filled: Mapping[str, Sequence[Answer]]) -> Section:
    """Sum the checklists up; the files hold every item.

    Args:
        filled: File name → its answers.
    """
    section = Section("checklists", "Reporting checklists")
    rows: list[dict[str, Any]] = []
    for file, found in filled.items():
        counts = Counter(one.state for one in found)
        states: dict[str, Any] = {state: counts[state] for state in STATES}
        rows.append({"checklist": CHECKLISTS[file][0], "file": file, "items": len(found), **states})
    columns = (
        text("checklist", "Checklist"),
        text("file", "File"),
        number("items", "Items"),
        number("auto", "Answered by the run"),
        number("manual", "For the authors"),
        number("missing", "Missing"),
    )
    caption = (
        "Items of the reporting guidelines. Answered: the file says where. For the authors: what no run can know. "
        "Missing: what this run could have shown and did not."
    )
    section.add(
        Table("checklists", caption, columns, rows),
        Paragraph(
            "Text for the methods section of an article, with versions and citations, is in methods.md; what the "
            "models are, and are not, for is in model_card.md."
        ),
    )
    gaps = {
        one.where: f"{CHECKLISTS[file][0]} {one.item.number}, {one.item.topic}: {one.where}"
        for file, found in reversed(list(filled.items()))
        for one in found
        if one.state == "missing"
    }
    if gaps:
        section.add(Bullets(tuple(f"{gap[0].upper()}{gap[1:]}." for gap in sorted(gaps.values()))))
    return section


def evidence(records: RunRecords, config: RunConfig, further: FurtherEvidence) -> dict[str, Evidence]:
    """Look through a run, and what lies beside it, for what answers the checklists."""
    markers = {name: found for name, found in records.markers.items() if found.metrics}
    summaries = [found.summary for found in markers.values()]
    has_dice, has_folds = records.dice is not None, records.cohort.folds.n > 1
    site = config.folds.site_column
    knows_sites = any(site in case.labels for case in records.cohort.cases.values())
    by_site = any(row["column"] == site for summary in summaries for row in summary.get("subgroups") or [])
    groups = any(summary.get("subgroups") for summary in summaries)
    trained = bool(records.train_histories)
    no_marker = "no marker was classified: configure classify.markers"
    return {
        "flow": _auto("report.html, Cohort: flow and excluded cases; tables/flow.csv, tables/excluded.csv"),
        "demographics": _auto("report.html, Cohort: characteristics by partition; tables/characteristics.csv"),
        "preprocessing": _auto("methods.md; config.yaml, preprocess; report.html, Cohort: quality control"),
        "subsets": _auto("methods.md: slices trained on, slices given to the classifiers; config.yaml"),
        "deidentification": _either(
            config.cohort.hash_ids,
            "identifiers are keyed hashes (cohort.hash_ids)",
            "set cohort.hash_ids, or describe how identifiers were replaced before the sheet was written",
            otherwise="manual",
        ),
        "missing_data": _auto("report.html, Cohort: sequences, and Molecular markers: cases left out; methods.md"),
        "grids": _auto("report.html, Cohort: slice distance and voxel size by partition"),
        "folds": _auto("report.html, Cohort: folds with their seed and hash; preprocess/folds.json"),
        "patient_level": _auto("by patient, checked by patient id and by the scans' voxels; report.html, Cohort"),
        "architecture": _either(
            records.derived["student"].architecture is not None,
            "report.html, Architecture search: drawings and cells; search/student.json, search/teacher.json",
            "run the search stage",
        ),
        "software": _auto("report.html, Environment; methods.md"),
        "initialisation": _auto("methods.md"),
        "training": _either(trained, "methods.md; report.html, Training; config.yaml", "run the train stage"),
        "model_selection": _either(
            records.search_history is not None or trained,
            "methods.md; report.html, Architecture search: candidates; train/manifest.json: epoch kept",
            "run the search and train stages",
        ),
        "ensembling": _auto("methods.md: one network a fold out-of-fold, the mean of all folds for new patients"),
        "metrics": _either(
            has_dice or bool(markers),
            "methods.md; report.html, Segmentation and Molecular markers",
            "run the segment and classify stages",
        ),
        "uncertainty": _either(
            has_dice or bool(markers),
            "methods.md; an interval and n beside every figure of report.html",
            "run the segment and classify stages",
        ),
        "robustness": _either(
            any((rows.seeds > 1).any() for rows in further.comparisons),
            "report.html, Other patients, other seeds: searches with other seeds; tables/comparison.csv",
            "one seed was run: `glioma-nas compare CONFIG --seeds N` repeats the search with others, and "
            "report.comparisons shows it here",
        ),
        "explanation": _either(
            any(found.pictures for found in markers.values()),
            "report.html, Molecular markers: Grad-CAM with randomised weights as control; classify/MARKER/grad_cam",
            "set classify.grad_cam_cases and classify a marker",
        ),
        "internal": _either(
            has_dice and has_folds, "report.html: every figure is out-of-fold, by patient", "run the segment stage"
        ),
        "external": _either(
            bool(further.measured),
            "report.html, Other patients, other seeds; tables/evaluations.csv, and the page of each evaluation",
            "`glioma-nas evaluate RUN COHORT` scores the frozen run on patients from elsewhere, and report.evaluations "
            "shows it here",
        ),
        "performance": _either(
            has_dice,
            "report.html, Segmentation; tables/segmentation.csv, tables/segmentation-paired.csv",
            "run the segment stage on cases with expert masks",
        ),
        "diagnostic": _either(
            bool(markers), "report.html, Molecular markers; tables/marker-*.csv, tables/subgroups-*.csv", no_marker
        ),
        "failures": _either(
            has_dice,
            "report.html, Segmentation: best, median and worst overlays, list of failures; tables/failures.csv",
            "run the segment stage on cases with expert masks",
        ),
        "limits": _auto("report.html, What this report does not know; model_card.md"),
        "sites": _either(
            by_site,
            f"report.html, Molecular markers: subgroups by {site}; folds balanced by site where balance is asked for",
            f"name '{site}' in classify.subgroups and classify a marker"
            if knows_sites
            else f"the sheet has no column '{site}' (folds.site_column); single centre, or add it",
            otherwise="missing" if knows_sites else "manual",
        ),
        "outcome": _either(bool(markers), "report.html, Molecular markers: column and positive class", no_marker),
        "predictors": _either(
            bool(markers), "methods.md: sequences, predicted masks, age and sex of every classifier", no_marker
        ),
        "recalibration": _either(
            any(summary.get("reliability") for summary in summaries),
            "temperature scaling on training patients, reliability after it: report.html, Molecular markers; for other "
            "cohorts `glioma-nas evaluate --recalibrate-on`",
            no_marker,
        ),
        "imbalance": _either(
            bool(markers),
            "report.html, Molecular markers: positives beside n, PR-AUC; thresholds by training patients",
            no_marker,
        ),
        "fairness": _either(
            groups, "report.html, Molecular markers: subgroups; tables/subgroups-*.csv", "set classify.subgroups"
        ),
        "thresholds": _either(
            bool(markers),
            "methods.md: probability at the chosen temperature, threshold and abstention from training patients",
            no_marker,
        ),
        "partitions_differ": _auto(
            "report.html, Cohort: characteristics by partition; for another cohort the drift table of `evaluate`"
        ),
        "events": _either(
            bool(markers), "report.html: n and positives beside every figure; tables/flow.csv", no_marker
        ),
        "bad_input": _auto("docs, Serving a new patient: what is refused; model_card.md"),
    }


def _auto(where: str) -> Evidence:
    return Evidence("auto", where)


def _either(holds: bool, where: str, lacking: str, *, otherwise: State = "missing") -> Evidence:
    return Evidence("auto", where) if holds else Evidence(otherwise, lacking)
