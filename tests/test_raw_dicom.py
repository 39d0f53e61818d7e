"""The way of a raw examination, by the commands: DICOM, import, registration and skull stripping, slices, and back."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from glioma_nas.cli import app
from glioma_nas.grids import turn_onto
from glioma_nas.prepared import PreparedCase, PreparedCohort
from glioma_nas.privacy.pseudonyms import Pseudonyms, load_salt

CONFIG = """
cohort: {sheet: imported, sequences: [t1ce, flair]}
preprocess:
  steps: [orient, register, strip_template, resample, zscore, crop_pad, resize]
  step_options: {resample: {spacing_mm: 1.5}}
  crop_size_px: 160
  image_size_px: 128
folds: {n_folds: 2, stratify_by: []}
"""


@dataclass(frozen=True)
class Way:
    """Where everything lies, and each synthetic patient's prepared case."""

    root: Path
    prepared: PreparedCohort
    cases: dict[str, PreparedCase]


def command(*arguments: str) -> str:
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(scope="module")
def way(tmp_path_factory: pytest.TempPathFactory) -> Way:
    root = tmp_path_factory.mktemp("way")
    dicom, imported, run = str(root / "dicom"), str(root / "imported"), str(root / "run")
    patients = ("--patients", "2", "--seed", "3", "--size-px", "128", "--missing-t1ce", "0")
    command("cohort", "synth", "--out", dicom, "--format", "dicom", "--raw", *patients)
    command("cohort", "import-dicom", dicom, "--out", imported, "--clinical", f"{dicom}/clinical.csv")
    (root / "run.yaml").write_text(CONFIG)
    command("preprocess", str(root / "run.yaml"), "--out", run)
    prepared = PreparedCohort.load(root / "run" / "preprocess")
    pseudonyms = Pseudonyms(load_salt(root / "imported.salt", create=False))
    names = {pseudonyms.patient(name): name for name in ("SYN-0001", "SYN-0002")}
    return Way(root, prepared, {names[case.patient_id]: case for case in prepared.cases.values()})


def dice(first: np.ndarray, second: np.ndarray) -> float:
    return float(2 * (first & second).sum() / (first.sum() + second.sum()))


def truth(way: Way, name: str, file: str) -> np.ndarray:
    """Read a true mask with its axes as those of the imported T1 with contrast, which carries it."""
    image = nib.load(way.root / "dicom" / file)
    turned, affine = turn_onto(np.asarray(image.dataobj), image.affine, way.cases[name].scans["t1ce"].affine)
    np.testing.assert_allclose(affine, way.cases[name].scans["t1ce"].affine, atol=1e-3)
    return turned > 0


@pytest.mark.slow
def test_every_patient_arrives_with_masks_and_labels_under_pseudonyms(way: Way) -> None:
    assert set(way.cases) == {"SYN-0001", "SYN-0002"}
    with (way.root / "dicom" / "clinical.csv").open(newline="") as handle:
        known = {row["patient_id"]: row for row in csv.DictReader(handle)}
    for name, case in way.cases.items():
        assert case.has_mask and set(case.present) == {"t1ce", "flair"}
        for column in ("idh", "codel_1p19q", "mgmt", "grade", "ki67"):
            assert case.labels[column] == known[name][column]
        assert (f"{case.age:.0f}", case.sex) == (known[name]["age"], known[name]["sex"])
    assert "SYN-" not in json.dumps([case.labels for case in way.cases.values()])
    command("phi-scan", str(way.root / "run"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SYN-0001", "SYN-0002"])
def test_known_motion_brain_and_tumour_are_found_again_on_the_scan_they_came_from(way: Way, name: str) -> None:
    case = way.cases[name]
    brain = truth(way, name, f"synthetic/{name}_brain.nii.gz")
    tumour = truth(way, name, f"{name}/mask.nii.gz")
    drawn = np.array(json.loads((way.root / f"dicom/synthetic/{name}.json").read_text())["truth"]["motion"]["flair"])
    inside = np.argwhere(brain)[::997]
    points = case.scans["t1ce"].affine @ np.vstack([inside.T, np.ones(len(inside))])
    missed_mm = np.linalg.norm(((case.scans["flair"].motion - drawn) @ points)[:3], axis=0)
    moved_mm = np.linalg.norm(((drawn - np.eye(4)) @ points)[:3], axis=0)
    assert missed_mm.mean() <= 1.0 < moved_mm.mean()
    found = case.to_native((case.images()[:, case.sequences.index("t1ce")] != 0).astype(np.float32), "t1ce") >= 0.5
    assert dice(found, brain) >= 0.95
    np.testing.assert_array_equal(case.native_mask(), tumour)
    mask = case.mask()
    assert mask is not None
    assert dice(case.to_native(mask.astype(np.float32)) >= 0.5, tumour) > 0.93


@pytest.mark.slow
def test_quality_control_shows_every_case_and_flags_none(way: Way) -> None:
    page = (way.root / "run" / "preprocess" / "qc.html").read_text()
    with (way.root / "run" / "preprocess" / "qc.csv").open(newline="") as handle:
        rows = {row["case_id"]: row for row in csv.DictReader(handle)}
    for name, case in way.cases.items():
        with Image.open(case.folder / "qc.png") as sheet:
            assert sheet.height > 2 * 168
        assert f"cases/{case.case_id}/qc.png" in page
        assert rows[case.case_id]["flags"] == ""
        assert float(rows[case.case_id]["flair_overlap"]) > float(rows[case.case_id]["flair_overlap_before"])
        true_ml = truth(way, name, f"synthetic/{name}_brain.nii.gz").sum() * case.native_voxel_ml
        assert float(rows[case.case_id]["brain_ml"]) == pytest.approx(true_ml, rel=0.06)
