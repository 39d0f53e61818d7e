"""The baseline every marker classifier must beat: logistic regression on age and sex alone, without any image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glioma_nas.errors import StorageError
from glioma_nas.files import read_json, write_json
from glioma_nas.marker_evaluator import MarkerEvaluator
from glioma_nas.markers import MarkerCase, MetadataEncoder
from glioma_nas.progress import Progress
from glioma_nas.registry import classifiers

MODEL_FILE = "logistic_regression.json"


@classifiers.register("age_sex")
class AgeSexEvaluator(MarkerEvaluator):
    """Logistic regression on age and sex, the baseline beside every classifier."""

    def options(self) -> dict[str, Any]:
        """See `MarkerEvaluator.options`."""
        return {}

    def fit(
        self, cases: Sequence[MarkerCase], *, folder: Path, label: str, progress: Progress, seed: int, device: str
    ) -> None:
        """See `MarkerEvaluator.fit`; one row a patient, L2 penalty 1 on standardised age and sex. Deterministic."""
        from sklearn.linear_model import LogisticRegression

        patients = list({case.patient_id: case for case in cases}.values())
        encoder = MetadataEncoder.of(patients)
        features = encoder(patients).astype(np.float64)
        mean, deviation = features.mean(axis=0), features.std(axis=0)
        # A column without spread says nothing; dividing by one leaves it at zero.
        deviation[deviation == 0] = 1.0
        model = LogisticRegression(C=1.0)
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
        features = MetadataEncoder(**model["metadata"])(cases).astype(np.float64)
        standardised = (features - np.asarray(model["mean"])) / np.asarray(model["deviation"])
        logits = standardised @ np.asarray(model["coefficients"]) + model["intercept"]
        return np.asarray(1.0 / (1.0 + np.exp(-logits)), dtype=np.float64)
