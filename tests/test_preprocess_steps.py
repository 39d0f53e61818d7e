"""Single preprocess steps against hand-computed values."""

from __future__ import annotations

import numpy as np
import pytest

from glioma_nas.case_volumes import CaseVolumes
from glioma_nas.config import PreprocessConfig
from glioma_nas.errors import ImageError
from glioma_nas.preprocess_steps.resize import resample, resampling_matrix
from glioma_nas.registry import preprocess_steps


def volumes(image: np.ndarray, mask: np.ndarray | None = None) -> CaseVolumes:
    return CaseVolumes({"t1": image.astype(np.float32)}, mask, np.eye(4))


def test_all_steps_are_registered_with_a_summary() -> None:
    assert {"orient", "zscore", "crop_pad", "resize"} <= set(preprocess_steps.names())
    assert all(entry.summary for entry in preprocess_steps.entries())


def test_resampling_matrix_averages_areas() -> None:
    np.testing.assert_allclose(resampling_matrix(6, 3, "area").toarray(), np.repeat(np.eye(3), 2, axis=1) / 2)
    # Three old pixels on two new ones: one and a half each.
    np.testing.assert_allclose(resampling_matrix(3, 2, "area").toarray(), [[2 / 3, 1 / 3, 0], [0, 1 / 3, 2 / 3]])


def test_resampling_matrix_interpolates_linearly_when_enlarging() -> None:
    expected = [[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]]
    np.testing.assert_allclose(resampling_matrix(2, 4, "linear").toarray(), expected)


def test_resampling_matrix_is_a_triangle_of_two_pixels_when_halving() -> None:
    # Centre 2.5, distances 2 1 … in old pixels, triangle of half width 2: weights 0.25 0.75 0.75 0.25 of 2.
    np.testing.assert_allclose(resampling_matrix(6, 3, "linear").toarray()[1], [0, 0.125, 0.375, 0.375, 0.125, 0])


@pytest.mark.parametrize("kernel", ["linear", "area"])
@pytest.mark.parametrize(("n_in", "n_out"), [(7, 7), (224, 160), (160, 224), (5, 11), (240, 32)])
def test_resampling_keeps_a_constant(n_in: int, n_out: int, kernel: str) -> None:
    matrix = resampling_matrix(n_in, n_out, kernel)  # type: ignore[arg-type] - both kernels are allowed
    np.testing.assert_allclose(matrix @ np.ones(n_in), 1, atol=1e-12)
    if n_in == n_out:
        np.testing.assert_allclose(matrix.toarray(), np.eye(n_in), atol=1e-12)


def test_resample_removes_what_the_new_grid_cannot_hold() -> None:
    stripes = np.broadcast_to((np.arange(64) % 2)[:, None, None] * 2.0 - 1, (64, 64, 1)).astype(np.float32)
    assert np.abs(resample(stripes, (32, 32), "linear")[1:-1]).max() < 1e-6


def test_zscore_uses_the_brain_only() -> None:
    image = np.zeros((4, 4, 2))
    image[0, 0], image[1, 1] = (10, 20), (30, 40)
    after, record = preprocess_steps.get("zscore")().apply(volumes(image), PreprocessConfig())
    # Of 10, 20, 30, 40 the mean is 25 and the deviation the root of 125.
    np.testing.assert_allclose(after.images["t1"][0, 0], [-15 / np.sqrt(125), -5 / np.sqrt(125)], rtol=1e-6)
    assert record == {"t1": {"mean": 25.0, "deviation": pytest.approx(np.sqrt(125))}}
    assert not after.images["t1"][2:].any()


def test_zscore_keeps_a_voxel_of_mean_brightness_in_the_brain() -> None:
    image = np.zeros((4, 4, 2))
    image[0, 0], image[1, 1] = (10, 20), (20, 30)
    after, _ = preprocess_steps.get("zscore")().apply(volumes(image), PreprocessConfig())
    np.testing.assert_array_equal(after.images["t1"] != 0, image != 0)
    assert abs(after.images["t1"][0, 0, 1]) < 1e-3


def test_crop_pad_centres_on_the_brain_and_pads_with_zeros() -> None:
    image = np.zeros((40, 30, 2))
    image[2:12, 20:28] = 5
    mask = np.zeros((40, 30, 2), dtype=np.uint8)
    mask[2, 20, 0] = 1
    after, record = preprocess_steps.get("crop_pad")().apply(volumes(image, mask), PreprocessConfig(crop_size_px=32))
    # Centres 7 and 24, half a side 16: the window begins at -9 and 8.
    assert record == {"start": [-9, 8], "shape": [40, 30], "tumour_voxels_cut": 0}
    assert after.images["t1"].shape == (32, 32, 2)
    assert after.images["t1"][11:21, 12:20].min() == 5
    assert after.images["t1"].sum() == image.sum()
    assert after.mask is not None
    assert after.mask[11, 12, 0] == 1
    np.testing.assert_allclose(after.affine @ [11, 12, 0, 1], [2, 20, 0, 1])


def test_crop_pad_refuses_an_empty_volume() -> None:
    with pytest.raises(ImageError, match="no brain to centre on"):
        preprocess_steps.get("crop_pad")().apply(volumes(np.zeros((4, 4, 2))), PreprocessConfig())


def test_resize_keeps_positions_in_space() -> None:
    x = np.broadcast_to(np.arange(64.0)[:, None, None], (64, 64, 1))
    after, _ = preprocess_steps.get("resize")().apply(volumes(x), PreprocessConfig(image_size_px=32))
    # Brightness is the x position, so away from the border the new affine must say where each pixel lies.
    places = after.affine @ np.stack([np.arange(32), np.full(32, 8), np.zeros(32), np.ones(32)])
    np.testing.assert_allclose(after.images["t1"][1:-1, 8, 0], places[0, 1:-1], atol=1e-5)


@pytest.mark.parametrize("size_px", [32, 48, 80, 128])
@pytest.mark.parametrize("name", ["resize", "resample"])
def test_resampling_neither_blends_the_brain_with_its_background_nor_changes_its_size(name: str, size_px: int) -> None:
    places = np.indices((64, 64, 4)) - 31.5
    brain = np.hypot(places[0], places[1]) < 25
    image = np.where(brain, 7.0, 0.0)
    config = PreprocessConfig(image_size_px=size_px)
    step = preprocess_steps.get(name)(**({"spacing_mm": 64 / size_px} if name == "resample" else {}))
    after, _ = step.apply(volumes(image), config)
    found = after.images["t1"]
    assert found.shape[:2] == (size_px, size_px)
    np.testing.assert_allclose(found[found != 0], 7.0, rtol=1e-5)
    # The disc's area in old pixels; a rim of one pixel all round would add 8 % at 64 pixels.
    assert (found != 0).sum() * (64 / size_px) ** 2 == pytest.approx(brain.sum(), rel=0.02)


def test_brightness_that_averages_to_zero_inside_the_brain_is_no_background() -> None:
    image = np.zeros((64, 64, 1))
    image[8:56, 8:56] = np.where(np.arange(48) % 2, 1.0, -1.0)[:, None, None]
    after, _ = preprocess_steps.get("resize")().apply(volumes(image), PreprocessConfig(image_size_px=32))
    assert (after.images["t1"] != 0).sum() == 24 * 24


def test_resize_keeps_a_mask_pixel_of_at_least_half() -> None:
    mask = np.zeros((64, 64, 1), dtype=np.uint8)
    mask[0, 0], mask[1, 0] = 1, 1  # half of the new pixel (0, 0)
    mask[10, 10] = 1  # a quarter of the new pixel (5, 5)
    image = np.ones((64, 64, 1))
    after, _ = preprocess_steps.get("resize")().apply(volumes(image, mask), PreprocessConfig(image_size_px=32))
    assert after.mask is not None
    np.testing.assert_array_equal(np.argwhere(after.mask), [[0, 0, 0]])
