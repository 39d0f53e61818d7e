"""Stage: predict molecular markers from images, out-of-fold masks, age and sex, beside baselines.

For each marker ``MARKER/`` holds ``predictions.csv`` (one row a case), ``metrics.json``, ``roc.csv``,
``reliability.csv``, ``subgroups.csv``, ``abstention.csv`` (patient level), predictions and metrics of the baselines as
``baseline_NAME_*``, ``grad_cam/``, ``summary.json``, and in ``CLASSIFIER/`` and ``NAME/`` the classifiers of every
fold. With subtype rules ``subtype.csv`` and ``subtype.json`` lie beside the markers. Everything that can be wrong with
labels, folds, masks or options is found before the first training starts.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from glioma_nas.config import ClassifyConfig, MarkerConfig, RunConfig
from glioma_nas.errors import CohortError
from glioma_nas.files import write_json, write_text
from glioma_nas.marker_analysis import (
    Analysis,
    abstention_table,
    analyse,
    before_temperature,
    describe_patients,
    json_rows,
    reliability_table,
    roc_table,
    subgroup_table,
)
from glioma_nas.marker_evaluator import PREDICTION_COLUMNS, MarkerEvaluator, build_evaluator, save_evaluator
from glioma_nas.marker_masks import MaskSource, mask_source
from glioma_nas.marker_pictures import draw_grad_cam
from glioma_nas.marker_study import ClassifierSettings
from glioma_nas.markers import (
    MarkerCase,
    check_folds_hold_both_classes,
    cut_case,
    encode_labels,
)
from glioma_nas.pipeline import StageContext
from glioma_nas.prepared import PreparedCase, PreparedCohort
from glioma_nas.roc_analysis import Estimate
from glioma_nas.seeding import derive_seed
from glioma_nas.significance import significant
from glioma_nas.slice_classifier import SliceClassifierEvaluator
from glioma_nas.subtype_table import check_subtype, subtype_rows
from glioma_nas.uncertainty import CALL_COLUMNS, called_patients, out_of_fold_uncertainty, with_calls

BASELINE = "age_sex"

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MarkerPlan:
    """One marker, checked and ready to train.

    Attributes:
        name: Of the marker.
        config: Of the marker.
        masks: Whose masks are used.
        labels: Case id → 0 or 1.
        cases: Those with a label, in the sheet's order.
        n_label_unknown: Cases left out because their label is unknown.
        lacking: Case id → a sequence of the marker it lacks.
    """

    name: str
    config: MarkerConfig
    masks: MaskSource
    labels: Mapping[str, int]
    cases: tuple[PreparedCase, ...]
    n_label_unknown: int
    lacking: Mapping[str, str]


def run(context: StageContext) -> dict[str, Any]:
    """Cross-validate every marker's classifier and the baselines; see `glioma_nas.pipeline.Stage`.

    Raises:
        LabelError: A marker's labels cannot be used.
        LeakageError: A mask comes from a network that saw its patient.
        ConfigError: A classifier does not take an option.
        CohortError: A case lacks a sequence and the configuration says that this is an error.
        StorageError: A mask is missing.
    """
    cohort = PreparedCohort.load(context.inputs["preprocess"])
    plans = []
    for name, marker in context.config.classify.markers.items():
        evaluators = build_evaluators(context.config, marker)
        masks = mask_source(context.config, context.inputs.get("segment"))
        plans.append((plan_marker(context.config, cohort, masks, name, marker), evaluators))
    if context.config.classify.subtype is not None:
        labels = [case.labels for case in cohort.cases.values()]
        check_subtype(context.config.classify.subtype, context.config.classify.markers, labels)
    if not plans:
        context.progress.note("classify: no markers configured")
    results: dict[str, Any] = {"markers": {plan.name: _classify(context, cohort, plan, own) for plan, own in plans}}
    if context.config.classify.subtype is not None:
        results["subtype"] = _integrate(context, cohort)
    return results


def _integrate(context: StageContext, cohort: PreparedCohort) -> dict[str, Any]:
    assert context.config.classify.subtype is not None
    predictions = {
        name: pd.read_csv(context.folder / name / "predictions.csv", dtype={"case_id": str, "patient_id": str})
        for name in context.config.classify.markers
    }
    labels = {case.case_id: case.labels for case in cohort.cases.values()}
    table, summary = subtype_rows(context.config.classify.subtype, predictions, labels)
    write_text(context.folder / "subtype.csv", table.to_csv(index=False))
    write_json(context.folder / "subtype.json", summary)
    context.progress.note(
        f"subtype: {summary['n_called']} of {summary['n_patients']} patients called, "
        f"{summary['n_agree_with_known_markers']} of {summary['n_comparable']} as their known markers say. "
        f"{summary['disclaimer']}"
    )
    return summary


def build_evaluators(config: RunConfig, marker: MarkerConfig) -> dict[str, MarkerEvaluator]:
    """Build a marker's classifier and the baselines that stand beside it, by name.

    Raises:
        UnknownNameError: No classifier has that name.
        ConfigError: It does not take an option, or not those sequences.
    """
    settings = classifier_settings(config.classify, marker)
    return {
        name: build_evaluator(name, settings, marker.options if name == marker.classifier else {})
        for name in dict.fromkeys((marker.classifier, BASELINE, *config.classify.baselines))
    }


def classifier_settings(config: ClassifyConfig, marker: MarkerConfig) -> ClassifierSettings:
    """Return what all classifiers of a marker are told."""
    return ClassifierSettings(
        sequences=marker.sequences,
        epochs=config.epochs,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        slices_per_case=config.slices_per_case,
        image_size_px=config.image_size_px,
        inner_folds=config.inner_folds,
    )


def plan_marker(
    config: RunConfig, cohort: PreparedCohort, masks: MaskSource, name: str, marker: MarkerConfig
) -> MarkerPlan:
    """Find the marker's labels and cases, and everything that is wrong with them or their masks; see `run`."""
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
    masks.check(cases)
    return MarkerPlan(name, marker, masks, labels, cases, len(everyone) - len(known), lacking)


def cut_cases(config: RunConfig, cohort: PreparedCohort, plan: MarkerPlan) -> list[MarkerCase]:
    """Cut the classifier inputs of every case of the plan."""
    return [
        cut_case(
            case,
            plan.masks.read(case),
            order=cohort.sequences,
            sequences=plan.config.sequences,
            slices_per_case=config.classify.slices_per_case,
            image_size_px=config.classify.image_size_px,
            label=plan.labels[case.case_id],
            zero_missing=config.cohort.feeds_zeros,
        )
        for case in plan.cases
    ]


def _classify(
    context: StageContext, cohort: PreparedCohort, plan: MarkerPlan, evaluators: Mapping[str, MarkerEvaluator]
) -> dict[str, Any]:
    folder = context.folder / plan.name
    config = context.config
    cases = cut_cases(config, cohort, plan)
    frames: dict[str, pd.DataFrame] = {}
    for classifier, evaluator in evaluators.items():
        frames[classifier] = evaluator.cross_validate(
            cases,
            cohort.folds,
            folder=folder / classifier,
            progress=context.progress,
            seed=derive_seed(config.seed, "classify", plan.name, classifier),
            device=config.device,
            label=plan.name if classifier == plan.config.classifier else f"{plan.name} {classifier}",
        )
        save_evaluator(folder / classifier, classifier, evaluator)
    analysis = analyse(
        frames,
        classifiers=(plan.config.classifier,),
        seed=config.seed,
        marker=plan.name,
        bootstrap_samples=config.classify.bootstrap_samples,
        permutation_samples=config.classify.permutation_samples,
    )
    own = evaluators[plan.config.classifier]
    uncertain = out_of_fold_uncertainty(
        own,
        folder / plan.config.classifier,
        dict(zip(frames[plan.config.classifier]["case_id"], frames[plan.config.classifier]["fold"], strict=True)),
        cases,
        copies=config.classify.tta_copies,
        seed=derive_seed(config.seed, "classify", plan.name, "uncertainty"),
        device=config.device,
    )
    frames[plan.config.classifier] = with_calls(
        frames[plan.config.classifier], uncertain, margin=config.classify.abstain_margin
    )
    described = describe_patients(
        analysis.patients[plan.config.classifier], cases, {case.case_id: case.labels for case in plan.cases}
    )
    subgroups, absent = subgroup_table(described, config.classify.subgroups)
    summary = {
        **_summary(config, cohort, plan, cases, analysis),
        "options": own.options(),
        "calls": called_patients(frames[plan.config.classifier], copies=config.classify.tta_copies),
        "subgroup_columns_not_in_sheet": absent,
        "before_temperature_scaling": before_temperature(frames[plan.config.classifier]),
        "subgroups": json_rows(subgroups),
        "reliability": json_rows(reliability_table(analysis)),
        "grad_cam": [],
    }
    if isinstance(own, SliceClassifierEvaluator) and config.classify.grad_cam_cases:
        summary["grad_cam"] = draw_grad_cam(
            own,
            folder / plan.config.classifier,
            frames[plan.config.classifier],
            cases,
            cohort.cases,
            out=folder / "grad_cam",
            count=config.classify.grad_cam_cases,
            seed=derive_seed(config.seed, "classify", plan.name, "grad_cam"),
            progress=context.progress,
        )
    _write_tables(folder, config, plan, frames, analysis, subgroups)
    for name in evaluators:
        for prefix in _prefixes(plan, name):
            write_json(folder / f"{prefix}metrics.json", _as_json(analysis.reports[name], cohort.folds.n))
    write_json(folder / "summary.json", summary)
    context.progress.note(f"{plan.name}: {summary['statement']}")
    _logger.info("marker %s: out-of-fold AUC %.3f", plan.name, summary["metrics"]["auc"]["value"])
    return summary


def _summary(
    config: RunConfig, cohort: PreparedCohort, plan: MarkerPlan, cases: Sequence[MarkerCase], analysis: Analysis
) -> dict[str, Any]:
    own = analysis.reports[plan.config.classifier]
    rule = f"= {plan.config.positive}" if plan.config.positive is not None else f"≥ {plan.config.threshold:g}"
    zeroed = config.cohort.feeds_zeros
    against = {item.baseline: item.as_json() for item in analysis.versus}
    return {
        "column": plan.config.column,
        "positive_class": f"{plan.config.column} {rule}",
        "classifier": plan.config.classifier,
        "masks": plan.masks.words,
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
        "baseline_age_sex": _as_json(analysis.reports[BASELINE], cohort.folds.n),
        "baselines": {
            item.baseline: _as_json(analysis.reports[item.baseline], cohort.folds.n) for item in analysis.versus
        },
        "auc_minus_baseline": against.get(BASELINE),
        "auc_minus_baselines": against,
        "permutation_p": {name: significant(value) for name, value in analysis.permutation_p.items()},
        "statement": analysis.statement(plan.config.classifier),
    }


def _split(n_folds: int) -> str:
    return f"out-of-fold, patient level, {n_folds} folds"


def _as_json(report: Mapping[str, Estimate], n_folds: int) -> dict[str, dict[str, Any]]:
    return {name: {**estimate.as_json(), "split": _split(n_folds)} for name, estimate in report.items()}


def _write_tables(
    folder: Path,
    config: RunConfig,
    plan: MarkerPlan,
    frames: Mapping[str, pd.DataFrame],
    analysis: Analysis,
    subgroups: pd.DataFrame,
) -> None:
    for classifier, frame in frames.items():
        table = frame[list(PREDICTION_COLUMNS)].assign(
            predicted=(frame["probability"] >= frame["threshold"]).astype(int),
        )
        if classifier == plan.config.classifier:
            table = table.assign(**{column: frame[column] for column in CALL_COLUMNS})
        for prefix in _prefixes(plan, classifier):
            write_text(folder / f"{prefix}predictions.csv", table.to_csv(index=False))
    for name, rows in (
        ("roc", roc_table(analysis)),
        ("reliability", reliability_table(analysis)),
        ("subgroups", subgroups),
        ("abstention", abstention_table(analysis.patients[plan.config.classifier])),
    ):
        write_text(folder / f"{name}.csv", rows.to_csv(index=False))


def _prefixes(plan: MarkerPlan, classifier: str) -> list[str]:
    own = [""] if classifier == plan.config.classifier else []
    return own if own and classifier != BASELINE else [*own, f"baseline_{classifier}_"]
