"""What every marker classifier must do: subclass `ClassifierSuite` in a test module and set its attributes.

The phantoms are made here: each patient is a textured head with a round tumour, and the tumour's brightness in the
first sequence follows the label as strongly as asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import nni
import numpy as np
import pandas as pd
from nni.nas.evaluator import Evaluator

from glioma_nas.folds import Folds
from glioma_nas.marker_evaluator import (
    PREDICTION_COLUMNS,
    MarkerEvaluator,
    build_evaluator,
    load_evaluator,
    save_evaluator,
)
from glioma_nas.marker_study import ClassifierSettings
from glioma_nas.markers import MarkerCase
from glioma_nas.registry import classifiers


def phantom_cases(
    n_patients: int, *, seed: int = 0, n_sequences: int = 2, side: int = 32, n_slices: int = 2, signal: float = 2.0
) -> list[MarkerCase]:
    """Make one labelled case for each patient, positives and negatives in turn.

    Args:
        n_patients: Number of patients.
        seed: Seed of everything drawn.
        n_sequences: Channels.
        side: Height and width of the slices, in pixels.
        n_slices: Slices of a case.
        signal: How much brighter the tumours of positives are in the first sequence, in standard deviations of the
            noise; 0 makes image and label independent.
    """
    generator = np.random.default_rng(seed)
    rows, columns = np.mgrid[:side, :side]
    cases = []
    for index in range(n_patients):
        label = index % 2
        centre = side / 2 + generator.uniform(-side / 6, side / 6, size=2)
        radius = generator.uniform(side / 8, side / 5)
        tumour = ((rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 <= radius**2).astype(np.uint8)
        images = generator.standard_normal((n_slices, n_sequences, side, side))
        images[:, :1] += signal * label * tumour
        images[:, 1:] += tumour
        cases.append(
            MarkerCase(
                case_id=f"case{index:03d}",
                patient_id=f"patient{index:03d}",
                images=images.astype(np.float32),
                mask=np.repeat(tumour[None], n_slices, axis=0),
                slices=tuple(range(n_slices)),
                # Unknown age and sex must be bearable.
                age=None if index % 7 == 3 else float(generator.uniform(20, 80)),
                sex=(None, "M", "F")[int(generator.integers(3))],
                label=label,
                mask_empty=False,
                tumour_volume_ml=float(tumour.sum()) * n_slices / 1000,
                pixel_mm=1.0,
            )
        )
    return cases


def phantom_folds(cases: list[MarkerCase], n_folds: int = 2) -> Folds:
    """Deal cases to folds in pairs, so that each fold holds both classes of `phantom_cases`."""
    ids = [case.case_id for case in cases]
    held_out = [
        tuple(case_id for index, case_id in enumerate(ids) if index // 2 % n_folds == k) for k in range(n_folds)
    ]
    return Folds(0, tuple((tuple(case_id for case_id in ids if case_id not in test), test) for test in held_out))


class ClassifierSuite:
    """Shared tests of marker classifiers.

    Attributes:
        classifier: Registered name.
        options: Options that make it fast.
        settings: Settings that make it fast.
    """

    classifier: ClassVar[str]
    options: ClassVar[Mapping[str, Any]] = {}
    settings: ClassVar[ClassifierSettings] = ClassifierSettings(
        sequences=("t1ce", "flair"), epochs=1, batch_size=8, slices_per_case=2, image_size_px=32, inner_folds=2
    )

    def build(self) -> MarkerEvaluator:
        """Build the classifier under test."""
        return build_evaluator(self.classifier, self.settings, self.options)

    def cross_validate(self, folder: Path, cases: list[MarkerCase], seed: int = 0) -> pd.DataFrame:
        """Run two folds of the classifier under test."""
        return self.build().cross_validate(cases, phantom_folds(cases), folder=folder, seed=seed)

    def test_is_registered_as_documented_nni_evaluator(self) -> None:
        """Anything that scores a model is an NNI evaluator, and `glioma-nas list` shows its first line."""
        evaluator = self.build()
        assert isinstance(evaluator, Evaluator)
        assert next(entry for entry in classifiers.entries() if entry.name == self.classifier).summary

    def test_cross_validation_predicts_each_case_once_out_of_fold(self, tmp_path: Path) -> None:
        """One row a case, in the fold that holds it out, with one threshold and one temperature a fold."""
        cases = phantom_cases(12)
        frame = self.cross_validate(tmp_path, cases)
        assert tuple(frame.columns) == PREDICTION_COLUMNS
        folds = phantom_folds(cases)
        assert [(row.case_id, row.fold) for row in frame.itertuples()] == [
            (case_id, fold) for fold in range(folds.n) for case_id in folds.test(fold)
        ]
        assert frame["probability"].between(0, 1).all() and frame["threshold"].between(0, 1).all()
        assert frame.groupby("fold")[["threshold", "temperature"]].nunique().eq(1).all(axis=None)

    def test_predictions_and_threshold_do_not_depend_on_labels_of_the_test_fold(self, tmp_path: Path) -> None:
        """Flipping held-out labels changes nothing, or the classifier has peeked."""
        cases = phantom_cases(12)
        first = phantom_folds(cases).test(0)
        flipped = [replace(case, label=1 - (case.label or 0)) if case.case_id in first else case for case in cases]
        columns = ["probability", "threshold", "temperature"]
        honest = self.cross_validate(tmp_path / "a", cases).query("fold == 0")[columns]
        other = self.cross_validate(tmp_path / "b", flipped).query("fold == 0")[columns]
        pd.testing.assert_frame_equal(honest, other, check_exact=True)

    def test_cross_validation_repeats_when_seed_is_the_same(self, tmp_path: Path) -> None:
        """Same seed, same numbers to the last bit."""
        cases = phantom_cases(12)
        pd.testing.assert_frame_equal(
            self.cross_validate(tmp_path / "a", cases, seed=4),
            self.cross_validate(tmp_path / "b", cases, seed=4),
            check_exact=True,
        )

    def test_resuming_redoes_unfinished_folds_only_and_gives_the_same(self, tmp_path: Path) -> None:
        """A finished fold is read back, a missing one is made again with the same result."""
        cases = phantom_cases(12)
        whole = self.cross_validate(tmp_path, cases)
        kept = tmp_path / "fold0" / "predictions.csv"
        written = kept.stat().st_mtime_ns
        for path in sorted((tmp_path / "fold1").rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        pd.testing.assert_frame_equal(self.cross_validate(tmp_path, cases), whole, check_exact=True)
        assert kept.stat().st_mtime_ns == written

    def test_stored_folds_predict_new_patients_without_labels(self, tmp_path: Path) -> None:
        """What a fold left on disk is enough for patients whose label nobody knows."""
        cases = phantom_cases(12)
        frame = self.cross_validate(tmp_path, cases)
        save_evaluator(tmp_path, self.classifier, self.build())
        again = load_evaluator(tmp_path)
        unlabelled = {case.case_id: replace(case, label=None) for case in cases}
        rows = frame.query("fold == 1")
        predicted = again.predict(tmp_path / "fold1", [unlabelled[case_id] for case_id in rows["case_id"]])
        np.testing.assert_allclose(predicted, rows["probability_uncalibrated"], rtol=1e-6)
        ensemble = again.predict_folds(tmp_path, list(unlabelled.values()))
        assert ensemble.shape == (12,) and ((ensemble >= 0) & (ensemble <= 1)).all()

    def test_options_and_settings_survive_nni_serialisation(self) -> None:
        """NNI sends evaluators to trial processes as JSON."""
        evaluator = self.build()
        again = nni.load(nni.dump(evaluator))
        assert type(again) is type(evaluator)
        assert (again.settings, again.options()) == (evaluator.settings, evaluator.options())
