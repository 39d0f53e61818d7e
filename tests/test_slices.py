"""The slice data set, its sampler and its augmentation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from glioma_nas.case_preparation import Recipe, prepare_case
from glioma_nas.cohort import Case, read_cohort
from glioma_nas.config import AugmentationConfig, CohortConfig, PreprocessConfig
from glioma_nas.errors import CohortError
from glioma_nas.prepared import PreparedCase
from glioma_nas.slices import Draw, EpochSampler, SliceDataset
from glioma_nas.testing.phantoms import write_nifti, write_phantom_cohort

RECIPE = Recipe(("t1ce", "flair", "t1"), PreprocessConfig(crop_size_px=48, image_size_px=48), (1,))


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


def prepared(case: Case, folder: Path, recipe: Recipe) -> PreparedCase:
    prepare_case(case, folder, recipe)
    return PreparedCase.load(folder)


@pytest.mark.parametrize(("rule", "expected"), [("all", 6), ("brain", 4), ("tumour", 3)])
def test_slices_are_chosen_for_training_by_area_and_all_are_scored(tmp_path: Path, rule: str, expected: int) -> None:
    image = np.zeros((40, 40, 6), np.int16)
    image[8:32, 8:32, 1:5] = np.random.default_rng(0).integers(50, 90, (24, 24, 4))
    mask = np.zeros(image.shape, np.uint8)
    mask[10:20, 10:20, 2:5] = 1
    paths = [write_nifti(tmp_path / f"{name}.nii.gz", data) for name, data in (("flair", image), ("mask", mask))]
    config = PreprocessConfig(crop_size_px=48, image_size_px=48, training_slices=rule)
    case = prepared(Case("A", "A", {"flair": paths[0]}, paths[1]), tmp_path / "out", Recipe(("flair",), config, (1,)))
    data = SliceDataset([case], ("flair",), augment=True, seed=0)
    drawn = {draw.index for draw in EpochSampler(data, length=None, tumour_fraction=0.5, seed=0)}
    assert len(drawn) == expected
    assert set(data.tumour_indices) <= drawn
    assert len(data) == case.n_slices == 6
    balanced = EpochSampler(data, length=20, tumour_fraction=0.5, seed=0)
    assert {draw.index for draw in balanced} <= drawn


def test_indicator_channels_follow_the_sequences(tmp_path: Path) -> None:
    sheet = write_phantom_cohort(tmp_path, 1, 0)
    (case,) = read_cohort(CohortConfig(sheet=sheet)).cases
    recipe = Recipe(("t1ce", "flair"), RECIPE.preprocess, (1,), indicated=("t1ce", "flair"))
    channels = recipe.channels
    assert channels == ("t1ce", "flair", "t1ce_is_present", "flair_is_present")
    whole = prepared(case, tmp_path / "whole", recipe)
    images = {"flair": case.images["flair"]}
    lacking = prepared(replace(case, images=images), tmp_path / "lacking", recipe)
    assert (whole.sequences, lacking.present) == (channels, ("flair",))
    np.testing.assert_array_equal(whole.images()[:, 2], (whole.images()[:, :2] != 0).any(axis=1))
    assert not lacking.images()[:, [0, 2]].any()
    for item, n_present in ((whole, 2), (lacking, 1)):
        data = SliceDataset([item], channels, augment=True, seed=0)
        for position in range(6):
            image = data[Draw(3, 0, position)]["image"]
            present = [bool(image[channel].any()) for channel in range(4)]
            assert present[:2] == present[2:]
            assert sum(present[:2]) == n_present
            assert set(image[2:].unique().tolist()) <= {0.0, 1.0}


def test_dropped_sequences_are_fed_as_missing_and_one_always_stays(tmp_path: Path) -> None:
    sheet = write_phantom_cohort(tmp_path, 1, 0)
    (case,) = read_cohort(CohortConfig(sheet=sheet)).cases
    recipe = Recipe(("t1ce", "flair"), RECIPE.preprocess, (1,), indicated=("t1ce", "flair"))
    whole = prepared(case, tmp_path / "whole", recipe)
    config = AugmentationConfig(sequence_dropout=0.5)
    data = SliceDataset([whole], recipe.channels, augment=True, augmentation=config, seed=0)
    seen = []
    for position in range(60):
        image = data[Draw(3, 0, position)]["image"]
        present = tuple(bool(image[channel].any()) for channel in range(4))
        assert present[:2] == present[2:]
        seen.append(present[:2])
    # Both stay in 1/4 of the draws, one in the rest; never none.
    assert set(seen) == {(True, True), (True, False), (False, True)}
    assert 5 <= seen.count((True, True)) <= 28
