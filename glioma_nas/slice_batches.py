"""Batches of augmented slices, the classes balanced, for training marker classifiers.

What moves pixels is MONAI's; what is drawn, is drawn before from a generator of the sample's own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from glioma_nas.augmentation import plain_tensors
from glioma_nas.markers import MarkerCase
from glioma_nas.seeding import derive_seed

MAX_ROTATION_DEGREES = 15.0
MAX_SHIFT = 0.05
MAX_GAIN = 0.1


class MarkerSlices(Dataset[dict[str, Tensor]]):
    """Augmented slices; an item is asked for as (case index, slice index, seed of the augmentation)."""

    def __init__(self, cases: Sequence[MarkerCase], metadata: NDArray[np.float32]) -> None:
        self.cases = cases
        self._metadata = metadata

    def __getitem__(self, draw: tuple[int, int, int]) -> dict[str, Tensor]:
        """Return image float32 (C, H, W), mask float32 (1, H, W), metadata float32 (2,) and target float32 ()."""
        index, slice_index, seed = draw
        case = self.cases[index]
        image = torch.from_numpy(np.array(case.images[slice_index], dtype=np.float32))
        mask = torch.from_numpy(np.array(case.mask[slice_index], dtype=np.float32))[None]
        image, mask = augment(image, mask, torch.Generator().manual_seed(seed))
        return {
            "image": image,
            "mask": mask,
            "metadata": torch.from_numpy(self._metadata[index]),
            "target": torch.tensor(float(case.label or 0)),
        }


def augment(image: Tensor, mask: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mirror, rotate and shift image and mask alike, and change the gain of each channel.

    Args:
        image: (C, H, W), float32.
        mask: (1, H, W), float32, 0 or 1.
        generator: Source of all parameters, which are drawn first.

    Returns:
        Image and mask of the same shapes; the mask holds 0 and 1 only.
    """
    from monai.transforms import AffineGrid, Resample

    mirrored, angle, shift_x, shift_y = torch.rand(4, generator=generator).tolist()
    gain = 1.0 + MAX_GAIN * (2 * torch.rand(image.shape[0], 1, 1, generator=generator) - 1)
    angle = math.radians(MAX_ROTATION_DEGREES) * (2 * angle - 1)
    sign = -1.0 if mirrored < 0.5 else 1.0
    cosine, sine = math.cos(angle), math.sin(angle)
    height, width = image.shape[1:]
    # Rows give the place in the old slice, down and to the right of its middle, for each place in the new one.
    place = [
        [cosine, sign * sine, height * MAX_SHIFT * (2 * shift_y - 1)],
        [-sine, sign * cosine, width * MAX_SHIFT * (2 * shift_x - 1)],
        [0.0, 0.0, 1.0],
    ]
    stack = torch.cat([image * gain, mask])
    with plain_tensors():
        grid, _ = AffineGrid(affine=torch.tensor(place))(spatial_size=(height, width))
        moved = Resample(mode="bilinear", padding_mode="border", dtype=np.float32)(stack, grid)
    return moved[:-1], (moved[-1:] >= 0.5).float()


class BalancedSampler(Sampler[tuple[int, int, int]]):
    """Draw positives and negatives in turn: a class's patient, one of its cases, some of its slices, all uniformly.

    What is drawn depends on (seed, epoch) only, so an epoch that is done again after an interruption is the same.

    Args:
        cases: Labelled cases of both classes.
        length: Slices of an epoch.
        seed: Seed of the draws.
        bag: Slices in a row that come from the same case, drawn with replacement; divides ``length``.
    """

    def __init__(self, cases: Sequence[MarkerCase], *, length: int, seed: int, bag: int = 1) -> None:
        assert length % bag == 0, f"{length} slices are no whole number of bags of {bag}"
        self._bag = bag
        self._length = length
        self._seed = seed
        self._epoch = 0
        self._patients: dict[int, dict[str, list[int]]] = {0: {}, 1: {}}
        for index, case in enumerate(cases):
            self._patients[int(case.label or 0)].setdefault(case.patient_id, []).append(index)
        self._n_slices = [len(case.images) for case in cases]

    def set_epoch(self, epoch: int) -> None:
        """Choose the draws of ``epoch``; Lightning calls this before each epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        generator = np.random.default_rng(derive_seed(self._seed, "draws", self._epoch))
        patients = {label: list(groups.values()) for label, groups in self._patients.items()}
        for position in range(self._length // self._bag):
            groups = patients[position % 2]
            group = groups[int(generator.integers(len(groups)))]
            index = group[int(generator.integers(len(group)))]
            for _ in range(self._bag):
                yield index, int(generator.integers(self._n_slices[index])), int(generator.integers(2**62))
