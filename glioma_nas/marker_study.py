"""Which patients and which marker a segmentation network is scored on, and the classifier inputs its masks give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from glioma_nas.config import MarkerConfig
from glioma_nas.errors import LeakageError
from glioma_nas.marker_tuning import inner_folds
from glioma_nas.markers import FoldSplit, MarkerCase, cut_case, encode_labels
from glioma_nas.prepared import PreparedCase, PreparedCohort
from glioma_nas.seeding import derive_seed
from glioma_nas.segmentation_inference import THRESHOLD, predict_probability


@dataclass(frozen=True)
class ClassifierSettings:
    """What all classifiers of a marker are told.

    Attributes:
        sequences: Sequences, in channel order.
        epochs: Training epochs.
        batch_size: Slices of one optimiser step.
        learning_rate: Of the optimiser.
        slices_per_case: See `glioma_nas.markers.choose_slices`.
        image_size_px: Side of the slices the classifier sees.
        inner_folds: Folds of the training patients on which `glioma_nas.marker_tuning` chooses.
    """

    sequences: tuple[str, ...]
    epochs: int = 30
    batch_size: int = 16
    learning_rate: float = 1e-3
    slices_per_case: int = 8
    image_size_px: int = 96
    inner_folds: int = 3


@dataclass(frozen=True)
class MarkerStudy:
    """Which patients and which marker `MarkerEvaluator.evaluate` scores a segmentation network on. Plain data.

    Attributes:
        preprocess_folder: Finished folder of the preprocess stage.
        marker: Name of the marker.
        config: Column and rule of the marker.
        sheet: Cohort sheet, for messages.
        network_sequences: Input channels of the segmentation network, in order.
        network_patients: Patients the segmentation network was or will be trained on; none of them is scored. To be
            given, empty for a network that was trained on none.
        case_ids: Cases to score; none for all whose patient the network has not seen.
        work_folder: Where temporary weights go; none for the system's temporary folder.
        seed: Seed of the classifiers.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        missing_sequence: What becomes of a case that lacks a sequence of the marker: ``error``, ``exclude``, or
            ``zero`` to feed a channel of zeros.
        own_folds: Folds that are drawn among the scored patients, by patient and class, fewer when a class has fewer
            patients; none for the cohort's folds, which the scored patients may fill unevenly.
    """

    preprocess_folder: Path
    marker: str
    config: MarkerConfig
    sheet: Path
    network_sequences: tuple[str, ...]
    network_patients: tuple[str, ...]
    case_ids: tuple[str, ...] | None = None
    work_folder: Path | None = None
    seed: int = 0
    device: str = "cpu"
    missing_sequence: str = "error"
    own_folds: int | None = None

    def as_json(self) -> dict[str, Any]:
        """Return plain data, for NNI's trial processes."""
        plain = {**vars(self), "config": self.config.model_dump(mode="json")}
        return {key: str(value) if isinstance(value, Path) else value for key, value in plain.items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> MarkerStudy:
        """Rebuild from what `as_json` returned, after JSON, which knows no tuples, paths or models."""
        plain: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
        plain["config"] = MarkerConfig.model_validate(plain["config"])
        for key in ("preprocess_folder", "sheet", "work_folder"):
            plain[key] = None if plain[key] is None else Path(plain[key])
        return cls(**plain)


def cases_of_study(model: Any, study: MarkerStudy, settings: ClassifierSettings) -> tuple[list[MarkerCase], FoldSplit]:
    """Segment the study's patients with ``model`` and cut a classifier's inputs out.

    Args:
        model: Network (N, C, H, W) → logits (N, K, H, W); class 0 is background.
        study: Patients and marker.
        settings: Of the classifier.

    Raises:
        LeakageError: A case to score belongs to a patient the network was trained on.
        LabelError: The marker's labels cannot be used.
        CohortError: A case lacks a sequence, and that is an error.
    """
    cohort, chosen, labels = _chosen(study, settings)
    cases = []
    for case in chosen:
        if case.case_id in labels:
            probability = predict_probability(
                model, case.images(), cohort.sequences, study.network_sequences, device=study.device
            )
            cases.append(
                cut_case(
                    case,
                    (probability >= THRESHOLD).astype(np.uint8),
                    order=cohort.sequences,
                    sequences=settings.sequences,
                    slices_per_case=settings.slices_per_case,
                    image_size_px=settings.image_size_px,
                    label=labels[case.case_id],
                    zero_missing=study.missing_sequence == "zero",
                )
            )
    if study.own_folds is None:
        return cases, cohort.folds
    splits = inner_folds(cases, study.own_folds, derive_seed(study.seed, "folds of the study"))
    return cases, _OwnFolds(tuple((_ids(train), _ids(test)) for train, test in splits))


def _ids(cases: Sequence[MarkerCase]) -> tuple[str, ...]:
    return tuple(case.case_id for case in cases)


def labels_of_study(study: MarkerStudy, settings: ClassifierSettings) -> dict[str, int]:
    """Return case id → label of the cases that `cases_of_study` would cut out; no network is needed.

    Raises:
        LeakageError: See `cases_of_study`.
        LabelError: See `cases_of_study`.
    """
    return _chosen(study, settings)[2]


@dataclass(frozen=True)
class _OwnFolds:
    splits: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]

    @property
    def n(self) -> int:
        return len(self.splits)

    def train(self, fold: int, /) -> Sequence[str]:
        return self.splits[fold][0]

    def test(self, fold: int, /) -> Sequence[str]:
        return self.splits[fold][1]


def _chosen(
    study: MarkerStudy, settings: ClassifierSettings
) -> tuple[PreparedCohort, list[PreparedCase], dict[str, int]]:
    cohort = PreparedCohort.load(study.preprocess_folder)
    seen = frozenset(study.network_patients)
    if study.case_ids is None:
        chosen = [case for case in cohort.cases.values() if case.patient_id not in seen]
    else:
        chosen = [cohort.cases[case_id] for case_id in study.case_ids]
    for case in chosen:
        if case.patient_id in seen:
            raise LeakageError(
                f"case {case.case_id}: the segmentation network was trained on its patient; score it on patients "
                "it has not seen"
            )
    if study.missing_sequence == "exclude":
        chosen = [case for case in chosen if set(settings.sequences) <= set(case.present)]
    n_folds = cohort.folds.n if study.own_folds is None else 2  # the fewest that `inner_folds` draws
    labels = encode_labels(chosen, study.marker, study.config, sheet=study.sheet, n_folds=n_folds)
    return cohort, chosen, labels
