"""Logistic regression on a few numbers of each patient: what the baselines of every marker share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glioma_nas.calibration import sigmoid
from glioma_nas.errors import StorageError
from glioma_nas.files import read_json, write_json
from glioma_nas.marker_evaluator import MarkerEvaluator
from glioma_nas.markers import MarkerCase, MetadataEncoder
from glioma_nas.progress import Progress

MODEL_FILE = "logistic_regression.json"


class FeatureRegression(MarkerEvaluator):
    """L2-penalised logistic regression on standardised features.

    Standardisation and coefficients come from the training patients; of a patient with several cases the first counts.

    Attributes:
        inverse_penalty: scikit-learn's C; smaller shrinks more.
    """

    inverse_penalty = 1.0

    @abstractmethod
    def features(self, cases: Sequence[MarkerCase], metadata: MetadataEncoder) -> NDArray[np.float64]:
        """Return the features of each case, float64 (n, F), finite. Called with training and with new cases."""

    def options(self) -> dict[str, Any]:
        """See `MarkerEvaluator.options`."""
        return {}

    def fit(
        self, cases: Sequence[MarkerCase], *, folder: Path, label: str, progress: Progress, seed: int, device: str
    ) -> None:
        """See `MarkerEvaluator.fit`. Deterministic."""
        from sklearn.linear_model import LogisticRegression

        patients = list({case.patient_id: case for case in reversed(cases)}.values())
        encoder = MetadataEncoder.of(patients)
        features = self.features(patients, encoder)
        mean, deviation = features.mean(axis=0), features.std(axis=0)
        # A column without spread says nothing; dividing by one leaves it at zero.
        deviation[deviation < 1e-12] = 1.0
        model = LogisticRegression(C=self.inverse_penalty, max_iter=1000)
        model.fit((features - mean) / deviation, [case.label for case in patients])
        write_json(
            folder / MODEL_FILE,
            {
                "metadata": encoder.as_json(),
                "mean": mean.tolist(),
                "deviation": deviation.tolist(),
                "coefficients": model.coef_[0].tolist(),
                "intercept": float(model.intercept_[0]),
                "train_patients": sorted(case.patient_id for case in patients),
            },
        )

    def predict(self, folder: Path, cases: Sequence[MarkerCase], *, device: str = "cpu") -> NDArray[np.float64]:
        """See `MarkerEvaluator.predict`."""
        if not (folder / MODEL_FILE).is_file():
            raise StorageError(f"{folder / MODEL_FILE}: no such file; run the classify stage first")
        model = read_json(folder / MODEL_FILE)
        features = self.features(cases, MetadataEncoder(**model["metadata"]))
        standardised = (features - np.asarray(model["mean"])) / np.asarray(model["deviation"])
        return sigmoid(standardised @ np.asarray(model["coefficients"]) + model["intercept"])
