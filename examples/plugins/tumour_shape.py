"""A marker classifier in one file: logistic regression on what a radiologist could measure in the mask.

``plugins: [tumour_shape.py]`` and, in ``classify.markers``, ``idh: {column: idh, positive: mutant, classifier:
tumour_shape}``. Folds, thresholds and patient-level figures are the same for every classifier; it fits and predicts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glioma_nas.errors import StorageError
from glioma_nas.files import read_json, write_json
from glioma_nas.marker_evaluator import MarkerEvaluator
from glioma_nas.markers import MarkerCase
from glioma_nas.progress import Progress
from glioma_nas.registry import classifiers

MODEL_FILE = "tumour_shape.json"


@classifiers.register("tumour_shape")
class TumourShapeEvaluator(MarkerEvaluator):
    """Logistic regression on tumour area, its spread over slices and its brightness in each sequence."""

    def options(self) -> dict[str, Any]:
        """See `MarkerEvaluator.options`."""
        return {}

    def fit(
        self, cases: Sequence[MarkerCase], *, folder: Path, label: str, progress: Progress, seed: int, device: str
    ) -> None:
        """See `MarkerEvaluator.fit`; deterministic, so there is nothing to resume."""
        from sklearn.linear_model import LogisticRegression

        features = np.stack([measurements(case) for case in cases])
        mean, deviation = features.mean(axis=0), features.std(axis=0)
        deviation[deviation == 0] = 1.0
        model = LogisticRegression().fit((features - mean) / deviation, [case.label for case in cases])
        write_json(
            folder / MODEL_FILE,
            {
                "mean": mean.tolist(),
                "deviation": deviation.tolist(),
                "coefficients": model.coef_[0].tolist(),
                "intercept": float(model.intercept_[0]),
            },
        )

    def predict(self, folder: Path, cases: Sequence[MarkerCase], *, device: str = "cpu") -> NDArray[np.float64]:
        """See `MarkerEvaluator.predict`."""
        if not (folder / MODEL_FILE).is_file():
            raise StorageError(f"{folder / MODEL_FILE}: no such file; run the classify stage first")
        model = read_json(folder / MODEL_FILE)
        features = np.stack([measurements(case) for case in cases])
        standardised = (features - np.asarray(model["mean"])) / np.asarray(model["deviation"])
        return np.asarray(1 / (1 + np.exp(-(standardised @ np.asarray(model["coefficients"]) + model["intercept"]))))


def measurements(case: MarkerCase) -> NDArray[np.float64]:
    """Return mean area and its spread over slices (shares of the image), and each sequence's mean inside the mask."""
    inside = case.mask.astype(bool)
    areas = inside.mean(axis=(1, 2))
    # An empty mask has no brightness; the images are normalised, so that 0 is the average of the brain.
    brightness = [image[inside].mean() if inside.any() else 0.0 for image in np.moveaxis(case.images, 1, 0)]
    return np.asarray([areas.mean(), areas.std(), *brightness], dtype=np.float64)
