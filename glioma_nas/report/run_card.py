"""The model card of a whole run: what its networks and classifiers are for, what they are not for, how good they are.

The cards of single exported files are `glioma_nas.model_card`. Reference: Mitchell et al., Model Cards for Model
Reporting, FAT* 2019.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from glioma_nas.config import RunConfig
from glioma_nas.report.document import plural, show_interval, show_number
from glioma_nas.report.provenance_section import DISCLAIMER, run_id
from glioma_nas.report.records import RunRecords
from glioma_nas.report.segmentation_section import NetworkSummary, device

NOT_MEASURED = "not measured"


def run_card(records: RunRecords, config: RunConfig, summaries: Mapping[str, NetworkSummary]) -> str:
    """Render the card as Markdown."""
    cohort = records.cohort
    patients = {case.patient_id for case in cohort.cases.values()}
    lines = [
        "# Model card",
        "",
        f"**{DISCLAIMER}**",
        "",
        "## Models",
        "",
        "| | |",
        "|---|---|",
        f"| run | {run_id(records)}, seed {config.seed} |",
        f"| networks | {', '.join(summaries) or NOT_MEASURED}: outline the whole tumour on axial slices of "
        f"{', '.join(config.cohort.sequences)} |",
        f"| classifiers | {_classifiers(config)} |",
        f"| learnt from | {plural(len(patients), 'patient')}, {plural(len(cohort.cases), 'case')} of one cohort, in "
        f"{cohort.folds.n} folds by patient, hash {cohort.folds.hash[:16]} |",
        "",
        "## Meant for",
        "",
        "- Research on segmentation and on what images say about molecular markers, by people who check every outline.",
        "- Adults with a glioma that tissue has shown or will show, scanned as the patients of the run were.",
        "",
        "## Not meant for",
        "",
        "- Diagnosis, choice of treatment, or sparing a patient a biopsy.",
        "- Children, other tumours, scans after surgery, other modalities, or sequences the run did not see.",
        "",
        "## How good",
        "",
        "Out-of-fold, by patient, with 95 % intervals over patients.",
        "",
        "| what | value | 95 % interval | n |",
        "|---|---:|---:|---:|",
        *_segmentation(records, summaries),
        *_marker_rows(records),
        "",
        "## Who is underrepresented",
        "",
        *_groups(records),
        "",
        "## Limits",
        "",
        "- Patients of one cohort: scanners, protocols, ages and tumours it lacks were never seen; `glioma-nas "
        "evaluate` measures how it does elsewhere.",
        "- Each network was trained once a fold; how figures vary with the seed is not measured.",
        "- Probabilities hold for the share of positive patients of this cohort.",
        "- Input that is missing, of another modality, or far from the scans of the run is refused by `glioma-nas "
        "predict`; what passes can still be unlike them.",
        "",
    ]
    return "\n".join(lines)


def _classifiers(config: RunConfig) -> str:
    named = [f"{name} ({marker.classifier})" for name, marker in config.classify.markers.items()]
    return ", ".join(named) or "none"


def _segmentation(records: RunRecords, summaries: Mapping[str, NetworkSummary]) -> list[str]:
    if not summaries:
        return [f"| Dice | {NOT_MEASURED} | | |"]
    lines = []
    for name, summary in summaries.items():
        dice = summary.dice
        ends = show_interval(dice.low, dice.high, 3) or NOT_MEASURED
        lines.append(f"| Dice, {name} | {show_number(dice.value, 3)} | {ends} | {dice.n} |")
    for name, record in records.latency.items():
        median = show_number(record["median_ms"], 2)
        lines.append(f"| time for a slice, {name}; {device(records)} | {median} ms | | {record['n']} |")
    return lines


def _marker_rows(records: RunRecords) -> list[str]:
    lines = []
    for name, found in records.markers.items():
        auc: Mapping[str, Any] = found.metrics.get("auc", {})
        value = show_number(auc.get("value"), 2)
        if value is None:
            lines.append(f"| AUC, {name} | {NOT_MEASURED} | | |")
            continue
        ends = show_interval(auc.get("low"), auc.get("high"), 2) or NOT_MEASURED
        lines.append(f"| AUC, {name} | {value} | {ends} | {auc['n']}, {auc['n_positive']} positive |")
        baseline = show_number(found.baseline_metrics.get("auc", {}).get("value"), 2)
        if baseline is not None:
            lines.append(f"| AUC, {name}, from age and sex alone | {baseline} | | {auc['n']} |")
    return lines


def _groups(records: RunRecords) -> list[str]:
    cases = list({case.patient_id: case for case in records.cohort.cases.values()}.values())
    ages = sorted(case.age for case in cases if case.age is not None)
    women, men = (sum(case.sex == sex for case in cases) for sex in ("F", "M"))
    span = f"{ages[0]:.0f} to {ages[-1]:.0f} years" if ages else "unknown"
    return [
        f"- Sex: {women} women, {men} men, {len(cases) - women - men} unknown. Age: {span}, "
        f"{len(cases) - len(ages)} unknown.",
        "- Origin, ethnicity and social position are not in the data, so nothing is known about differences by them.",
    ]
