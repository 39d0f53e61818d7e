"""Rigid registration of one patient's sequences against motions that are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from glioma_nas.case_preparation import Recipe, prepare_case
from glioma_nas.cohort import Case
from glioma_nas.config import PreprocessConfig
from glioma_nas.grids import IDENTITY, rotation_about, rotation_degrees, shift_mm
from glioma_nas.images import Affine
from glioma_nas.prepared import PreparedCase
from glioma_nas.registration import from_itk, register_rigid, shrunk, to_itk
from glioma_nas.testing.head_phantoms import HEAD_CENTRE_MM, head_grid, make_head, write_raw_patient

# 8 mm and 6 degrees, about two axes at a time.
MOTIONS = [
    rotation_about(HEAD_CENTRE_MM, (6.0, 0.0, 0.0), (4.62, 4.62, 4.62)),
    rotation_about(HEAD_CENTRE_MM, (0.0, -4.243, 4.243), (0.0, -8.0, 0.0)),
]


def brain_points() -> np.ndarray:
    places = np.meshgrid((-60, -20, 20, 60), (-85, -40, 5, 50), (-30, 5, 40, 75), indexing="ij")
    return np.stack([*(axis.ravel() for axis in places), np.ones(64)])


def error_mm(found: Affine, true: Affine) -> np.ndarray:
    points = brain_points()
    return np.linalg.norm(((found - true) @ points)[:3], axis=0)


def test_motions_of_these_tests_are_eight_millimetres_and_six_degrees() -> None:
    for motion in MOTIONS:
        assert rotation_degrees(motion) == pytest.approx(6, abs=0.02)
        assert shift_mm(motion, HEAD_CENTRE_MM) == pytest.approx(8, abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(("sequence", "motion"), zip(("flair", "t2"), MOTIONS, strict=True))
def test_registration_finds_a_known_motion_to_a_millimetre(sequence: str, motion: Affine) -> None:
    affine, shape = head_grid((1.0, 1.0, 5.0))
    fixed = make_head("t1ce", affine=affine, shape=shape)
    moving = make_head(sequence, affine=affine, shape=shape, motion=motion)
    found = register_rigid(fixed.data, fixed.affine, moving.data, moving.affine)
    assert error_mm(IDENTITY, motion).mean() > 5
    assert error_mm(found.motion, motion).mean() <= 1.0
    assert found.information > found.information_before
    np.testing.assert_allclose(found.motion[:3, :3] @ found.motion[:3, :3].T, np.eye(3), atol=1e-9)


@pytest.mark.slow
def test_registration_between_an_axial_and_an_oblique_sagittal_scan_is_the_same_twice() -> None:
    affine, shape = head_grid((1.0, 1.0, 5.0))
    other_affine, other_shape = head_grid((5.5, 0.9, 0.9), oblique_degrees=(5.0, -8.0, 4.0))
    fixed = make_head("t1ce", affine=affine, shape=shape)
    moving = make_head("t2", affine=other_affine, shape=other_shape, motion=MOTIONS[0])
    found = [register_rigid(fixed.data, fixed.affine, moving.data, moving.affine) for _ in range(2)]
    assert error_mm(found[0].motion, MOTIONS[0]).mean() <= 1.0
    np.testing.assert_array_equal(found[0].motion, found[1].motion)


def ball(affine: Affine) -> np.ndarray:
    places = np.indices((32, 32, 24)).reshape(3, -1)
    mm = (affine[:3, :3] @ places + affine[:3, 3:]).T
    radius = np.linalg.norm(mm * [1.0, 0.8, 1.2], axis=1)
    bright = np.linalg.norm(mm - [12.0, 8.0, 0.0], axis=1) < 16
    return ((radius < 45) * (100 + 20 * np.sin(mm[:, 0] / 8)) + bright * 60).reshape(32, 32, 24).astype(np.float32)


def test_registration_begins_elsewhere_when_headers_place_the_scans_far_apart() -> None:
    affine = np.diag([4.0, 4.0, 4.0, 1.0])
    affine[:3, 3] = (-62, -62, -46)
    far = affine.copy()
    far[0, 3] += 500
    head = ball(affine)
    found = register_rigid(head, affine, head, far)
    assert found.information_before == 0 and found.improved
    np.testing.assert_allclose((found.motion @ [0, 0, 0, 1])[:3], [500, 0, 0], atol=1)


def test_itk_images_keep_place_and_voxels_of_oblique_volumes() -> None:
    affine, _ = head_grid((1.0, 2.0, 5.0), oblique_degrees=(10.0, 20.0, -30.0))
    data = np.random.default_rng(0).normal(size=(4, 5, 6)).astype(np.float32)
    image = to_itk(data, affine)
    np.testing.assert_array_equal(from_itk(image), data)
    lps = np.array(image.TransformIndexToPhysicalPoint((3, 1, 2)))
    np.testing.assert_allclose(lps * [-1, -1, 1], (affine @ [3, 1, 2, 1])[:3], atol=1e-9)


@pytest.mark.parametrize("sides", [(1.0, 1.0, 5.0), (-1.56, -1.56, 6.4), (1.5, -0.9, 1.0)])
@pytest.mark.parametrize("degrees", [(0.0, 0.0, 0.0), (3.1, -4.7, 6.3)])
def test_coarser_images_stay_where_they_were(sides: tuple[float, float, float], degrees: tuple[float, ...]) -> None:
    # Brightness says the place: x + 2 y + 3 z in millimetres. Voxels must say the place where their image has them.
    turn = rotation_about(np.zeros(3), degrees, (0.3, 11.7, -5.2))
    affine = turn @ np.diag([*sides, 1.0])
    places = np.stack([*np.indices((48, 50, 40)), np.ones((48, 50, 40))])
    slope = np.array([1.0, 2.0, 3.0])
    data = np.einsum("r,rxyz->xyz", slope @ affine[:3], places).astype(np.float32)
    for level_mm in (2.0, 3.0, 6.0):
        image = shrunk(to_itk(data, affine), level_mm)
        size = image.GetSize()
        # Smoothing bends the ramp towards the edges of the image.
        for index in ([n // 2 for n in size], [n // 2 - 1 for n in size]):
            lps = np.array(image.TransformIndexToPhysicalPoint(index))
            assert image[index] == pytest.approx(slope @ (lps * [-1, -1, 1]), abs=0.2)


@pytest.mark.slow
def test_mask_moves_with_the_sequence_it_was_drawn_on_and_returns_to_every_scan(tmp_path: Path) -> None:
    affine, shape = head_grid((2.0, 2.0, 5.0))
    motions = {"flair": MOTIONS[0]}
    paths = write_raw_patient(tmp_path / "raw", spacing_mm=(2.0, 2.0, 5.0), motions=motions, mask_on="flair")
    config = PreprocessConfig(
        steps=("register", "orient", "zscore", "crop_pad", "resize"),
        crop_size_px=128,
        image_size_px=128,
        mask_sequence="flair",
    )
    mask = paths["mask"]
    images = {name: paths[name] for name in ("t1ce", "flair")}
    prepare_case(Case("A", "A", images, mask), tmp_path / "out", Recipe(("flair", "t1ce"), config, (1,)))
    case = PreparedCase.load(tmp_path / "out")
    assert (case.step_sequence, case.native_sequence) == ("t1ce", "flair")
    truth = {
        name: make_head(name, affine=affine, shape=shape, motion=motions.get(name, IDENTITY)).tumour
        for name in ("t1ce", "flair")
    }
    prepared = case.mask()
    assert prepared is not None
    for name, tumour in truth.items():
        back = case.to_native(prepared.astype(np.float32), name) >= 0.5
        assert back.shape == tumour.shape
        assert 2 * (back & tumour).sum() / (back.sum() + tumour.sum()) > 0.93
    np.testing.assert_array_equal(case.native_mask(), truth["flair"])
    own = case.quality["sequences"]["flair"]
    assert own["shift_mm"] == pytest.approx(8, abs=1)
    assert own["rotation_degrees"] == pytest.approx(6, abs=1)
    assert own["overlap"] > own["overlap_before"]
