"""Preparing a case and the way back: geometry is undone exactly, whatever the scan's orientation."""

from __future__ import annotations

import itertools
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from glioma_nas.case_preparation import Recipe, prepare_case
from glioma_nas.cohort import Case
from glioma_nas.config import PreprocessConfig
from glioma_nas.errors import CohortError, ConfigError, ImageError, StorageError
from glioma_nas.prepared import PreparedCase, slices_to_volume, volume_to_slices
from glioma_nas.testing.phantoms import write_nifti

OBLIQUE = nib.affines.from_matvec(
    np.array([[0.93, -0.26, 0.35], [0.25, 0.96, -0.1], [-0.05, 0.03, 5.8]]) * [1.1, 0.9, 1], [-40, 30, 12]
)
ORIENTATIONS = [
    "".join(axes) for order in itertools.permutations(("RL", "AP", "SI")) for axes in itertools.product(*order)
]


def oriented(codes: str, shape: tuple[int, int, int]) -> np.ndarray:
    # An affine whose axes run towards `codes`, on top of an oblique pose.
    orientation = nib.orientations.axcodes2ornt(codes)
    back = nib.orientations.inv_ornt_aff(
        nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), orientation), shape
    )
    return OBLIQUE @ back


def prepare(
    folder: Path, image: np.ndarray, mask: np.ndarray | None, affine: np.ndarray, *, crop: int, size: int, **extra: Path
) -> PreparedCase:
    folder.mkdir(parents=True, exist_ok=True)
    path = write_nifti(folder / "flair.nii.gz", image, affine)
    mask_path = None if mask is None else write_nifti(folder / "mask.nii.gz", mask, affine)
    case = Case("A", "P", {"flair": path, **extra}, mask_path)
    preprocess = PreprocessConfig(crop_size_px=crop, image_size_px=size)
    prepare_case(case, folder / "out", Recipe(("t1ce", "flair"), preprocess, (1,)))
    return PreparedCase.load(folder / "out")


def block_phantom(shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    image = np.zeros(shape, dtype=np.int16)
    image[3:-2, 2:-3, 1:-1] = np.random.default_rng(0).integers(
        50, 150, tuple(side - cut for side, cut in zip(shape, (5, 5, 2), strict=True))
    )
    mask = np.zeros(shape, dtype=np.uint8)
    mask[5:8, 6:11, 2:4] = 1
    return image, mask


def test_volume_to_slices_puts_anterior_on_top_and_the_patients_right_at_the_left() -> None:
    volume = np.zeros((5, 6, 7))
    volume[4, 5, 2] = 1  # rightmost, most anterior voxel of the third slice from below
    slices = volume_to_slices(volume)
    assert slices.shape == (7, 6, 5)
    assert slices[2, 0, 0] == 1
    np.testing.assert_array_equal(slices_to_volume(slices), volume)


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_to_native_returns_the_same_voxels_for_every_orientation(tmp_path: Path, codes: str) -> None:
    shape = (20, 24, 9)
    image, mask = block_phantom(shape)
    case = prepare(tmp_path, image, mask, oriented(codes, shape), crop=32, size=32)
    prepared_mask = case.mask()
    assert prepared_mask is not None
    assert prepared_mask.sum() == mask.sum()
    np.testing.assert_array_equal(case.to_native(prepared_mask.astype(np.float32)), mask)
    np.testing.assert_array_equal(case.native_mask(), mask)


def test_prepared_slices_are_alike_whatever_the_orientation_on_disk(tmp_path: Path) -> None:
    canonical_image, canonical_mask = block_phantom((20, 24, 9))
    reference = prepare(tmp_path / "RAS", canonical_image, canonical_mask, OBLIQUE, crop=32, size=32)
    for codes in ("LPS", "PSR", "SAL"):
        turn = nib.orientations.axcodes2ornt(codes)
        to = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), turn)
        image, mask = (nib.orientations.apply_orientation(data, to) for data in (canonical_image, canonical_mask))
        affine = OBLIQUE @ nib.orientations.inv_ornt_aff(to, canonical_image.shape)
        assert nib.aff2axcodes(affine) == tuple(codes)
        case = prepare(tmp_path / codes, image, mask, affine, crop=32, size=32)
        np.testing.assert_allclose(case.images(), reference.images(), atol=1e-6)
        np.testing.assert_array_equal(case.mask(), reference.mask())


def test_to_native_is_zero_beyond_the_crop(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(1, 100, (60, 50, 3)).astype(np.int16)
    mask = np.ones(image.shape, dtype=np.uint8)
    case = prepare(tmp_path, image, mask, np.diag([1.0, 1, 5, 1]), crop=32, size=32)
    native = case.to_native(np.ones((3, 32, 32), dtype=np.float32))
    assert native.shape == image.shape
    assert native.sum() == 32 * 32 * 3
    # The brain fills the field of view, so the window sits in its middle.
    assert native[14:46, 9:41].all()
    assert dict(case.steps)["crop_pad"]["tumour_voxels_cut"] == 60 * 50 * 3 - 32 * 32 * 3


def test_to_native_keeps_a_ball_after_halving_the_resolution(tmp_path: Path) -> None:
    x, y, z = np.indices((96, 96, 12))
    distance = np.sqrt((x - 45.3) ** 2 + (y - 50.8) ** 2 + (4 * (z - 5.5)) ** 2)
    image = np.where(distance < 40, 100 + x % 7, 0).astype(np.int16)
    mask = (distance < 15).astype(np.uint8)
    case = prepare(tmp_path, image, mask, np.diag([-1.0, -1, 4, 1]), crop=96, size=48)
    prepared_mask = case.mask()
    assert prepared_mask is not None
    found = case.to_native(prepared_mask.astype(np.float32)) >= 0.5
    dice = 2 * (found & (mask > 0)).sum() / (found.sum() + mask.sum())
    assert dice >= 0.95
    assert case.spacing_mm == pytest.approx((2, 2, 4))


def test_images_are_standardised_in_the_brain_and_zero_outside(tmp_path: Path) -> None:
    image, mask = block_phantom((20, 24, 9))
    t1ce = write_nifti(tmp_path / "t1ce.nii.gz", (image * 7 + 1000 * (image > 0)).astype(np.int16), OBLIQUE)
    case = prepare(tmp_path, image, mask, OBLIQUE, crop=32, size=32, t1ce=t1ce)
    slices = case.images()
    assert slices.dtype == np.float32
    assert slices.shape == (9, 2, 32, 32)
    inside = slices[:, 1] != 0
    assert inside.sum() == np.count_nonzero(image)
    for channel in (0, 1):
        assert slices[:, channel][inside].mean() == pytest.approx(0, abs=1e-5)
        assert slices[:, channel][inside].std() == pytest.approx(1, abs=1e-5)
    # A linear change of brightness, another scanner's gain, leaves nothing behind.
    np.testing.assert_allclose(slices[:, 0], slices[:, 1], atol=1e-4)


def test_a_missing_sequence_is_a_channel_of_zeros(tmp_path: Path) -> None:
    image, mask = block_phantom((20, 24, 9))
    case = prepare(tmp_path, image, mask, OBLIQUE, crop=32, size=32)
    assert case.sequences == ("t1ce", "flair")
    assert case.present == ("flair",)
    assert not case.images()[:, 0].any()
    assert case.images()[:, 1].any()
    assert case.channels(("flair",)) == (1,)
    assert case.reference == tmp_path / "out" / "grid_flair.nii.gz"


def test_a_case_without_mask_is_prepared(tmp_path: Path) -> None:
    image, _ = block_phantom((20, 24, 9))
    case = prepare(tmp_path, image, None, OBLIQUE, crop=32, size=32)
    assert (case.mask(), case.native_mask(), case.has_mask, case.tumour_slices) == (None, None, False, ())
    assert case.n_slices == 9
    assert case.brain_px[0] == 0 < case.brain_px[4]


def test_tumour_slices_need_enough_pixels(tmp_path: Path) -> None:
    image, mask = block_phantom((20, 24, 9))
    mask[5, 6, 5] = 1  # one pixel alone
    case = prepare(tmp_path, image, mask, OBLIQUE, crop=32, size=32)
    assert case.tumour_px == (0, 0, 15, 15, 0, 1, 0, 0, 0)
    assert case.tumour_slices == (2, 3)


def test_native_voxel_ml_is_the_volume_of_a_voxel(tmp_path: Path) -> None:
    image, mask = block_phantom((20, 24, 9))
    case = prepare(tmp_path, image, mask, np.diag([-2.0, -2, 5, 1]), crop=32, size=32)
    assert case.native_voxel_ml == pytest.approx(0.02)


def test_channels_refuses_a_sequence_that_was_not_prepared(tmp_path: Path) -> None:
    image, mask = block_phantom((20, 24, 9))
    case = prepare(tmp_path, image, mask, OBLIQUE, crop=32, size=32)
    with pytest.raises(CohortError, match="sequence 'flare' was not prepared: did you mean 'flair'"):
        case.channels(("flare",))


def test_prepare_case_refuses_a_brain_of_one_value(tmp_path: Path) -> None:
    image, mask = block_phantom((20, 24, 9))
    with pytest.raises(
        ImageError, match=r"case A: preprocess step 'zscore': sequence 'flair': all 1995 non-zero voxels are 9"
    ):
        prepare(tmp_path, np.where(image > 0, 9, 0).astype(np.int16), mask, OBLIQUE, crop=32, size=32)


@pytest.mark.parametrize("what", ["shape", "affine"])
def test_prepare_case_refuses_sequences_on_two_grids(tmp_path: Path, what: str) -> None:
    image, mask = block_phantom((20, 24, 9))
    affine = OBLIQUE.copy()
    affine[2, 3] += 3 if what == "affine" else 0
    t1ce = write_nifti(tmp_path / "t1ce.nii.gz", image[:, :, :-1] if what == "shape" else image, affine)
    # The first sequence is the reference, so the message names the other one.
    with pytest.raises(ImageError, match=rf"flair\.nii\.gz: {what} .* t1ce\.nii\.gz in the same case"):
        prepare(tmp_path, image, mask, OBLIQUE, crop=32, size=32, t1ce=t1ce)


def test_prepare_case_refuses_a_mask_of_another_shape(tmp_path: Path) -> None:
    image, mask = block_phantom((20, 24, 9))
    with pytest.raises(ImageError, match=r"mask\.nii\.gz: shape 20×24×8 differs from 20×24×9 of flair\.nii\.gz"):
        prepare(tmp_path, image, mask[:, :, 1:], OBLIQUE, crop=32, size=32)


def test_prepare_case_refuses_steps_that_leave_another_size(tmp_path: Path) -> None:
    image, _ = block_phantom((20, 24, 9))
    path = write_nifti(tmp_path / "flair.nii.gz", image, OBLIQUE)
    preprocess = PreprocessConfig(steps=("orient", "zscore"), image_size_px=32)
    with pytest.raises(
        ConfigError, match=r"leaves slices of 20×24 pixels, but preprocess.image_size_px is 32; add 'crop_pad'"
    ):
        prepare_case(Case("A", "P", {"flair": path}), tmp_path / "out", Recipe(("flair",), preprocess, (1,)))
    assert not (tmp_path / "out" / "case.json").exists()


def test_load_refuses_what_is_no_prepared_case(tmp_path: Path) -> None:
    (tmp_path / "case.json").write_text("{}")
    with pytest.raises(StorageError, match="not a prepared case"):
        PreparedCase.load(tmp_path)
    with pytest.raises(StorageError, match=r"case\.json: no such file"):
        PreparedCase.load(tmp_path / "elsewhere")


def test_images_refuses_a_damaged_array(tmp_path: Path) -> None:
    image, mask = block_phantom((20, 24, 9))
    case = prepare(tmp_path, image, mask, OBLIQUE, crop=32, size=32)
    (tmp_path / "out" / "images.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(StorageError, match=r"images\.npy: missing or damaged"):
        case.images()
