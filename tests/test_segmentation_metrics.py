from __future__ import annotations

import numpy as np
import pytest

from glioma_nas.errors import ConfigError, ImageError
from glioma_nas.segmentation_metrics import dice_coefficient, dice_of_slices, dice_over_cases, hd95_mm


def block(shape, corner, size):
    mask = np.zeros(shape, dtype=np.uint8)
    mask[tuple(slice(start, start + length) for start, length in zip(corner, size, strict=True))] = 1
    return mask


def test_dice_equals_hand_value():
    # 8 and 8 voxels, 4 in common.
    a = block((4, 4, 4), (0, 0, 0), (2, 2, 2))
    b = block((4, 4, 4), (1, 0, 0), (2, 2, 2))
    assert dice_coefficient(a, b) == pytest.approx(0.5)


def test_dice_counts_any_label_as_tumour():
    assert dice_coefficient(np.array([0, 4, 2]), np.array([0, 1, 1])) == 1.0


@pytest.mark.parametrize(("fill_a", "fill_b", "expected"), [(0, 0, 1.0), (0, 1, 0.0), (1, 0, 0.0), (1, 1, 1.0)])
def test_dice_follows_the_empty_mask_rule(fill_a, fill_b, expected):
    assert dice_coefficient(np.full((2, 2), fill_a), np.full((2, 2), fill_b)) == expected


def test_dice_is_refused_when_grids_differ():
    with pytest.raises(ImageError, match=r"shape \(2, 2\), the reference \(2, 3\)"):
        dice_coefficient(np.zeros((2, 2)), np.zeros((2, 3)))


def test_dice_of_slices_leaves_out_slices_empty_in_both():
    prediction, truth = np.zeros((4, 2, 2)), np.zeros((4, 2, 2))
    prediction[0] = truth[0] = 1
    prediction[1, 0, 0] = 1
    assert dice_of_slices(prediction, truth) == pytest.approx((1.0 + 0.0) / 2)
    assert dice_of_slices(np.zeros((3, 2, 2)), np.zeros((3, 2, 2))) == 1.0


def test_dice_over_cases_differs_by_reduction_as_computed_by_hand():
    # Case one: one slice of 4 right, one of 1 missed. Case two: one voxel of two found.
    first_truth, first = np.zeros((2, 2, 2)), np.zeros((2, 2, 2))
    first_truth[0], first[0] = 1, 1
    first_truth[1, 0, 0] = 1
    second_truth, second = np.zeros((1, 2, 2)), np.zeros((1, 2, 2))
    second_truth[0, 0] = 1
    second[0, 0, 0] = 1
    pairs = [(first, first_truth), (second, second_truth)]
    assert dice_over_cases(pairs, reduction="case") == pytest.approx((8 / 9 + 2 / 3) / 2)
    assert dice_over_cases(pairs, reduction="slice") == pytest.approx((1 + 0 + 2 / 3) / 3)
    assert dice_over_cases(pairs, reduction="global") == pytest.approx(2 * 5 / 12)


def test_dice_over_cases_is_refused_when_reduction_is_unknown():
    with pytest.raises(ConfigError, match="did you mean 'slice'"):
        dice_over_cases([], reduction="slices")


def test_dice_over_cases_is_refused_when_there_is_no_case():
    with pytest.raises(ImageError, match="no cases"):
        dice_over_cases([])


@pytest.mark.parametrize(("axis", "expected"), [(0, 3.0), (1, 2.0), (2, 10.0)])
def test_hd95_is_the_shift_in_mm_along_each_axis(axis, expected):
    # A plate one voxel thick across the axis, shifted by two voxels: every surface point is that far away.
    size = [8, 8, 8]
    size[axis] = 1
    corner, moved = [2, 2, 2], [2, 2, 2]
    moved[axis] = 4
    a, b = block((12, 12, 12), corner, size), block((12, 12, 12), moved, size)
    assert hd95_mm(a, b, (1.5, 1.0, 5.0)) == pytest.approx(expected)


def test_hd95_is_zero_when_masks_are_equal():
    mask = block((6, 6, 6), (1, 1, 1), (3, 3, 3))
    assert hd95_mm(mask, mask, (1, 1, 1)) == 0.0


def test_hd95_is_none_when_a_mask_is_empty():
    mask, empty = block((4, 4, 4), (1, 1, 1), (2, 2, 2)), np.zeros((4, 4, 4))
    assert hd95_mm(mask, empty, (1, 1, 1)) is None
    assert hd95_mm(empty, mask, (1, 1, 1)) is None
    assert hd95_mm(empty, empty, (1, 1, 1)) is None


@pytest.mark.parametrize("spacing", [(1.0, 1.0), (1.0, 0.0, 1.0), (1.0, float("nan"), 1.0)])
def test_hd95_is_refused_when_spacing_does_not_fit(spacing):
    with pytest.raises(ImageError, match="one positive size for each of 3 axes"):
        hd95_mm(np.ones((2, 2, 2)), np.ones((2, 2, 2)), spacing)
