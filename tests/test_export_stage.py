from __future__ import annotations

import csv
import importlib.util
import io
import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import nibabel as nib
import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import nn

from glioma_nas import registry
from glioma_nas.architecture import Architecture
from glioma_nas.config import RunConfig, parse_config
from glioma_nas.engine_files import load_engine
from glioma_nas.engine_scores import expert_dice
from glioma_nas.errors import BackendError, StorageError
from glioma_nas.export_formats import ExportedFile, check_formats
from glioma_nas.latency_backend import Array, Engine, open_onnx_backend
from glioma_nas.latency_records import LatencyTable
from glioma_nas.model_precision import unquantised_convolutions
from glioma_nas.network_size import network_size
from glioma_nas.parity import Parity
from glioma_nas.pipeline import StageContext
from glioma_nas.prepared import PreparedCase, PreparedCohort
from glioma_nas.progress import Silent
from glioma_nas.space_building import build_space
from glioma_nas.stages import export, latency, preprocess
from glioma_nas.testing.phantoms import write_phantom_cohort
from glioma_nas.trained_networks import build_network, load_network, network_names, weights_path

SEQUENCES = ("t1ce", "flair")


def _config(folder: Path, **export_options: Any) -> RunConfig:
    data = {
        "cohort": {"sheet": "cohort.csv", "sequences": ["t1ce", "flair"]},
        "preprocess": {"crop_size_px": 48, "image_size_px": 48, "workers": 1},
        "folds": {"n_folds": 2},
        "search": {"space_options": {"preset": "tiny"}},
        "latency": {"threads": 1, "warmup_runs": 1, "runs": 2, "max_runs": 5, "network_runs": 5},
        "train": {"baselines": ["monai_unet"], "baseline_options": {"monai_unet": {"channels": [4, 8]}}},
        "export": {"parity_slices": 4, **export_options},
    }
    return parse_config(data, source="test", folder=folder)


def _context(config: RunConfig, run: Path, stage: str, *needs: str) -> StageContext:
    (run / stage).mkdir(parents=True, exist_ok=True)
    return StageContext(config, run / stage, {name: run / name for name in needs}, Silent())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder up to the train stage, with random weights that outline something: export cares for no more."""
    folder = tmp_path_factory.mktemp("export")
    write_phantom_cohort(folder, 4, 0, sequences=("t1ce", "flair"))
    config, run = _config(folder), folder / "run"
    preprocess.run(_context(config, run, "preprocess"))
    space = build_space(config)
    weights = {label: np.full(len(values), 1 / len(values)) for label, values in space.layout.choices.items()}
    for name in ("teacher", "student"):
        space.decode(weights, architecture=name).save(run / "search" / f"{name}.json")
    images = slices_of(PreparedCohort.load(run / "preprocess").cases.values())
    for fold in range(2):
        for name in network_names(config):
            path = weights_path(run / "train", fold, name)
            path.parent.mkdir(parents=True)
            torch.manual_seed(fold)
            network = build_network(config, run / "search", name).eval()
            if name in ("teacher", "student"):
                outline_half(network, images)
            save_file(network.state_dict(), path)
    return run


def slices_of(cases: Iterable[PreparedCase]) -> torch.Tensor:
    """Return all slices of some cases, (N, 2, H, W)."""
    return torch.from_numpy(np.concatenate([case.images()[:, list(case.channels(SEQUENCES))] for case in cases]))


def outline_half(network: nn.Module, images: torch.Tensor) -> None:
    """Shift the last bias so that half of all pixels are called tumour: masks that are all empty compare nothing."""
    with torch.inference_mode():
        background, tumour = network(images).unbind(1)
    last = network.get_submodule("head.classify.1")
    assert isinstance(last.bias, torch.Tensor)
    last.bias.data[1] += (background - tumour).median()


@pytest.mark.slow
def test_stage_writes_engines_parity_and_latency(run: Path) -> None:
    config = _config(run.parent)
    results = export.run(_context(config, run, "export", "preprocess", "search", "train"))
    files = {path.name for path in (run / "export" / "engines").iterdir()}
    exported = {"teacher.onnx", "student.onnx", "monai_unet.onnx", "student_fold1.onnx"}
    assert files == exported | {"student.safetensors", "student.pt2"}
    for name in exported:
        path = run / "export" / "engines" / name
        model = onnx.load(path)
        onnx.checker.check_model(model)
        assert [size.dim_param or size.dim_value for size in model.graph.input[0].type.tensor_type.shape.dim] == [
            "batch",
            2,
            48,
            48,
        ]
    parity = json.loads((run / "export" / "parity.json").read_text())
    assert set(parity["engines"]) == exported | {"student.pt2"}
    for row in parity["engines"].values():
        assert row["max_abs_logit_difference"] <= 1e-3
        assert row["n_slices"] == 4
    assert parity["engines"]["student_fold1.onnx"]["fold"] == 1
    assert parity["engines"]["student_fold1.onnx"]["sha256"] != parity["engines"]["student.onnx"]["sha256"]
    networks = json.loads((run / "export" / "latency.json").read_text())["networks"]
    assert list(networks) == ["teacher", "student", "monai_unet"]
    for row in networks.values():
        assert row["n"] == len(row["times_ms"]) == 5
        assert row["warmup_runs"] == 1 and {"disturbed", "clock_mhz", "median_low_ms"} <= row.keys()
        assert row["median_ms"] == pytest.approx(np.median(row["times_ms"]), abs=1e-3)
    assert networks["student"]["times_student"] == {"median": 1.0, "p5": 1.0, "p95": 1.0}
    unet = build_network(config, run / "search", "monai_unet")
    assert networks["monai_unet"]["params_m"] == pytest.approx(
        sum(p.numel() for p in unet.parameters()) / 1e6, abs=1e-6
    )
    rows = list(csv.DictReader(io.StringIO((run / "export" / "latency.csv").read_text())))
    assert [row["network"] for row in rows] == ["teacher", "student", "monai_unet"]
    assert {"disturbed", "median_low_ms", "median_high_ms", "clock_mhz"} <= rows[0].keys()
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
    space = build_space(config)
    specs = {*space.operator_specs(), *space.fixed_part_specs()}
    assert set(table) == specs
    assert results["entries"] == len(specs)
    assert results["fastest"][0]["median_ms"] <= results["slowest"][0]["median_ms"]
    assert latency.run(_context(config, run, "latency"))["slowest"] == results["slowest"]  # nothing is measured twice


def test_size_counts_parameters_and_multiplications() -> None:
    # 3·5 3×3 filters and 5 biases; each of 5 outputs at 6×8 pixels takes 27 multiplications.
    size = network_size(nn.Conv2d(3, 5, 3, padding=1), (1, 3, 6, 8))
    assert size.params_m * 1e6 == pytest.approx(9 * 3 * 5 + 5)
    assert size.macs_g * 1e9 == pytest.approx(27 * 5 * 6 * 8)


@pytest.mark.slow
def test_student_is_delivered_in_every_format_that_can_be_written_here(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The delivery of a student; engines for a GPU are built, and said not to be compared where there is none."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    formats = ["safetensors", "torch_export", "onnx_int8", "openvino", "tensorrt_rtx", "tensorrt_rtx_int8"]
    config = _config(run.parent, formats=formats, min_reduced_mask_dice=0.5)
    context = StageContext(config, tmp_path, {name: run / name for name in ("preprocess", "search", "train")}, Silent())
    results = export.run(context)
    folder = tmp_path / "engines"
    written = {path.name for path in folder.iterdir() if path.name.startswith("student.") or "int8" in path.name}
    assert written == {
        *("student.onnx", "student_int8.onnx", "student.xml", "student.bin", "student.pt2", "student.safetensors"),
        *("student.plan", "student.plan.json", "student_int8.plan", "student_int8.plan.json"),
    }
    parity = json.loads((tmp_path / "parity.json").read_text())
    for name in ("student.onnx", "student.xml", "student.pt2"):
        assert parity["engines"][name]["max_abs_logit_difference"] <= 1e-3, name
    assert parity["engines"]["student_int8.onnx"]["max_abs_logit_difference"] > 0
    reduced = parity["engines"]["student_int8.onnx"]
    assert reduced["n_cases"] == 2
    assert 0 <= reduced["expert_dice"] <= 1 and 0 <= reduced["expert_dice_float32"] <= 1
    assert "expert_dice" not in parity["engines"]["student.xml"]
    assert "weights alone" in parity["not_compared"]["student.safetensors"]
    if not torch.cuda.is_available():
        assert "no CUDA device" in results["not_compared"]["student.plan"]
    precisions = [load_engine(folder / name)[1].precision for name in ("student.plan", "student_int8.plan")]
    assert precisions == ["float32", "int8"]
    assert not unquantised_convolutions((folder / "student_int8.onnx").read_bytes())
    card = (tmp_path / "MODEL_CARD.md").read_text()
    assert f"| {reduced['tumour_px']} | 4 |" in card
    assert (
        "not a medical device" in card
        and "| student.xml |" in card
        and "What fewer bits cost" in card
        and "not compared: weights alone" in card
    )
    # A batch of three, from files alone: the sizes that were exported are not the only ones that work.
    batch = torch.randn((3, 2, 48, 48), generator=torch.Generator().manual_seed(0))
    network = load_network(config, run / "search", run / "train", 0, "student")
    with torch.no_grad():
        expected = network(batch)
        again = torch.export.load(folder / "student.pt2").module()(batch)
    torch.testing.assert_close(again, expected, atol=1e-4, rtol=1e-4)
    given = open_onnx_backend("openvino").read_file(folder / "student.xml", (3, 2, 48, 48), threads=1)
    np.testing.assert_allclose(given.run([batch.numpy()])[0], expected.numpy(), atol=1e-3)


def bundle_case(folder: Path, images: NDArray[np.float32], sequences: tuple[str, ...]) -> None:
    """Write slices (Z, C, H, W) as the volumes a bundle takes: one file a sequence, axes from the left to the right,
    from posterior to anterior and upwards, with a margin in the plane that the network does not take."""
    folder.mkdir(parents=True)
    for channel, name in enumerate(sequences):
        rows_to_posterior = np.moveaxis(images[:, channel], 0, -1)  # (H, W, Z): posterior, left, superior
        volume = np.ascontiguousarray(rows_to_posterior[::-1, ::-1].transpose(1, 0, 2))
        volume = np.pad(volume, ((2, 2), (3, 3), (0, 0)))
        affine = np.diag([0.9, 0.8, 5.0, 1.0])
        affine[:3, 3] = (-20.0, -30.0, 10.0)
        nib.save(nib.Nifti1Image(volume, affine), folder / f"{name}.nii.gz")


@pytest.mark.slow
def test_monai_runs_the_bundle_on_cases(run: Path, tmp_path: Path) -> None:
    """MONAI's own command, in the bundle's folder: masks on the scans' grids, as the network outlines them."""
    config = _config(run.parent)
    inputs = {name: run / name for name in ("preprocess", "search", "train")}
    export.run(StageContext(config, tmp_path, inputs, Silent()))
    bundle = tmp_path / "bundle"
    assert (bundle / "docs" / "license.txt").read_text().startswith("Configuration files")
    cases = list(PreparedCohort.load(run / "preprocess").cases.values())[:2]
    for case in cases:
        bundle_case(tmp_path / "cases" / case.case_id, slices_of([case]).numpy(), SEQUENCES)
    network = load_network(config, run / "search", run / "train", 0, "student")
    # Other weights than those of the program, to see that those of model.pt are taken.
    torch.manual_seed(7)
    state = {
        name: tensor + 0.05 * torch.randn(tensor.shape) if name.endswith(("weight", "bias")) else tensor
        for name, tensor in network.state_dict().items()
    }
    assert torch.load(bundle / "models" / "model.pt", weights_only=True).keys() == state.keys()
    network.load_state_dict(state)
    outline_half(network, slices_of(cases))
    torch.save(network.state_dict(), bundle / "models" / "model.pt")
    options = ["--dataset_dir", str(tmp_path / "cases"), "--output_dir", str(tmp_path / "masks")]
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", "configs/inference.json", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, cwd=bundle)
    assert done.returncode == 0, done.stderr[-3000:]
    outlined = 0
    for case in cases:
        (path,) = (tmp_path / "masks" / case.case_id).iterdir()
        mask = nib.load(path)
        scan = nib.load(tmp_path / "cases" / case.case_id / "t1ce.nii.gz")
        np.testing.assert_allclose(mask.affine, scan.affine, atol=1e-5)
        assert mask.shape == scan.shape
        with torch.inference_mode():
            expected = network(slices_of([case])).argmax(1).numpy()
        given = np.asarray(mask.dataobj)[2:-2, 3:-3].transpose(2, 1, 0)[:, ::-1, ::-1]
        assert (given == expected).mean() > 0.999
        outlined += int(expected.sum())
    assert outlined > 0


# The keys that MONAI's bundle specification calls mandatory, of which one was renamed meanwhile.
MANDATORY = {
    *("version", "monai_version", "pytorch_version", "numpy_version", "optional_packages_version"),
    *("required_packages_version", "task", "description", "authors", "copyright", "network_data_format"),
}
MANDATORY_OF_A_TENSOR = {
    *("type", "format", "num_channels", "spatial_shape", "dtype", "value_range", "is_patch_data", "channel_def"),
}


@pytest.mark.slow
def test_bundle_passes_monai_verification_and_loads(run: Path, tmp_path: Path) -> None:
    from monai.bundle import ConfigParser

    config = _config(run.parent)
    export.run(
        StageContext(config, tmp_path, {name: run / name for name in ("preprocess", "search", "train")}, Silent())
    )
    bundle = tmp_path / "bundle"

    # The schema beside the metadata exists, so nothing is fetched.
    command = [sys.executable, "-m", "monai.bundle", "verify_metadata", "--meta_file"]
    files = [str(bundle / "configs" / "metadata.json"), "--filepath", str(bundle / "configs" / "schema.json")]
    done = subprocess.run([*command, *files], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "metadata is verified with no error" in done.stdout + done.stderr
    parser = ConfigParser()
    parser.read_config(bundle / "configs" / "inference.json")
    parser["bundle_root"] = str(bundle)
    image = torch.randn((1, 2, 48, 48), generator=torch.Generator().manual_seed(0))
    network = load_network(config, run / "search", run / "train", 0, "student")
    with torch.no_grad():
        torch.testing.assert_close(
            parser.get_parsed_content("network_def")(image), network(image), atol=1e-4, rtol=1e-4
        )
    meta = json.loads((bundle / "configs" / "metadata.json").read_text())
    assert meta.keys() >= MANDATORY
    tensors = [tensor for side in meta["network_data_format"].values() for tensor in side.values()]
    assert len(tensors) == 2 and all(tensor.keys() >= MANDATORY_OF_A_TENSOR for tensor in tensors)
    assert "written by\nglioma_nas, not by MONAI" in (bundle / "docs" / "README.md").read_text()
    again = registry.search_spaces.get("nasbranet")
    record = Architecture.from_json(meta["glioma_nas_architecture"])
    module = again(**record.space_options()).derive(record).eval()
    module.load_state_dict(torch.load(bundle / "models" / "model.pt", weights_only=True))
    with torch.no_grad():
        torch.testing.assert_close(module(image), network(image))
    assert meta["network_data_format"]["inputs"]["image"]["channel_def"] == {"0": "t1ce", "1": "flair"}
    del meta["network_data_format"]["outputs"]
    with pytest.raises(jsonschema.ValidationError, match="'outputs' is a required property"):
        jsonschema.validate(meta, json.loads((bundle / "configs" / "schema.json").read_text()))


class Truth(Engine):
    """Outlines what it is told, whatever the image."""

    def __init__(self, tumours: list[NDArray[np.bool_]]) -> None:
        self.tumours = list(tumours)

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        tumour = self.tumours.pop(0)
        return [np.stack([np.where(tumour, -2, 2), np.where(tumour, 2, -2)])[None].astype(np.float32)]

    def call(self) -> None:
        raise NotImplementedError


@pytest.mark.slow
def test_dice_with_the_experts_masks_is_that_of_the_outlines(run: Path) -> None:
    cohort = PreparedCohort.load(run / "preprocess")
    cases = list(cohort.cases.values())[:2]
    masks = [mask for case in cases for mask in case.mask() > 0]
    right, none = (
        expert_dice(Truth(tumours), cases, ("t1ce", "flair"))
        for tumours in (masks, [np.zeros_like(mask) for mask in masks])
    )
    assert all(value > 0.9 for value in right), "the mask on slices, taken back to its own grid, is nearly the mask"
    assert none == [0.0, 0.0]


def test_refused_file_takes_what_belongs_to_it_along(tmp_path: Path) -> None:
    for name in ("student.xml", "student.bin", "student.plan", "student.plan.json", "teacher.xml"):
        (tmp_path / name).write_bytes(b"x")
    ExportedFile(tmp_path / "student.xml", None).remove()
    assert {path.name for path in tmp_path.iterdir()} == {"student.plan", "student.plan.json", "teacher.xml"}
    ExportedFile(tmp_path / "student.plan", None).remove()
    assert {path.name for path in tmp_path.iterdir()} == {"teacher.xml"}


@pytest.mark.parametrize(
    ("formats", "message"),
    [
        (["onx"], r"unknown format 'onx': did you mean 'onnx'"),
        (["tensorrt"], r"'tensorrt' cannot be written here: .*pip"),
    ],
)
def test_format_that_cannot_be_written_is_refused_before_anything_runs(formats: list[str], message: str) -> None:
    if formats == ["tensorrt"] and importlib.util.find_spec("tensorrt"):
        pytest.skip("TensorRT is installed")
    with pytest.raises(BackendError, match=message):
        check_formats(formats)


def test_fewer_bits_are_judged_by_their_masks_alone() -> None:
    limits = _config(Path(), min_reduced_mask_dice=0.9).export
    Parity(3.0, 0.95, 9, 2).require(limits, engine="student_int8.onnx", reduced=True)
    with pytest.raises(BackendError, match=r"Dice of the masks 0\.80000 \(at least 0\.9\)"):
        Parity(3.0, 0.8, 9, 2).require(limits, engine="student_int8.onnx", reduced=True)
