"""Score a frozen run on another cohort: Dice and distance per patient, markers at the run's own thresholds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from glioma_nas.binary_statistics import binary_report
from glioma_nas.calibration import log_odds, reliability, sigmoid
from glioma_nas.case_preparation import is_prepared, prepare_case
from glioma_nas.cohort import Case
from glioma_nas.errors import CohortError, ConfigError, GliomaNasError, LabelError, LeakageError
from glioma_nas.external_validation.drift import drift_rows
from glioma_nas.external_validation.validation_page import render_validation
from glioma_nas.files import read_json, write_json, write_text
from glioma_nas.markers import encode_labels
from glioma_nas.new_patients.batch import unexpected
from glioma_nas.new_patients.case_inputs import find_cases, told
from glioma_nas.new_patients.frozen_run import FrozenRun
from glioma_nas.new_patients.input_checks import require_servable
from glioma_nas.new_patients.marker_prediction import predict_marker
from glioma_nas.new_patients.prediction import ensemble_probabilities, known_case, prediction_key, tumour_on_slices
from glioma_nas.prepared import PreparedCase
from glioma_nas.progress import Progress
from glioma_nas.report.further_evidence import applied_stages
from glioma_nas.report.intervals import estimate, mean, median
from glioma_nas.roc_analysis import delong
from glioma_nas.seeding import numpy_generator
from glioma_nas.segmentation_scores import native_outline, native_scores

CASES_FILE = "cases.csv"
DRIFT_FILE = "drift.csv"
RESULTS_FILE = "validation.json"
PAGE_FILE = "report.html"
PREPARED_FOLDER = "prepared"
ROW_FILE = "row.json"


@dataclass(frozen=True)
class Part:
    """Patients on whom probabilities may be re-calibrated; their markers are not scored, their outlines are.

    Attributes:
        column: Column of the cohort.
        value: Its value for those patients.
    """

    column: str
    value: str

    @classmethod
    def parse(cls, text: str) -> Part:
        """Read ``COLUMN=VALUE``.

        Raises:
            ConfigError: It is not of that form.
        """
        column, separator, value = (piece.strip() for piece in text.partition("="))
        if not separator or not column or not value:
            raise ConfigError(f"--recalibrate-on {text}: expected COLUMN=VALUE, for example site=B")
        return cls(column, value)

    def holds(self, case: Case) -> bool:
        """Tell whether a case belongs to the part."""
        return case.labels.get(self.column) == self.value


def validate_run(
    source: Path, run: FrozenRun, out: Path, *, recalibrate_on: Part | None, progress: Progress
) -> dict[str, Any]:
    """Predict every case of another cohort with the frozen run and score it.

    Args:
        source: See `glioma_nas.new_patients.case_inputs.find_cases`.
        run: The run.
        out: Gets ``cases.csv``, ``drift.csv``, ``MARKER.csv``, ``validation.json`` and ``report.html``.
        recalibrate_on: A named part of the cohort to fit a logistic re-calibration on.
        progress: Where to report.

    Returns:
        What ``validation.json`` holds.

    Raises:
        CohortError: The cohort cannot be read, or none of its cases can be served.
        LeakageError: A case is one of the run's own.
        ConfigError: Nobody belongs to ``recalibrate_on``.
    """
    found = find_cases(source, run, out, progress)
    cases, unreadable = found.cases, found.problems
    if recalibrate_on is not None and not any(recalibrate_on.holds(case) for case in cases):
        raise ConfigError(
            f"--recalibrate-on {recalibrate_on.column}={recalibrate_on.value}: no case of {source} has that value"
        )
    rows: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    owners: dict[str, Case] = {}
    with progress.task("evaluate", len(cases)) as task:
        for case in cases:
            try:
                row = _row(case, run, out / PREPARED_FOLDER / case.case_id)
                _require_new_person(case, PreparedCase.load(out / PREPARED_FOLDER / case.case_id), owners)
                rows.append(row)
            except LeakageError:
                raise
            except (GliomaNasError, OSError) as err:
                failed[case.case_id] = told(str(err), case, run)
            except Exception as err:  # noqa: BLE001 - as in `predict`: one strange scan must not cost the others
                failed[case.case_id] = unexpected(err, case, run)
            if case.case_id in failed:
                progress.note(f"evaluate: case {case.case_id} is left out: {failed[case.case_id]}")
            task.advance()
    if not rows:
        raise CohortError(
            f"{source}: none of {len(cases)} cases can be served; the first: {next(iter(failed.values()))}"
        )
    served = [case for case in cases if case.case_id not in failed]
    table = pd.DataFrame(rows)
    prepared = [PreparedCase.load(out / PREPARED_FOLDER / case.case_id) for case in served]
    drift = drift_rows(list(run.cohort.cases.values()), prepared, run.config.cohort.sequences)
    markers = {name: _score_marker(name, source, served, table, run, recalibrate_on, out) for name in run.markers}
    results = {
        "run": run.folder.name,
        "applied": applied_stages(run.folder),
        "network": run.network,
        "other_code": run.other_code,
        "cohort": source.name,
        "n_cases": len(table),
        "n_patients": int(table.patient_id.nunique()),
        "not_read": list(unreadable),
        "left_out": failed,
        "same_patient_ids": shared_patients(served, run) if found.comparable else [],
        "patient_ids_comparable": found.comparable,
        "out_of_fold_dice": run.out_of_fold_dice,
        "segmentation": _score_segmentation(table, run),
        "empty_outlines": _count_empty(table),
        "sites": _by_site(table, run),
        "markers": markers,
    }
    write_text(out / CASES_FILE, table.to_csv(index=False))
    write_text(out / DRIFT_FILE, pd.DataFrame(drift).to_csv(index=False))
    write_text(out / PAGE_FILE, render_validation(results, table, drift, run))
    write_json(out / RESULTS_FILE, results)
    return results


def shared_patients(cases: Sequence[Case], run: FrozenRun) -> list[str]:
    """Return the patient ids that the run has too: another scan of its own patients, or a number given twice.

    Equal voxels are refused, but a second scan of a patient has others, and only the id can tell.
    """
    own = {case.patient_id for case in run.cohort.cases.values()}
    return sorted({case.patient_id for case in cases} & own)


def _require_new_person(case: Case, prepared: PreparedCase, owners: dict[str, Case]) -> None:
    """Refuse a scan that another patient of this cohort has too: one person would count as two.

    Raises:
        CohortError: It has.
    """
    for name, digest in prepared.voxel_hashes.items():
        owner = owners.setdefault(digest, case)
        if owner.patient_id != case.patient_id:
            raise CohortError(
                f"its {name} is the very scan of case {owner.case_id}, which stands under another patient id; one "
                "person must not count twice"
            )


def _row(case: Case, run: FrozenRun, folder: Path) -> dict[str, Any]:
    """Predict and score one case; read back what an earlier call with the same inputs found."""
    mask = case.mask.stat() if case.mask is not None else None
    key = f"{prediction_key(case, run)}-{mask.st_size}-{mask.st_mtime_ns}" if mask else prediction_key(case, run)
    # The sheet may have been mended since: who somebody is and where they were scanned is never taken from earlier.
    who = {
        "case_id": case.case_id,
        "patient_id": case.patient_id,
        "site": case.labels.get(run.config.folds.site_column),
    }
    if (folder / ROW_FILE).is_file() and (known := read_json(folder / ROW_FILE))["key"] == key:
        return {**known["row"], **who}
    require_servable(case, run, any_spacing=True)  # how spacing differs is a finding, see the drift table
    if not is_prepared(case, folder, run.recipe):
        prepare_case(case, folder, run.recipe)
    prepared = PreparedCase.load(folder)
    same = known_case(prepared, run)
    if same is not None:
        raise LeakageError(
            f"case {case.case_id}: a scan is the very one of case {same}, which the run was made with; external "
            "validation needs other patients"
        )
    probability = ensemble_probabilities(prepared, run).mean(axis=0, dtype=np.float32)
    outline = native_outline(prepared, probability)
    row: dict[str, Any] = {**who, **native_scores(prepared, outline)}
    on_slices = tumour_on_slices(probability, outline)
    for name in run.markers:
        marker = predict_marker(name, prepared, on_slices, run)
        row[f"{name}_probability"], row[f"{name}_threshold"] = marker.probability, marker.threshold
        row[f"{name}_call"], row[f"{name}_reason"] = marker.call, marker.reason
    write_json(folder / ROW_FILE, {"key": key, "row": row})
    return row


def _score_segmentation(table: pd.DataFrame, run: FrozenRun) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for column in ("dice", "hd95_mm"):
        scored = table.dropna(subset=[column])
        if scored.empty:
            continue
        result = estimate(
            scored[column].tolist(),
            scored.patient_id.tolist(),
            numpy_generator(run.config.seed, "external validation", column),
            # A few lost outlines make distances of any size; the run's own report shows the median too.
            statistic=mean if column == "dice" else median,
        )
        assert result is not None
        found[column] = {"value": result.value, "low": result.low, "high": result.high, "n": result.n}
    return found


def _count_empty(table: pd.DataFrame) -> dict[str, int]:
    """Count the outlines for which a distance does not exist; such a Dice is 0, or 1 where both are empty."""
    scored = table.dropna(subset=["dice"])
    return {
        "n_scored": len(scored),
        "n_predicted_empty": int((scored.volume_predicted_ml == 0).sum()),
        "n_expert_empty": int((scored.volume_true_ml == 0).sum()),
    }


def _by_site(table: pd.DataFrame, run: FrozenRun) -> list[dict[str, Any]]:
    rows = []
    for site, group in table.dropna(subset=["site"]).groupby("site", sort=True):
        dice = _score_segmentation(group, run).get("dice", {})
        rows.append({"site": str(site), "n_cases": len(group), **{f"dice_{key}": value for key, value in dice.items()}})
    return rows


def _score_marker(
    name: str,
    source: Path,
    cases: Sequence[Case],
    table: pd.DataFrame,
    run: FrozenRun,
    part: Part | None,
    out: Path,
) -> dict[str, Any]:
    """Score one marker; a marker that this cohort cannot score says why."""
    config = run.config.classify.markers[name]
    try:
        labels = encode_labels(cases, name, config, sheet=source, n_folds=1)
    except LabelError as err:
        return {"not_measured": str(err)}
    recalibrating = {case.case_id: part is not None and part.holds(case) for case in cases}
    rows = table.assign(
        label=table.case_id.map(labels),
        part=table.case_id.map(recalibrating),
        probability=table[f"{name}_probability"].astype(float),
        threshold=table[f"{name}_threshold"].astype(float),
        call=table[f"{name}_call"],
        reason=table[f"{name}_reason"],
    ).dropna(subset=["label"])
    not_predicted = rows[rows.probability.isna()].reason.value_counts().to_dict()
    rows = rows.dropna(subset=["probability"])
    patients = rows.groupby("patient_id", sort=True).agg(
        label=("label", "first"),
        probability=("probability", "mean"),
        threshold=("threshold", "mean"),
        part=("part", "max"),
        site=("site", "first"),
    )
    scored, fitted = patients[~patients.part.astype(bool)], patients[patients.part.astype(bool)]
    columns = ["label", "probability", "threshold"]
    write_text(out / f"{name}.csv", scored[columns].to_csv())
    result: dict[str, Any] = {
        "positive_class": run.marker_summary(name)["positive_class"],
        "in_the_run": run.marker_summary(name)["metrics"]["auc"],
        "not_predicted": {str(reason): int(count) for reason, count in not_predicted.items()},
    }
    report = _report(name, scored, run)
    if isinstance(report, str):
        return {**result, "not_measured": report}
    result["metrics"] = report
    result["abstention"] = _count_calls(rows[~rows.part.astype(bool)])
    result["reliability"] = _bins(scored)
    result["sites"] = _auc_by_site(scored)
    if part is not None:
        result["recalibration"] = _recalibrated(name, scored, fitted, run, part)
    return result


def _auc_by_site(patients: pd.DataFrame) -> list[dict[str, Any]]:
    """Return one row a site; its AUC is left out where a class has fewer than two patients."""
    rows: list[dict[str, Any]] = []
    for site, group in patients.dropna(subset=["site"]).groupby("site", sort=True):
        row: dict[str, Any] = {"site": str(site), "n": len(group), "n_positive": int((group.label == 1).sum())}
        if min(row["n_positive"], row["n"] - row["n_positive"]) >= 2:
            found = delong(group.label.astype(int), group.probability)
            row |= {"auc": found.value, "low": found.low, "high": found.high}
        rows.append(row)
    return rows


def _count_calls(rows: pd.DataFrame) -> dict[str, int]:
    """Count the cases for which the run made a call, and how many of those were right."""
    called = rows[rows.call != "none"]
    right = int(((called.call == "positive") == (called.label == 1)).sum())
    return {"n_cases": len(rows), "n_called": len(called), "n_right": right}


def _bins(patients: pd.DataFrame) -> list[dict[str, Any]]:
    return [asdict(one) for one in reliability(patients.label.astype(int), patients.probability)]


def _report(name: str, patients: pd.DataFrame, run: FrozenRun) -> dict[str, Any] | str:
    """Return the figures of a marker, or why there are none."""
    try:
        report = binary_report(
            patients.label.astype(int).to_numpy(),
            patients.probability.to_numpy(),
            patients.threshold.to_numpy(),
            samples=run.config.classify.bootstrap_samples,
            generator=numpy_generator(run.config.seed, "external validation", name),
        )
    except LabelError as err:
        return str(err)
    return {key: value.as_json() for key, value in report.items()}


def _recalibrated(name: str, scored: pd.DataFrame, fitted: pd.DataFrame, run: FrozenRun, part: Part) -> dict[str, Any]:
    """Re-calibrate on one part and score the others; AUC cannot change, calibration can.

    Reference:
        Steyerberg, Clinical Prediction Models, 2nd ed. 2019, ch. 15: logistic re-calibration.
    """
    where = f"{part.column}={part.value}"
    if fitted.label.nunique() < 2:
        return {"on": where, "not_measured": f"the {len(fitted)} patients with {where} are not of both classes"}
    slope, intercept = fit_recalibration(fitted.label.to_numpy(), fitted.probability.to_numpy())
    if slope <= 0:
        # It would turn the order of the patients round, which is another classifier and no re-calibration.
        return {"on": where, "not_measured": f"among the patients with {where} the probabilities point the wrong way"}
    moved = {
        column: recalibrate(scored[column].to_numpy(dtype=np.float64), slope, intercept)
        for column in ("probability", "threshold")
    }
    after = scored.assign(**moved)
    report = _report(name, after, run)
    if isinstance(report, str):
        return {"on": where, "not_measured": report}
    fit = {"on": where, "n_fitted": len(fitted), "slope": slope, "intercept": intercept}
    return {**fit, "metrics": report, "reliability": _bins(after)}


def fit_recalibration(labels: NDArray[Any], probabilities: NDArray[np.float64]) -> tuple[float, float]:
    """Fit slope and intercept of the log-odds by logistic regression, lightly penalised so that it always exists."""
    model = LogisticRegression(C=100.0).fit(log_odds(probabilities)[:, None], labels.astype(int))
    return float(model.coef_[0, 0]), float(model.intercept_[0])


def recalibrate(probabilities: NDArray[np.float64], slope: float, intercept: float) -> NDArray[np.float64]:
    """Return the probabilities (n,) whose log-odds are slope·log-odds + intercept."""
    return np.asarray(sigmoid(slope * log_odds(probabilities) + intercept), dtype=np.float64)


def measured(results: Mapping[str, Any]) -> list[list[Any]]:
    """Return the rows of the table the command prints: what, value, interval, n, and the run's own figure."""
    rows: list[list[Any]] = []
    for column, name in (("dice", "Dice"), ("hd95_mm", "HD95, mm")):
        found = results["segmentation"].get(column)
        own = results["out_of_fold_dice"] if column == "dice" else None
        rows.append([name, *_cells(found), own] if found else [name, "not measured", None, None, own])
    for name, marker in results["markers"].items():
        if "metrics" in marker:
            rows.append([f"AUC {name}", *_cells(marker["metrics"]["auc"]), marker["in_the_run"]["value"]])
        else:
            rows.append([f"AUC {name}", "not measured", marker["not_measured"], None, None])
    return rows


def _cells(found: Mapping[str, Any]) -> list[Any]:
    ends = None if found["low"] is None else f"{found['low']:.3f} to {found['high']:.3f}"
    return [round(found["value"], 3), ends, found["n"]]
