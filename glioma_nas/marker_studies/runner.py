"""Run one published table on a cohort: cross-validate every row and every baseline on the same patients and folds."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from glioma_nas.config import RunConfig
from glioma_nas.errors import ConfigError, StorageError, did_you_mean
from glioma_nas.files import canonical_json, read_json, sha256_file, sha256_text, write_json, write_text
from glioma_nas.marker_analysis import Analysis, analyse
from glioma_nas.marker_evaluator import build_evaluator, finished_folds, load_evaluator, save_evaluator
from glioma_nas.marker_masks import EXPERT, GIVEN, mask_source
from glioma_nas.marker_studies.tables import FIGURES, StudyTable
from glioma_nas.pipeline import MANIFEST
from glioma_nas.prepared import PreparedCohort
from glioma_nas.progress import Progress
from glioma_nas.seeding import derive_seed
from glioma_nas.stages.classify import MarkerPlan, classifier_settings, cut_cases, plan_marker

PRESETS = ("small", "full")
STUDY_FILE = "study.json"


@dataclass(frozen=True)
class StudyResult:
    """What a study found.

    Attributes:
        table: The published table.
        plan: Patients, labels, masks.
        preset: ``small`` or ``full``.
        analysis: Figures of every row and baseline, by label or registered name.
        frames: The same keys → out-of-fold predictions.
        folder: Where the study's files lie.
        n_folds: Folds of the cross-validation.
    """

    table: StudyTable
    plan: MarkerPlan
    preset: str
    analysis: Analysis
    frames: Mapping[str, pd.DataFrame]
    folder: Path
    n_folds: int

    def rows(self) -> list[dict[str, Any]]:
        """Return one row for each row of the table and each baseline: ours with intervals, the source's beside."""
        published = {row.label: row for row in self.table.rows}
        found = []
        for name, report in self.analysis.reports.items():
            row: dict[str, Any] = {"model": name, "kind": "table" if name in published else "baseline"}
            auc = report["auc"]
            row |= {"n": auc.n, "n_positive": auc.n_positive, "split": f"out-of-fold, {self.n_folds} folds, by patient"}
            for figure, estimate in report.items():
                row |= {figure: estimate.value, f"{figure}_low": estimate.low, f"{figure}_high": estimate.high}
            row["permutation_p"] = self.analysis.permutation_p[name]
            printed = published[name].published if name in published else {}
            row |= {f"{figure}_in_source": printed.get(figure) for figure in FIGURES}
            row["source_row_impossible"] = published[name].is_impossible if name in published else None
            found.append(row)
        return found


def run_study(
    config: RunConfig,
    table: StudyTable,
    *,
    run_folder: Path,
    progress: Progress,
    marker: str | None = None,
    preset: str = "small",
    pretrained: Mapping[str, Path] | None = None,
) -> StudyResult:
    """Cross-validate every row of ``table`` and the baselines; finished folds are read back.

    Args:
        config: The run's configuration; ``classify`` says epochs, slices, masks and baselines.
        table: One of `glioma_nas.marker_studies.tables.TABLES`.
        run_folder: Folder whose preprocess stage (and, for a network's masks, segment stage) is done.
        progress: Where to report.
        marker: Marker of the configuration; by default the table's.
        preset: ``small`` for CPUs or ``full``.
        pretrained: Backbone → local weights file that its rows start from; all others start from random weights.

    Raises:
        ConfigError: The marker or preset is unknown, or no row has such a backbone.
        LabelError: The labels cannot be used.
        LeakageError: A mask comes from a network that saw its patient.
        StorageError: The folder holds a study of other inputs.
    """
    name = marker or table.marker
    if name not in config.classify.markers:
        raise ConfigError(
            f"classify.markers has no '{name}': {did_you_mean(name, config.classify.markers)} Add it, or name another "
            "with --marker"
        )
    if preset not in PRESETS:
        raise ConfigError(f"unknown preset '{preset}': {did_you_mean(preset, PRESETS)}")
    chosen = config.classify.markers[name]
    settings = classifier_settings(config.classify, chosen)
    options = _row_options(table, preset, pretrained or {})
    evaluators = {
        row.label: (row.classifier, build_evaluator(row.classifier, settings, options[row.label])) for row in table.rows
    }
    baselines = {other: (other, build_evaluator(other, settings, {})) for other in config.classify.baselines}
    cohort = PreparedCohort.load(run_folder / "preprocess")
    segmented = run_folder / "segment"
    masks = mask_source(config, segmented if segmented.is_dir() else None)
    plan = plan_marker(config, cohort, masks, name, chosen)
    folder = run_folder / "studies" / f"{table.name.replace('-', '_')}_{name}_{preset}"
    _claim(folder, config, run_folder, name, preset, pretrained or {})
    cases = cut_cases(config, cohort, plan)
    frames = {}
    for label, (classifier, evaluator) in {**evaluators, **baselines}.items():
        own = folder / "models" / slug(label)
        frames[label] = evaluator.cross_validate(
            cases,
            cohort.folds,
            folder=own,
            progress=progress,
            # The same seed for all rows: they differ by what the table varies, not by their draws.
            seed=derive_seed(config.seed, "study", name),
            device=config.device,
            label=label,
        )
        save_evaluator(own, classifier, evaluator)
    analysis = analyse(
        frames,
        classifiers=tuple(evaluators),
        seed=config.seed,
        marker=name,
        bootstrap_samples=config.classify.bootstrap_samples,
        permutation_samples=config.classify.permutation_samples,
    )
    result = StudyResult(table, plan, preset, analysis, frames, folder, cohort.folds.n)
    write_text(folder / "table.csv", pd.DataFrame(result.rows()).to_csv(index=False))
    for file, other, compared in (
        ("comparisons.csv", "baseline", analysis.versus),
        ("comparisons_between_rows.csv", "other", analysis.between),
    ):
        comparisons = [
            {"model": item.classifier, other: item.baseline, **item.as_json(), "sentence": item.sentence()}
            for item in compared
        ]
        write_text(folder / file, pd.DataFrame(comparisons).to_csv(index=False))
    for label, frame in frames.items():
        write_text(folder / "predictions" / f"{slug(label)}.csv", frame.to_csv(index=False))
    return result


def central_net_weights(result: StudyResult) -> dict[str, list[float]] | None:
    """Return branch → its share in CentralNet's weighted sums at each stage, mean of the folds (fig. 5-5).

    None when the table has no CentralNet.
    """
    label = next((row.label for row in result.table.rows if row.classifier == "central_net"), None)
    if label is None:
        return None
    folder = result.folder / "models" / slug(label)
    evaluator = load_evaluator(folder)
    folds = [evaluator.fusion_weights(fold) for fold in finished_folds(folder)]
    return {
        branch: [statistics.fmean(shares) for shares in zip(*(fold[branch] for fold in folds), strict=True)]
        for branch in folds[0]
    }


def slug(label: str) -> str:
    """Return a label as a file name.

    >>> slug("ResNeSt, MIX")
    'resnest_mix'
    """
    return re.sub(r"[^a-z0-9]+", "_", label.lower()).strip("_")


def _inputs(config: RunConfig, run_folder: Path) -> list[Path]:
    """List the files that change whenever slices or masks do."""
    masks = config.classify.masks
    paths = [run_folder / "preprocess" / MANIFEST]
    if masks == GIVEN and config.classify.mask_provenance is not None:
        paths.append(config.cohort.sheet.parent / config.classify.mask_provenance)
    if masks not in (EXPERT, GIVEN):
        paths.append(run_folder / "segment" / MANIFEST)
    return paths


def _row_options(table: StudyTable, preset: str, pretrained: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    options = {row.label: row.full_options(preset) for row in table.rows}
    backbones = sorted({str(chosen["backbone"]) for chosen in options.values() if "backbone" in chosen})
    for backbone in pretrained:
        if backbone not in backbones:
            has = f"it has {', '.join(backbones)}" if backbones else "its networks have no published weights"
            raise ConfigError(
                f"--pretrained {backbone}: no row of {table.name} with preset {preset} has this backbone; {has}"
            )
    for chosen in options.values():
        if chosen.get("backbone") in pretrained:
            chosen["pretrained"] = str(pretrained[chosen["backbone"]])
    return options


def _claim(
    folder: Path, config: RunConfig, run_folder: Path, marker: str, preset: str, pretrained: Mapping[str, Path]
) -> None:
    # Folds of another configuration must not be read back as if they were of this one.
    classify = config.classify.model_dump(mode="json", exclude={"markers"})
    content = {
        "seed": config.seed,
        "marker": config.classify.markers[marker].model_dump(mode="json"),
        "classify": classify,
        "missing_sequence": config.cohort.missing_sequence,
        "preset": preset,
        "pretrained": {backbone: sha256_file(path) for backbone, path in sorted(pretrained.items())},
        "folds": read_json(run_folder / "preprocess" / "folds.json")["hash"],
        "inputs": [sha256_file(path) for path in _inputs(config, run_folder)],
    }
    record = {"key": sha256_text(canonical_json(content)), **content}
    path = folder / STUDY_FILE
    if path.is_file() and read_json(path)["key"] != record["key"]:
        raise StorageError(
            f"{folder}: holds this study with other settings, slices or masks; delete it, or choose another --out"
        )
    write_json(path, record)
