"""Table 4-6 on any cohort: the settings differ in what their names say, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from finished_run import CONFIG
from typer.testing import CliRunner

from glioma_nas.architecture import Architecture
from glioma_nas.cli import app
from glioma_nas.config import RunConfig, parse_config
from glioma_nas.errors import ConfigError
from glioma_nas.progress import Silent
from glioma_nas.segmentation_studies.ablation_study import ablated, prune, student_width, study_ablation
from glioma_nas.space_building import build_space
from glioma_nas.testing.phantoms import write_phantom_cohort


def config(tmp_path: Path, **space_options: Any) -> RunConfig:
    search = {**CONFIG["search"], "space_options": {"preset": "tiny", **space_options}}
    train = {"epochs": 1, "steps_per_epoch": 2, "batch_size": 4}
    return parse_config({**CONFIG, "classify": {}, "search": search, "train": train}, source="test", folder=tmp_path)


def test_settings_fix_the_width_at_the_students_and_change_the_branches(tmp_path: Path) -> None:
    base = config(tmp_path, pairs=["2_4"])
    assert student_width(base) == 2
    one, two = (build_space(setting) for setting in ablated(base).values())
    assert one.variable_groups()["width"] == two.variable_groups()["width"] == []
    assert one.variable_groups()["operator"] == build_space(base).variable_groups()["operator"]
    assert {name.count("_") + 1 for name in one.layout.branch_sets} == {1} and len(one.layout.branch_sets) == 3
    assert list(two.layout.branch_sets) == ["2_4"]
    assert all(setting.model_copy(update={"search": base.search}) == base for setting in ablated(base).values())


def test_pruned_teacher_has_its_cells_at_the_narrowest_width(tmp_path: Path) -> None:
    base = config(tmp_path)
    space = build_space(base)
    weights = {label: [1.0 / len(mutable.values)] * len(mutable.values) for label, mutable in space.simplify().items()}
    teacher = space.decode(weights, architecture="teacher", branches="2_8")
    teacher.save(tmp_path / "search" / "teacher.json")
    pruned = Architecture.load(prune(base, tmp_path / "search", tmp_path / "pruned") / "student.json")
    wide, narrow = space.plan(teacher), space.plan(pruned)
    assert [(step.cell, step.operator, step.stride) for step in wide.steps] == [
        (step.cell, step.operator, step.stride) for step in narrow.steps
    ]
    assert {step.width for step in wide.steps} == {4} and {step.width for step in narrow.steps} == {2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": [4], "end_widths": [4]}, "does not let it; use nasbranet with several widths"),
        ({"end_widths": [4]}, "two end_widths"),
    ],
)
def test_space_without_the_choices_to_leave_out_is_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        student_width(config(tmp_path, **options))


def test_study_without_distillation_is_refused(tmp_path: Path) -> None:
    base = config(tmp_path)
    base = base.model_copy(update={"train": base.train.model_copy(update={"kd_weight": 0.0})})
    with pytest.raises(ConfigError, match=r"set train\.kd_weight above 0"):
        study_ablation(base, tmp_path, n_seeds=1, folds=None, progress=Silent())


@pytest.mark.slow
def test_ablation_runs_from_the_command_line(tmp_path: Path) -> None:
    write_phantom_cohort(tmp_path / "cohort", 6, 0)
    data = {**CONFIG, "classify": {}, "train": {"epochs": 1, "steps_per_epoch": 2, "batch_size": 4}}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(data))
    out = tmp_path / "out"
    done = CliRunner().invoke(
        app, ["study", "table-4-6", str(path), "--folds", "1", "--threads", "1", "--out", str(out), "--json"]
    )
    assert done.exit_code == 0, done.output
    rows = {row["network"]: row for row in json.loads(done.stdout)}
    assert [row["setting"] for row in rows.values()] == [
        "{O, s | χ = 2, b = 1}",
        "{O, s | χ = 2, b = 2}",
        "{O, s, χ | b = 2}",
        "T → T pruned",
        "T → S",
        "T",
    ]
    # One architecture, trained with and without its teacher.
    alone, taught = rows["searched_width_2_branches"], rows["student"]
    assert (alone["params_m"], alone["macs_g"]) == (taught["params_m"], taught["macs_g"])
    assert taught["difference"] is None and alone["difference"] == pytest.approx(
        alone["dice"] - taught["dice"], abs=1e-3
    )
    assert rows["teacher_pruned"]["params_m"] < rows["teacher"]["params_m"]
    assert rows["student"]["source_dice"] == 0.894 and rows["teacher"]["source_dice"] is None
    assert all(row["n_patients"] == 3 for row in rows.values())
    page = (out / "report.html").read_text()
    assert "T → T pruned" in page and "the searched networks alone" in page
