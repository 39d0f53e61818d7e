"""The example operators, a local file and a pip package, used by name in a space, a latency table and an export."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from glioma_nas import local, registry
from glioma_nas.architecture import Architecture
from glioma_nas.latency_backend import open_backend
from glioma_nas.latency_building import build_table
from glioma_nas.onnx_export import export_onnx
from glioma_nas.search_spaces.nasbranet import NASBraNet
from glioma_nas.strategies.architecture_parameters import ArchitectureParameters, choices_of, groups_of
from glioma_nas.strategies.one_shot import CoSearch
from glioma_nas.testing.operator_suite import OperatorSuite

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


USE_THE_PACKAGE = """
import torch
from glioma_nas import registry
from glioma_nas.onnx_export import export_onnx

(entry,) = (item for item in registry.operators.entries() if item.name == "large_kernel")
space = registry.search_spaces.get("nasbranet")("tiny", operators=["skip", "large_kernel"])
sample = {label: [0] if label.startswith("in_") else values[-1] for label, values in space.layout.choices.items()}
network = space.derive(space.architecture(sample))
size = len(export_onnx(network.eval(), [(1, 2, 32, 32)], opset=17))
print(entry.origin, "|", sum(spec.operator == "large_kernel" for spec in space.operator_specs()), "|", size > 1000)
"""


@pytest.mark.slow
def test_operator_of_an_installed_package_is_found_by_its_entry_point(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "site"
    shutil.copytree(PACKAGE, source)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(target), str(source)], check=True, capture_output=True, timeout=300)
    path = os.pathsep.join([str(target), os.environ.get("PYTHONPATH", "")])
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", USE_THE_PACKAGE],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == "package glioma-nas-large-kernel 0.1.0 | 20 | True"
