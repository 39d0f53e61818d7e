"""The commands on cohorts, run as a user runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from dicom_files import SECRETS, write_patient

from glioma_nas.testing.phantoms import write_phantom_cohort

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.slow  # each starts an interpreter


def cli(*arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "glioma_nas", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1", "OMP_NUM_THREADS": "1"},
        check=False,
        timeout=300,
    )


def test_validate_exits_0_on_a_sound_cohort_and_says_where_the_page_is(tmp_path: Path) -> None:
    sheet = write_phantom_cohort(tmp_path / "cohort", 4, 0)
    done = cli("cohort", "validate", sheet, "--out", "check", "--workers", 1, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("4 cases, 20 files: 0 errors")
    assert "check/validation.html" in done.stdout
    assert "4/4" in done.stderr


def test_validate_exits_2_with_a_configuration_whose_cohort_has_errors(tmp_path: Path) -> None:
    write_phantom_cohort(tmp_path / "cohort", 4, 0)
    (tmp_path / "cohort" / "P002" / "flair.nii.gz").write_bytes(b"")
    (tmp_path / "run.yaml").write_text(
        "cohort: {sheet: cohort/cohort.csv, sequences: [flair]}\n"
        "classify: {markers: {idh: {column: idhh, positive: mutant}}}\n"
    )
    done = cli("cohort", "validate", "run.yaml", "--json", folder=tmp_path)
    assert done.returncode == 2, done.stderr
    rows = {row["finding"]: row for row in json.loads(done.stdout)}
    assert rows["unreadable"]["cases"] == "P002"
    assert "did you mean 'idh'" in rows["no-label"]["what to do"]
    assert (tmp_path / "runs" / "validate-run" / "validation.json").is_file()


def test_validate_refuses_what_is_no_cohort_in_one_line(tmp_path: Path) -> None:
    done = cli("cohort", "validate", tmp_path, folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_import_dicom_makes_a_cohort_that_validate_reads(tmp_path: Path) -> None:
    write_patient(tmp_path / "export")
    done = cli("cohort", "import-dicom", "export", "--out", "mine", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("10 series, 1 cases, 4 series converted")
    assert not [secret for secret in SECRETS if secret in done.stdout + done.stderr]
    assert (tmp_path / "mine.salt").stat().st_mode & 0o077 == 0
    assert "P-" in (tmp_path / "mine" / "cohort.csv").read_text()
    checked = cli("cohort", "validate", "mine", folder=tmp_path)
    assert checked.stdout.startswith("1 cases, 4 files: 0 errors"), checked.stdout


def fold_configuration(folder: Path, n: int = 8) -> Path:
    write_phantom_cohort(folder / "cohort", n, 0)
    (folder / "run.yaml").write_text(
        "cohort: {sheet: cohort/cohort.csv, sequences: [flair]}\n"
        "classify: {markers: {idh: {column: idh, positive: mutant, sequences: [flair]}}}\n"
        "folds: {n_folds: 2, repeats: 2}\n"
    )
    return folder / "run.yaml"


def test_folds_are_drawn_exported_and_accepted_again(tmp_path: Path) -> None:
    fold_configuration(tmp_path)
    done = cli(
        "cohort", "folds", "run.yaml", "--out", "folds.json", "--nnunet", "splits.json", "--json", folder=tmp_path
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [(row["repeat"], row["fold"], row["held out"], row["idh"]) for row in rows] == [
        (repeat, fold, 4, "mutant 2, wildtype 2") for repeat in (0, 1) for fold in (0, 1)
    ]
    assert len(json.loads((tmp_path / "splits.json").read_text())) == 4
    again = cli("cohort", "folds", "run.yaml", "--check", "folds.json", "--skip-voxels", "--json", folder=tmp_path)
    assert again.returncode == 0 and json.loads(again.stdout) == rows


def test_folds_with_a_copy_on_both_sides_exit_2(tmp_path: Path) -> None:
    fold_configuration(tmp_path)
    cohort = tmp_path / "cohort"
    (tmp_path / "splits.json").write_text(
        json.dumps(
            [
                {"train": ["P001", "P003", "P005", "P007"], "val": ["P002", "P004", "P006", "P008"]},
                {"val": ["P001", "P003", "P005", "P007"], "train": ["P002", "P004", "P006", "P008"]},
            ]
        )
    )
    (cohort / "P001" / "flair.nii.gz").write_bytes((cohort / "P002" / "flair.nii.gz").read_bytes())
    done = cli("cohort", "folds", "run.yaml", "--check", "splits.json", folder=tmp_path)
    assert done.returncode == 2
    assert "flair of case P001 (train) and flair of case P002 (test) hold identical voxels" in done.stderr
