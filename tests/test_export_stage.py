from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from glioma_nas.config import RunConfig, parse_config
from glioma_nas.errors import BackendError, StorageError
from glioma_nas.latency_records import LatencyTable
from glioma_nas.network_size import network_size
from glioma_nas.pipeline import StageContext
from glioma_nas.prepared import PreparedCohort
from glioma_nas.progress import Silent
from glioma_nas.space_building import build_space
from glioma_nas.stages import export, latency, preprocess
from glioma_nas.testing.phantoms import write_phantom_cohort
from glioma_nas.trained_networks import build_network, network_names, weights_path


def _config(folder: Path, **export_options: Any) -> RunConfig:
    data = {
        "cohort": {"sheet": "cohort.csv", "sequences": ["t1ce", "flair"]},
        "preprocess": {"crop_size_px": 48, "image_size_px": 48, "workers": 1},
        "folds": {"n_folds": 2},
        "search": {"space_options": {"preset": "tiny"}},
        "latency": {"threads": 1, "warmup_runs": 1, "runs": 2, "network_runs": 5},
        "train": {"baselines": ["monai_unet"], "baseline_options": {"monai_unet": {"channels": [4, 8]}}},
        "export": {"parity_slices": 4, **export_options},
    }
    return parse_config(data, source="test", folder=folder)


def _context(config: RunConfig, run: Path, stage: str, *needs: str) -> StageContext:
    (run / stage).mkdir(parents=True, exist_ok=True)
    return StageContext(config, run / stage, {name: run / name for name in needs}, Silent())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder up to the train stage, with random weights: export does not care how good they are."""
    folder = tmp_path_factory.mktemp("export")
    write_phantom_cohort(folder, 4, 0, sequences=("t1ce", "flair"))
    config, run = _config(folder), folder / "run"
    preprocess.run(_context(config, run, "preprocess"))
    space = build_space(config)
    weights = {label: np.full(len(values), 1 / len(values)) for label, values in space.layout.choices.items()}
    for name in ("teacher", "student"):
        space.decode(weights, architecture=name).save(run / "search" / f"{name}.json")
    for fold in range(2):
        for name in network_names(config):
            path = weights_path(run / "train", fold, name)
            path.parent.mkdir(parents=True)
            torch.manual_seed(fold)
            save_file(build_network(config, run / "search", name).state_dict(), path)
    return run


@pytest.mark.slow
def test_stage_writes_engines_parity_and_latency(run: Path) -> None:
    config = _config(run.parent)
    results = export.run(_context(config, run, "export", "preprocess", "search", "train"))
    files = {path.name for path in (run / "export" / "engines").iterdir()}
    assert files == {"teacher.onnx", "student.onnx", "monai_unet.onnx", "student_fold1.onnx"}
    for path in (run / "export" / "engines").iterdir():
        model = onnx.load(path)
        onnx.checker.check_model(model)
        assert [size.dim_param or size.dim_value for size in model.graph.input[0].type.tensor_type.shape.dim] == [
            "batch",
            2,
            48,
            48,
        ]
    parity = json.loads((run / "export" / "parity.json").read_text())
    assert set(parity["engines"]) == files
    for row in parity["engines"].values():
        assert row["max_abs_logit_difference"] <= 1e-3
        assert row["n_slices"] == 4
    assert parity["engines"]["student_fold1.onnx"]["fold"] == 1
    assert parity["engines"]["student_fold1.onnx"]["sha256"] != parity["engines"]["student.onnx"]["sha256"]
    networks = json.loads((run / "export" / "latency.json").read_text())["networks"]
    assert list(networks) == ["teacher", "student", "monai_unet"]
    for row in networks.values():
        assert row["n"] == len(row["times_ms"]) == 5
        assert row["median_ms"] == pytest.approx(np.median(row["times_ms"]), abs=1e-3)
    assert networks["student"]["times_student"] == {"median": 1.0, "p5": 1.0, "p95": 1.0}
    unet = build_network(config, run / "search", "monai_unet")
    assert networks["monai_unet"]["params_m"] == pytest.approx(
        sum(p.numel() for p in unet.parameters()) / 1e6, abs=1e-6
    )
    rows = list(csv.DictReader(io.StringIO((run / "export" / "latency.csv").read_text())))
    assert [row["network"] for row in rows] == ["teacher", "student", "monai_unet"]
    assert rows[0]["input_shape"] == "1x2x48x48" and rows[0]["backend"] == "onnxruntime" and rows[0]["threads"] == "1"
    json.dumps(results, allow_nan=False)


@pytest.mark.slow
def test_engine_beyond_tolerance_is_refused_and_not_written(run: Path, tmp_path: Path) -> None:
    config = _config(run.parent, max_abs_logit_difference=1e-12)
    context = StageContext(config, tmp_path, {name: run / name for name in ("preprocess", "search", "train")}, Silent())
    with pytest.raises(BackendError, match=r"teacher\.onnx does not compute what PyTorch computes on 4 slices"):
        export.run(context)
    assert not (tmp_path / "engines" / "teacher.onnx").exists()


@pytest.mark.slow
def test_missing_weights_are_named(run: Path, tmp_path: Path) -> None:
    inputs = {"preprocess": run / "preprocess", "search": run / "search", "train": tmp_path}
    with pytest.raises(StorageError, match=r"fold0/teacher/weights\.safetensors: no such file"):
        export.run(StageContext(_config(run.parent), tmp_path, inputs, Silent()))


@pytest.mark.slow
def test_parity_slices_show_tumour_first_and_follow_the_channel_order(run: Path) -> None:
    cohort = PreparedCohort.load(run / "preprocess")
    (case, *_) = cases = list(cohort.cases.values())
    n_tumour = sum(len(case.tumour_slices) for case in cases)
    assert n_tumour > 0
    (one,) = export.parity_slices([case], ("flair", "t1ce"), 1)
    expected = case.images()[case.tumour_slices[0], list(case.channels(("flair", "t1ce")))]
    np.testing.assert_array_equal(one, expected)
    brain = sum(pixels > 0 for case in cases for pixels in case.brain_px)
    assert len(export.parity_slices(cases, ("t1ce",), n_tumour)) == n_tumour
    assert len(export.parity_slices(cases, ("t1ce",), 10**6)) == brain


@pytest.mark.slow
def test_latency_stage_measures_every_operator_of_the_space(run: Path) -> None:
    config = _config(run.parent)
    results = latency.run(_context(config, run, "latency"))
    table = LatencyTable.load(run / "latency" / "latency_table.json")
    specs = set(build_space(config).operator_specs())
    assert set(table) == specs
    assert results["entries"] == len(specs)
    assert results["fastest"][0]["median_ms"] <= results["slowest"][0]["median_ms"]
    assert latency.run(_context(config, run, "latency"))["slowest"] == results["slowest"]  # nothing is measured twice


def test_size_counts_parameters_and_multiplications() -> None:
    # 3·5 3×3 filters and 5 biases; each of 5 outputs at 6×8 pixels takes 27 multiplications.
    size = network_size(nn.Conv2d(3, 5, 3, padding=1), (1, 3, 6, 8))
    assert size.params_m * 1e6 == pytest.approx(9 * 3 * 5 + 5)
    assert size.macs_g * 1e9 == pytest.approx(27 * 5 * 6 * 8)
