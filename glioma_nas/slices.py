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

from glioma_nas.errors import CohortError
from glioma_nas.prepared import PreparedCase
from glioma_nas.seeding import derive_seed, numpy_generator

_logger = logging.getLogger(__name__)

_MAX_ROTATION_DEGREES = 15.0
_SCALE_RANGE = (0.9, 1.1)
_MAX_SHIFT = 0.05
_GAIN_DEVIATION = 0.1
_SHIFT_DEVIATION = 0.1
_MAX_NOISE_DEVIATION = 0.1


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
        augment: Whether to vary every slice by rotation, scale, shift, left-right flip, intensity and noise.
        seed: Seed of the augmentation.

    Raises:
        CohortError: No case has a mask, or a sequence was not prepared.
    """

    def __init__(self, cases: Sequence[PreparedCase], sequences: Sequence[str], *, augment: bool, seed: int) -> None:
        self.cases = [case for case in cases if case.has_mask]
        if not self.cases:
            raise CohortError(
                f"none of {len(cases)} cases has a mask, so there is nothing to train on; add masks to the sheet"
            )
        if len(self.cases) < len(cases):
            _logger.info("%d of %d cases have no mask and are not trained on", len(cases) - len(self.cases), len(cases))
        self.sequences = tuple(sequences)
        self.augment = augment
        self.seed = seed
        self._channels = [list(case.channels(self.sequences)) for case in self.cases]
        self._places = [(number, index) for number, case in enumerate(self.cases) for index in range(case.n_slices)]
        tumour = {(number, index) for number, case in enumerate(self.cases) for index in case.tumour_slices}
        self.tumour_indices = tuple(i for i, place in enumerate(self._places) if place in tumour)
        """Indices of the slices that show tumour."""
        self.background_indices = tuple(
            i
            for i, place in enumerate(self._places)
            if place not in tumour and self.cases[place[0]].brain_px[place[1]] > 0
        )
        """Indices of the slices that show brain but no tumour."""

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
                numpy_generator(self.seed, "augment", draw.epoch, draw.position), n_channels=len(image)
            )
            image, mask = variation.apply(image, mask)
        return {"image": image, "mask": mask, "case": case.case_id, "slice": index}


class EpochSampler(Sampler[Draw]):
    """Draw the slices of an epoch, as a function of seed and epoch alone.

    Args:
        dataset: Where to draw from.
        length: Draws of an epoch; None means every slice once, in random order.
        tumour_fraction: Share of draws that show tumour, when ``length`` is given; if no slice is free of it, all do.
        seed: Seed of the draws.

    Raises:
        CohortError: Slices with tumour are wanted and there are none.
    """

    def __init__(self, dataset: SliceDataset, *, length: int | None, tumour_fraction: float, seed: int) -> None:
        self._tumour = dataset.tumour_indices
        self._background = dataset.background_indices
        self._n_slices = len(dataset)
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
        return self._n_slices if self._length is None else self._length

    def __iter__(self) -> Iterator[Draw]:
        epoch = self._epoch
        generator = numpy_generator(self._seed, "sampler", epoch)
        if self._length is None:
            indices = generator.permutation(self._n_slices)
        else:
            n_tumour = round(self._length * self._tumour_fraction) if self._background else self._length
            chosen = [
                _cycle(self._tumour, n_tumour, generator),
                _cycle(self._background, self._length - n_tumour, generator),
            ]
            indices = generator.permutation(np.concatenate(chosen))
        for position, index in enumerate(indices):
            yield Draw(int(index), epoch, position)


@dataclass(frozen=True)
class Variation:
    """The parameters of one augmentation, drawn first and applied afterwards.

    Attributes:
        rotation_degrees: In-plane rotation, ±15.
        scale: Magnification, 0.9 to 1.1.
        shift: (x, y) as a fraction of the side, ±0.05.
        flip: Whether left and right are swapped.
        gain: Factor of each channel, about 1.
        offset: Addend of each channel, in deviations, about 0.
        noise: Deviation of added Gaussian noise, 0 to 0.1.
        noise_seed: Seed of that noise.
    """

    rotation_degrees: float
    scale: float
    shift: tuple[float, float]
    flip: bool
    gain: tuple[float, ...]
    offset: tuple[float, ...]
    noise: float
    noise_seed: int

    @classmethod
    def draw(cls, generator: np.random.Generator, *, n_channels: int) -> Variation:
        """Draw a variation for an image of ``n_channels``."""
        return cls(
            rotation_degrees=float(generator.uniform(-_MAX_ROTATION_DEGREES, _MAX_ROTATION_DEGREES)),
            scale=float(generator.uniform(*_SCALE_RANGE)),
            shift=(
                float(generator.uniform(-_MAX_SHIFT, _MAX_SHIFT)),
                float(generator.uniform(-_MAX_SHIFT, _MAX_SHIFT)),
            ),
            flip=bool(generator.random() < 0.5),
            gain=tuple(np.exp(generator.normal(0, _GAIN_DEVIATION, n_channels)).tolist()),
            offset=tuple(generator.normal(0, _SHIFT_DEVIATION, n_channels).tolist()),
            noise=float(generator.uniform(0, _MAX_NOISE_DEVIATION)),
            noise_seed=derive_seed(int(generator.integers(2**31)), "noise"),
        )

    def apply(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Vary one slice; what moves in from outside is background, and background stays 0.

        Args:
            image: (C, H, W) float32, background 0.
            mask: (H, W) int64.
        """
        angle = np.deg2rad(self.rotation_degrees)
        cos, sin = np.cos(angle) / self.scale, np.sin(angle) / self.scale
        mirror = -1.0 if self.flip else 1.0
        # Rows give the place in the old slice, in units of half a side, for each place in the new one.
        matrix = torch.tensor(
            [[[mirror * cos, -mirror * sin, mirror * 2 * self.shift[0]], [sin, cos, 2 * self.shift[1]]]],
            dtype=torch.float32,
        )
        grid = torch.nn.functional.affine_grid(matrix, [1, 1, *mask.shape], align_corners=False)
        varied = _sample(image[None], grid, "bilinear")[0]
        brain = _sample((image != 0).float()[None], grid, "nearest")[0]
        moved_mask = _sample(mask[None, None].float(), grid, "nearest")[0, 0].round().long()
        noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(self.noise_seed)) * self.noise
        gain, offset = (torch.tensor(values, dtype=torch.float32)[:, None, None] for values in (self.gain, self.offset))
        return (varied * gain + offset + noise) * brain, moved_mask


def _sample(image: Tensor, grid: Tensor, mode: str) -> Tensor:
    return torch.nn.functional.grid_sample(image, grid, mode=mode, padding_mode="zeros", align_corners=False)


def _cycle(indices: Sequence[int], n: int, generator: np.random.Generator) -> npt.NDArray[np.int64]:
    # Every slice comes once before any comes again.
    rounds = -(-n // len(indices)) if indices else 0
    shuffled = [generator.permutation(np.asarray(indices, dtype=np.int64)) for _ in range(rounds)]
    return np.concatenate([np.empty(0, dtype=np.int64), *shuffled])[:n]
