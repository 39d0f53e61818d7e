"""What augmentation does to a slice, by hand-computed values."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from glioma_nas.augmentation import Variation
from glioma_nas.config import AugmentationConfig

STILL = Variation(0.0, 1.0, (0.0, 0.0), False, (1.0, 1.0), (0.0, 0.0), 0.0, 0)


def square() -> tuple[torch.Tensor, torch.Tensor]:
    image = torch.zeros(2, 40, 40)
    image[:, 4:36, 4:36] = 0.5
    image[:, 8:14, 20:30] = 2.0
    mask = torch.zeros(40, 40, dtype=torch.int64)
    mask[8:14, 20:30] = 1
    return image, mask


def vary(**changes: object) -> Variation:
    return Variation(**{**STILL.__dict__, **changes})  # type: ignore[arg-type] - values are given by the tests below


def test_variation_of_nothing_changes_nothing() -> None:
    image, mask = square()
    varied, moved = STILL.apply(image, mask)
    torch.testing.assert_close(varied, image, atol=1e-5, rtol=0)
    assert torch.equal(moved, mask)


def test_variation_flips_left_and_right_only() -> None:
    image, mask = square()
    varied, moved = vary(flip=True).apply(image, mask)
    torch.testing.assert_close(varied, image.flip(-1), atol=1e-5, rtol=0)
    assert torch.equal(moved, mask.flip(-1))


def test_variation_moves_image_and_mask_together() -> None:
    image, mask = square()
    _, moved = vary(shift=(0.05, 0.0)).apply(image, mask)
    # Reading 2 pixels (5 % of 40) further right moves the content 2 pixels to the left.
    assert torch.equal(moved, torch.roll(mask, -2, dims=1))
    varied, moved = vary(rotation_degrees=12.0, scale=1.1).apply(image, mask)
    assert varied[0][moved == 1].mean() > 1.7
    assert moved.sum() == pytest.approx(int(mask.sum()) * 1.1**2, rel=0.1)


def test_variation_rotates_by_the_angle_given() -> None:
    image = torch.zeros(1, 41, 41)
    mask = torch.zeros(41, 41, dtype=torch.int64)
    mask[20, 20:40] = 1  # a ray from the centre to the right
    _, moved = vary(rotation_degrees=15.0).apply(image, mask)
    y, x = torch.nonzero(moved, as_tuple=True)
    angle = torch.rad2deg(torch.atan2((y - 20.0).sum(), (x - 20.0).sum())).abs()
    assert angle == pytest.approx(15, abs=2)


def test_variation_of_brightness_leaves_the_background_zero() -> None:
    image, mask = square()
    varied, _ = vary(gain=(2.0, 1.0), offset=(0.5, -1.0), noise=0.1, seed=3).apply(image, mask)
    assert not varied[:, :4].any()
    assert varied[0, 8:14, 20:30].mean() == pytest.approx(2 * 2 + 0.5, abs=0.05)
    assert varied[1, 8:14, 20:30].mean() == pytest.approx(1.0, abs=0.05)
    assert varied[0, 20:30, 8:30].std() == pytest.approx(0.1, rel=0.15)


def test_variation_keeps_a_missing_sequence_at_zero() -> None:
    image, mask = square()
    image[1] = 0
    varied, _ = vary(offset=(0.3, 0.3), noise=0.1).apply(image, mask)
    assert not varied[1].any()


def draw(number: int, **changes: float) -> Variation:
    return Variation.draw(np.random.default_rng(number), AugmentationConfig(**changes), present=[True, True])


def test_variation_draws_stay_in_range() -> None:
    for number in range(200):
        variation = draw(number, elastic_px=3)
        assert abs(variation.rotation_degrees) <= 15
        assert 0.9 <= variation.scale <= 1.1
        assert max(map(abs, variation.shift)) <= 0.05
        assert len(variation.gain) == len(variation.offset) == 2
        assert variation.elastic_px in (0, 3)
        assert variation.bias_field in (0, 0.3)
        assert len(variation.gamma) in (0, 2)
    drawn = [draw(number, elastic_px=3) for number in range(400)]
    for share, happened in (
        (0.5, [item.flip for item in drawn]),
        (0.3, [item.elastic_px > 0 for item in drawn]),
        (0.2, [item.bias_field > 0 for item in drawn]),
        (0.2, [bool(item.gamma) for item in drawn]),
    ):
        assert np.mean(happened) == pytest.approx(share, abs=0.07)
    assert not any(any(item.dropped) for item in drawn)


def test_switching_a_part_off_leaves_the_others_as_they_were() -> None:
    for number in range(20):
        first, second = draw(number), draw(number, rotation_degrees=0, gamma_probability=0, noise=0)
        assert (second.rotation_degrees, second.gamma, second.noise) == (0, (), 0)
        assert (first.shift, first.flip, first.gain, first.bias_field) == (
            second.shift,
            second.flip,
            second.gain,
            second.bias_field,
        )


def test_nothing_is_varied_when_every_part_is_off() -> None:
    off = dict.fromkeys(AugmentationConfig.model_fields, 0.0)
    image, mask = square()
    varied, moved = draw(5, **off).apply(image, mask)
    torch.testing.assert_close(varied, image, atol=1e-5, rtol=0)
    assert torch.equal(moved, mask)


def test_present_sequence_stays_when_the_other_is_missing_already() -> None:
    config = AugmentationConfig(sequence_dropout=0.9)
    for number in range(50):
        variation = Variation.draw(np.random.default_rng(number), config, present=[False, True])
        assert not variation.dropped[1]


def test_bias_field_is_smooth_and_multiplies_what_lies_above_the_darkest_voxel() -> None:
    image, mask = square()
    image[:, 30:34, 30:34] = -1.0
    varied, _ = vary(bias_field=0.5, seed=4).apply(image, mask)
    inside = image[0] != 0
    field = ((varied[0] + 1) / (image[0] + 1))[inside & (image[0] > -1)]
    assert field.min() > 0
    assert field.max() / field.min() > 1.1
    torch.testing.assert_close(varied[0][image[0] == -1], torch.full((16,), -1.0), atol=1e-5, rtol=0)
    assert not varied[:, :4].any()
    # The same coil for every sequence.
    torch.testing.assert_close(varied[0], varied[1])
    columns = varied[0, 16:28, 6:18]
    assert (columns[:, 1:] - columns[:, :-1]).abs().max() < 0.1


def test_gamma_keeps_the_ends_of_the_brightness() -> None:
    image, mask = square()
    image[:, 30:34, 30:34] = -1.0
    varied, _ = vary(gamma=(2.0, 1.0)).apply(image, mask)
    # 0.5 lies half-way between -1 and 2: squared, a quarter of the way.
    assert varied[0, 20, 20] == pytest.approx(-1 + 3 * 0.25, abs=1e-3)
    assert varied[0, 10, 25] == pytest.approx(2, abs=1e-3)
    assert varied[0, 31, 31] == pytest.approx(-1, abs=1e-3)
    torch.testing.assert_close(varied[1], image[1], atol=1e-3, rtol=0)


def test_elastic_deformation_moves_image_and_mask_together() -> None:
    image, mask = square()
    varied, moved = vary(elastic_px=1.5, seed=7).apply(image, mask)
    assert not torch.equal(moved, mask)
    assert varied[0][moved == 1].mean() > 1.7
    again, _ = vary(elastic_px=1.5, seed=7).apply(image, mask)
    assert torch.equal(varied, again)


def test_global_generators_are_left_alone() -> None:
    image, mask = square()
    torch.manual_seed(3)
    np.random.seed(3)
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(3)
    np.random.seed(3)
    draw(1, bias_probability=1, gamma_probability=1, elastic_px=2, elastic_probability=1).apply(image, mask)
    assert (torch.rand(1), np.random.rand()) == expected


def test_rotation_of_a_slice_that_is_not_square_keeps_distances() -> None:
    mask = torch.zeros(60, 100, dtype=torch.int64)
    mask[28:32, 68:72] = 1  # 20 pixels to the right of the centre
    _, moved = vary(rotation_degrees=90.0).apply(torch.zeros(2, 60, 100), mask)
    y, x = (float(axis.double().mean()) for axis in torch.nonzero(moved, as_tuple=True))
    assert (abs(y - 29.5), x) == (pytest.approx(20, abs=0.5), pytest.approx(49.5, abs=0.5))
    assert moved.sum() == 16


def test_parts_of_one_variation_draw_from_seeds_of_their_own() -> None:
    image, mask = square()
    everything = {"elastic_px": 1.5, "bias_field": 0.5, "noise": 0.1}
    for name, value in everything.items():
        alone = vary(seed=7, **{name: value}).apply(image, mask)[0]
        other = vary(seed=8, **{name: value}).apply(image, mask)[0]
        assert not torch.equal(alone, other)
    # Whether the slice is deformed says nothing about its noise.
    still = vary(seed=7, noise=0.1).apply(image, mask)[0]
    bent = vary(seed=7, noise=0.1, elastic_px=1e-6).apply(image, mask)[0]
    torch.testing.assert_close(bent, still, atol=1e-4, rtol=0)


def test_varied_slices_are_plain_tensors() -> None:
    image, mask = square()
    varied, moved = draw(1, bias_probability=1, gamma_probability=1, elastic_px=2, elastic_probability=1).apply(
        image, mask
    )
    assert (type(varied), type(moved)) == (torch.Tensor, torch.Tensor)
    assert (varied.dtype, moved.dtype) == (torch.float32, torch.int64)
