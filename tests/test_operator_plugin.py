"""The example operators, a local file and a pip package, used by name in a space, a latency table and an export."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import yaml

from glioma_nas import local, registry
from glioma_nas.architecture import Architecture
from glioma_nas.latency_backend import open_backend
from glioma_nas.latency_building import build_table
from glioma_nas.latency_records import LatencyTable
from glioma_nas.onnx_export import export_onnx
from glioma_nas.search_spaces.nasbranet import NASBraNet
from glioma_nas.strategies.architecture_parameters import ArchitectureParameters, choices_of, groups_of
from glioma_nas.strategies.one_shot import CoSearch
from glioma_nas.testing.operator_suite import OperatorSuite
from glioma_nas.testing.phantoms import write_phantom_cohort

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
EXAMPLE = EXAMPLES / "operator_plugin" / "asymmetric_conv.py"
PACKAGE = EXAMPLES / "operator_package"


@pytest.fixture
def space(monkeypatch: pytest.MonkeyPatch) -> NASBraNet:
    monkeypatch.setenv(local.ENVIRONMENT_VARIABLE, "")
    registry.load_file(EXAMPLE)
    torch.manual_seed(0)
    return NASBraNet("tiny", operators=["skip", "asymmetric_conv"], in_channels=2, n_classes=2, image_size_px=32)


def only_the_plugin(space: NASBraNet) -> Architecture:
    sample = {label: values[0] for label, values in space.layout.choices.items()}
    sample.update(dict.fromkeys(space.variable_groups()["operator"], "asymmetric_conv"))
    sample.update({label: [0] for label in space.variable_groups()["scale"]})
    return space.architecture(sample)


def test_operator_is_listed_with_its_file(space: NASBraNet) -> None:
    entry = next(item for item in registry.operators.entries() if item.name == "asymmetric_conv")
    assert entry.origin == f"file {EXAMPLE}"


def test_operator_is_sliced_and_trained_in_the_supernet(space: NASBraNet) -> None:
    strategy = CoSearch(latency_weight=0)
    strategy.mutate_model(space)
    parameters = ArchitectureParameters(
        "student",
        choices=choices_of(space),
        groups=groups_of(space),
        fixed=space.fixed_choices["student"],
        search_widths=True,
    )
    for rule in ("min", "max"):
        with strategy.relaxation_slot.using(parameters.relaxation(rule, differentiable=True)):
            outputs = space(torch.randn(2, 2, 32, 32))
        sum(logits.square().mean() for logits in outputs.values()).backward()
    assert float(parameters.logits["op_s2_l1"].grad.abs().sum()) > 0


def test_operator_enters_the_latency_table_by_itself(space: NASBraNet, tmp_path: Path) -> None:
    specs = [spec for spec in space.operator_specs() if spec.operator == "asymmetric_conv"][:2]
    assert len(specs) == 2
    table = build_table(
        specs, open_backend("onnxruntime"), path=tmp_path / "t.json", warmup_runs=0, runs=2, threads=1, space=space
    )
    assert all(table.lookup(spec) > 0 for spec in specs)


def test_network_of_the_operator_exports_with_equal_logits(space: NASBraNet) -> None:
    network = space.derive(only_the_plugin(space)).eval()
    image = torch.randn(1, 2, 32, 32)
    session = onnxruntime.InferenceSession(export_onnx(network, [(1, 2, 32, 32)], opset=17))
    (logits,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    np.testing.assert_allclose(logits, network(image).detach().numpy(), atol=1e-4)


class TestExampleOperator(OperatorSuite):
    name = "asymmetric_conv"

    @pytest.fixture(autouse=True)
    def loaded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(local.ENVIRONMENT_VARIABLE, "")
        registry.load_file(EXAMPLE)


CONFIG = {
    "cohort": {"sheet": "cohort/cohort.csv", "sequences": ["t1ce", "flair"]},
    "preprocess": {"crop_size_px": 48, "image_size_px": 32, "workers": 1},
    "folds": {"n_folds": 2},
    "latency": {"threads": 1, "warmup_runs": 0, "runs": 1, "max_runs": 1, "network_runs": 1},
    "search": {"pretrain_epochs": 0, "search_epochs": 1, "steps_per_epoch": 1, "batch_size": 2},
    "train": {"epochs": 1, "steps_per_epoch": 1, "batch_size": 2},
    "export": {"parity_slices": 1, "formats": [], "bundle": False},
}

RUN_THE_STAGES = """
import sys
from glioma_nas.cli import app
for command in (["preprocess"], ["latency", "build"], ["search"], ["train"], ["export"]):
    app([*command, sys.argv[1], "--out", sys.argv[2]], standalone_mode=False)
"""


def run_with_operator(folder: Path, name: str, environment: dict[str, str], **config: Any) -> None:
    """Run a configuration that names the operator from preprocessing to export, and check what each stage left."""
    write_phantom_cohort(folder / "cohort", 4, 0)
    options = {"preset": "tiny", "operators": ["skip", name], "widths": [2], "end_widths": [2]}
    search = {**CONFIG["search"], "space_options": options}
    (folder / "run.yaml").write_text(yaml.safe_dump({**CONFIG, "search": search, **config}))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUN_THE_STAGES, "run.yaml", "out"],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    run = folder / "out"
    # Teachers have no skips, so that theirs is a network of this operator alone.
    teacher = Architecture.load(run / "search" / "teacher.json").sample()
    assert {value for label, value in teacher.items() if label.startswith("op_")} == {name}
    table = LatencyTable.load(run / "latency" / "latency_table.json")
    assert sum(spec.operator == name for spec in table) > 1
    session = onnxruntime.InferenceSession(run / "export" / "engines" / "teacher.onnx")
    (logits,) = session.run(None, {session.get_inputs()[0].name: np.zeros((1, 2, 32, 32), np.float32)})
    assert logits.shape == (1, 2, 32, 32) and np.isfinite(logits).all()


@pytest.mark.slow
def test_operator_in_one_file_is_searched_timed_and_exported_by_name(tmp_path: Path) -> None:
    shutil.copy(EXAMPLE, tmp_path)
    run_with_operator(tmp_path, "asymmetric_conv", {}, plugins=["asymmetric_conv.py"])


@pytest.mark.slow
def test_operator_of_an_installed_package_is_searched_timed_and_exported_by_name(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "site"
    shutil.copytree(PACKAGE, source)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(target), str(source)], check=True, capture_output=True, timeout=300)
    installed = {"PYTHONPATH": os.pathsep.join([str(target), os.environ.get("PYTHONPATH", "")])}
    listed = subprocess.run(
        [sys.executable, "-m", "glioma_nas", "list", "operators", "--json"],
        env={**os.environ, **installed},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    (entry,) = (entry for entry in json.loads(listed.stdout) if entry["name"] == "large_kernel")
    assert entry["origin"] == "package glioma-nas-large-kernel 0.1.0"
    assert entry["summary"].startswith("A 7×7 convolution of each channel")
    run_with_operator(tmp_path, "large_kernel", installed)
