"""A frozen run is scored on patients from elsewhere; its own patients are refused."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from finished_run import make_finished_run, seeing_no_tumour
from typer.testing import CliRunner

from glioma_nas.calibration import calibration_intercept, calibration_slope
from glioma_nas.cli import app
from glioma_nas.errors import ConfigError, LeakageError
from glioma_nas.external_validation.drift import standardised_difference
from glioma_nas.external_validation.validation import (
    Part,
    _count_empty,
    fit_recalibration,
    recalibrate,
    validate_run,
)
from glioma_nas.files import read_json
from glioma_nas.new_patients.case_inputs import FoundCases, find_cases
from glioma_nas.new_patients.frozen_run import FrozenRun
from glioma_nas.privacy.pseudonyms import Pseudonyms
from glioma_nas.progress import Silent
from glioma_nas.roc_analysis import auc
from glioma_nas.testing.phantoms import write_nifti, write_phantom_cohort


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> FrozenRun:
    return FrozenRun.open(make_finished_run(tmp_path_factory.mktemp("finished")), network="teacher")


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve strangers of two sites, ten years older than the phantoms are, with scans three times as bright."""
    folder = tmp_path_factory.mktemp("elsewhere")
    sheet = write_phantom_cohort(folder, 12, 77)
    for scan in sorted(folder.glob("P*/*.nii.gz")):
        if scan.name != "mask.nii.gz":
            write_nifti(scan, np.asarray(nib.load(scan).dataobj) * 3)
    rows = list(csv.DictReader(sheet.open()))
    for index, row in enumerate(rows):
        row["site"] = "A" if index < 6 else "B"
        row["age"] = str(float(row["age"]) + 10)
    with sheet.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return sheet


@pytest.fixture(scope="module")
def validated(run: FrozenRun, elsewhere: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("validated")
    validate_run(elsewhere, run, out, recalibrate_on=Part("site", "A"), progress=Silent())
    return out


@pytest.mark.slow
def test_every_patient_is_scored_with_intervals(validated: Path) -> None:
    results = read_json(validated / "validation.json")
    table = pd.read_csv(validated / "cases.csv")
    assert results["n_patients"] == len(table) == 12
    dice = results["segmentation"]["dice"]
    assert dice["value"] == pytest.approx(table.dice.mean()) and dice["low"] <= dice["value"] <= dice["high"]
    assert [row["site"] for row in results["sites"]] == ["A", "B"]
    assert results["sites"][0]["dice_value"] == pytest.approx(table.dice[:6].mean())


@pytest.mark.slow
def test_tumours_of_strangers_are_found(validated: Path) -> None:
    table = pd.read_csv(validated / "cases.csv")
    assert table.dice.mean() > 0.3 and table.dice.nunique() > 6
    # An outline of v ml and one of t ml overlap by at most the smaller one.
    smaller = table[["volume_true_ml", "volume_predicted_ml"]].min(axis=1)
    assert (table.dice <= 2 * smaller / (table.volume_true_ml + table.volume_predicted_ml) + 1e-4).all()


@pytest.mark.slow
def test_recalibration_part_is_fitted_on_and_not_scored(validated: Path) -> None:
    marker = read_json(validated / "validation.json")["markers"]["ki67"]
    assert marker["metrics"]["auc"]["n"] == 6 and marker["recalibration"]["n_fitted"] == 6
    assert marker["recalibration"]["metrics"]["auc"]["value"] == pytest.approx(marker["metrics"]["auc"]["value"])
    assert len(pd.read_csv(validated / "ki67.csv")) == 6


@pytest.mark.slow
def test_age_drift_is_found_and_pointed_out(validated: Path) -> None:
    drift = pd.read_csv(validated / "drift.csv").set_index("figure")
    assert drift.loc["age, years", "new"] - drift.loc["age, years", "run"] > 5
    page = (validated / "report.html").read_text()
    assert "shifted by half a standard deviation" in page and "http://" not in page


@pytest.mark.slow
def test_second_call_gives_the_same_without_predicting_again(run: FrozenRun, elsewhere: Path, validated: Path) -> None:
    before = read_json(validated / "validation.json")
    row = validated / "prepared" / "P001" / "row.json"
    written = row.stat().st_mtime_ns
    again = validate_run(elsewhere, run, validated, recalibrate_on=Part("site", "A"), progress=Silent())
    assert json.loads(json.dumps(again)) == before
    assert row.stat().st_mtime_ns == written


@pytest.mark.slow
def test_patient_ids_of_the_run_are_pointed_out(run: FrozenRun, validated: Path) -> None:
    # The strangers are numbered like the run's patients: the same people, for all that anybody can tell.
    own = {case.patient_id for case in run.cohort.cases.values()}
    assert set(read_json(validated / "validation.json")["same_patient_ids"]) == own
    assert "8 patient ids stand in the run too" in (validated / "report.html").read_text()


@pytest.mark.slow
def test_calls_and_reliability_stand_beside_the_figures(validated: Path) -> None:
    marker = read_json(validated / "validation.json")["markers"]["ki67"]
    table = pd.read_csv(validated / "cases.csv")[6:]
    assert marker["abstention"]["n_cases"] == 6
    assert marker["abstention"]["n_called"] == (table.ki67_call != "none").sum() >= marker["abstention"]["n_right"]
    for bins in (marker["reliability"], marker["recalibration"]["reliability"]):
        assert sum(one["n"] for one in bins) == 6
    page = (validated / "report.html").read_text()
    assert "Re-calibrated on site=A." in page and page.count("data:image/svg+xml") >= 2


@pytest.mark.slow
def test_patients_without_an_outline_are_counted_and_not_scored(
    run: FrozenRun, elsewhere: Path, tmp_path: Path
) -> None:
    results = validate_run(elsewhere, seeing_no_tumour(run), tmp_path, recalibrate_on=None, progress=Silent())
    marker = results["markers"]["ki67"]
    assert marker["not_predicted"] == {"not predicted: no tumour was found in the images": 12}
    assert "metrics" not in marker and marker["not_measured"]
    assert "12 cases with a known marker stand in none of these figures" in (tmp_path / "report.html").read_text()
    assert results["empty_outlines"]["n_predicted_empty"] == 12 and results["segmentation"]["dice"]["value"] == 0


@pytest.mark.slow
def test_sites_are_told_apart_for_markers_too(validated: Path) -> None:
    marker = read_json(validated / "validation.json")["markers"]["ki67"]
    table = pd.read_csv(validated / "ki67.csv")
    (site,) = marker["sites"]  # those of site A re-calibrate
    assert (site["site"], site["n"], site["n_positive"]) == ("B", 6, int(table.label.sum()))
    assert site["auc"] == pytest.approx(auc(table.label, table.probability))


@pytest.mark.slow
def test_scale_of_a_scanner_shows_as_drift_though_networks_do_not_see_it(validated: Path) -> None:
    drift = pd.read_csv(validated / "drift.csv").set_index("figure")
    # Scans of this site are three times as bright; normalised they look alike.
    scanned = drift.loc["flair as scanned, percentile 95"]
    assert scanned["new"] > 2.5 * scanned["run"] and scanned["shift"] > 3
    assert abs(drift.loc["flair intensity, percentile 50", "shift"]) < 1


def test_empty_outlines_are_counted_where_no_distance_exists() -> None:
    table = pd.DataFrame(
        {"dice": [0.8, 0.0, 1.0, None], "volume_predicted_ml": [9.0, 0, 0, 0], "volume_true_ml": [8.0, 5, 0, None]}
    )
    assert _count_empty(table) == {"n_scored": 3, "n_predicted_empty": 2, "n_expert_empty": 1}


@pytest.mark.slow
def test_one_scan_under_two_patient_ids_counts_once(run: FrozenRun, elsewhere: Path, tmp_path: Path) -> None:
    shutil.copytree(elsewhere.parent, tmp_path / "cohort")
    sheet = pd.read_csv(tmp_path / "cohort" / "cohort.csv", dtype=str).iloc[:3]
    twin = sheet.iloc[[0]].assign(case_id="Z", patient_id="Z")
    again = sheet.iloc[[1]].assign(case_id="Y")
    pd.concat([sheet, twin, again]).to_csv(tmp_path / "cohort" / "cohort.csv", index=False)
    results = validate_run(tmp_path / "cohort", run, tmp_path / "out", recalibrate_on=None, progress=Silent())
    assert list(results["left_out"]) == ["Z"] and "must not count twice" in results["left_out"]["Z"]
    assert (results["n_patients"], results["n_cases"]) == (3, 4)


@pytest.mark.slow
def test_hashed_ids_are_compared_where_the_salt_is_at_hand(run: FrozenRun, elsewhere: Path, tmp_path: Path) -> None:
    def found(salt: Path) -> FoundCases:
        cohort = run.config.cohort.model_copy(update={"hash_ids": True, "salt_file": salt})
        hidden = FrozenRun(run.folder, run.config.model_copy(update={"cohort": cohort}), "teacher")
        return find_cases(elsewhere, hidden, tmp_path / "out", Silent())

    salt = tmp_path / "project.salt"
    salt.write_text("ab" * 32)
    known = found(salt)
    assert known.comparable
    assert {case.patient_id for case in known.cases} == {
        Pseudonyms(bytes.fromhex("ab" * 32)).patient(f"P{number:03d}") for number in range(1, 13)
    }
    other = found(tmp_path / "absent.salt")
    assert not other.comparable and not (tmp_path / "absent.salt").exists()
    assert not {case.patient_id for case in known.cases} & {case.patient_id for case in other.cases}


@pytest.mark.slow
def test_networks_of_another_version_of_the_code_are_pointed_out(
    run: FrozenRun, elsewhere: Path, validated: Path, tmp_path: Path
) -> None:
    assert read_json(validated / "validation.json")["other_code"] is None
    other = Path(shutil.copytree(run.folder, tmp_path / "run"))
    manifest = read_json(other / "train" / "manifest.json")
    manifest["versions"]["source"] = "0123456789ab"
    (other / "train" / "manifest.json").write_text(json.dumps(manifest))
    results = validate_run(
        elsewhere,
        FrozenRun(other, run.config, run.network),
        Path(shutil.copytree(validated, tmp_path / "out")),
        recalibrate_on=None,
        progress=Silent(),
    )
    assert "source 0123456789ab; here" in results["other_code"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "The networks were trained by another version of glioma_nas" in page


@pytest.mark.slow
def test_mended_sheet_counts_without_predicting_again(
    run: FrozenRun, elsewhere: Path, validated: Path, tmp_path: Path
) -> None:
    shutil.copytree(validated, tmp_path / "out")
    sheet = pd.read_csv(elsewhere, dtype=str)
    sheet["site"], sheet.loc[1, "patient_id"] = "C", sheet.patient_id[0]
    mended = elsewhere.with_name("mended.csv")
    sheet.to_csv(mended, index=False)
    results = validate_run(mended, run, tmp_path / "out", recalibrate_on=None, progress=Silent())
    assert results["n_patients"] == 11 and [row["site"] for row in results["sites"]] == ["C"]


@pytest.mark.slow
def test_the_runs_own_patients_are_refused(run: FrozenRun, tmp_path: Path) -> None:
    with pytest.raises(LeakageError, match="is the very one of case P001, which the run was made with"):
        validate_run(run.config.cohort.sheet, run, tmp_path, recalibrate_on=None, progress=Silent())


@pytest.mark.slow
def test_marker_without_labels_here_says_why(run: FrozenRun, elsewhere: Path, tmp_path: Path) -> None:
    shutil.copytree(elsewhere.parent, tmp_path / "cohort")
    sheet = pd.read_csv(tmp_path / "cohort" / "cohort.csv", dtype=str).drop(columns=["idh"])
    sheet.iloc[:3].to_csv(tmp_path / "cohort" / "cohort.csv", index=False)
    done = CliRunner().invoke(
        app,
        ["evaluate", str(run.folder), str(tmp_path / "cohort" / "cohort.csv"), "--out", str(tmp_path / "o"), "--json"],
    )
    assert done.exit_code == 0, done.output
    rows = {row["figure"]: row for row in json.loads(done.stdout)}
    assert rows["AUC idh"]["value"] == "not measured" and rows["Dice"]["n"] == 3
    assert "lacks the column" in read_json(tmp_path / "o" / "validation.json")["markers"]["idh"]["not_measured"]


@pytest.mark.parametrize("text", ["site", "=B", "site="])
def test_part_that_is_no_part_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected COLUMN=VALUE"):
        Part.parse(text)


def test_part_nobody_belongs_to_is_refused(run: FrozenRun, elsewhere: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="site=Z: no case"):
        validate_run(elsewhere, run, tmp_path, recalibrate_on=Part.parse("site = Z"), progress=Silent())


def test_probabilities_that_point_the_wrong_way_are_not_turned_round(run: FrozenRun) -> None:
    from glioma_nas.external_validation.validation import _recalibrated

    fitted = pd.DataFrame({"label": [1, 1, 0, 0], "probability": [0.1, 0.2, 0.8, 0.9], "threshold": 0.5})
    found = _recalibrated("ki67", fitted, fitted, run, Part("site", "B"))
    assert found == {"on": "site=B", "not_measured": found["not_measured"]}
    assert "point the wrong way" in found["not_measured"]


def test_recalibration_undoes_a_planted_miscalibration() -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 1.5, 4000)
    labels = (generator.random(4000) < 1 / (1 + np.exp(-logits))).astype(int)
    wrong = 1 / (1 + np.exp(-(3 * logits + 1)))
    slope, intercept = fit_recalibration(labels[:2000], wrong[:2000])
    assert slope == pytest.approx(1 / 3, abs=0.05) and intercept == pytest.approx(-1 / 3, abs=0.12)
    right = recalibrate(wrong[2000:], slope, intercept)
    assert calibration_slope(labels[2000:], right) == pytest.approx(1, abs=0.12)
    assert calibration_intercept(labels[2000:], right) == pytest.approx(0, abs=0.12)
    assert auc(labels[2000:], right) == pytest.approx(auc(labels[2000:], wrong[2000:]))


@pytest.mark.parametrize(
    ("first", "second", "expected"), [([0, 2], [4, 6], 2 * 2**0.5), ([1, 1], [1, 1], None), ([1], [1, 2], None)]
)
def test_standardised_difference_is_cohens_d(first: list[float], second: list[float], expected: float | None) -> None:
    found = standardised_difference(np.array(first, dtype=float), np.array(second, dtype=float))
    assert found == (None if expected is None else pytest.approx(expected))
