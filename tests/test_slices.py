"""The slice data set, its sampler and its augmentation."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from glioma_nas.case_preparation import Recipe, prepare_case
from glioma_nas.cohort import Case, read_cohort
from glioma_nas.config import CohortConfig, PreprocessConfig
from glioma_nas.errors import CohortError
from glioma_nas.prepared import PreparedCase
from glioma_nas.slices import Draw, EpochSampler, SliceDataset, Variation
from glioma_nas.testing.phantoms import write_phantom_cohort

RECIPE = Recipe(("t1ce", "flair", "t1"), PreprocessConfig(crop_size_px=48, image_size_px=48), (1,))
STILL = Variation(0.0, 1.0, (0.0, 0.0), False, (1.0, 1.0), (0.0, 0.0), 0.0, 0)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[PreparedCase]:
    folder = tmp_path_factory.mktemp("slices")
    sheet = write_phantom_cohort(folder, 4, 0)
    prepared = []
    for case in read_cohort(CohortConfig(sheet=sheet)).cases:
        prepare_case(case, folder / "out" / case.case_id, RECIPE)
        prepared.append(PreparedCase.load(folder / "out" / case.case_id))
    return prepared


def dataset(cases: list[PreparedCase], *, augment: bool = False, seed: int = 0) -> SliceDataset:
    return SliceDataset(cases, ("flair", "t1ce"), augment=augment, seed=seed)


def test_items_are_the_prepared_slices_in_the_channel_order_asked_for(cases: list[PreparedCase]) -> None:
    data = dataset(cases)
    assert len(data) == 4 * 6
    item = data[6 + 3]
    assert (item["case"], item["slice"]) == ("P002", 3)
    assert item["image"].dtype == torch.float32
    assert item["mask"].dtype == torch.int64
    np.testing.assert_array_equal(item["image"], cases[1].images()[3, [1, 0]])
    np.testing.assert_array_equal(item["mask"], cases[1].mask()[3])  # type: ignore[index] - phantoms have masks


def test_items_can_be_changed_without_changing_the_file(cases: list[PreparedCase]) -> None:
    data = dataset(cases)
    data[3]["image"].zero_()
    assert data[3]["image"].any()


def test_indices_tell_tumour_from_background(cases: list[PreparedCase]) -> None:
    data = dataset(cases)
    assert all(data[index]["mask"].sum() >= 10 for index in data.tumour_indices)
    assert all(data[index]["mask"].sum() < 10 and data[index]["image"].any() for index in data.background_indices)
    assert not set(data.tumour_indices) & set(data.background_indices)


def test_dataset_leaves_cases_without_mask_out(cases: list[PreparedCase], tmp_path: Path) -> None:
    images = {"t1ce": write_phantom_cohort(tmp_path / "cohort", 1, 0).parent / "P001" / "t1ce.nii.gz"}
    prepare_case(Case("X", "X", images), tmp_path / "X", RECIPE)
    without = PreparedCase.load(tmp_path / "X")
    assert len(dataset([*cases, without])) == len(dataset(cases))
    with pytest.raises(CohortError, match="none of 1 cases has a mask"):
        dataset([without])


def test_sampler_draws_the_share_of_tumour_slices_asked_for(cases: list[PreparedCase]) -> None:
    data = dataset(cases)
    draws = list(EpochSampler(data, length=40, tumour_fraction=0.7, seed=0))
    assert len(draws) == 40
    assert sum(draw.index in data.tumour_indices for draw in draws) == 28
    assert sum(draw.index in data.background_indices for draw in draws) == 12
    assert [draw.position for draw in draws] == list(range(40))
    # 28 draws of fewer tumour slices: every one comes before any comes once more than another.
    counts = [sum(draw.index == index for draw in draws) for index in data.tumour_indices]
    assert max(counts) - min(counts) <= 1


def test_sampler_without_length_takes_every_slice_once(cases: list[PreparedCase]) -> None:
    data = dataset(cases)
    sampler = EpochSampler(data, length=None, tumour_fraction=0.7, seed=0)
    indices = [draw.index for draw in sampler]
    assert len(sampler) == len(data)
    assert sorted(indices) == list(range(len(data))) != indices


def test_sampler_depends_on_seed_and_epoch_only(cases: list[PreparedCase]) -> None:
    data = dataset(cases)
    sampler = EpochSampler(data, length=20, tumour_fraction=0.5, seed=4)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert [draw.index for draw in first] != [draw.index for draw in second]
    resumed = EpochSampler(data, length=20, tumour_fraction=0.5, seed=4)
    resumed.set_epoch(1)
    assert list(resumed) == second
    assert [draw.index for draw in EpochSampler(data, length=20, tumour_fraction=0.5, seed=5)] != [
        d.index for d in first
    ]


def test_sampler_refuses_a_share_of_nothing(cases: list[PreparedCase]) -> None:
    data = dataset(cases)
    data.tumour_indices = ()
    with pytest.raises(CohortError, match="none of 24 slices shows tumour"):
        EpochSampler(data, length=8, tumour_fraction=0.7, seed=0)
    assert len(list(EpochSampler(data, length=8, tumour_fraction=0.0, seed=0))) == 8


def test_augmentation_depends_on_seed_epoch_and_position(cases: list[PreparedCase]) -> None:
    data = dataset(cases, augment=True)
    reference = data[Draw(3, 5, 7)]["image"]
    assert torch.equal(reference, dataset(cases, augment=True)[Draw(3, 5, 7)]["image"])
    for draw, seed in ((Draw(3, 6, 7), 0), (Draw(3, 5, 8), 0), (Draw(3, 5, 7), 1)):
        assert not torch.equal(reference, dataset(cases, augment=True, seed=seed)[draw]["image"])


@pytest.mark.slow
def test_batches_are_the_same_with_any_number_of_loader_workers(cases: list[PreparedCase]) -> None:
    batches = []
    for workers in (0, 2):
        sampler = EpochSampler(dataset(cases), length=16, tumour_fraction=0.5, seed=0)
        sampler.set_epoch(3)
        loader = DataLoader(
            dataset(cases, augment=True),
            batch_size=4,
            sampler=sampler,
            num_workers=workers,
            multiprocessing_context="spawn" if workers else None,
        )
        batches.append(list(loader))
    for alone, parallel in zip(*batches, strict=True):
        assert torch.equal(alone["image"], parallel["image"])
        assert torch.equal(alone["mask"], parallel["mask"])
        assert alone["case"] == parallel["case"]


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
    varied, _ = vary(gain=(2.0, 1.0), offset=(0.5, -1.0), noise=0.1, noise_seed=3).apply(image, mask)
    assert not varied[:, :4].any()
    assert varied[0, 8:14, 20:30].mean() == pytest.approx(2 * 2 + 0.5, abs=0.05)
    assert varied[1, 8:14, 20:30].mean() == pytest.approx(1.0, abs=0.05)
    assert varied[0, 20:30, 8:30].std() == pytest.approx(0.1, rel=0.15)


def test_variation_keeps_a_missing_sequence_at_zero() -> None:
    image, mask = square()
    image[1] = 0
    varied, _ = vary(offset=(0.3, 0.3), noise=0.1).apply(image, mask)
    assert not varied[1].any()


def test_variation_draws_stay_in_range() -> None:
    for number in range(200):
        variation = Variation.draw(np.random.default_rng(number), n_channels=2)
        assert abs(variation.rotation_degrees) <= 15
        assert 0.9 <= variation.scale <= 1.1
        assert max(map(abs, variation.shift)) <= 0.05
        assert len(variation.gain) == len(variation.offset) == 2
    flips = [Variation.draw(np.random.default_rng(number), n_channels=1).flip for number in range(200)]
    assert 70 < sum(flips) < 130


def test_variation_is_fast() -> None:
    image, mask = torch.randn(3, 112, 112), torch.zeros(112, 112, dtype=torch.int64)
    times = []
    for number in range(20):
        started = time.perf_counter()
        Variation.draw(np.random.default_rng(number), n_channels=3).apply(image, mask)
        times.append(time.perf_counter() - started)
    assert np.median(times) < 0.02
