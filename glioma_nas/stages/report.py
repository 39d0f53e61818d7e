"""Report stage: one self-contained page, and everything on it as CSV and PNG files."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from glioma_nas import __version__
from glioma_nas.config import RunConfig
from glioma_nas.files import write_bytes, write_text
from glioma_nas.pipeline import StageContext
from glioma_nas.report import (
    checklists,
    cohort_section,
    further_evidence,
    marker_section,
    provenance_section,
    search_section,
    segmentation_section,
)
from glioma_nas.report.charts import colour_of
from glioma_nas.report.document import Figures, Headline, Section, Table, plural, show_interval, show_number
from glioma_nas.report.methods_text import methods_text
from glioma_nas.report.page import Page, anchor, render
from glioma_nas.report.records import RunRecords, read_records
from glioma_nas.report.run_card import run_card
from glioma_nas.report.segmentation_section import NetworkSummary, main_network

REPORT_FILE = "report.html"
METHODS_FILE = "methods.md"
CARD_FILE = "model_card.md"


def run(context: StageContext) -> dict[str, Any]:
    """Write ``report.html``, ``tables/*.csv``, ``figures/``, and what an article needs besides.

    That is ``methods.md``, ``model_card.md``, and the checklists ``claim_2024.csv`` and ``tripod_ai.csv``.

    What no stage measured is shown as "not measured".

    Returns:
        The file of the report and how many tables, figures and gaps it has.

    Raises:
        StorageError: A file of an earlier stage is there but broken.
    """
    config = context.config
    with context.progress.task("report", 3) as task:
        records = read_records(context.inputs, list(config.classify.markers))
        task.advance()
        further = further_evidence.read_evidence(
            config.report.evaluations,
            config.report.comparisons,
            run=context.inputs["preprocess"].parent,
            config=config,
            folds=records.cohort.folds,
        )
        summaries = segmentation_section.summarise(records, config)
        known = checklists.evidence(records, config, further)
        filled = {name: checklists.answers(items, known) for name, (_, items) in checklists.CHECKLISTS.items()}
        sections = build_sections(records, config, summaries, filled, further)
        page = Page(
            title=config.report.title,
            subtitle="glioma_nas run report",
            facts=_facts(records, config),
            disclaimer=provenance_section.DISCLAIMER,
            headlines=_headlines(records, config, summaries),
            sections=sections,
        )
        task.advance()
        tables = [block for section in sections for block in section.blocks if isinstance(block, Table)]
        plates = [block for section in sections for block in section.blocks if isinstance(block, Figures)]
        for table in tables:
            write_text(context.folder / "tables" / f"{anchor(table.name)}.csv", table.to_csv())
        pictures = [picture.figure for plate in plates for picture in plate.pictures]
        for figure in pictures:
            suffix, content = (".png", figure.png) if figure.png else (".svg", figure.svg())
            write_bytes(context.folder / "figures" / f"{anchor(figure.name)}{suffix}", content)
        for name, found in filled.items():
            write_text(context.folder / name, checklists.to_csv(found))
        write_text(context.folder / METHODS_FILE, methods_text(records, config))
        write_text(context.folder / CARD_FILE, run_card(records, config, summaries))
        write_text(context.folder / REPORT_FILE, render(page))
        task.advance()
    return {
        "report": REPORT_FILE,
        "n_tables": len(tables),
        "n_figures": len(pictures),
        "not_measured": [what for section in sections for what in section.missing],
    }


def build_sections(
    records: RunRecords,
    config: RunConfig,
    summaries: Mapping[str, NetworkSummary],
    filled: Mapping[str, Sequence[checklists.Answer]],
    further: further_evidence.FurtherEvidence,
) -> list[Section]:
    """Build every chapter, the limits last since they repeat what the others lack."""
    networks = list(dict.fromkeys([*summaries, *(name for name, _ in records.train_histories), *records.latency]))
    colours = colour_of(networks)
    sections = [
        cohort_section.build(records, config),
        search_section.build_search(records, config),
        search_section.build_training(records, config, colours),
        segmentation_section.build(records, config, summaries, colours),
        marker_section.build(records, config),
        further_evidence.build(further),
        checklists.build(filled),
        provenance_section.build_environment(records, config),
    ]
    return [*sections, provenance_section.build_limits(records, config, sections, further)]


def _facts(records: RunRecords, config: RunConfig) -> list[tuple[str, str]]:
    now = datetime.datetime.now(datetime.UTC)
    return [
        ("Date", f"{now:%d %B %Y, %H:%M} UTC".removeprefix("0")),
        ("Run", provenance_section.run_id(records)),
        ("Cohort", config.cohort.sheet.name),
        ("Folds", f"{records.cohort.folds.n}, by patient"),
        ("Seed", str(config.seed)),
        ("glioma_nas", __version__),
    ]


def _headlines(records: RunRecords, config: RunConfig, summaries: Mapping[str, NetworkSummary]) -> list[Headline]:
    cases = records.cohort.cases
    patients = len({case.patient_id for case in cases.values()})
    found = [Headline("Patients", str(patients), plural(len(cases), "case"))]
    if summaries:
        name = main_network(list(summaries))
        dice = summaries[name].dice
        value = show_number(dice.value, 3) or ""
        found.append(Headline(f"Dice, {name}", value, _detail(dice.low, dice.high, 3, f"n = {dice.n}, out-of-fold")))
    if "student" in records.latency:
        record = records.latency["student"]
        detail = f"95th percentile {show_number(record['p95_ms'], 2)}, {plural(int(record['n']), 'run')}"
        found.append(Headline("Latency, student", f"{show_number(record['median_ms'], 2)} ms", detail))
    found += _marker_headlines(records, config.classify.markers)
    return found


def _marker_headlines(records: RunRecords, markers: Mapping[str, Any]) -> Sequence[Headline]:
    found = []
    for name in markers:
        auc = records.markers[name].metrics.get("auc", {})
        value = show_number(auc.get("value"), 2)
        if value is not None:
            split = f"n = {auc['n']}, {auc['n_positive']} positive, {auc['split']}"
            found.append(Headline(f"AUC, {name}", value, _detail(auc.get("low"), auc.get("high"), 2, split)))
    return found


def _detail(low: Any, high: Any, digits: int, rest: str) -> str:
    ends = show_interval(low, high, digits)
    return f"{ends}; {rest}" if ends else rest
