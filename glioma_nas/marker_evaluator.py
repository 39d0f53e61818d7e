"""What predicts a marker: an NNI evaluator that is trained and tested on folds of patients.

`MarkerEvaluator.cross_validate` gives the patient-safe predictions the pipeline reports; `MarkerEvaluator.evaluate`
gives NNI a number for a segmentation network, namely how well a marker is predicted from the masks it draws. Plugin
authors subclass `MarkerEvaluator` (or `glioma_nas.slice_classifier.SliceClassifierEvaluator` for a network) and write
``fit`` and ``predict``; folds, thresholds, files and resuming are settled here.
"""

from __future__ import annotations

import inspect
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import nni
import numpy as np
import pandas as pd
from nni.nas.evaluator import Evaluator
from numpy.typing import NDArray

from glioma_nas import __version__, registry
from glioma_nas.classifier_code import classifier_code
from glioma_nas.errors import ConfigError, LabelError, LeakageError, StorageError, did_you_mean
from glioma_nas.files import read_json, write_json, write_text
from glioma_nas.marker_study import ClassifierSettings, MarkerStudy, cases_of_study
from glioma_nas.marker_tuning import TUNING_FILE, Tuning, choose, inner_folds, nothing_chosen
from glioma_nas.markers import FoldSplit, MarkerCase, check_folds_hold_both_classes
from glioma_nas.progress import Progress, Silent
from glioma_nas.roc_analysis import Estimate, delong
from glioma_nas.seeding import derive_seed

PREDICTION_COLUMNS = (
    "case_id",
    "patient_id",
    "fold",
    "label",
    "probability",
    "threshold",
    "probability_uncalibrated",
    "temperature",
)
PREDICTIONS_FILE = "predictions.csv"
CLASSIFIER_FILE = "classifier.json"


class MarkerEvaluator(Evaluator, ABC):
    """A classifier of one marker.

    Args:
        settings: What all classifiers are told.
        study: What `evaluate` works on; needed by `evaluate` only.
    """

    def __init__(self, settings: ClassifierSettings, *, study: MarkerStudy | None = None) -> None:
        self.settings = settings
        self.study = study

    @abstractmethod
    def options(self) -> dict[str, Any]:
        """Return the keyword arguments beyond ``settings`` and ``study`` that rebuild this evaluator; plain JSON."""

    def check_training_files(self) -> None:
        """Make sure that files which training needs, and predictions do not, are there; by default there are none.

        Called once by `build_evaluator`, long before `fit`, and not by `load_evaluator`.

        Raises:
            ConfigError: One is not.
        """

    @abstractmethod
    def fit(
        self, cases: Sequence[MarkerCase], *, folder: Path, label: str, progress: Progress, seed: int, device: str
    ) -> None:
        """Train on ``cases``, all labelled, and leave in ``folder`` what `predict` needs.

        Called once for each fold by `cross_validate`, and again with the same arguments after an interruption: then it
        continues where it stopped. Same seed and cases, same result.
        """

    @abstractmethod
    def predict(self, folder: Path, cases: Sequence[MarkerCase], *, device: str = "cpu") -> NDArray[np.float64]:
        """Return each case's probability of the positive class, float64 (n,), with what `fit` left in ``folder``.

        Called after `fit`, and later for new patients, whose ``label`` is none; must not read ``label``.

        Raises:
            StorageError: ``folder`` holds no finished training.
        """

    def predict_variants(
        self, folder: Path, cases: Sequence[MarkerCase], *, device: str = "cpu"
    ) -> Mapping[str, NDArray[np.float64]]:
        """Return the predictions of every variant among which the training patients choose; by default one, `predict`.

        Called after `fit`, as `predict` is. What it costs beyond `predict` should be nothing but another summary of the
        same outputs.
        """
        return {"": self.predict(folder, cases, device=device)}

    def cross_validate(
        self,
        cases: Sequence[MarkerCase],
        folds: FoldSplit,
        *,
        folder: Path,
        progress: Progress | None = None,
        seed: int = 0,
        device: str = "cpu",
        label: str = "classifier",
        tune: bool = True,
    ) -> pd.DataFrame:
        """Train and test on every fold; folds that are finished in ``folder`` are read back instead.

        Args:
            cases: Labelled cases; cases of the folds that are not among them are left out.
            folds: Patient-level folds.
            folder: Where ``fold0``, ``fold1``, … go.
            progress: Where to report.
            seed: Seed of this cross-validation.
            device: ``cpu``, ``cuda`` or ``cuda:N``.
            label: What is trained, for bars and messages.
            tune: Choose threshold, temperature and variant on inner folds; off (where the ranking alone counts) saves
                their trainings and leaves 0.5, 1 and the first variant.

        Returns:
            One row a case, in order of fold and case: `PREDICTION_COLUMNS`. Threshold and temperature come from the
            training side of the row's fold only; ``probability`` is at that temperature.

        Raises:
            LabelError: A case has no label, or a training side holds one class only.
            LeakageError: A patient stands on both sides of a fold.
            StorageError: ``folder`` holds predictions of other cases.
        """
        progress = progress or Silent()
        by_id = {case.case_id: case for case in cases}
        labels = {case.case_id: case.label for case in cases}
        known = {case_id: value for case_id, value in labels.items() if value is not None}
        if len(known) < len(cases):
            missing = next(case_id for case_id, value in labels.items() if value is None)
            raise LabelError(f"{label}: case {missing} has no label; cross-validation needs labelled cases only")
        check_folds_hold_both_classes(folds, known, label)
        frames = []
        for fold in range(folds.n):
            train = [by_id[case_id] for case_id in folds.train(fold) if case_id in by_id]
            test = [by_id[case_id] for case_id in folds.test(fold) if case_id in by_id]
            _refuse_shared_patients(train, test, fold)
            if test:
                frames.append(
                    self._run_fold(
                        fold,
                        train,
                        test,
                        folder=folder / f"fold{fold}",
                        label=f"{label} fold {fold + 1}/{folds.n}",
                        progress=progress,
                        seed=derive_seed(seed, "fold", fold),
                        device=device,
                        tune=tune,
                    )
                )
        return pd.concat(frames, ignore_index=True)

    def _run_fold(
        self,
        fold: int,
        train: Sequence[MarkerCase],
        test: Sequence[MarkerCase],
        *,
        folder: Path,
        label: str,
        progress: Progress,
        seed: int,
        device: str,
        tune: bool,
    ) -> pd.DataFrame:
        done = folder / PREDICTIONS_FILE
        if done.is_file():
            return _read_predictions(done, test)
        tuning = Tuning()
        if tune:
            tuning = self._tune(train, folder=folder, label=label, progress=progress, seed=seed, device=device)
        self.fit(train, folder=folder, label=label, progress=progress, seed=seed, device=device)
        variants = self.predict_variants(folder, test, device=device)
        if not tuning.n_inner_folds:
            tuning = nothing_chosen(variants)
            tuning.write(folder)
        raw = variants[tuning.variant]
        frame = pd.DataFrame(
            {
                "case_id": [case.case_id for case in test],
                "patient_id": [case.patient_id for case in test],
                "fold": fold,
                "label": [case.label for case in test],
                "probability": tuning.temper(raw),
                "threshold": tuning.threshold,
                "probability_uncalibrated": raw,
                "temperature": tuning.temperature,
            },
            columns=list(PREDICTION_COLUMNS),
        )
        write_text(done, frame.to_csv(index=False))
        # Read back, so that a resumed run continues with the very same numbers.
        return _read_predictions(done, test)

    def _tune(
        self, train: Sequence[MarkerCase], *, folder: Path, label: str, progress: Progress, seed: int, device: str
    ) -> Tuning:
        if (folder / TUNING_FILE).is_file():
            return Tuning.read(folder)
        splits = inner_folds(train, self.settings.inner_folds, seed)
        if not splits:
            progress.note(f"{label}: too few patients for inner folds; threshold 0.5, no temperature scaling")
            return Tuning()
        held: dict[str, dict[str, float]] = {}
        for number, (inner_train, inner_test) in enumerate(splits):
            own = folder / "inner" / f"fold{number}"
            self.fit(
                inner_train,
                folder=own,
                label=f"{label}, inner {number + 1}/{len(splits)}",
                progress=progress,
                seed=derive_seed(seed, "inner", number),
                device=device,
            )
            for variant, values in self.predict_variants(own, inner_test, device=device).items():
                held.setdefault(variant, {}).update(
                    zip((case.case_id for case in inner_test), map(float, values), strict=True)
                )
        predictions = {
            variant: np.asarray([of_case[case.case_id] for case in train]) for variant, of_case in held.items()
        }
        tuning = choose(train, predictions, n_inner_folds=len(splits))
        tuning.write(folder)
        # The inner classifiers are of no further use.
        shutil.rmtree(folder / "inner")
        return tuning

    def predict_folds(self, folder: Path, cases: Sequence[MarkerCase], *, device: str = "cpu") -> NDArray[np.float64]:
        """Return the mean probability of all folds' classifiers, float64 (n,), for patients none of them has seen.

        Args:
            folder: The folder `cross_validate` was given.
            cases: New cases.
            device: ``cpu``, ``cuda`` or ``cuda:N``.

        Raises:
            StorageError: ``folder`` holds no finished fold.
        """
        mean: NDArray[np.float64] = self.predict_members(folder, cases, device=device).mean(axis=0)
        return mean

    def predict_members(self, folder: Path, cases: Sequence[MarkerCase], *, device: str = "cpu") -> NDArray[np.float64]:
        """Return each fold's probability at its own temperature, float64 (folds, n); see `predict_folds`.

        Raises:
            StorageError: ``folder`` holds no finished fold.
        """
        members = [self.predict_fold(fold, cases, device=device) for fold in finished_folds(folder)]
        return np.asarray(members, dtype=np.float64)

    def predict_fold(self, fold: Path, cases: Sequence[MarkerCase], *, device: str = "cpu") -> NDArray[np.float64]:
        """Return what one fold's classifier says, with the variant and at the temperature it chose, float64 (n,).

        Args:
            fold: Folder of a finished fold.
            cases: Cases its classifier was not trained on.
            device: ``cpu``, ``cuda`` or ``cuda:N``.

        Raises:
            StorageError: ``fold`` holds no finished training.
        """
        tuning = Tuning.read(fold)
        return tuning.temper(self.predict_variants(fold, cases, device=device)[tuning.variant])

    def evaluate(self, model: Any) -> float:
        """Score a segmentation network by the patient-level out-of-fold AUC its masks give for the study's marker.

        Called by NNI for each candidate network, or by hand. Inside an NNI trial the AUC is reported as the final
        result, with its interval.

        Args:
            model: Network (N, C, H, W) → logits (N, K, H, W); class 0 is background.

        Returns:
            The AUC, in [0, 1].

        Raises:
            ConfigError: The evaluator was built without a study.
            LeakageError: A case to score belongs to a patient the network was trained on.
        """
        estimate = self.measure(model)
        if nni.get_current_parameter() is not None:
            nni.report_final_result(
                {"default": estimate.value, "auc_low": estimate.low, "auc_high": estimate.high, "n": estimate.n}
            )
        return estimate.value

    def measure(self, model: Any) -> Estimate:
        """Return what `evaluate` does, with its interval, and report it to nobody."""
        if self.study is None:
            raise ConfigError("evaluate(model) needs a MarkerStudy; build the evaluator with study=MarkerStudy(...)")
        cases, folds = cases_of_study(model, self.study, self.settings)
        with tempfile.TemporaryDirectory(dir=self.study.work_folder) as scratch:
            frame = self.cross_validate(
                cases,
                folds,
                folder=Path(scratch),
                seed=derive_seed(self.study.seed, "marker", self.study.marker),
                device=self.study.device,
                label=self.study.marker,
                tune=False,  # the AUC needs no threshold
            )
        patients = patient_level(frame)
        return delong(patients["label"], patients["probability"])

    def _dump(self) -> dict[str, Any]:
        """Return plain data for NNI, which sends evaluators to trial processes as JSON."""
        return {
            "settings": asdict(self.settings),
            "options": self.options(),
            "study": None if self.study is None else self.study.as_json(),
        }

    @classmethod
    def _load(cls, **ir: Any) -> MarkerEvaluator:
        """Rebuild from what `_dump` returned, after a passage through JSON."""
        settings = ClassifierSettings(**{**ir["settings"], "sequences": tuple(ir["settings"]["sequences"])})
        study = None if ir["study"] is None else MarkerStudy.from_json(ir["study"])
        return cls(settings, study=study, **ir["options"])

    def extra_repr(self) -> str:
        """Show settings and options in ``repr``."""
        return ", ".join(f"{key}={value!r}" for key, value in {**asdict(self.settings), **self.options()}.items())


def finished_folds(folder: Path) -> list[Path]:
    """List the folders of the folds `MarkerEvaluator.cross_validate` has finished in ``folder``.

    Raises:
        StorageError: There is none.
    """
    finished = sorted(path.parent for path in folder.glob(f"fold*/{PREDICTIONS_FILE}"))
    if not finished:
        raise StorageError(f"{folder}: holds no finished fold of a classifier; run the classify stage first")
    return finished


def patient_level(frame: pd.DataFrame) -> pd.DataFrame:
    """Reduce predictions of cases to one row a patient: mean probability, with a column ``n_cases``.

    Args:
        frame: Rows as `MarkerEvaluator.cross_validate` returns them.

    Raises:
        LeakageError: Cases of one patient stand in different folds.
    """
    groups = frame.groupby("patient_id", sort=True)
    spread = groups["fold"].nunique()
    if (spread > 1).any():
        raise LeakageError(f"patient {spread.idxmax()} was tested in several folds; draw the folds by patient")
    return groups.agg(
        fold=("fold", "first"),
        label=("label", "first"),
        probability=("probability", "mean"),
        threshold=("threshold", "first"),
        n_cases=("case_id", "size"),
    ).reset_index()


def build_evaluator(
    name: str, settings: ClassifierSettings, options: Mapping[str, Any], *, study: MarkerStudy | None = None
) -> MarkerEvaluator:
    """Build the classifier registered under ``name``, to train it.

    Raises:
        UnknownNameError: No classifier has that name.
        ConfigError: It takes no such option, or not that value, or lacks a file it is to be trained with.
    """
    evaluator = _construct(name, settings, options, study=study)
    evaluator.check_training_files()
    return evaluator


def _construct(
    name: str, settings: ClassifierSettings, options: Mapping[str, Any], *, study: MarkerStudy | None = None
) -> MarkerEvaluator:
    classifier = registry.classifiers.get(name)
    allowed = set(inspect.signature(classifier).parameters) - {"settings", "study"}
    for option in options:
        if option not in allowed:
            raise ConfigError(f"classifier '{name}' has no option '{option}': {did_you_mean(option, allowed)}")
    evaluator = classifier(settings, study=study, **options)
    assert isinstance(evaluator, MarkerEvaluator), f"classifier '{name}' is no MarkerEvaluator"
    return evaluator


def save_evaluator(folder: Path, name: str, evaluator: MarkerEvaluator) -> None:
    """Record in ``folder`` which classifier its folds belong to and which code trained it, for `load_evaluator`."""
    settings = asdict(evaluator.settings)
    settings["sequences"] = list(settings["sequences"])
    made_by = {"version": __version__, "code": classifier_code(type(evaluator))}
    record = {"classifier": name, "settings": settings, "options": evaluator.options(), **made_by}
    write_json(folder / CLASSIFIER_FILE, record)


def load_evaluator(folder: Path) -> MarkerEvaluator:
    """Rebuild the classifier whose folds lie in ``folder``; use its `MarkerEvaluator.predict_folds` on new patients.

    Raises:
        StorageError: ``folder`` holds no classifier.
    """
    record = read_json(folder / CLASSIFIER_FILE)
    settings = ClassifierSettings(**{**record["settings"], "sequences": tuple(record["settings"]["sequences"])})
    return _construct(record["classifier"], settings, record["options"])


def _refuse_shared_patients(train: Sequence[MarkerCase], test: Sequence[MarkerCase], fold: int) -> None:
    shared = {case.patient_id for case in train} & {case.patient_id for case in test}
    if shared:
        raise LeakageError(
            f"fold {fold}: patient {min(shared)} stands on both sides of the split; draw the folds by patient"
        )


def _read_predictions(path: Path, test: Sequence[MarkerCase]) -> pd.DataFrame:
    frame = pd.read_csv(path, dtype={"case_id": str, "patient_id": str}, float_precision="round_trip", na_filter=False)
    expected = [(case.case_id, case.patient_id, case.label) for case in test]
    found = list(zip(frame["case_id"], frame["patient_id"], frame["label"], strict=True))
    if found != expected:
        raise StorageError(f"{path}: was made from other cases or labels; delete {path.parent} and run the stage again")
    return frame
