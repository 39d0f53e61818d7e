"""Synthetic scans: shaped like MRI, with the tumour's parts as bright as in real patients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import nibabel as nib
import numpy as np
import pytest

from glioma_nas.synthetic.anatomy import Head
from glioma_nas.synthetic.measurement import Z_RANGES, part_z, z_scores
from glioma_nas.synthetic.patients import SyntheticPatient, draw_patient
from glioma_nas.synthetic.scanner import Grid, draw_motion, slice_thickly
from glioma_nas.synthetic.scans import PatientScans, draw_scans
from glioma_nas.synthetic.tumours import TumourPlan

pytestmark = pytest.mark.slow

PEOPLE = [draw_patient(number, 0) for number in range(1, 200)]


def first(rule: Callable[[SyntheticPatient], bool]) -> SyntheticPatient:
    return next(patient for patient in PEOPLE if rule(patient))


RING = first(lambda p: p.enhancement == "ring" and p.lobe == "frontal" and not p.is_mutant)
PLAIN = first(lambda p: p.enhancement == "none" and p.is_mutant and not p.t2_flair_mismatch)
MISMATCH = first(lambda p: p.t2_flair_mismatch)


@cache
def scans_of(patient: SyntheticPatient, *, size_px: int = 64, raw: bool = False) -> PatientScans:
    # Tests share scans, because drawing one takes a second.
    return draw_scans(patient, 0, size_px=size_px, raw=raw)


def mean_z(scans: PatientScans, name: str, label: int) -> float:
    return float(z_scores(scans)[name][scans.mask == label].mean())


def test_scan_looks_like_a_scan() -> None:
    scans = scans_of(RING)
    assert set(scans.scans) == {"t1", "t1ce", "t2", "flair"}
    grid = scans.scans["flair"].grid
    assert grid.shape[:2] == (64, 64)
    assert 5 <= grid.spacing_mm[2] <= 6.5
    assert nib.aff2axcodes(grid.affine) == ("L", "P", "S")
    # An adult brain has 1 to 1.9 litres.
    assert 1e6 < scans.brain.sum() * np.prod(grid.spacing_mm) < 1.9e6
    assert not scans.brain[0].any()
    assert not scans.brain[:, 0].any()
    for scan in scans.scans.values():
        assert scan.data.dtype == np.int16
        np.testing.assert_array_equal(scan.data > 0, scans.brain > 0)
        np.testing.assert_array_equal(scan.grid.affine, grid.affine)
    assert set(np.unique(scans.mask)) <= {0, 1, 2, 4}
    assert not scans.mask[scans.brain == 0].any()


def test_healthy_tissue_has_the_order_of_brightness_of_each_sequence() -> None:
    head = Head.draw(np.random.default_rng(0))
    grid = Grid.draw(48, 4.25, 24, 5.6, np.random.default_rng(0))
    tissue = head.tissue(grid.fine_axes)
    np.testing.assert_allclose(tissue.wm + tissue.gm + tissue.csf, tissue.brain, atol=1e-4)
    total = tissue.brain.sum()
    # Segmentations of healthy adults find 35 to 50 % grey, 30 to 45 % white matter.
    assert 0.35 < tissue.gm.sum() / total < 0.55
    assert 0.25 < tissue.wm.sum() / total < 0.45


def test_ring_is_bright_with_contrast_around_dark_necrosis() -> None:
    scans = scans_of(RING)
    assert mean_z(scans, "t1ce", 4) > 1.3
    assert mean_z(scans, "t1ce", 4) - mean_z(scans, "t1", 4) > 1.5
    assert mean_z(scans, "t1", 1) < 0
    assert mean_z(scans, "flair", 2) > 1.3
    assert scans.truth["volume_ml"]["4"] > 1


def test_tumour_without_enhancement_shows_none() -> None:
    scans = scans_of(PLAIN)
    assert (scans.mask == 4).sum() == 0
    assert abs(mean_z(scans, "t1ce", 1) - mean_z(scans, "t1", 1)) < 0.6
    assert mean_z(scans, "flair", 1) > 0.8


def test_mismatch_is_bright_on_t2_and_dark_on_flair_within_a_bright_rim() -> None:
    scans = scans_of(MISMATCH)
    assert mean_z(scans, "t2", 1) > 1.8
    assert mean_z(scans, "flair", 1) < 1
    assert mean_z(scans, "flair", 2) > mean_z(scans, "flair", 1) + 1


def test_parts_of_the_tumour_are_as_bright_as_in_real_patients() -> None:
    parts = [part_z(scans_of(patient)) for patient in PEOPLE[:20]]
    for key, (low, high) in Z_RANGES.items():
        values = [part[key] for part in parts if key in part]
        assert len(values) >= 10, key
        assert low <= min(values) <= max(values) <= high, (key, sorted(values))


def test_only_what_images_show_leaves_a_trace_in_them() -> None:
    stranger = replace(
        RING, age_years=19.0, sex="M" if RING.sex == "F" else "F", mgmt="unknown", tertp="unknown", cdkn2a="unknown"
    )
    for name, scan in scans_of(RING, size_px=40).scans.items():
        np.testing.assert_array_equal(draw_scans(stranger, 0, size_px=40).scans[name].data, scan.data)


def test_another_size_shows_the_same_person() -> None:
    coarse, fine = scans_of(RING, size_px=40), scans_of(RING)
    total, same = (sum(scans.truth["volume_ml"].values()) for scans in (coarse, fine))
    assert total == pytest.approx(same, rel=0.15)


def test_ki67_roughens_the_core_weakly() -> None:
    def texture(ki67: float, number: int) -> float:
        patient = replace(RING, ki67_percent=ki67)
        return TumourPlan.draw(patient, np.random.default_rng(number)).texture

    low, high = ([texture(value, number) for number in range(200)] for value in (12.0, 50.0))
    # Two deviations apart in Ki67, but the spread within one value is about as large.
    assert 1.2 < np.median(high) / np.median(low) < 2.2
    assert np.mean(np.array(high[:100]) > np.array(low[100:])) < 0.95


def test_mass_effect_shifts_the_midline_without_changing_the_skull() -> None:
    head = Head.draw(np.random.default_rng(4))
    axes = Grid.draw(48, 4.25, 24, 5.6, np.random.default_rng(0)).fine_axes
    shape = tuple(len(axis) for axis in axes)
    still = head.tissue(axes)
    push = tuple(np.where(still.brain > 0.5, 4.0 if k == 0 else 0.0, 0).astype(np.float32) for k in range(3))
    assert push[0].shape == shape
    moved = head.tissue(axes, (push[0], push[1], push[2]))
    # Axes run towards the left, so what moves by 4 mm to the right moves to lower indices.
    middle = tuple(slice(side // 2 - 8, side // 2 + 8) for side in shape)
    places = np.arange(shape[0]).reshape(-1, 1, 1)[middle[0]]
    before, after = ((places * t.csf[middle]).sum() / t.csf[middle].sum() for t in (still, moved))
    assert after < before - 0.1


def test_raw_scans_are_whole_heads_on_grids_of_their_own() -> None:
    scans = scans_of(RING, raw=True)
    assert scans.reference == "t1ce"
    reference = scans.scans["t1ce"]
    assert scans.mask.shape == reference.data.shape
    assert scans.truth["motion"]["t1ce"] == np.eye(4).tolist()
    affines = {name: scan.grid.affine.round(3).tobytes() for name, scan in scans.scans.items()}
    assert len(set(affines.values())) == 4
    for name, scan in scans.scans.items():
        assert 5 <= scan.grid.spacing_mm[2] <= 6.5
        motion = np.array(scans.truth["motion"][name])
        assert np.abs(motion[:3, 3]).max() <= 4
        np.testing.assert_allclose(motion[:3, :3] @ motion[:3, :3].T, np.eye(3), atol=1e-5)
    # Fat outside the brain is what a skull stripper has to take away.
    assert (reference.data[scans.brain == 0] > reference.data[scans.brain > 0].mean()).sum() > 1000


def test_without_contrast_the_raw_mask_goes_with_flair() -> None:
    scans = draw_scans(RING, 0, size_px=40, raw=True, missing=("t1ce",))
    assert set(scans.scans) == {"t1", "t2", "flair"}
    assert scans.reference == "flair"
    assert scans.mask.shape == scans.scans["flair"].data.shape


def test_thick_slices_hold_a_landmark_where_the_transform_puts_it() -> None:
    generator = np.random.default_rng(3)
    grid = Grid.draw(60, 3.0, 20, 6.0, generator)
    axis = np.arange(-90, 91, 2.0)
    axes = (axis, axis, axis)
    landmark = np.array([20.0, -14.0, 8.0])
    squared = sum((a - c) ** 2 for a, c in zip(np.meshgrid(*axes, indexing="ij", sparse=True), landmark, strict=True))
    fine = np.exp(-squared / (2 * 6.0**2)).astype(np.float32)
    lie = draw_motion(4, 6, generator) @ grid.head_to_scanner
    image = slice_thickly(fine, axes, grid, lie)
    weights = np.where(image > 0.05, image, 0)
    found = np.array(
        [
            (np.arange(n).reshape(s) * weights).sum()
            for n, s in zip(image.shape, ((-1, 1, 1), (1, -1, 1), (1, 1, -1)), strict=True)
        ]
    )
    found = grid.affine @ [*(found / weights.sum()), 1]
    np.testing.assert_allclose(found, lie @ [*landmark, 1], atol=0.25)
