"""Table 4-5 on any cohort: same folds and budget, patients paired, the source's figures beside."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from finished_run import CONFIG
from scipy.stats import wilcoxon
from typer.testing import CliRunner

from glioma_nas.cli import app
from glioma_nas.cli.segmentation_study_commands import further_student
from glioma_nas.config import parse_config
from glioma_nas.errors import ConfigError, GliomaNasError, ImageError
from glioma_nas.latency_records import Environment
from glioma_nas.pipeline import Pipeline
from glioma_nas.progress import Silent
from glioma_nas.segmentation_studies.methods_page import render_methods
from glioma_nas.segmentation_studies.methods_study import MethodsPlan, study_methods, with_published
from glioma_nas.segmentation_studies.paired_scores import networks_table, paired_p_value, per_patient
from glioma_nas.testing.phantoms import write_phantom_cohort

NARROW = "narrow:search.space_options.widths=[2],search.space_options.end_widths=[2]"


def scores() -> pd.DataFrame:
    rows = []
    for seed in (0, 1):
        for patient in range(8):
            for case in range(2 if patient == 0 else 1):
                for network, shift in (("teacher", 0.05), ("student", 0.0), ("icnet", -0.1 - 0.01 * patient)):
                    dice = 0.6 + 0.02 * patient + shift + 0.1 * case + 0.02 * seed
                    rows.append(
                        {
                            "network": network,
                            "patient_id": f"P{patient}",
                            "case_id": f"P{patient}-{case}",
                            "seed": seed,
                            "training": 0,
                            "dice": dice,
                            "hd95_mm": 4.0,
                        }
                    )
    return pd.DataFrame(rows)


def latency(**medians: float) -> dict[str, Any]:
    rounds = (0.9, 1.0, 1.3)
    return {
        "networks": {
            name: {
                "median_ms": value,
                "p95_ms": value * 1.3,
                "macs_g": 1.0,
                "params_m": 2.0,
                "times_ms": [value * slow for slow in rounds],
            }
            for name, value in medians.items()
        }
    }


def table(latencies: list[dict[str, Any]], **choices: Any) -> pd.DataFrame:
    names = ["student", "teacher", "icnet"]
    found = networks_table(scores(), latencies, names=names, reference="student", seed=0, **choices)
    return with_published(found).set_index("network")


def test_a_patients_cases_and_seeds_count_as_one_patient() -> None:
    patients = per_patient(scores())
    assert patients.shape == (8, 3)
    assert patients.loc["P0", "student"] == pytest.approx(0.6 + 0.05 + 0.01)
    assert patients.loc["P3", "icnet"] == pytest.approx(0.6 + 0.06 - 0.13 + 0.01)


def test_table_compares_every_method_with_the_student() -> None:
    found = table([latency(student=2.0, teacher=4.0, icnet=5.0), latency(student=2.0, teacher=6.0, icnet=5.0)])
    assert found.n_patients.tolist() == [8, 8, 8]
    assert (
        found.latency_ms["teacher"] == 5.0
        and found.times_reference["icnet"] == 2.5
        and found.speed_hz["student"] == 500
    )
    assert found.dice_seeds_sd["student"] == pytest.approx(0.02 / 2**0.5)
    assert np.isnan(found.p_holm["student"]) and np.isnan(found.difference["student"])
    # All eight signs agree: the exact two-sided p is 2/2^8, and Holm doubles the smaller of two.
    assert found.p["icnet"] == pytest.approx(2 / 2**8)
    assert found.p_holm["icnet"] == pytest.approx(2 * 2 / 2**8)
    # ICNet falls behind by 0.10 to 0.17, 0.135 on average; the teacher leads every patient by the same 0.05.
    assert found.difference["icnet"] == pytest.approx(-0.135)
    assert -0.17 < found.difference_low["icnet"] < -0.135 < found.difference_high["icnet"] < -0.10
    assert found.difference_low["teacher"] == pytest.approx(0.05) == found.difference_high["teacher"]
    assert found.source_dice["icnet"] == 0.888 and np.isnan(found.source_dice["teacher"])
    assert found.source_times_student["icnet"] == pytest.approx(3.16, abs=0.005)


def test_trainings_of_one_search_do_not_count_as_seeds() -> None:
    once = scores()
    twice = pd.concat([once, once.assign(training=1, dice=once.dice + 0.04)])
    timed, names = [latency(student=2.0, teacher=4.0, icnet=5.0)], ["student", "teacher", "icnet"]
    found = networks_table(twice, timed, names=names, reference="student", seed=0).iloc[0]
    assert (found.seeds, found.trainings) == (2, 2)
    assert found.dice_seeds_sd == pytest.approx(0.02 / 2**0.5)
    assert found.dice_trainings_sd == pytest.approx(0.04 / 2**0.5)
    first = twice[twice.seed == 0]
    alone = networks_table(first, timed, names=names, reference="student", seed=0).iloc[0]
    assert (alone.seeds, alone.trainings, alone.dice_seeds_sd) == (1, 2, None)
    assert per_patient(twice).loc["P3", "student"] == pytest.approx(per_patient(once).loc["P3", "student"] + 0.02)


def test_speed_and_front_are_told_of_every_network() -> None:
    found = table([latency(student=2.0, teacher=4.0, icnet=5.0)], slowest="icnet")
    assert found.speedup.tolist() == pytest.approx([2.5, 1.25, 1.0])
    # ICNet is slower than the teacher and less accurate; student and teacher are each best at something.
    assert found.front.tolist() == [True, True, False]


def test_page_leaves_the_references_own_comparison_empty(tmp_path: Path) -> None:
    medians = {"student": 2.0, "teacher": 4.0, "icnet": 50.0}
    conditions = Environment("a processor", 1, "onnxruntime", "1", "float32", "2", "Linux")
    timed = {
        **latency(**medians),
        "environment": dataclasses.asdict(conditions),
        "input_shape": [1, 2, 32, 32],
        "parity": {name: {"mask_dice": 1.0} for name in medians},
    }
    for row in timed["networks"].values():
        row["n"] = 3
    config = parse_config(CONFIG, source="test", folder=tmp_path)
    rows = table([timed], slowest="icnet").reset_index()
    page, picture = render_methods(rows, [timed], config, folds=[0], n_seeds=1)
    first = page[page.index("<table") : page.index("</table>")]
    student = re.search(r"<tr>\s*<t[dh][^>]*>student.*?</tr>", first, re.DOTALL)
    assert student is not None and "0.6" in student[0] and "not measured" not in student[0]
    assert "SD over seeds" not in first and "× UNet" in page and "counted from 0; used: 0" in page
    assert picture.startswith(b"\x89PNG")
    rows["dice_trainings_sd"] = 0.01
    page, _ = render_methods(rows, [timed], config, folds=[0], n_seeds=1, n_trainings=3)
    assert "SD over trainings" in page and "SD over seeds" not in page and "1 search × 3 trainings" in page


def test_equal_networks_do_not_differ() -> None:
    same = np.array([0.5, 0.6])
    assert paired_p_value(same, same.copy()) == 1.0
    other = same + np.array([0.1, -0.2])
    assert paired_p_value(same, other) == wilcoxon(same, other).pvalue


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"methods": ["icnet", "icnet"]}, "'icnet' names two networks"),
        ({"methods": ["icnet"], "folds": [2]}, "--folds 2: give numbers from 0 to 1"),
        ({"methods": ["icnet"], "folds": [0, 0]}, "each once"),
        ({"methods": ["icnet"], "n_seeds": 2, "run": Path("r")}, "--run holds the search of one seed"),
        ({"methods": ["icnett"]}, "icnet"),
    ],
)
def test_plan_that_cannot_be_is_refused_before_anything_runs(
    tmp_path: Path, plan: dict[str, Any], message: str
) -> None:
    config = parse_config(CONFIG, source="test", folder=tmp_path)
    with pytest.raises(GliomaNasError, match=message):
        study_methods(config, tmp_path, MethodsPlan(**plan), progress=Silent())
    assert not list(tmp_path.iterdir())


def test_images_that_a_network_cannot_take_are_refused_before_anything_runs(tmp_path: Path) -> None:
    data = {**CONFIG, "preprocess": {**CONFIG["preprocess"], "image_size_px": 48}}
    data["train"] = {"baseline_options": {"icnet": {"width": 2, "blocks": [1, 1, 1, 1]}}}
    config = parse_config(data, source="test", folder=tmp_path)
    with pytest.raises(ImageError, match="48×48 pixels: this network needs sides divisible by 32"):
        study_methods(config, tmp_path, MethodsPlan(["icnet"]), progress=Silent())
    assert not list(tmp_path.iterdir())


def test_student_on_another_cohort_is_refused(tmp_path: Path) -> None:
    config = parse_config(CONFIG, source="test", folder=tmp_path)
    other = config.model_copy(update={"preprocess": config.preprocess.model_copy(update={"crop_size_px": 64})})
    with pytest.raises(ConfigError, match="--student wide changes preprocess"):
        study_methods(config, tmp_path, MethodsPlan(["icnet"], {"wide": other}), progress=Silent())


@pytest.mark.parametrize("text", ["wide", ":a=1", "wide:", "wide:a=1,b"])
def test_student_without_a_name_or_a_change_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected NAME:key=value"):
        further_student(text)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The smallest study; its operators are timed once for all tests."""
    folder = tmp_path_factory.mktemp("study")
    sheet = write_phantom_cohort(folder / "cohort", 6, 0)
    return {
        **CONFIG,
        "cohort": {**CONFIG["cohort"], "sheet": str(sheet)},
        "latency": {**CONFIG["latency"], "shared_table": str(folder / "table.json")},
        "train": {
            "epochs": 1,
            "steps_per_epoch": 2,
            "batch_size": 4,
            "baseline_options": {
                "icnet": {"width": 2, "blocks": [1, 1, 1, 1]},
                "monai_unet": {"channels": [2, 4]},
            },
        },
        "classify": {},
    }


@pytest.mark.slow
def test_study_runs_from_the_command_line_and_again_from_what_is_there(tmp_path: Path, study: dict[str, Any]) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(study))
    out = tmp_path / "out"
    command = ["study", "table-4-5", str(path), "--threads", "1", "--folds", "0", "--json", "--methods"]

    def rows(*arguments: str) -> dict[str, dict[str, Any]]:
        done = CliRunner().invoke(app, [*command, *arguments])
        assert done.exit_code == 0, done.output
        return {row["network"]: row for row in json.loads(done.stdout)}

    first = rows(
        "icnet",
        "--out",
        str(out),
        "--student",
        NARROW,
    )
    assert list(first) == ["student", "teacher", "narrow", "icnet"]
    assert first["student"]["times_reference"] == 1 and first["icnet"]["source_dice"] == 0.888
    assert first["narrow"]["params_m"] < first["teacher"]["params_m"]
    assert all(0 <= row["dice"] <= 1 and row["n_patients"] == 3 for row in first.values())
    page = (out / "report.html").read_text()
    assert "Table 4-5" in page and "its test patients are untouched by the search" in page
    assert (out / "front.png").read_bytes().startswith(b"\x89PNG")

    trained = {file: file.stat().st_mtime_ns for file in out.rglob("weights.safetensors")}
    assert len(trained) == 4
    # One network more: the others are taken over, from the study's own search as from a run folder's.
    second = rows("icnet,monai_unet", "--out", str(out))
    assert list(second) == ["student", "teacher", "icnet", "monai_unet"]
    assert {name: second[name]["dice"] for name in ("teacher", "icnet")} == {
        name: first[name]["dice"] for name in ("teacher", "icnet")
    }
    assert all(file.stat().st_mtime_ns == time for file, time in trained.items())


@pytest.mark.slow
def test_search_of_a_finished_run_is_taken_over_and_trained_twice(tmp_path: Path, study: dict[str, Any]) -> None:
    options = {"monai_unet": study["train"]["baseline_options"]["monai_unet"]}
    data = {**study, "train": {**study["train"], "baseline_options": options}}
    config = parse_config(data, source="test", folder=tmp_path)
    run = tmp_path / "run"
    Pipeline(config, run, Silent()).run(("preprocess", "latency", "search"))
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*")}
    plan = MethodsPlan(["monai_unet"], folds=[0], n_trainings=2, run=run)
    found = study_methods(config, tmp_path / "out", plan, progress=Silent())
    assert found.network.tolist() == ["student", "teacher", "monai_unet"]
    assert {file: file.stat().st_mtime_ns for file in run.rglob("*")} == before
    # Two trainings of each network, by seeds of their own, from the one search.
    scores = pd.read_csv(tmp_path / "out" / "scores.csv")
    assert set(scores.seed) == {config.seed} and set(scores.training) == {0, 1}
    assert (found.seeds == 1).all() and (found.trainings == 2).all()
    weights = [file.read_bytes() for file in (tmp_path / "out").rglob("student/weights.safetensors")]
    assert len(weights) == 2 and weights[0] != weights[1]
    other = config.model_copy(update={"seed": 4})
    with pytest.raises(ConfigError, match="its stage 'preprocess' is missing, or was not made with"):
        study_methods(other, tmp_path / "other", plan, progress=Silent())
