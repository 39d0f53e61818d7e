"""Vary a training slice with MONAI's transforms.

All parameters are drawn first, from a generator of the sample's own, so that a sample is the same in any worker and
any order; what a transform draws by itself, such as noise, it draws from a seed among them. Rotation, translation,
scale and elastic deformation are one interpolation of one grid. Background stays 0, and a missing sequence missing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glioma_nas.config import AugmentationConfig
from glioma_nas.seeding import derive_seed

_CONTROL_POINTS = (6, 6)
_BIAS_DEGREE = 3


@dataclass(frozen=True)
class Variation:
    """The parameters of one augmentation.

    Attributes:
        rotation_degrees: In-plane rotation.
        scale: Magnification.
        shift: (x, y) as a fraction of the side.
        flip: Whether left and right are swapped.
        gain: Factor of each channel, about 1.
        offset: Addend of each channel, in deviations, about 0.
        noise: Deviation of added Gaussian noise.
        seed: Seed of whatever a transform draws by itself: noise, bias field, elastic deformation.
        elastic_px: Deviation of the displacement of 6 × 6 control points; 0 for none.
        bias_field: Largest coefficient of a cubic bias field, the same in all channels; 0 for none.
        gamma: Exponent of each channel's brightness, scaled to [0, 1]; 1 for none.
        dropped: Channels that are fed as missing; empty for none.
    """

    rotation_degrees: float
    scale: float
    shift: tuple[float, float]
    flip: bool
    gain: tuple[float, ...]
    offset: tuple[float, ...]
    noise: float
    seed: int
    elastic_px: float = 0.0
    bias_field: float = 0.0
    gamma: tuple[float, ...] = ()
    dropped: tuple[bool, ...] = ()

    @classmethod
    def draw(cls, generator: np.random.Generator, config: AugmentationConfig, *, present: Sequence[bool]) -> Variation:
        """Draw a variation for an image whose channels are ``present`` or missing.

        Everything is drawn whether it is used or not, so that switching one part off leaves the others as they were.
        """
        n = len(present)
        angle, size, right, down = generator.uniform(-1, 1, 4)
        flip, elastic, bias, gamma = generator.random(4)
        gain, offset, exponent = generator.normal(0, 1, (3, n))
        noise = generator.random()
        seed = int(generator.integers(2**31))
        dropped = generator.random(n) < config.sequence_dropout
        stays = generator.random(n)
        if present and not any(there and not gone for there, gone in zip(present, dropped, strict=True)):
            dropped[int(np.argmax(stays * np.asarray(present)))] = False
        return cls(
            rotation_degrees=float(angle * config.rotation_degrees),
            scale=float(1 + size * config.scale),
            shift=(float(right * config.shift), float(down * config.shift)),
            flip=bool(flip < config.flip_probability),
            gain=tuple(np.exp(gain * config.gain).tolist()),
            offset=tuple((offset * config.offset).tolist()),
            noise=float(noise * config.noise),
            seed=seed,
            elastic_px=config.elastic_px if elastic < config.elastic_probability else 0.0,
            bias_field=config.bias_field if bias < config.bias_probability else 0.0,
            gamma=tuple(np.exp(exponent * config.gamma).tolist()) if gamma < config.gamma_probability else (),
            dropped=tuple(dropped.tolist()),
        )

    def apply(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Vary one slice; what moves in from outside is background, and background stays 0.

        Args:
            image: (C, H, W) float32, background 0.
            mask: (H, W) int64.
        """
        with plain_tensors():
            varied, brain, moved_mask = self._moved(image, mask)
            if self.bias_field or self.gamma:
                varied = self._scanned(varied, brain)
            varied = self._noisy(varied)
        varied = torch.where(brain, varied, 0.0)
        if any(self.dropped):
            varied[torch.tensor(self.dropped)] = 0
        return varied, moved_mask

    def _moved(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return image, where it shows brain (C, H, W), and mask, all moved alike."""
        from monai.transforms import AffineGrid, Flip, Resample

        shape = image.shape[1:]
        classes = torch.cat([(image != 0).float(), mask[None].float()])
        if self.flip:
            mirror = Flip(spatial_axis=1)
            image, classes = mirror(image), mirror(classes)
        right, down = self.shift
        grid, _ = AffineGrid(
            rotate_params=float(np.deg2rad(self.rotation_degrees)),
            translate_params=(down * shape[0], right * shape[1]),
            scale_params=(1 / self.scale, 1 / self.scale),
        )(spatial_size=shape)
        if self.elastic_px:
            grid = torch.cat([grid[:2] + self._elastic(shape), grid[2:]])
        resample = Resample(padding_mode="zeros", dtype=np.float32)
        moved = resample(image, grid, mode="bilinear")
        classes = resample(classes, grid, mode="nearest")
        return moved, classes[:-1] > 0, classes[-1].round().long()

    def _elastic(self, shape: torch.Size) -> Tensor:
        from monai.transforms import SmoothField

        # Evenly distributed control points of the deviation asked for.
        largest_px = 3**0.5 * self.elastic_px
        field = SmoothField(
            _CONTROL_POINTS,
            low=-largest_px,
            high=largest_px,
            channels=2,
            spatial_size=shape,
            mode="bicubic",
            align_corners=True,
        )
        displacement: Tensor = self._seeded(field, "elastic")(randomize=True)
        return displacement

    def _scanned(self, image: Tensor, brain: Tensor) -> Tensor:
        from monai.transforms import AdjustContrast, RandBiasField

        field = torch.ones(image.shape[1:])
        if self.bias_field:
            draw = RandBiasField(degree=_BIAS_DEGREE, coeff_range=(-self.bias_field, self.bias_field), prob=1.0)
            field = self._seeded(draw, "bias")(field[None])[0]
        scanned = image.clone()
        for channel in range(len(image)):
            inside = brain[channel]
            if not inside.any():
                continue
            # Images are standardised. A coil's sensitivity multiplies the signal as it was, whose zero lies at about
            # the darkest voxel of the brain.
            values = image[channel][inside]
            darkest = values.min()
            values = (values - darkest) * field[inside] + darkest
            if self.gamma:
                values = AdjustContrast(self.gamma[channel])(values[None])[0]
            scanned[channel][inside] = values
        return scanned

    def _noisy(self, image: Tensor) -> Tensor:
        from monai.transforms import RandGaussianNoise

        gain, offset = (torch.tensor(values, dtype=torch.float32)[:, None, None] for values in (self.gain, self.offset))
        image = image * gain + offset
        if not self.noise:
            return image
        noisy: Tensor = self._seeded(RandGaussianNoise(prob=1.0, std=self.noise, sample_std=False), "noise")(image)
        return noisy

    def _seeded(self, transform: Any, name: str) -> Any:  # any of MONAI's random transforms
        transform.set_random_state(seed=derive_seed(self.seed, name) % 2**32)
        return transform


@contextmanager
def plain_tensors() -> Iterator[None]:
    """Let MONAI's transforms work on tensors without metadata, which they would otherwise carry at thrice the time."""
    from monai.data import get_track_meta, set_track_meta

    tracked = get_track_meta()
    set_track_meta(False)
    try:
        yield
    finally:
        set_track_meta(tracked)
