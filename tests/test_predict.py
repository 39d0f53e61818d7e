"""New patients are served by a frozen run: outlines in the scan's own grid, markers, one page, one bad case alone."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from finished_run import make_finished_run, seeing_no_tumour
from typer.testing import CliRunner

from glioma_nas.cli import app
from glioma_nas.errors import CohortError, ConfigError, GliomaNasError, StorageError
from glioma_nas.files import read_json
from glioma_nas.new_patients.batch import _serve, predict_all
from glioma_nas.new_patients.case_inputs import find_cases
from glioma_nas.new_patients.frozen_run import FrozenRun
from glioma_nas.new_patients.input_checks import problems_of_input, require_servable
from glioma_nas.new_patients.prediction import other_masks, prediction_key
from glioma_nas.progress import Silent
from glioma_nas.testing.phantoms import write_phantom_cohort
from glioma_nas.uncertainty import UncertainPrediction, decide

NOBODY = {"case_id": None, "age": None, "sex": None}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_finished_run(tmp_path_factory.mktemp("finished"))


@pytest.fixture(scope="module")
def run(run_folder: Path) -> FrozenRun:
    return FrozenRun.open(run_folder, network="teacher")


@pytest.fixture
def patient(tmp_path: Path) -> Path:
    """A folder with the scans of somebody the run has never seen."""
    write_phantom_cohort(tmp_path / "strangers", 3, 99)
    folder = tmp_path / "new_patient"
    folder.mkdir()
    for name in ("t1ce", "flair"):
        shutil.copyfile(tmp_path / "strangers" / "P002" / f"{name}.nii.gz", folder / f"scan_{name}.nii.gz")
    return folder


@pytest.mark.slow
def test_new_patient_gets_mask_markers_and_page(run: FrozenRun, patient: Path, tmp_path: Path) -> None:
    served = predict_all(
        patient, run, tmp_path / "out", patient={**NOBODY, "age": 51.0}, force=False, progress=Silent()
    )
    assert [outcome.state for outcome in served.outcomes] == ["predicted"]
    folder = tmp_path / "out" / "new_patient"
    scan, mask = nib.load(patient / "scan_t1ce.nii.gz"), nib.load(folder / "mask.nii.gz")
    assert mask.shape == scan.shape
    np.testing.assert_allclose(mask.affine, scan.affine)
    record = read_json(folder / "prediction.json")
    voxel_ml = abs(np.linalg.det(scan.affine[:3, :3])) / 1000
    assert mask.get_fdata().any()
    assert record["segmentation"]["volume_ml"] == pytest.approx(float(mask.get_fdata().sum()) * voxel_ml, abs=1e-3)
    assert record["segmentation"]["n_members"] == 2
    assert [marker["marker"] for marker in record["markers"]] == ["idh", "ki67"]
    for marker in record["markers"]:
        assert 0 <= marker["lowest"] <= marker["probability"] <= marker["highest"] <= 1
        assert marker["n_members"] == 2 * (1 + 4)
        assert (marker["call"] == "none") == bool(marker["reason"])
    assert record["subtype"]["call"] or record["subtype"]["reason"]
    assert record["subtype"]["predicted"]["idh"] == pytest.approx(record["markers"][0]["probability"], abs=1e-3)
    page = (folder / "report.html").read_text()
    assert "tissue required" in page and record["quality_flags"][0] in page
    assert "needs tissue" in page and "sex is unknown" in page.lower() and "age is unknown" not in page.lower()
    assert "data:image/png" in page and "http://" not in page


@pytest.mark.slow
def test_prediction_is_that_of_the_run_itself(run: FrozenRun, tmp_path: Path) -> None:
    # A patient of the run: the fold that did not train on it must give the very mask of the segment stage.
    case = run.cohort.cases[run.cohort.folds.test(0)[0]]
    folder = tmp_path / "known"
    folder.mkdir()
    for name in ("t1ce", "flair"):
        shutil.copyfile(run.config.cohort.sheet.parent / case.case_id / f"{name}.nii.gz", folder / f"{name}.nii.gz")
    (outcome,) = predict_all(folder, run, tmp_path / "out", patient=NOBODY, force=False, progress=Silent()).outcomes
    assert outcome.problem == ""
    record = read_json(tmp_path / "out" / "known" / "prediction.json")
    assert any("which the run was trained on" in warning for warning in record["warnings"])
    # The volumes of the single networks are on the scan's own grid, as the mask of the segment stage is.
    member = nib.load(run.folder / "segment" / "masks" / "teacher" / f"{case.case_id}.nii.gz").get_fdata()
    assert member.any()
    found = record["segmentation"]
    ends = (found["volume_lowest_ml"], found["volume_highest_ml"])
    assert any(end == pytest.approx(float(member.sum()) * case.native_voxel_ml, abs=2e-3) for end in ends)


@pytest.mark.parametrize(
    ("trained_with", "network", "said"),
    [("expert", "student", "with expert masks and get those of the student"), ("teacher", "student", "of the teacher")],
)
def test_masks_of_another_origin_than_the_classifiers_had_are_said(trained_with: str, network: str, said: str) -> None:
    (warning,) = other_masks(trained_with, network)
    assert said in warning and "the AUC shown was not measured with these" in warning
    assert other_masks(network, network) == []


@pytest.mark.slow
def test_second_call_skips_what_is_done_and_notices_what_changed(run: FrozenRun, patient: Path, tmp_path: Path) -> None:
    def again(**changed: object) -> str:
        (outcome,) = predict_all(
            patient, run, tmp_path / "out", patient={**NOBODY, **changed}, force=False, progress=Silent()
        ).outcomes
        return outcome.state

    assert again() == "predicted"
    mask = (tmp_path / "out" / "new_patient" / "mask.nii.gz").read_bytes()
    assert again() == "done before"
    assert again(age=33.0) == "predicted"
    assert (tmp_path / "out" / "new_patient" / "mask.nii.gz").read_bytes() == mask


def test_patients_in_folders_of_one_name_are_not_taken_for_each_other(run: FrozenRun, tmp_path: Path) -> None:
    keys = set()
    for owner in ("a", "b"):
        folder = tmp_path / owner / "anat"
        folder.mkdir(parents=True)
        for name in ("t1ce", "flair"):
            scan = folder / f"{name}.nii"
            scan.write_bytes(owner.encode())
            os.utime(scan, ns=(0, 0))
        (case,) = find_cases(folder, run, tmp_path / "out", Silent()).cases
        keys.add(prediction_key(case, run))
    assert len(keys) == 2


@pytest.mark.slow
def test_bad_case_does_not_stop_the_others(run_folder: Path, tmp_path: Path) -> None:
    sheet = write_phantom_cohort(tmp_path / "strangers", 3, 99)
    truncated = tmp_path / "strangers" / "P002" / "flair.nii.gz"
    truncated.write_bytes(truncated.read_bytes()[:200])
    done = CliRunner().invoke(app, ["predict", str(run_folder), str(sheet), "--out", str(tmp_path / "out"), "--json"])
    assert done.exit_code == 2
    rows = pd.read_csv(tmp_path / "out" / "predictions.csv")
    assert rows.state.tolist() == ["predicted", "failed", "predicted"]
    assert "flair" in rows.problem[1]
    assert not (tmp_path / "out" / "P002" / "prediction.json").exists()


class SurprisedOnce(torch.nn.Module):
    """A network that fails on its first image, in a way that no library error stands for."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network
        self.calls = 0

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == 1:
            raise AssertionError("an assumption that this image breaks")
        logits: torch.Tensor = self.network(image)
        return logits


@pytest.mark.slow
def test_whatever_one_case_raises_does_not_stop_the_next(run: FrozenRun, tmp_path: Path) -> None:
    sheet = write_phantom_cohort(tmp_path / "strangers", 2, 99)
    surprised = FrozenRun(run.folder, run.config, "teacher")
    surprised.__dict__["networks"] = (SurprisedOnce(run.networks[0]), run.networks[1])
    served = predict_all(sheet, surprised, tmp_path / "out", patient=NOBODY, force=False, progress=Silent())
    assert [outcome.state for outcome in served.outcomes] == ["failed", "predicted"]
    assert served.outcomes[0].problem == "case P001: AssertionError: an assumption that this image breaks"


def test_earlier_outline_does_not_outlive_a_case_that_fails(run: FrozenRun, patient: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out" / "new_patient"
    folder.mkdir(parents=True)
    for name in ("prediction.json", "report.html", "mask.nii.gz"):
        (folder / name).write_text("{")
    (patient / "scan_flair.nii.gz").write_bytes(b"no scan")
    (outcome,) = predict_all(patient, run, tmp_path / "out", patient=NOBODY, force=False, progress=Silent()).outcomes
    assert outcome.state == "failed"
    assert not any((folder / name).exists() for name in ("prediction.json", "report.html", "mask.nii.gz"))


def test_scan_that_vanishes_stops_its_own_case_alone(run: FrozenRun, tmp_path: Path) -> None:
    sheet = write_phantom_cohort(tmp_path / "strangers", 2, 99)
    cases = find_cases(sheet, run, tmp_path / "out", Silent()).cases
    (tmp_path / "strangers" / cases[0].case_id / "flair.nii.gz").unlink()
    outcome = _serve(cases[0], run, tmp_path / "out" / cases[0].case_id, force=False)
    assert outcome.state == "failed" and "flair" in outcome.problem


def test_missing_sequence_is_said_before_anything_is_computed(run: FrozenRun, patient: Path, tmp_path: Path) -> None:
    (patient / "scan_flair.nii.gz").unlink()
    with pytest.raises(CohortError, match=r"lacks flair: this run's network needs t1ce, flair.*the case has t1ce"):
        predict_all(patient, run, tmp_path / "out", patient=NOBODY, force=False, progress=Silent())
    assert not (tmp_path / "out" / "new_patient").exists()


def test_missing_sequence_is_replaced_where_training_did_so(run: FrozenRun, patient: Path, tmp_path: Path) -> None:
    (patient / "scan_flair.nii.gz").unlink()
    cohort = run.config.cohort.model_copy(update={"missing_sequence": "zero"})
    lenient = FrozenRun(run.folder, run.config.model_copy(update={"cohort": cohort}), "teacher")
    predict_all(patient, lenient, tmp_path / "out", patient=NOBODY, force=False, progress=Silent())
    record = read_json(tmp_path / "out" / "new_patient" / "prediction.json")
    assert record["warnings"][0].startswith("flair is missing and was replaced by zeros")


def test_four_dimensional_scan_is_refused_by_name(run: FrozenRun, patient: Path, tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(np.ones((8, 8, 4, 3), np.float32), np.eye(4)), patient / "scan_flair.nii.gz")
    (outcome,) = predict_all(patient, run, tmp_path / "out", patient=NOBODY, force=False, progress=Silent()).outcomes
    assert outcome.state == "failed" and "flair" in outcome.problem and "dimension" in outcome.problem


@pytest.mark.parametrize(
    ("voxels", "zoom_mm", "message"),
    [
        (lambda scan: np.where(scan == 0, -1000, scan * 40), None, "look like Hounsfield units of a CT"),
        (lambda scan: (scan > 1).astype(np.float32), None, "holds only 2 different values, as a label map does"),
        (lambda scan: scan[:, :, :3], None, "has 3 axial slices; at least 5 are needed"),
        (lambda scan: scan, 0.9, r"slices of t1ce are 0.9 mm apart, while the run learnt from slices .* --any-spacing"),
    ],
)
def test_scan_the_run_cannot_serve_is_refused_before_anything_is_computed(
    run: FrozenRun, patient: Path, tmp_path: Path, voxels: Any, zoom_mm: float | None, message: str
) -> None:
    for name in ("t1ce", "flair"):
        path = patient / f"scan_{name}.nii.gz"
        scan = nib.load(path)
        affine = scan.affine.copy()
        if zoom_mm is not None:
            affine[:3, 2] *= zoom_mm / np.linalg.norm(affine[:3, 2])
        nib.save(nib.Nifti1Image(np.float32(voxels(scan.get_fdata(dtype=np.float32))), affine), path)
    (outcome,) = predict_all(patient, run, tmp_path / "out", patient=NOBODY, force=False, progress=Silent()).outcomes
    assert outcome.state == "failed" and re.search(message, outcome.problem), outcome.problem
    assert not (tmp_path / "out" / "new_patient").exists()


def test_other_slice_distance_is_served_when_allowed_and_said(run: FrozenRun, patient: Path, tmp_path: Path) -> None:
    (case,) = find_cases(patient, run, tmp_path / "out", Silent()).cases
    for path in case.images.values():
        scan = nib.load(path)
        nib.save(nib.Nifti1Image(scan.get_fdata(dtype=np.float32), scan.affine @ np.diag([1, 1, 0.2, 1])), path)
    with pytest.raises(CohortError, match="does not resample"):
        require_servable(case, run)
    require_servable(case, run, any_spacing=True)
    assert any("does not resample" in problem for problem in problems_of_input(case, run))


def test_sidecar_of_another_modality_is_refused(run: FrozenRun, patient: Path, tmp_path: Path) -> None:
    (patient / "scan_flair.json").write_text('{"Modality": "CT"}')
    (case,) = find_cases(patient, run, tmp_path / "out", Silent()).cases
    with pytest.raises(CohortError, match=r"scan_flair\.nii\.gz as flair: its sidecar says modality CT"):
        require_servable(case, run)


def test_run_that_hides_ids_names_no_file_of_a_case_that_fails(run: FrozenRun, patient: Path, tmp_path: Path) -> None:
    cohort = run.config.cohort.model_copy(update={"hash_ids": True, "salt_file": tmp_path / "absent.salt"})
    hidden = FrozenRun(run.folder, run.config.model_copy(update={"cohort": cohort}), "teacher")
    (patient / "scan_flair.nii.gz").write_bytes(b"no scan")
    served = predict_all(patient, hidden, tmp_path / "out", patient=NOBODY, force=False, progress=Silent())
    (outcome,) = served.outcomes
    assert outcome.case_id.startswith("C-") and outcome.problem.startswith(
        f"flair of case {outcome.case_id}: not a NIfTI"
    )
    assert "new_patient" not in (tmp_path / "out" / "predictions.csv").read_text()
    assert (tmp_path / "out.salt").is_file() and not list((tmp_path / "out").rglob("*.salt"))


def test_two_files_of_one_sequence_are_not_guessed_between(run: FrozenRun, patient: Path, tmp_path: Path) -> None:
    shutil.copyfile(patient / "scan_flair.nii.gz", patient / "other_t2_flair.nii.gz")
    with pytest.raises(CohortError, match="both look like flair; leave one of them"):
        find_cases(patient, run, tmp_path / "out", Silent())


@pytest.mark.parametrize(
    ("patient_options", "message"),
    [({"age": 130.0}, "--age 130: expected years"), ({"case_id": "../up"}, "--case-id '../up' cannot name a folder")],
)
def test_impossible_patient_is_refused(
    run: FrozenRun, patient: Path, tmp_path: Path, patient_options: dict[str, object], message: str
) -> None:
    with pytest.raises(GliomaNasError, match=message):
        predict_all(
            patient, run, tmp_path / "out", patient={**NOBODY, **patient_options}, force=False, progress=Silent()
        )


def test_patient_options_are_refused_for_many_cases(run: FrozenRun, tmp_path: Path) -> None:
    sheet = write_phantom_cohort(tmp_path / "strangers", 3, 99)
    with pytest.raises(CohortError, match="holds 3 cases; --case-id, --age and --sex describe one patient"):
        predict_all(sheet, run, tmp_path / "out", patient={**NOBODY, "age": 40.0}, force=False, progress=Silent())


def test_folder_that_is_no_run_or_unfinished_is_refused(run_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="not a run folder"):
        FrozenRun.open(tmp_path)
    shutil.copyfile(run_folder / "config.yaml", tmp_path / "config.yaml")
    with pytest.raises(StorageError, match="stage 'preprocess' is not done"):
        FrozenRun.open(tmp_path)
    with pytest.raises(ConfigError, match=r"no network 'studnet'.*student"):
        FrozenRun.open(run_folder, network="studnet")


def test_run_whose_stages_do_not_belong_together_is_refused(run_folder: Path, tmp_path: Path) -> None:
    def copied(name: str) -> Path:
        return Path(shutil.copytree(run_folder, tmp_path / name))

    again = copied("preprocessed_again")
    with (again / "preprocess" / "manifest.json").open("a") as handle:
        handle.write("\n")
    with pytest.raises(StorageError, match="stage 'search' was made from an earlier 'preprocess'"):
        FrozenRun.open(again)
    measured = copied("measured_again")
    with (measured / "latency" / "manifest.json").open("a") as handle:
        handle.write("\n")
    assert FrozenRun.open(measured).network == "student"
    changed = copied("changed")
    text = (changed / "config.yaml").read_text()
    assert "crop_size_px: 48" in text
    (changed / "config.yaml").write_text(text.replace("crop_size_px: 48", "crop_size_px: 40"))
    with pytest.raises(StorageError, match="prepares cases in another way"):
        FrozenRun.open(changed)


@pytest.mark.parametrize("found", [1, None])
def test_run_whose_cases_another_version_prepared_is_refused_in_one_line(
    run_folder: Path, tmp_path: Path, found: int | None
) -> None:
    other = Path(shutil.copytree(run_folder, tmp_path / "other"))
    file = sorted((other / "preprocess" / "cases").glob("*/case.json"))[-1]
    record = {key: value for key, value in read_json(file).items() if key != "preparation"}
    file.write_text(json.dumps(record if found is None else {**record, "preparation": found}))
    with pytest.raises(StorageError, match=rf"\(preparation {found or 'not recorded'}; here \d+\); run") as refused:
        FrozenRun.open(other)
    assert f"glioma-nas preprocess {other / 'config.yaml'} --out {other} --force" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_classifiers_of_another_version_of_the_code_are_refused_in_one_line(run_folder: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(run_folder, tmp_path / "other"))
    file = other / "classify" / "idh" / "idh" / "classifier.json"
    # Options that this version does not know either: the code is what is named.
    record = {**read_json(file), "code": "0123456789ab", "version": "0.0.9", "options": {"no_such": 1}}
    file.write_text(json.dumps(record))
    with pytest.raises(StorageError, match=r"another version of its code \(0\.0\.9, 0123456789ab; here") as refused:
        FrozenRun.open(other)
    assert f"glioma-nas classify {other / 'config.yaml'} --out {other} --force" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_networks_of_another_version_of_the_code_are_pointed_out(run_folder: Path, tmp_path: Path) -> None:
    assert FrozenRun.open(run_folder).other_code is None
    other = Path(shutil.copytree(run_folder, tmp_path / "other"))
    manifest = read_json(other / "train" / "manifest.json")
    manifest["versions"]["source"] = "0123456789ab"
    (other / "train" / "manifest.json").write_text(json.dumps(manifest))
    opened = FrozenRun(other, FrozenRun.open(run_folder).config, "student")
    assert opened.other_code is not None and "source 0123456789ab; here" in opened.other_code


def test_nothing_is_predicted_where_no_tumour_was_found(run: FrozenRun, patient: Path, tmp_path: Path) -> None:
    blind = seeing_no_tumour(run)
    (outcome,) = predict_all(patient, blind, tmp_path / "out", patient=NOBODY, force=False, progress=Silent()).outcomes
    assert outcome.record is not None, outcome.problem
    for marker in outcome.record["markers"]:
        assert (marker["call"], marker["probability"]) == ("none", None)
        assert marker["reason"] == "not predicted: no tumour was found in the images"
    subtype = outcome.record["subtype"]
    assert (subtype["call"], subtype["probabilities"]) == (None, {}) and "no tumour was found" in subtype["text"]
    page = (tmp_path / "out" / "new_patient" / "report.html").read_text()
    assert "neither markers nor a subtype are predicted" in page and "Nothing was outlined" in page
    assert "not predicted" in page and "predicted outline" not in page.split("<main>")[1]
    row = pd.read_csv(tmp_path / "out" / "predictions.csv").iloc[0]
    assert row.volume_ml == 0 and pd.isna(row.idh_probability) and row.idh_call == "none"


def test_source_that_is_not_there_is_one_line(run_folder: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["predict", str(run_folder), str(tmp_path / "nowhere"), "--out", str(tmp_path)])
    assert isinstance(done.exception, CohortError)
    assert "nowhere: no such file or folder" in str(done.exception)


def test_hostile_case_id_shows_as_text(run: FrozenRun, patient: Path, tmp_path: Path) -> None:
    hostile = patient.parent / "<script>alert(1)<script>"
    patient.rename(hostile)
    (outcome,) = predict_all(hostile, run, tmp_path / "out", patient=NOBODY, force=False, progress=Silent()).outcomes
    page = (tmp_path / "out" / outcome.case_id / "report.html").read_text()
    assert "<script" not in page


@pytest.mark.parametrize(
    ("probability", "abstains", "call", "reason"),
    [
        (0.8, False, "positive", ""),
        (0.2, False, "negative", ""),
        (0.8, True, "none", "members disagree"),
        (0.52, False, "none", "within 0.05 of the threshold"),
    ],
)
def test_call_needs_agreement_and_distance(probability: float, abstains: bool, call: str, reason: str) -> None:
    found = UncertainPrediction("a", probability, 0.1, 0.9, 0.1, 0.5, 15, abstains)
    said = decide(found, margin=0.05)
    assert said[0] == call and reason in said[1] and bool(said[1]) == bool(reason)


def test_json_output_names_every_marker(run_folder: Path, patient: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(
        app, ["predict", str(run_folder), str(patient), "--out", str(tmp_path / "out"), "--sex", "f", "--json"]
    )
    assert done.exit_code == 0, done.output
    (row,) = json.loads(done.stdout)
    assert {"case", "state", "volume_ml", "idh", "ki67"} <= set(row)
