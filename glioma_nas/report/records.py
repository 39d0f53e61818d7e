"""Read what the stages of a run left behind, and refuse what is broken.

A file that a stage did not write is "not measured" and read as none; a file that is there but lacks a column, or holds
text where a number belongs, is an error that names it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from glioma_nas.errors import StorageError
from glioma_nas.files import read_json
from glioma_nas.pipeline import MANIFEST
from glioma_nas.prepared import PreparedCohort

NETWORKS_OF_SEARCH = ("teacher", "student")
_CURVE_COLUMNS = (
    "loss_weights",
    "loss_architecture_teacher",
    "loss_architecture_student",
    "expected_latency_ms",
    "entropy_operator",
    "entropy_scale",
    "entropy_width",
    "dice_validation",
)
_PREDICTION_COLUMNS = ("case_id", "patient_id", "fold", "label", "probability", "threshold")
_METRIC_KEYS = ("value", "low", "high", "n", "n_positive", "split")


@dataclass(frozen=True)
class MarkerRecords:
    """What the classify stage found for one marker.

    Attributes:
        predictions: Out-of-fold predictions, one row for each case; none when not measured.
        metrics: Metric name → value, low, high, n, n_positive, split; empty when not measured.
        baseline_predictions: The same from age and sex only.
        baseline_metrics: The same from age and sex only.
        summary: Who was left out and why, as the classify stage counted them; empty when not recorded.
        pictures: File name of a Grad-CAM overlay → PNG.
    """

    predictions: pd.DataFrame | None
    metrics: Mapping[str, Mapping[str, Any]]
    baseline_predictions: pd.DataFrame | None
    baseline_metrics: Mapping[str, Mapping[str, Any]]
    summary: Mapping[str, Any]
    pictures: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class DerivedRecord:
    """One network that the search derived: teacher or student.

    Attributes:
        architecture: The record as plain data (space, options, choices, id); none when not measured.
        cells: One dict for each cell, in order; empty when not measured.
        drawing: SVG text; none when there is no drawing.
    """

    architecture: Mapping[str, Any] | None
    cells: Sequence[Mapping[str, Any]]
    drawing: str | None


@dataclass(frozen=True)
class RunRecords:
    """Everything the report is made of.

    Attributes:
        cohort: Prepared cases and folds.
        manifests: Stage name → its manifest.
        search_history: One row for each epoch of the search; none when not measured.
        derived: ``teacher`` and ``student``.
        train_histories: (network, fold) → one row for each epoch.
        latency: Network → median_ms, p95_ms, n, params_m, macs_g and so on; empty when not measured.
        latency_conditions: ``environment`` (device, threads, backend, precision, …) and ``input_shape`` of them all.
        parity: Engine file → network, fold and how far it is from PyTorch; empty when not measured.
        parity_backend: The engine they were compared on; none when not measured.
        dice: One row for each network and case; none when not measured.
        segment_folder: Where the predicted masks lie.
        markers: Marker name → its records.
    """

    cohort: PreparedCohort
    manifests: Mapping[str, Mapping[str, Any]]
    search_history: pd.DataFrame | None
    derived: Mapping[str, DerivedRecord]
    train_histories: Mapping[tuple[str, int], pd.DataFrame]
    latency: Mapping[str, Mapping[str, Any]]
    latency_conditions: Mapping[str, Any]
    parity: Mapping[str, Mapping[str, Any]]
    parity_backend: str | None
    dice: pd.DataFrame | None
    segment_folder: Path
    markers: Mapping[str, MarkerRecords]

    def predicted_mask(self, network: str, case_id: str) -> np.ndarray[Any, Any] | None:
        """Return a case's out-of-fold mask on the prepared grid; uint8 (Z, H, W), 0 or 1; none when not measured.

        Raises:
            StorageError: The file is no such array or does not fit the case.
        """
        path = self.segment_folder / "masks_prepared" / network / f"{case_id}.npy"
        if not path.is_file():
            return None
        try:
            mask: np.ndarray[Any, Any] = np.load(path, allow_pickle=False)
        except (OSError, ValueError) as err:
            raise StorageError(f"{path}: not a NumPy array ({err}); run the segment stage again") from err
        truth = self.cohort.cases[case_id].mask()
        if mask.ndim != 3 or (truth is not None and mask.shape != truth.shape):
            expected = "(Z, H, W)" if truth is None else str(truth.shape)
            raise StorageError(f"{path}: shape {mask.shape} is not {expected}; run the segment stage again")
        return mask


def read_records(inputs: Mapping[str, Path], markers: Sequence[str]) -> RunRecords:
    """Read the folders of finished stages.

    Args:
        inputs: Stage name → its folder; ``preprocess`` is needed, the others may be absent.
        markers: Names of the configured markers.

    Raises:
        StorageError: A file is there but broken.
    """
    preprocess = inputs["preprocess"]
    search, train = inputs.get("search"), inputs.get("train")
    export, segment, classify = inputs.get("export"), inputs.get("segment"), inputs.get("classify")
    latency, parity = _read_object(export, "latency.json"), _read_object(export, "parity.json")
    return RunRecords(
        cohort=PreparedCohort.load(preprocess),
        manifests={
            name: read_json(folder / MANIFEST) for name, folder in inputs.items() if (folder / MANIFEST).is_file()
        },
        search_history=_read_search_history(search),
        derived={name: _read_derived(search, name) for name in NETWORKS_OF_SEARCH},
        train_histories=_read_train_histories(train),
        latency=_entries(export, latency, "networks", ("median_ms", "p95_ms", "n")),
        latency_conditions={key: value for key, value in latency.items() if key != "networks"},
        parity=_entries(export, parity, "engines", ("network", "max_abs_logit_difference", "mask_dice", "n_slices")),
        parity_backend=parity.get("backend"),
        dice=_read_dice(segment),
        segment_folder=segment if segment is not None else preprocess / "no-segment-stage",
        markers={name: _read_marker(classify, name) for name in markers},
    )


def _read_search_history(folder: Path | None) -> pd.DataFrame | None:
    path = _existing(folder, "history.csv")
    if path is None:
        return None
    frame = _read_table(path, text=("phase",), numbers=("epoch",))
    present = [name for name in _CURVE_COLUMNS if name in frame.columns]
    return _as_numbers(path, frame, present)


def _read_derived(folder: Path | None, name: str) -> DerivedRecord:
    architecture = _existing(folder, f"{name}.json")
    cells = _existing(folder, f"{name}_cells.json")
    drawing = _existing(folder, f"{name}.svg")
    rows = [] if cells is None else read_json(cells)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise StorageError(f"{cells}: expected a list of objects; run the search stage again")
    return DerivedRecord(
        architecture=None if architecture is None else read_json(architecture),
        cells=rows,
        drawing=None if drawing is None else drawing.read_text(encoding="utf-8"),
    )


def _read_train_histories(folder: Path | None) -> dict[tuple[str, int], pd.DataFrame]:
    found: dict[tuple[str, int], pd.DataFrame] = {}
    if folder is None:
        return found
    for path in sorted(folder.glob("fold*/*/history.csv")):
        fold = path.parent.parent.name.removeprefix("fold")
        if not fold.isdigit():
            continue
        frame = _read_table(path, text=(), numbers=("epoch", "loss"))
        optional = [name for name in ("dice_validation", "learning_rate") if name in frame.columns]
        found[(path.parent.name, int(fold))] = _as_numbers(path, frame, optional)
    return found


def _read_object(folder: Path | None, name: str) -> Mapping[str, Any]:
    path = _existing(folder, name)
    if path is None:
        return {}
    content = read_json(path)
    if not isinstance(content, dict):
        raise StorageError(f"{path}: expected an object; run that stage again")
    return content


def _entries(
    folder: Path | None, content: Mapping[str, Any], name: str, keys: Sequence[str]
) -> Mapping[str, Mapping[str, Any]]:
    entries = content.get(name, {} if not content else None)
    if not isinstance(entries, dict):
        raise StorageError(f"{folder}: the object '{name}' is missing in a file of it; run the export stage again")
    for entry, record in entries.items():
        missing = [key for key in keys if not isinstance(record, dict) or key not in record]
        if missing:
            what = f"'{entry}' of '{name}' lacks {', '.join(missing)}"
            raise StorageError(f"{folder}: {what}; run the export stage again")
    return entries


def _read_dice(folder: Path | None) -> pd.DataFrame | None:
    path = _existing(folder, "dice.csv")
    if path is None:
        return None
    frame = _read_table(path, text=("network", "case_id", "patient_id"), numbers=("fold", "dice"))
    optional = [name for name in ("hd95_mm", "volume_true_ml", "volume_predicted_ml") if name in frame.columns]
    frame = _as_numbers(path, frame, optional)
    outside = frame.loc[~frame["dice"].isna() & ~frame["dice"].between(0, 1), "case_id"]
    if len(outside):
        raise StorageError(f"{path}: Dice of case {outside.iloc[0]} is outside 0 … 1; run the segment stage again")
    return frame


def _read_marker(folder: Path | None, name: str) -> MarkerRecords:
    return MarkerRecords(
        predictions=_read_predictions(folder, f"{name}/predictions.csv"),
        metrics=_read_metrics(folder, f"{name}/metrics.json"),
        baseline_predictions=_read_predictions(folder, f"{name}/baseline_age_sex_predictions.csv"),
        baseline_metrics=_read_metrics(folder, f"{name}/baseline_age_sex_metrics.json"),
        summary=_read_object(folder, f"{name}/summary.json"),
        pictures={path.name: path.read_bytes() for path in sorted((folder / name / "grad_cam").glob("*.png"))}
        if folder is not None
        else {},
    )


def _read_predictions(folder: Path | None, name: str) -> pd.DataFrame | None:
    path = _existing(folder, name)
    if path is None:
        return None
    frame = _read_table(path, text=_PREDICTION_COLUMNS[:2], numbers=_PREDICTION_COLUMNS[2:])
    if not set(frame["label"]) <= {0, 1} or not frame["probability"].between(0, 1).all():
        raise StorageError(f"{path}: labels must be 0 or 1 and probabilities in 0 … 1; run the classify stage again")
    return frame


def _read_metrics(folder: Path | None, name: str) -> Mapping[str, Mapping[str, Any]]:
    path = _existing(folder, name)
    if path is None:
        return {}
    metrics = read_json(path)
    if not isinstance(metrics, dict):
        raise StorageError(f"{path}: expected an object of metrics; run the classify stage again")
    for metric, record in metrics.items():
        missing = [key for key in _METRIC_KEYS if not isinstance(record, dict) or key not in record]
        if missing:
            raise StorageError(f"{path}: metric '{metric}' lacks {', '.join(missing)}; run the classify stage again")
    _check_accuracy(path, metrics)
    return metrics


def _check_accuracy(path: Path, metrics: Mapping[str, Mapping[str, Any]]) -> None:
    # Accuracy is a weighted mean of sensitivity and specificity: outside their range, one of the three is wrong.
    values = [metrics.get(name, {}).get("value") for name in ("accuracy", "sensitivity", "specificity")]
    known = [float(value) for value in values if value is not None]
    if len(known) < len(values):
        return
    accuracy, sensitivity, specificity = known
    slack = 1e-3  # the file holds rounded numbers
    if not min(sensitivity, specificity) - slack <= accuracy <= max(sensitivity, specificity) + slack:
        raise StorageError(
            f"{path}: accuracy {accuracy} lies outside sensitivity {sensitivity} and specificity {specificity}, "
            "which cannot be; run the classify stage again"
        )


def _existing(folder: Path | None, name: str) -> Path | None:
    path = None if folder is None else folder / name
    return path if path is not None and path.is_file() else None


def _read_table(path: Path, *, text: Sequence[str], numbers: Sequence[str]) -> pd.DataFrame:
    try:
        # Identifiers stay text: "007" must not become 7, nor a case called "NA" a missing value.
        frame = pd.read_csv(path, dtype=dict.fromkeys(text, str), keep_default_na=False, na_values={})
    except (OSError, ValueError) as err:
        raise StorageError(f"{path}: not readable as CSV ({err}); delete it and run the stage again") from err
    missing = [name for name in (*text, *numbers) if name not in frame.columns]
    if missing:
        raise StorageError(f"{path}: column {', '.join(missing)} missing; run the stage again")
    return _as_numbers(path, frame, numbers)


def _as_numbers(path: Path, frame: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    frame = frame.copy()
    for name in columns:
        column = frame[name].replace("", np.nan) if frame[name].dtype != np.float64 else frame[name]
        try:
            frame[name] = pd.to_numeric(column).astype(float)
        except (ValueError, TypeError) as err:
            raise StorageError(f"{path}: column {name} holds text ({err}); run the stage again") from err
    return frame
