"""Molecular markers as data: labels from sheet columns, and the inputs a classifier of a marker gets.

A marker is a column of the cohort sheet with a rule for its positive class; IDH and Ki67 are two configurations of
that, not two programs. A classifier sees a few axial slices of each case, the tumour mask a network predicted for them
without having been trained on that patient, age and sex. What a classifier is stands in `glioma_nas.marker_evaluator`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from glioma_nas.cohort import UNKNOWN_VALUES
from glioma_nas.config import MarkerConfig
from glioma_nas.errors import CohortError, ImageError, LabelError, LeakageError, did_you_mean

MIDDLE_AGE_YEARS = 50.0


class CaseWithLabels(Protocol):
    """What labels are read from: a row of the sheet or a prepared case."""

    @property
    def case_id(self) -> str:
        """Name of the case."""

    @property
    def patient_id(self) -> str:
        """Name of the patient; several cases may share it."""

    @property
    def labels(self) -> Mapping[str, str]:
        """Non-empty label columns as text."""


class CaseWithImages(CaseWithLabels, Protocol):
    """What classifier inputs are cut from: a prepared case."""

    @property
    def age(self) -> float | None:
        """Years."""

    @property
    def sex(self) -> str | None:
        """``M`` or ``F``."""

    @property
    def present(self) -> Sequence[str]:
        """Sequences the case has."""

    @property
    def spacing_mm(self) -> Sequence[float]:
        """Pixel width, pixel height and slice distance of the prepared slices."""

    def images(self) -> NDArray[np.float32]:
        """Normalised slices, float32 (Z, C, H, W)."""


class FoldSplit(Protocol):
    """Patient-level folds as case ids."""

    @property
    def n(self) -> int:
        """Number of folds."""

    def train(self, fold: int, /) -> Sequence[str]:
        """Case ids to train on."""

    def test(self, fold: int, /) -> Sequence[str]:
        """Case ids to test on."""


@dataclass(frozen=True, eq=False)
class MarkerCase:
    """What a classifier gets of one case.

    Attributes:
        case_id: Name of the case.
        patient_id: Name of the patient.
        images: Chosen slices, float32 (S, C, H, W), normalised, channels in the marker's order of sequences.
        mask: Predicted out-of-fold tumour of these slices, uint8 (S, H, W), 0 or 1.
        slices: Index of each chosen slice in the prepared case, ascending.
        age: Years; none when unknown.
        sex: ``M`` or ``F``; none when unknown.
        label: 1 for the marker's positive class, 0 for the other, none when unknown (a patient to predict).
        mask_empty: True when the network found no tumour, so that the middle slices were taken.
        tumour_volume_ml: Volume of the whole predicted tumour, not of the chosen slices only.
        pixel_mm: Side of a pixel of the chosen slices.
    """

    case_id: str
    patient_id: str
    images: NDArray[np.float32]
    mask: NDArray[np.uint8]
    slices: tuple[int, ...]
    age: float | None
    sex: str | None
    label: int | None
    mask_empty: bool
    tumour_volume_ml: float
    pixel_mm: float


def encode_labels(
    cases: Sequence[CaseWithLabels], marker: str, config: MarkerConfig, *, sheet: Path, n_folds: int = 2
) -> dict[str, int]:
    """Return case id → 0 or 1 for the cases whose marker is known.

    A column of words holds the positive value and exactly one other; a third one is more likely a typing error than a
    class. A column of numbers is positive from the threshold on.

    Args:
        cases: All cases of the run.
        marker: Name of the marker, for messages.
        config: Column and rule.
        sheet: The cohort sheet, for messages.
        n_folds: Folds of the cross-validation; each class needs at least that many patients.

    Raises:
        LabelError: The column is absent or empty, a value is not understood, cases of one patient disagree, all
            patients are of one class, or a class has fewer patients than there are folds.
    """
    where = f"{sheet}: marker '{marker}', column '{config.column}'"
    known = {
        case.case_id: text
        for case in cases
        if (text := str(case.labels.get(config.column, "")).strip()).lower() not in UNKNOWN_VALUES
    }
    if not known:
        columns = sorted({column for case in cases for column in case.labels})
        raise LabelError(
            f"{where}: the sheet lacks the column, or no case of this run has a value in it; "
            f"{did_you_mean(config.column, columns)} Fill the column, or remove classify.markers.{marker}"
        )
    labels = _labels_of_words(known, config.positive, where) if config.positive is not None else {}
    if config.threshold is not None:
        labels = _labels_of_numbers(known, config.threshold, where)
    _check_classes(cases, labels, where, n_folds)
    return labels


def _labels_of_words(known: Mapping[str, str], positive: str, where: str) -> dict[str, int]:
    wanted = positive.strip().lower()
    frequency = Counter(text.lower() for text in known.values())
    others = [value for value, _ in frequency.most_common() if value != wanted]
    if wanted not in frequency:
        raise LabelError(
            f"{where}: positive class '{positive}' does not occur; {did_you_mean(wanted, frequency)} Correct 'positive'"
        )
    if len(others) > 1:
        example = next(case_id for case_id, text in known.items() if text.lower() == others[-1])
        raise LabelError(
            f"{where}: unknown value '{others[-1]}' (first in case {example}); allowed are '{positive}', "
            f"'{others[0]}', or empty for unknown; correct the cell"
        )
    return {case_id: int(text.lower() == wanted) for case_id, text in known.items()}


def _labels_of_numbers(known: Mapping[str, str], threshold: float, where: str) -> dict[str, int]:
    labels = {}
    for case_id, text in known.items():
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise LabelError(
                f"{where}: unknown value '{text}' in case {case_id}; a number is needed because the marker has a "
                "threshold, or an empty cell for unknown; correct the cell"
            )
        labels[case_id] = int(value >= threshold)
    return labels


def _check_classes(cases: Sequence[CaseWithLabels], labels: Mapping[str, int], where: str, n_folds: int) -> None:
    patients: dict[str, int] = {}
    for case in cases:
        label = labels.get(case.case_id)
        if label is not None and patients.setdefault(case.patient_id, label) != label:
            raise LabelError(f"{where}: cases of patient {case.patient_id} hold different values; correct the cells")
    sizes = {value: sum(label == value for label in patients.values()) for value in (0, 1)}
    if 0 in sizes.values():
        raise LabelError(
            f"{where}: all {len(patients)} patients with a known value are of one class "
            f"({'positive' if sizes[1] else 'negative'}); nothing can be learnt: add patients of the other class, "
            "correct 'positive' or 'threshold', or remove the marker"
        )
    for value, name in ((1, "positive"), (0, "negative")):
        if sizes[value] < max(2, n_folds):
            raise LabelError(
                f"{where}: {sizes[value]} {name} patients are fewer than {max(2, n_folds)} folds; "
                "lower folds.n_folds, or add patients"
            )


def check_folds_hold_both_classes(folds: FoldSplit, labels: Mapping[str, int], marker: str) -> None:
    """Make sure that every training side holds both classes of the marker.

    Raises:
        LabelError: One does not, which happens when folds were stratified by another column.
    """
    for fold in range(folds.n):
        classes = {labels[case_id] for case_id in folds.train(fold) if case_id in labels}
        if len(classes) < 2:
            raise LabelError(
                f"marker '{marker}': the training side of fold {fold} holds patients of one class only; add its column "
                "to folds.stratify_by and run preprocess again"
            )


def check_out_of_fold(
    provenance: Mapping[str, Mapping[str, Any]], cases: Iterable[CaseWithLabels], *, source: Path
) -> None:
    """Make sure that no mask comes from a network that was trained on the patient it shows.

    Args:
        provenance: Case id → record of the network that made its mask, with ``train_patients``.
        cases: Cases whose masks are about to be used.
        source: File the provenance was read from, for messages.

    Raises:
        LeakageError: A network saw the patient, or the record does not say whom it saw.
    """
    for case in cases:
        record = provenance.get(case.case_id, {})
        trained_on = record.get("train_patients")
        if trained_on is not None and not (
            isinstance(trained_on, list | tuple) and all(isinstance(patient, str) for patient in trained_on)
        ):
            # A number never equals the text of the sheet, so the patient would pass as unseen.
            raise LeakageError(
                f"{source}: case {case.case_id}: train_patients is {trained_on!r}; give a list of patient ids as text, "
                'for example ["12", "13"]'
            )
        if trained_on is None:
            raise LeakageError(
                f"{source}: case {case.case_id}: it is not recorded which patients the network behind its mask was "
                "trained on; run the segment stage again"
            )
        if case.patient_id in trained_on:
            raise LeakageError(
                f"{source}: case {case.case_id}: its mask was made by network '{record.get('network', '?')}' of fold "
                f"{record.get('fold', '?')}, which was trained on this patient; classifiers take out-of-fold masks "
                "only: run the segment stage again"
            )


def choose_slices(mask: NDArray[Any], count: int) -> tuple[tuple[int, ...], bool]:
    """Choose the axial slices a classifier sees.

    Rule: the ``count`` slices with the largest tumour area (of equal ones the lower), slices without tumour never;
    when the mask is empty, the ``count`` slices in the middle of the scan.

    Args:
        mask: (Z, H, W), non-zero is tumour.
        count: Number of slices at most.

    Returns:
        Slice indices in ascending order, and whether the mask was empty.
    """
    area = (np.asarray(mask) != 0).sum(axis=(1, 2))
    n = int(area.size)
    if not area.any():
        first = max(0, (n - count) // 2)
        return tuple(range(first, min(n, first + count))), True
    largest = np.argsort(-area, kind="stable")[:count]
    return tuple(sorted(int(index) for index in largest if area[index] > 0)), False


def cut_case(
    case: CaseWithImages,
    mask: NDArray[Any],
    *,
    order: Sequence[str],
    sequences: Sequence[str],
    slices_per_case: int,
    image_size_px: int,
    label: int | None = None,
    zero_missing: bool = False,
) -> MarkerCase:
    """Cut a classifier's inputs out of a prepared case.

    Args:
        case: The prepared case.
        mask: Predicted tumour on the prepared grid, (Z, H, W), non-zero is tumour.
        order: Sequences in the order of the prepared channels.
        sequences: Sequences the marker needs, in the classifier's channel order.
        slices_per_case: See `choose_slices`.
        image_size_px: Side of the square slices the classifier sees.
        label: 0, 1 or none.
        zero_missing: Feed a zero channel for a sequence the case lacks, instead of refusing it.

    Raises:
        CohortError: A sequence was not prepared, or the case lacks one and ``zero_missing`` is off.
        ImageError: The mask lies on another grid.
    """
    for sequence in sequences:
        if sequence not in order:
            raise CohortError(f"sequence '{sequence}' was not prepared: {did_you_mean(sequence, order)}")
        if sequence not in case.present and not zero_missing:
            raise CohortError(
                f"case {case.case_id} lacks sequence '{sequence}' of the marker; set cohort.missing_sequence to "
                "exclude or zero"
            )
    images = case.images()
    if mask.shape != (images.shape[0], *images.shape[2:]):
        raise ImageError(
            f"case {case.case_id}: the mask has shape {mask.shape}, its slices (Z, H, W) are "
            f"{(images.shape[0], *images.shape[2:])}; run the segment stage again"
        )
    slices, empty = choose_slices(mask, slices_per_case)
    channels = [list(order).index(sequence) for sequence in sequences]
    chosen = np.asarray(images[list(slices)][:, channels], dtype=np.float32)
    chosen[:, [sequence not in case.present for sequence in sequences]] = 0.0
    tumour = np.asarray(mask[list(slices)] != 0, dtype=np.float32)[:, None]
    return MarkerCase(
        case_id=case.case_id,
        patient_id=case.patient_id,
        images=_resized(chosen, image_size_px),
        mask=(_resized(tumour, image_size_px)[:, 0] >= 0.5).astype(np.uint8),
        slices=slices,
        age=case.age,
        sex=case.sex,
        label=label,
        mask_empty=empty,
        tumour_volume_ml=float((np.asarray(mask) != 0).sum() * np.prod(case.spacing_mm) / 1000),
        pixel_mm=float(case.spacing_mm[0]) * images.shape[3] / image_size_px,
    )


def _resized(stack: NDArray[np.float32], side: int) -> NDArray[np.float32]:
    if stack.shape[2:] == (side, side):
        return np.ascontiguousarray(stack)
    resized = F.interpolate(torch.from_numpy(stack), size=(side, side), mode="bilinear", antialias=True)
    return np.ascontiguousarray(resized.numpy())


@dataclass(frozen=True)
class MetadataEncoder:
    """Age and sex as two numbers: age/100 years; male 0, female 1 (METHOD §9).

    An unknown age is the mean of the training patients', an unknown sex 0.5, so that neither speaks for a class.

    Attributes:
        mean_age_years: Stands in for an unknown age.
    """

    mean_age_years: float

    @classmethod
    def of(cls, cases: Sequence[MarkerCase]) -> MetadataEncoder:
        """Take the mean age of training cases; 50 years when none is known."""
        ages = [case.age for case in cases if case.age is not None]
        return cls(float(np.mean(ages)) if ages else MIDDLE_AGE_YEARS)

    def __call__(self, cases: Sequence[MarkerCase]) -> NDArray[np.float32]:
        """Return float32 (n, 2): age in hundreds of years, sex."""
        sexes = {"M": 0.0, "F": 1.0}
        return np.asarray(
            [
                ((self.mean_age_years if case.age is None else case.age) / 100.0, sexes.get(case.sex or "", 0.5))
                for case in cases
            ],
            dtype=np.float32,
        ).reshape(len(cases), 2)

    def as_json(self) -> dict[str, float]:
        """Return plain data that rebuilds the encoder as keyword arguments."""
        return asdict(self)
