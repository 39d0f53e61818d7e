"""A landmark goes to the slices and returns to the same voxel of every scan, whatever grid each scan lies on."""

from __future__ import annotations

import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glioma_nas.case_preparation import Recipe, prepare_case
from glioma_nas.cohort import Case
from glioma_nas.config import PreprocessConfig
from glioma_nas.errors import CohortError, ConfigError, ImageError
from glioma_nas.grids import resample_to_grid, rotation_about, turn_onto, turned_grid, voxel_map
from glioma_nas.images import Affine
from glioma_nas.prepared import PreparedCase
from glioma_nas.testing.phantoms import write_nifti

LANDMARK_MM = np.array([11.0, -7.0, 9.0, 1.0])
CODES = ["RAS", "LPS", "LAS", "RPI", "PSR", "SAL", "ILA"]


def grid(
    codes: str, spacing: tuple[float, float, float], oblique: tuple[float, float, float]
) -> tuple[Affine, tuple[int, int, int]]:
    """A field of view of about 96 × 96 × 72 mm with a voxel centre on the landmark."""
    order = nib.orientations.axcodes2ornt(tuple(codes))
    extent = np.array([96.0, 96.0, 72.0])[order[:, 0].astype(int)]
    shape = tuple(int(side) for side in np.rint(extent / spacing))
    affine = np.zeros((4, 4))
    affine[3, 3] = 1
    for axis, (world, sign) in enumerate(order):
        affine[int(world), axis] = sign * spacing[axis]
    affine = rotation_about(np.zeros(3), oblique, (0, 0, 0)) @ affine
    place = np.array([*(side // 2 + offset for side, offset in zip(shape, (2, -3, 1), strict=True)), 1.0])
    affine[:3, 3] = LANDMARK_MM[:3] - (affine @ place)[:3]
    return affine, (shape[0], shape[1], shape[2])


def head_with_landmark(affine: Affine, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
    """A ball of 34 mm with texture, and a mask of all voxels within 5 mm of the landmark and the landmark itself."""
    places = np.indices(shape).reshape(3, -1)
    world = (affine @ np.vstack([places, np.ones(places.shape[1])]))[:3]
    head = (np.linalg.norm(world, axis=0) < 34).reshape(shape)
    image = head * (100 + np.random.default_rng(0).integers(0, 50, shape))
    mask = (np.linalg.norm(world - LANDMARK_MM[:3, None], axis=0) < 5).reshape(shape)
    voxel = np.rint(np.linalg.inv(affine) @ LANDMARK_MM)[:3].astype(int)
    mask[tuple(voxel)] = True
    return image.astype(np.int16), mask.astype(np.uint8), tuple(int(index) for index in voxel)


spacings = st.tuples(*(st.sampled_from([1.0, 1.5, 2.0]) for _ in range(2)), st.sampled_from([1.0, 3.0, 5.0]))
angles = st.tuples(*(st.floats(-25, 25) for _ in range(3)))
grids = st.builds(grid, st.sampled_from(CODES), spacings, angles)


@settings(max_examples=15, deadline=None)
@given(grids, grids)
def test_landmark_returns_to_the_same_voxel_of_both_scans(first, second) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images, voxels = {}, {}
        for sequence, (affine, shape) in (("t1ce", first), ("flair", second)):
            image, mask, voxels[sequence] = head_with_landmark(affine, shape)
            images[sequence] = write_nifti(folder / f"{sequence}.nii.gz", image, affine)
        mask_path = write_nifti(folder / "mask.nii.gz", mask, second[0])  # drawn on flair
        steps = ("orient", "same_grid", "zscore", "crop_pad", "resize")
        config = PreprocessConfig(steps=steps, crop_size_px=128, image_size_px=128)
        prepare_case(Case("A", "A", images, mask_path), folder / "out", Recipe(("t1ce", "flair"), config, (1,)))
        case = PreparedCase.load(folder / "out")
        # A single bright pixel on the slice, where the affine says that the landmark is.
        place = np.linalg.inv(case.affine) @ LANDMARK_MM
        volume = np.exp(
            -0.5 * sum((axis - c) ** 2 for axis, c in zip(np.indices(case_shape(case)), place, strict=False))
        )
        slices = np.ascontiguousarray(volume[::-1, ::-1].transpose(2, 1, 0)).astype(np.float32)
        for sequence, (affine, shape) in (("t1ce", first), ("flair", second)):
            back = case.to_native(slices, sequence)
            assert back.shape == shape
            peak = np.array(np.unravel_index(back.argmax(), shape))
            off = np.abs(affine[:3, :3] @ (peak - voxels[sequence]))
            # Of slices 5 mm apart that do not pass through the landmark, the nearest one lights up.
            assert np.linalg.norm(off) <= max(case.spacing_mm) / 2 + 1e-6


voxels_mm = st.tuples(st.sampled_from([0.8, 1.0, 1.7]), st.sampled_from([None, 1.5, 4.0]))


@settings(max_examples=12, deadline=None)
@given(grids, grids, voxels_mm, st.sampled_from([64, 96, 160]))
def test_landmark_returns_to_the_same_voxel_through_resampling_and_resizing(first, second, voxel_mm, size_px) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images, voxels = {}, {}
        for sequence, (affine, shape) in (("t1ce", first), ("flair", second)):
            image, _, voxels[sequence] = head_with_landmark(affine, shape)
            images[sequence] = write_nifti(folder / f"{sequence}.nii.gz", image, affine)
        config = PreprocessConfig(
            steps=("orient", "same_grid", "resample", "zscore", "crop_pad", "resize"),
            step_options={"resample": {"spacing_mm": voxel_mm[0], "slice_mm": voxel_mm[1]}},
            crop_size_px=128,
            image_size_px=size_px,
        )
        prepare_case(Case("A", "A", images), folder / "out", Recipe(("t1ce", "flair"), config, (1,)))
        case = PreparedCase.load(folder / "out")
        # A smooth spot on the slices, where their affine says that the landmark is; wider than any voxel, so that its
        # centre is not lost between slices.
        width, height, depth = case_shape(case)
        places = np.indices((width, height, depth)).reshape(3, -1)
        world = (case.affine @ np.vstack([places, np.ones(places.shape[1])]))[:3]
        spot = np.exp(-0.5 * ((world - LANDMARK_MM[:3, None]) ** 2).sum(axis=0) / 5.0**2)
        volume = spot.reshape(width, height, depth)
        slices = np.ascontiguousarray(volume[::-1, ::-1].transpose(2, 1, 0)).astype(np.float32)
        for sequence, (_, shape) in (("t1ce", first), ("flair", second)):
            back = case.to_native(slices, sequence)
            assert back.shape == shape
            weights = np.where(back > 0.1, back, 0)
            centre = [float((np.indices(shape)[axis] * weights).sum() / weights.sum()) for axis in range(3)]
            assert tuple(round(place) for place in centre) == voxels[sequence]


def case_shape(case: PreparedCase) -> tuple[int, int, int]:
    z, _, height, width = case.images().shape
    return width, height, z


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("oblique", [(0.0, 0.0, 0.0), (12.0, -9.0, 20.0)])
def test_mask_on_the_reference_returns_voxel_by_voxel(tmp_path: Path, codes: str, oblique) -> None:
    affine, shape = grid(codes, (1.5, 1.5, 3.0), oblique)
    image, mask, voxel = head_with_landmark(affine, shape)
    path, mask_path = (
        write_nifti(tmp_path / f"{name}.nii.gz", data, affine) for name, data in (("t1ce", image), ("mask", mask))
    )
    config = PreprocessConfig(
        steps=("orient", "same_grid", "zscore", "crop_pad", "resize"), crop_size_px=96, image_size_px=96
    )
    prepare_case(Case("A", "A", {"t1ce": path}, mask_path), tmp_path / "out", Recipe(("t1ce",), config, (1,)))
    case = PreparedCase.load(tmp_path / "out")
    prepared = case.mask()
    assert prepared is not None
    back = case.to_native(prepared.astype(np.float32))
    np.testing.assert_array_equal(back, mask)
    assert back[voxel] == 1
    # The affine of the slices says the same as undoing the steps does.
    volume = np.ascontiguousarray(prepared.transpose(2, 1, 0)[::-1, ::-1]).astype(np.float32)
    np.testing.assert_array_equal(resample_to_grid(volume, case.affine, affine, shape), mask)


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("joined", [True, False])
def test_mask_whose_axes_are_stored_otherwise_is_turned_to_its_scan(tmp_path: Path, codes: str, joined: bool) -> None:
    affine, shape = grid("LPS", (1.5, 2.0, 3.0), (12.0, -9.0, 20.0))
    image, mask, _ = head_with_landmark(affine, shape)
    path = write_nifti(tmp_path / "t1ce.nii.gz", image, affine)
    stored = nib.Nifti1Image(mask, affine)
    start, end = nib.io_orientation(affine), nib.orientations.axcodes2ornt(tuple(codes))
    stored = stored.as_reoriented(nib.orientations.ornt_transform(start, end))
    mask_path = write_nifti(tmp_path / "mask.nii.gz", np.asarray(stored.dataobj), stored.affine)
    steps = ("orient", "same_grid", "zscore", "crop_pad", "resize")
    config = PreprocessConfig(steps=steps if joined else steps[:1] + steps[2:], crop_size_px=96, image_size_px=96)
    prepare_case(Case("A", "A", {"t1ce": path}, mask_path), tmp_path / "out", Recipe(("t1ce",), config, (1,)))
    case = PreparedCase.load(tmp_path / "out")
    np.testing.assert_array_equal(case.native_mask(), mask)
    prepared = case.mask()
    assert prepared is not None
    np.testing.assert_array_equal(case.to_native(prepared.astype(np.float32)), mask)


@pytest.mark.parametrize("codes", CODES)
def test_turned_volume_has_every_voxel_where_it_was(codes: str) -> None:
    affine, _ = grid("LPS", (1.5, 2.0, 3.0), (12.0, -9.0, 20.0))
    target, _ = grid(codes, (1.0, 1.0, 1.0), (3.0, 4.0, -5.0))
    data = np.random.default_rng(0).normal(size=(4, 5, 6))
    turned, placed = turn_onto(data, affine, target)
    assert nib.aff2axcodes(placed) == tuple(codes)
    shape, same = turned_grid(data.shape, affine, target)
    assert shape == turned.shape
    np.testing.assert_array_equal(placed, same)
    for voxel in ((0, 0, 0), (3, 1, 2), (2, 4, 5)):
        there = np.rint(np.linalg.inv(placed) @ affine @ [*voxel, 1])[:3].astype(int)
        np.testing.assert_allclose(placed @ [*there, 1], affine @ [*voxel, 1], atol=1e-9)
        assert turned[tuple(there)] == data[voxel]


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("apart", [(1e-6, -1e-6), (-1e-6, 1e-6)])
def test_grid_that_agrees_but_for_rounding_is_not_turned_at_45_degrees(axis: int, apart: tuple[float, float]) -> None:
    # To either side of 45 degrees the nearest axes of the scanner are others.
    affine, target = (
        grid("LPS", (1.5, 2.0, 3.0), tuple(45 + off if axis == own else 0.0 for own in range(3)))[0] for off in apart
    )
    data = np.random.default_rng(0).normal(size=(4, 5, 6))
    turned, placed = turn_onto(data, affine, target)
    np.testing.assert_array_equal(turned, data)
    np.testing.assert_array_equal(placed, affine)
    shape, same = turned_grid(data.shape, affine, target)
    assert shape == data.shape
    np.testing.assert_array_equal(same, affine)


def test_whole_voxel_maps_are_copies() -> None:
    data = np.random.default_rng(0).normal(size=(5, 6, 7)).astype(np.float32)
    flipped = np.diag([-1.0, 1.0, 1.0, 1.0])
    flipped[0, 3] = 4
    np.testing.assert_array_equal(resample_to_grid(data, flipped, np.eye(4), (5, 6, 7)), data[::-1])
    shifted = np.eye(4)
    shifted[:3, 3] = 1, 2, 3
    np.testing.assert_array_equal(resample_to_grid(data, np.eye(4), shifted, (4, 4, 4)), data[1:, 2:, 3:])


def test_resampling_interpolates_between_voxel_centres_and_is_zero_outside() -> None:
    data = np.arange(4, dtype=np.float32).reshape(4, 1, 1) * np.ones((4, 3, 3), np.float32)
    half = np.eye(4)
    half[0, 3] = 0.5
    found = resample_to_grid(data, np.eye(4), half, (5, 3, 3))[:, 1, 1]
    np.testing.assert_allclose(found[:3], [0.5, 1.5, 2.5])
    assert found[4] == 0


def test_voxel_map_goes_through_both_scanner_spaces() -> None:
    target, source = np.diag([2.0, 2.0, 5.0, 1.0]), np.diag([-1.0, -1.0, 1.0, 1.0])
    motion = rotation_about(np.array([0.0, 0.0, 0.0]), (0, 0, 90), (10, 0, 0))
    # Voxel (1, 0, 0) is at (2, 0, 0) mm; turned by 90° about z it is at (0, 2, 0), moved at (10, 2, 0).
    np.testing.assert_allclose((voxel_map(target, source, motion) @ [1, 0, 0, 1])[:3], [-10, -2, 0], atol=1e-12)


def two_grids(tmp_path: Path) -> dict[str, Path]:
    paths = {}
    for name, spacing in (("t1ce", (1.5, 1.5, 3.0)), ("flair", (2.0, 2.0, 3.0))):
        affine, shape = grid("RAS", spacing, (0, 0, 0))
        paths[name] = write_nifti(tmp_path / f"{name}.nii.gz", head_with_landmark(affine, shape)[0], affine)
    return paths


def test_steps_in_an_order_that_cannot_work_are_refused(tmp_path: Path) -> None:
    paths = two_grids(tmp_path)
    config = PreprocessConfig(steps=("orient", "crop_pad", "same_grid", "resize"), crop_size_px=64, image_size_px=64)
    with pytest.raises(ConfigError, match=r"'flair' still lies on a grid of its own; put 'register' .* before it"):
        prepare_case(Case("A", "A", paths), tmp_path / "out", Recipe(("t1ce", "flair"), config, (1,)))


def test_mask_on_the_grid_of_no_scan_is_refused(tmp_path: Path) -> None:
    paths = two_grids(tmp_path)
    affine, shape = grid("RAS", (1.0, 1.0, 1.0), (0, 0, 0))
    mask = write_nifti(tmp_path / "mask.nii.gz", np.ones(shape, np.uint8), affine)
    config = PreprocessConfig(steps=("same_grid", "crop_pad", "resize"), crop_size_px=64, image_size_px=64)
    with pytest.raises(ImageError, match=r"mask\.nii\.gz: the mask lies on the grid of none of t1ce, flair"):
        prepare_case(Case("A", "A", paths, mask), tmp_path / "out", Recipe(("t1ce", "flair"), config, (1,)))


def test_to_native_refuses_a_sequence_the_case_lacks(tmp_path: Path) -> None:
    paths = two_grids(tmp_path)
    config = PreprocessConfig(steps=("same_grid", "crop_pad", "resize"), crop_size_px=64, image_size_px=64)
    prepare_case(Case("A", "A", paths), tmp_path / "out", Recipe(("t1ce", "flair"), config, (1,)))
    case = PreparedCase.load(tmp_path / "out")
    with pytest.raises(CohortError, match="has no sequence 'flare': did you mean 'flair'"):
        case.to_native(np.zeros((24, 64, 64), np.float32), "flare")
