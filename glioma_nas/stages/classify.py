"""Stage: predict molecular markers from images, out-of-fold masks, age and sex, beside the age-and-sex baseline.

For each marker ``MARKER/`` holds ``predictions.csv`` (one row a case), ``metrics.json`` and ``roc.csv`` (patient
level), the same of the baseline as ``baseline_age_sex_*``, ``summary.json``, and in ``CLASSIFIER/`` and ``age_sex/``
the classifiers of every fold. Everything that can be wrong with labels, folds, masks or options is found before the
first training starts.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from glioma_nas.binary_statistics import binary_report
from glioma_nas.config import ClassifyConfig, MarkerConfig, RunConfig
from glioma_nas.errors import CohortError, StorageError
from glioma_nas.files import read_json, write_json, write_text
from glioma_nas.marker_evaluator import (
    PREDICTION_COLUMNS,
    ClassifierSettings,
    MarkerEvaluator,
    build_evaluator,
    patient_level,
    save_evaluator,
)
from glioma_nas.markers import (
    MarkerCase,
    check_folds_hold_both_classes,
    check_out_of_fold,
    cut_case,
    encode_labels,
)
from glioma_nas.pipeline import StageContext
from glioma_nas.prepared import PreparedCase, PreparedCohort
from glioma_nas.roc_analysis import Comparison, Estimate, paired_delong, roc_curve
from glioma_nas.seeding import derive_seed, numpy_generator

BASELINE = "age_sex"
MASKS_FOLDER = Path("masks_prepared") / "student"
PROVENANCE_FILE = "provenance.json"

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Plan:
    """One marker, checked and ready to train."""

    name: str
    config: MarkerConfig
    evaluators: Mapping[str, MarkerEvaluator]
    labels: Mapping[str, int]
    cases: tuple[PreparedCase, ...]
    n_label_unknown: int
    lacking: Mapping[str, str]


def run(context: StageContext) -> dict[str, Any]:
    """Cross-validate every marker's classifier and the baseline; see `glioma_nas.pipeline.Stage`.

    Raises:
        LabelError: A marker's labels cannot be used.
        LeakageError: A mask comes from a network that saw its patient.
        ConfigError: A classifier does not take an option.
        CohortError: A case lacks a sequence and the configuration says that this is an error.
        StorageError: A mask is missing.
    """
    cohort = PreparedCohort.load(context.inputs["preprocess"])
    plans = [_plan(context, cohort, name, marker) for name, marker in context.config.classify.markers.items()]
    if not plans:
        context.progress.note("classify: no markers configured")
    return {"markers": {plan.name: _classify(context, cohort, plan) for plan in plans}}


def build_evaluators(config: RunConfig, marker: MarkerConfig) -> dict[str, MarkerEvaluator]:
    """Build a marker's classifier and the baseline that stands beside it, by name.

    Raises:
        UnknownNameError: No classifier has that name.
        ConfigError: It does not take an option, or not those sequences.
    """
    settings = classifier_settings(config.classify, marker)
    return {
        name: build_evaluator(name, settings, marker.options if name == marker.classifier else {})
        for name in dict.fromkeys((marker.classifier, BASELINE))
    }


def _plan(context: StageContext, cohort: PreparedCohort, name: str, marker: MarkerConfig) -> _Plan:
    config = context.config
    evaluators = build_evaluators(config, marker)
    everyone = list(cohort.cases.values())
    known = encode_labels(everyone, name, marker, sheet=config.cohort.sheet, n_folds=cohort.folds.n)
    lacking = {
        case.case_id: next(sequence for sequence in marker.sequences if sequence not in case.present)
        for case in everyone
        if case.case_id in known and not set(marker.sequences) <= set(case.present)
    }
    if lacking and config.cohort.missing_sequence == "error":
        case_id, sequence = next(iter(lacking.items()))
        raise CohortError(
            f"case {case_id} lacks sequence '{sequence}' of marker '{name}' ({len(lacking)} such cases); "
            "set cohort.missing_sequence to exclude or zero"
        )
    left_out = lacking if config.cohort.missing_sequence == "exclude" else {}
    cases = tuple(case for case in everyone if case.case_id in known and case.case_id not in left_out)
    # Once more, for the cases that remain.
    labels = encode_labels(cases, name, marker, sheet=config.cohort.sheet, n_folds=cohort.folds.n)
    check_folds_hold_both_classes(cohort.folds, labels, name)
    provenance = context.inputs["segment"] / PROVENANCE_FILE
    check_out_of_fold(read_json(provenance), cases, source=provenance)
    return _Plan(name, marker, evaluators, labels, cases, len(everyone) - len(known), lacking)


def classifier_settings(config: ClassifyConfig, marker: MarkerConfig) -> ClassifierSettings:
    """Return what a marker's classifier is told."""
    return ClassifierSettings(
        sequences=marker.sequences,
        epochs=config.epochs,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        slices_per_case=config.slices_per_case,
        image_size_px=config.image_size_px,
    )


def _classify(context: StageContext, cohort: PreparedCohort, plan: _Plan) -> dict[str, Any]:
    folder = context.folder / plan.name
    cases = [_cut(context, cohort, plan, case) for case in plan.cases]
    frames: dict[str, pd.DataFrame] = {}
    reports: dict[str, dict[str, Estimate]] = {}
    for classifier, evaluator in plan.evaluators.items():
        frames[classifier] = evaluator.cross_validate(
            cases,
            cohort.folds,
            folder=folder / classifier,
            progress=context.progress,
            seed=derive_seed(context.config.seed, "classify", plan.name, classifier),
            device=context.config.device,
            label=plan.name if classifier == plan.config.classifier else f"{plan.name} {classifier}",
        )
        save_evaluator(folder / classifier, classifier, evaluator)
        reports[classifier] = _report(context, plan, classifier, frames[classifier])
    summary = _summary(context, cohort, plan, cases, frames, reports)
    _write(folder, plan, frames, reports, summary)
    context.progress.note(f"{plan.name}: {summary['statement']}")
    _logger.info("marker %s: out-of-fold AUC %.3f", plan.name, summary["metrics"]["auc"]["value"])
    return summary


def _cut(context: StageContext, cohort: PreparedCohort, plan: _Plan, case: PreparedCase) -> MarkerCase:
    return cut_case(
        case,
        _read_mask(context.inputs["segment"] / MASKS_FOLDER / f"{case.case_id}.npy"),
        order=cohort.sequences,
        sequences=plan.config.sequences,
        slices_per_case=context.config.classify.slices_per_case,
        image_size_px=context.config.classify.image_size_px,
        label=plan.labels[case.case_id],
        zero_missing=context.config.cohort.missing_sequence == "zero",
    )


def _read_mask(path: Path) -> NDArray[np.uint8]:
    try:
        mask: NDArray[np.uint8] = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as err:
        raise StorageError(f"{path}: predicted mask missing or damaged ({err}); run the segment stage again") from err
    return mask


def _report(context: StageContext, plan: _Plan, classifier: str, frame: pd.DataFrame) -> dict[str, Estimate]:
    patients = patient_level(frame)
    return binary_report(
        patients["label"],
        patients["probability"],
        patients["threshold"],
        samples=context.config.classify.bootstrap_samples,
        # The same draws for classifier and baseline: their intervals then differ by the predictions alone.
        generator=numpy_generator(context.config.seed, "classify", plan.name, "bootstrap"),
        groups=patients["fold"].tolist(),
    )


def _compare(plan: _Plan, frames: Mapping[str, pd.DataFrame]) -> Comparison | None:
    if plan.config.classifier == BASELINE:
        return None
    first, second = (patient_level(frames[name]) for name in (plan.config.classifier, BASELINE))
    return paired_delong(first["label"], first["probability"], second["probability"])


def _summary(
    context: StageContext,
    cohort: PreparedCohort,
    plan: _Plan,
    cases: Sequence[MarkerCase],
    frames: Mapping[str, pd.DataFrame],
    reports: Mapping[str, Mapping[str, Estimate]],
) -> dict[str, Any]:
    own = reports[plan.config.classifier]
    comparison = _compare(plan, frames)
    rule = f"= {plan.config.positive}" if plan.config.positive is not None else f"≥ {plan.config.threshold:g}"
    zeroed = context.config.cohort.missing_sequence == "zero"
    return {
        "column": plan.config.column,
        "positive_class": f"{plan.config.column} {rule}",
        "classifier": plan.config.classifier,
        "options": plan.evaluators[plan.config.classifier].options(),
        "sequences": list(plan.config.sequences),
        "split": _split(cohort.folds.n),
        "n_patients": own["auc"].n,
        "n_positive": own["auc"].n_positive,
        "n_cases": len(cases),
        "n_left_out_label_unknown": plan.n_label_unknown,
        "left_out_sequence_missing": {} if zeroed else dict(plan.lacking),
        "zero_channel_for_missing_sequence": dict(plan.lacking) if zeroed else {},
        "middle_slices_because_mask_empty": [case.case_id for case in cases if case.mask_empty],
        "n_age_unknown": sum(case.age is None for case in cases),
        "n_sex_unknown": sum(case.sex is None for case in cases),
        "metrics": _as_json(own, cohort.folds.n),
        "baseline_age_sex": _as_json(reports[BASELINE], cohort.folds.n),
        "auc_minus_baseline": None if comparison is None else comparison.as_json(),
        "statement": _statement(own["auc"], reports[BASELINE]["auc"], comparison),
    }


def _statement(own: Estimate, baseline: Estimate, comparison: Comparison | None) -> str:
    text = (
        f"out-of-fold AUC {own.value:.3f} (95 % interval {own.low:.3f} to {own.high:.3f}; {own.n} patients, "
        f"{own.n_positive} positive)"
    )
    if comparison is None:
        return text
    if comparison.low > 0:
        verdict = "better than"
    elif comparison.high < 0:
        verdict = "worse than"
    else:
        verdict = "not shown to differ from"
    return f"{text}; {verdict} age and sex alone ({baseline.value:.3f}; paired DeLong p = {comparison.p_value:.3f})"


def _split(n_folds: int) -> str:
    return f"out-of-fold, patient level, {n_folds} folds"


def _as_json(report: Mapping[str, Estimate], n_folds: int) -> dict[str, dict[str, Any]]:
    return {name: {**estimate.as_json(), "split": _split(n_folds)} for name, estimate in report.items()}


def _write(
    folder: Path,
    plan: _Plan,
    frames: Mapping[str, pd.DataFrame],
    reports: Mapping[str, Mapping[str, Estimate]],
    summary: Mapping[str, Any],
) -> None:
    rows = []
    for classifier, frame in frames.items():
        table = frame[list(PREDICTION_COLUMNS)].assign(
            predicted=(frame["probability"] >= frame["threshold"]).astype(int)
        )
        patients = patient_level(frame)
        for false_rate, true_rate, threshold in zip(
            *roc_curve(patients["label"], patients["probability"]), strict=True
        ):
            rows.append(
                {
                    "classifier": classifier,
                    "false_positive_rate": false_rate,
                    "true_positive_rate": true_rate,
                    # The curve starts above every probability; CSV has no infinity that all readers know.
                    "threshold": threshold if np.isfinite(threshold) else None,
                }
            )
        for prefix in _prefixes(plan, classifier):
            write_text(folder / f"{prefix}predictions.csv", table.to_csv(index=False))
            metrics = summary["metrics"] if prefix == "" else summary["baseline_age_sex"]
            write_json(folder / f"{prefix}metrics.json", metrics)
    write_text(folder / "roc.csv", pd.DataFrame(rows).to_csv(index=False))
    write_json(folder / "summary.json", dict(summary))


def _prefixes(plan: _Plan, classifier: str) -> list[str]:
    own = [""] if classifier == plan.config.classifier else []
    return [*own, f"baseline_{BASELINE}_"] if classifier == BASELINE else own
