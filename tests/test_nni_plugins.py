"""The walks of docs/plugins.md, all plugins at once, inside a real NNI trial process; NNI's Python interface."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glioma_nas.errors import StorageError
from glioma_nas.latency_backend import LatencyBackend
from glioma_nas.nni_experiments.checkpoint_serializer import JsonCheckpointSerializer
from glioma_nas.registry import latency_backends, load_file
from glioma_nas.testing.latency_suite import LatencyBackendSuite
from tests.nni_runs import ROOT, Nni, nni_in, output_of
from tests.tiny_run import TINY_RUN, write_run

EXAMPLES = ROOT / "examples"
PLUGINS = [
    EXAMPLES / "operator_plugin" / "asymmetric_conv.py",
    EXAMPLES / "plugins" / "hill_climbing.py",
    EXAMPLES / "plugins" / "torchscript_engine.py",
    EXAMPLES / "plugins" / "tumour_shape.py",
]


class TestTorchScriptExample(LatencyBackendSuite):
    def backend(self) -> LatencyBackend:
        load_file(EXAMPLES / "plugins" / "torchscript_engine.py")
        backend = latency_backends.get("torchscript")()
        assert isinstance(backend, LatencyBackend)
        return backend


@pytest.fixture
def nni(tmp_path: Path) -> Iterator[Nni]:
    with nni_in(tmp_path) as found:
        yield found


def install_without_pip(folder: Path) -> None:
    """Lay a package out as pip does: its module, and the metadata that names its entry point."""
    package = EXAMPLES / "operator_package"
    information = folder / "glioma_nas_large_kernel-0.1.0.dist-info"
    information.mkdir(parents=True)
    (folder / "glioma_nas_large_kernel.py").write_text((package / "glioma_nas_large_kernel.py").read_text())
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: glioma-nas-large-kernel\nVersion: 0.1.0\n")
    found = re.search(r"(\[project.entry-points.*?\])\n(.+?)\n", (package / "pyproject.toml").read_text(), re.DOTALL)
    assert found is not None
    (information / "entry_points.txt").write_text(f"[glioma_nas.plugins]\n{found.group(2)}\n".replace('"', ""))


def plugin_of_the_page(folder: Path) -> Path:
    """Save the operator that docs/plugins.md shows, under the name of another plugin file, which it must not shadow."""
    found = re.search(
        r'```python title="[^"]*saved as a file[^"]*"\n(.*?)```', (ROOT / "docs" / "plugins.md").read_text(), re.DOTALL
    )
    assert found is not None
    folder.mkdir()
    path = folder / PLUGINS[0].name
    path.write_text(found.group(1))
    return path


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="NNI's launcher is tested on Linux")
@pytest.mark.timeout(3600)  # one command alone may take 600 s
def test_every_kind_of_plugin_works_in_a_trial_process(nni: Nni, tmp_path: Path) -> None:
    install_without_pip(tmp_path / "site")
    nni.environment["PYTHONPATH"] = f"{ROOT}:{tmp_path / 'site'}"
    plugins = [*PLUGINS, plugin_of_the_page(tmp_path / "page")]
    listed = nni.call("list", *(part for path in plugins for part in ("--plugin", path))).stdout
    for name in ("asymmetric_conv", "large_kernel", "wide_pool", "hill_climbing", "torchscript", "tumour_shape"):
        assert name in listed
    run = write_run(
        tmp_path,
        n_patients=40,
        folds={"n_folds": 3},  # trials measure within fold 0's training patients, who must be in two folds
        plugins=[str(path) for path in plugins],
        latency={**TINY_RUN["latency"], "backend": "torchscript"},
        search={
            **TINY_RUN["search"],
            "space_options": {"preset": "tiny", "operators": ["skip", "asymmetric_conv", "large_kernel", "wide_pool"]},
            "strategy": "hill_climbing",
            "strategy_options": {"trials": 2},
        },
        classify={"markers": {"idh": {"column": "idh", "positive": "mutant", "classifier": "tumour_shape"}}},
    )
    experiment = tmp_path / "experiment"
    nni.call("nni", "config", run, "--out", experiment, "--trials", 1, "--seeds", 1, "--marker", "idh")
    table = json.loads((experiment / "run" / "latency" / "latency_table.json").read_text())
    assert "torchscript" in json.dumps(table)
    done = nni.call("nni", "create", experiment)
    assert "1 SUCCEEDED" in done.stdout, done.stderr
    trial = nni.trials(nni.newest())[0]
    architecture = json.loads((output_of(trial) / "architecture.json").read_text())
    operators = {value for label, value in architecture["choices"].items() if label.startswith("op_")}
    assert operators <= {"skip", "asymmetric_conv", "large_kernel", "wide_pool"}
    assert sorted(path.name for path in (experiment / "code").rglob("*.py")) == sorted(path.name for path in plugins)
    metrics = json.loads(json.loads(trial["finalMetricData"][0]["data"]))
    assert 0 <= metrics["auc_idh"] <= 1
    assert metrics["auc_ki67"] is None


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_nas_experiment_of_the_example_runs_and_resumes(tmp_path: Path) -> None:
    from glioma_nas.config import load_config
    from glioma_nas.pipeline import Pipeline
    from glioma_nas.progress import Silent

    Pipeline(load_config(write_run(tmp_path)), tmp_path / "run", Silent()).run(["preprocess", "latency"])
    script = EXAMPLES / "nni" / "nas_experiment.py"
    nni = Nni(tmp_path / "home")

    def run(*more: str) -> str:
        command = [sys.executable, str(script), str(tmp_path / "run"), str(tmp_path / "out"), *more]
        done = subprocess.run(command, env=nni.environment, capture_output=True, text=True, timeout=900, check=False)
        assert done.returncode == 0, done.stderr
        return next(line for line in done.stdout.splitlines() if line.startswith("experiment "))

    first = run()
    identity = first.split()[1]
    state = tmp_path / "out" / "experiments" / identity / "checkpoint" / "state.ckpt.json"
    assert json.loads(state.read_text())["strategy"]["ckpt_path"].endswith("last.ckpt")
    assert run("--resume", identity) == first


class Sneaky:
    """Something that is no plain data."""


@pytest.mark.parametrize(
    "state",
    [
        {"random_state": np.random.RandomState(3).get_state(), "counter": 4},
        {"population": deque([1, 2]), "dedup_history": [("a", 1), ("b", 2)], "seen": {1, 2}},
        {3: "number as key", "nested": {"__type__": "tuple"}, "inf": float("inf")},
    ],
)
def test_state_of_an_experiment_comes_back_as_it_was(tmp_path: Path, state: dict[Any, Any]) -> None:
    serializer = JsonCheckpointSerializer()
    serializer.save(state, tmp_path / "state.ckpt")
    found = serializer.load(tmp_path / "state.ckpt")
    np.testing.assert_equal(found, state)
    assert [type(value) for value in found.values()] == [type(value) for value in state.values()]


def test_population_of_evolution_comes_back(tmp_path: Path) -> None:
    from nni.nas.strategy.evolution import Individual

    serializer = JsonCheckpointSerializer()
    state = {"population": [Individual({"op": "skip"}, 0.5)]}
    serializer.save(state, tmp_path / "state.ckpt")
    assert serializer.load(tmp_path / "state.ckpt") == state


def test_state_that_is_no_plain_data_is_refused_and_none_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"holds a .*Sneaky, which is no plain data"):
        JsonCheckpointSerializer().save({"x": Sneaky()}, tmp_path / "state.ckpt")
    with pytest.raises(FileNotFoundError):
        JsonCheckpointSerializer().load(tmp_path / "state.ckpt")
    (tmp_path / "state.ckpt.json").write_text('{"x": {"__type__": "object", "values": []}}')
    with pytest.raises(StorageError, match="unknown kind of data 'object'"):
        JsonCheckpointSerializer().load(tmp_path / "state.ckpt")
