"""Axial slices as a torch data set, and a sampler whose draws depend on the seed and the epoch only.

The sampler hands the data set not just an index but the epoch and the position of the draw, from which augmentation
derives its generator. So a run that was killed and resumed sees the very same pixels, with any number of workers.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from glioma_nas.augmentation import Variation
from glioma_nas.config import AugmentationConfig, indicated_by
from glioma_nas.errors import CohortError
from glioma_nas.prepared import PreparedCase
from glioma_nas.seeding import numpy_generator

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Draw:
    """One slice to be read: its index in the data set, and where in training it is drawn."""

    index: int
    epoch: int
    position: int


class SliceItem(TypedDict):
    """One slice: ``image`` (C, H, W) float32, ``mask`` (H, W) int64 0/1, and where it comes from."""

    image: Tensor
    mask: Tensor
    case: str
    slice: int


class SliceDataset(Dataset[SliceItem]):
    """Every axial slice of the cases that have a mask, read from disk when asked for.

    Args:
        cases: Prepared cases; those without a mask have nothing to learn from and are left out.
        sequences: Channels and their order.
        augment: Whether every slice is varied.
        augmentation: How.
        seed: Seed of the augmentation.

    Raises:
        CohortError: No case has a mask, or a sequence was not prepared.
    """

    def __init__(
        self,
        cases: Sequence[PreparedCase],
        sequences: Sequence[str],
        *,
        augment: bool,
        seed: int,
        augmentation: AugmentationConfig | None = None,
    ) -> None:
        self.cases = [case for case in cases if case.has_mask]
        if not self.cases:
            raise CohortError(
                f"none of {len(cases)} cases has a mask, so there is nothing to train on; add masks to the sheet"
            )
        if len(self.cases) < len(cases):
            _logger.info("%d of %d cases have no mask and are not trained on", len(cases) - len(self.cases), len(cases))
        self.sequences = tuple(sequences)
        self.augment = augment
        self.augmentation = augmentation or AugmentationConfig()
        self._images = [index for index, name in enumerate(self.sequences) if indicated_by(name) is None]
        self._indicators = {
            index: self.sequences.index(shown)
            for index, name in enumerate(self.sequences)
            if (shown := indicated_by(name)) is not None
        }
        self.seed = seed
        self._channels = [list(case.channels(self.sequences)) for case in self.cases]
        self._places = [(number, index) for number, case in enumerate(self.cases) for index in range(case.n_slices)]
        tumour = {(number, index) for number, case in enumerate(self.cases) for index in case.tumour_slices}
        trained = {(number, index) for number, case in enumerate(self.cases) for index in case.training_slices}
        self.training_indices = tuple(i for i, place in enumerate(self._places) if place in trained)
        """Indices of the slices that may be trained on, see ``preprocess.training_slices``."""
        self.tumour_indices = tuple(i for i, place in enumerate(self._places) if place in tumour)
        """Indices of the slices that show tumour."""
        self.background_indices = tuple(
            i
            for i, place in enumerate(self._places)
            if place in trained and place not in tumour and self.cases[place[0]].brain_px[place[1]] > 0
        )
        """Indices of the slices that show brain but no tumour, and may be trained on."""

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, item: int | Draw) -> SliceItem:
        """Read one slice; an ``int`` counts as drawn in epoch 0 at that position."""
        draw = item if isinstance(item, Draw) else Draw(item, 0, item)
        number, index = self._places[draw.index]
        case = self.cases[number]
        pixels = case.mask()
        assert pixels is not None
        image = torch.from_numpy(np.ascontiguousarray(case.images()[index, self._channels[number]]))
        mask = torch.from_numpy(pixels[index].astype(np.int64))
        if self.augment:
            variation = Variation.draw(
                numpy_generator(self.seed, "augment", draw.epoch, draw.position),
                self.augmentation,
                present=[bool(image[channel].any()) for channel in self._images],
            )
            there = {channel: bool(image[shown].any()) for channel, shown in self._indicators.items()}
            varied, mask = variation.apply(image[self._images], mask)
            brain = (varied != 0).any(dim=0)
            image = torch.zeros_like(image)
            image[self._images] = varied
            for channel, shown in self._indicators.items():
                kept = there[channel] and not variation.dropped[self._images.index(shown)]
                image[channel] = brain if kept else 0
        return {"image": image, "mask": mask, "case": case.case_id, "slice": index}


class EpochSampler(Sampler[Draw]):
    """Draw the slices of an epoch, as a function of seed and epoch alone.

    Args:
        dataset: Where to draw from.
        length: Draws of an epoch; None means every slice that may be trained on once, in random order.
        tumour_fraction: Share of draws that show tumour, when ``length`` is given; if no slice is free of it, all do.
        seed: Seed of the draws.
        share: (k, n): of every n draws the k-th, for one of n processes that train together; together they draw what
            one alone would, less what would leave them unequal numbers.

    Raises:
        CohortError: Slices with tumour are wanted and there are none.
    """

    def __init__(
        self,
        dataset: SliceDataset,
        *,
        length: int | None,
        tumour_fraction: float,
        seed: int,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self._share = share
        self._tumour = dataset.tumour_indices
        self._background = dataset.background_indices
        self._all = dataset.training_indices
        self._n_slices = len(self._all)
        self._length = length
        self._tumour_fraction = tumour_fraction
        self._seed = seed
        self._epoch = 0
        if length is not None and not self._tumour and (tumour_fraction > 0 or not self._background):
            raise CohortError(
                f"none of {self._n_slices} slices shows tumour, so none can be drawn; "
                "lower preprocess.min_tumour_px or check the masks"
            )

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch (from 0) whose draws come next; the trainer calls it before each epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return (self._n_slices if self._length is None else self._length) // self._share[1]

    def __iter__(self) -> Iterator[Draw]:
        epoch = self._epoch
        generator = numpy_generator(self._seed, "sampler", epoch)
        if self._length is None:
            indices = generator.permutation(np.asarray(self._all, dtype=np.int64))
        else:
            n_tumour = round(self._length * self._tumour_fraction) if self._background else self._length
            chosen = [
                _cycle(self._tumour, n_tumour, generator),
                _cycle(self._background, self._length - n_tumour, generator),
            ]
            indices = generator.permutation(np.concatenate(chosen))
        first, step = self._share
        for position in range(first, len(self) * step, step):
            yield Draw(int(indices[position]), epoch, position)


def _cycle(indices: Sequence[int], n: int, generator: np.random.Generator) -> npt.NDArray[np.int64]:
    # Every slice comes once before any comes again.
    rounds = -(-n // len(indices)) if indices else 0
    shuffled = [generator.permutation(np.asarray(indices, dtype=np.int64)) for _ in range(rounds)]
    return np.concatenate([np.empty(0, dtype=np.int64), *shuffled])[:n]
