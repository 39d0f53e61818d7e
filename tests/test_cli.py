"""The command line as a user meets it: exit status and what is printed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from glioma_nas import __version__
from glioma_nas.testing.phantoms import write_phantom_cohort

ROOT = Path(__file__).resolve().parent.parent


def cli(*arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "glioma_nas", *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1", "COLUMNS": "120", "OMP_NUM_THREADS": "1"},
        check=False,
        timeout=300,
    )


def test_version_is_printed() -> None:
    done = cli("--version")
    assert (done.returncode, done.stdout.strip()) == (0, f"glioma-nas {__version__}")


def test_help_names_every_command() -> None:
    done = cli("--help")
    assert done.returncode == 0
    for command in (
        "demo",
        "run",
        "preprocess",
        "latency",
        "search",
        "train",
        "export",
        "segment",
        "classify",
        "report",
    ):
        assert f" {command} " in done.stdout
    assert " list " in done.stdout and " doctor " in done.stdout


@pytest.mark.parametrize(
    "code", ["import glioma_nas", "import glioma_nas.cli, glioma_nas.pipeline, glioma_nas.registry"]
)
def test_start_up_imports_no_heavy_library(code: str) -> None:
    script = f"{code}; import sys; print({{'torch', 'nni', 'torchvision', 'monai', 'pandas'}} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.strip() == "set()"


def test_unknown_command_exits_2_with_a_suggestion() -> None:
    done = cli("serch")
    assert done.returncode == 2
    assert "search" in done.stderr


def test_mistake_in_the_configuration_exits_2_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("cohort: {sheet: c.csv}\ntrian: {}\n")
    done = cli("run", "run.yaml", folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr.strip() == (
        "error: run.yaml: unknown key 'trian': did you mean 'train'? Allowed: "
        "augmentation, classify, cohort, device, export, folds, latency, plugins, preprocess, report, search, "
        "search_for_another_device, seed, train."
    )


def test_debug_shows_the_traceback_of_a_mistake(tmp_path: Path) -> None:
    done = cli("--debug", "run", "absent.yaml", folder=tmp_path)
    assert done.returncode == 2
    assert "Traceback" in done.stderr


def test_own_fault_exits_1_with_a_traceback(tmp_path: Path) -> None:
    plugin = tmp_path / "faulty.py"
    plugin.write_text(
        "import glioma_nas.pipeline as p\ndef boom(*a, **k): raise RuntimeError('boom')\np.Pipeline.run = boom\n"
    )
    (tmp_path / "run.yaml").write_text("cohort: {sheet: c.csv}\n")
    done = cli("run", "run.yaml", "--plugin", str(plugin), folder=tmp_path)
    assert done.returncode == 1
    assert "RuntimeError: boom" in done.stderr


def test_missing_sheet_exits_2_naming_it(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("cohort: {sheet: nowhere.csv}\n")
    done = cli("run", "run.yaml", folder=tmp_path)
    assert done.returncode == 2
    assert "nowhere.csv" in done.stderr and "Traceback" not in done.stderr


def test_folder_that_cannot_be_written_exits_2(tmp_path: Path) -> None:
    write_phantom_cohort(tmp_path / "cohort", 4, 0)
    (tmp_path / "run.yaml").write_text("cohort: {sheet: cohort/cohort.csv}\n")
    (tmp_path / "file").write_text("")
    done = cli("preprocess", "run.yaml", "--out", "file/run", folder=tmp_path)
    assert done.returncode == 2
    assert "not writable" in done.stderr


def test_single_class_label_is_refused_before_any_training(tmp_path: Path) -> None:
    sheet = write_phantom_cohort(tmp_path / "cohort", 4, 0)
    sheet.write_text(sheet.read_text().replace("wildtype", "mutant"))
    data = {
        "cohort": {"sheet": str(sheet)},
        "preprocess": {"crop_size_px": 48, "image_size_px": 32},
        "folds": {"n_folds": 2},
        "classify": {"markers": {"idh": {"column": "idh", "positive": "mutant"}}},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(data))
    done = cli("run", "run.yaml", folder=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "idh" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "runs" / "run" / "search").exists()


def test_list_as_json_holds_every_kind_with_origin() -> None:
    done = cli("list", "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    found = {(row["kind"], row["name"]) for row in rows}
    for item in [
        ("operators", "zoomed_conv"),
        ("search_spaces", "nasbranet"),
        ("strategies", "co_search"),
        ("strategies", "latency_darts"),
        ("evaluators", "segmentation"),
        ("latency_backends", "onnxruntime"),
        ("networks", "monai_unet"),
        ("classifiers", "kinet"),
        ("preprocess_steps", "zscore"),
    ]:
        assert item in found
    assert {row["origin"] for row in rows} == {"in-tree"}
    assert all(row["summary"] for row in rows)


def test_list_of_an_unknown_kind_suggests() -> None:
    done = cli("list", "operator")
    assert done.returncode == 2
    assert "did you mean 'operators'?" in done.stderr


def test_list_works_beside_the_users_own_folders_of_the_same_names(tmp_path: Path) -> None:
    for name in ("plugins", "strategies", "search_spaces", "evaluators"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('the user\\'s own package was imported')\n")
    done = cli("list", "strategies", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "co_search" in done.stdout


def test_doctor_names_backends_and_devices() -> None:
    done = cli("doctor", "--json")
    assert done.returncode == 0, done.stderr
    rows = {row["item"]: row for row in json.loads(done.stdout)}
    assert rows["latency backend onnxruntime"]["state"] == "ok"
    assert "cuda" in rows and "disk" in rows
    assert rows["nni guard"]["state"] in ("ok", "absent", "stale")
