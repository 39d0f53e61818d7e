"""What a fold may choose from its training patients: threshold, temperature, and how slices become a patient.

All three are chosen on *inner* out-of-fold predictions: the training patients are split again, and each is predicted by
a classifier that never saw it. In-sample predictions of a network are close to 0 and 1 whatever it has learnt, so a
threshold or a temperature from them does not hold for other patients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glioma_nas.calibration import apply_temperature, fit_temperature
from glioma_nas.errors import StorageError
from glioma_nas.files import read_json, write_json
from glioma_nas.markers import MarkerCase
from glioma_nas.roc_analysis import auc, choose_threshold
from glioma_nas.seeding import numpy_generator

TUNING_FILE = "tuning.json"


@dataclass(frozen=True)
class Tuning:
    """What a fold chose.

    Attributes:
        threshold: Smallest (tempered) probability that is called positive.
        temperature: See `glioma_nas.calibration.apply_temperature`.
        variant: Which of the classifier's variants predicts; empty when it has one only.
        n_inner_folds: Inner folds it was chosen on; 0 when nothing was chosen.
        n_patients: Inner out-of-fold predictions it was chosen on.
        inner_auc: Their AUC; none when nothing was chosen.
    """

    threshold: float = 0.5
    temperature: float = 1.0
    variant: str = ""
    n_inner_folds: int = 0
    n_patients: int = 0
    inner_auc: float | None = None

    def write(self, folder: Path) -> None:
        """Write the record into a fold's folder."""
        write_json(folder / TUNING_FILE, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> Tuning:
        """Read what `write` wrote.

        Raises:
            StorageError: There is none, or it is of another form.
        """
        try:
            return cls(**read_json(folder / TUNING_FILE))
        except TypeError as err:
            raise StorageError(f"{folder / TUNING_FILE}: not a tuning record ({err}); delete {folder}") from err

    def temper(self, probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the probabilities (n,) at this temperature; at 1 exactly as they came."""
        return probabilities if self.temperature == 1.0 else apply_temperature(probabilities, self.temperature)


def inner_folds(
    cases: Sequence[MarkerCase], n_folds: int, seed: int
) -> list[tuple[list[MarkerCase], list[MarkerCase]]]:
    """Split training cases by patient into (inner training, inner test), both classes on every inner training side.

    Args:
        cases: Labelled cases of the training side.
        n_folds: Wanted folds; fewer when a class has fewer patients, none when one has a single patient.
        seed: Of the split.
    """
    labels = {case.patient_id: int(case.label or 0) for case in cases}
    by_class = [sorted(patient for patient, label in labels.items() if label == value) for value in (0, 1)]
    n = min(n_folds, *(len(patients) for patients in by_class))
    if n < 2:
        return []
    generator = numpy_generator(seed, "inner folds")
    held: dict[str, int] = {}
    for offset, patients in enumerate(by_class):
        # Dealt in opposite directions, so that the fold sizes differ by one patient at most.
        for place, index in enumerate(generator.permutation(len(patients))):
            held[patients[int(index)]] = place % n if offset == 0 else n - 1 - place % n
    return [
        (
            [case for case in cases if held[case.patient_id] != fold],
            [case for case in cases if held[case.patient_id] == fold],
        )
        for fold in range(n)
    ]


def choose(
    cases: Sequence[MarkerCase], predictions: Mapping[str, NDArray[np.float64]], *, n_inner_folds: int
) -> Tuning:
    """Choose variant (largest AUC, of equal ones the first), then temperature, then threshold.

    Args:
        cases: The training cases.
        predictions: Variant → inner out-of-fold probability of each case, (n,).
        n_inner_folds: For the record.
    """
    patients = sorted({case.patient_id for case in cases})
    labels = {case.patient_id: int(case.label or 0) for case in cases}
    truth = np.asarray([labels[patient] for patient in patients])
    rows = {variant: _patient_means(cases, values, patients) for variant, values in predictions.items()}
    areas = {variant: auc(truth, values) for variant, values in rows.items()}
    best = max(areas, key=lambda variant: areas[variant])
    temperature = fit_temperature(truth, rows[best])
    # As they are called later: each case at the temperature, then the mean.
    tempered = _patient_means(cases, apply_temperature(predictions[best], temperature), patients)
    threshold = choose_threshold(truth, tempered)
    return Tuning(threshold, temperature, best, n_inner_folds, len(patients), areas[best])


def _patient_means(
    cases: Sequence[MarkerCase], values: NDArray[np.float64], patients: Sequence[str]
) -> NDArray[np.float64]:
    of_patient: dict[str, list[float]] = {patient: [] for patient in patients}
    for case, value in zip(cases, values, strict=True):
        of_patient[case.patient_id].append(float(value))
    return np.asarray([np.mean(of_patient[patient]) for patient in patients])


def nothing_chosen(variants: Mapping[str, Any]) -> Tuning:
    """Return the defaults: threshold 0.5, temperature 1, the first variant."""
    return Tuning(variant=next(iter(variants)))
