"""Vary a training slice: parameters are drawn first, from a generator of the sample's own, and applied afterwards.

Geometry is one interpolation of one grid. The bias field and the change of gamma are MONAI's transforms. Background
stays 0, and a sequence that is missing stays missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from glioma_nas.config import AugmentationConfig
from glioma_nas.seeding import derive_seed

_CONTROL_POINTS = 6
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
        noise_seed: Seed of that noise.
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
    noise_seed: int
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
        noise_seed = derive_seed(int(generator.integers(2**31)), "noise")
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
            noise_seed=noise_seed,
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
        random = torch.Generator().manual_seed(self.noise_seed)
        grid = self._grid(mask.shape, random)
        varied = _sample(image[None], grid, "bilinear")[0]
        brain = _sample((image != 0).float()[None], grid, "nearest")[0]
        moved_mask = _sample(mask[None, None].float(), grid, "nearest")[0, 0].round().long()
        if self.bias_field or self.gamma:
            varied = self._scanned(varied, brain > 0)
        noise = torch.randn(image.shape, generator=random) * self.noise
        gain, offset = (torch.tensor(values, dtype=torch.float32)[:, None, None] for values in (self.gain, self.offset))
        varied = (varied * gain + offset + noise) * brain
        if any(self.dropped):
            varied[torch.tensor(self.dropped)] = 0
        return varied, moved_mask

    def _grid(self, shape: torch.Size, random: torch.Generator) -> Tensor:
        angle = np.deg2rad(self.rotation_degrees)
        cos, sin = np.cos(angle) / self.scale, np.sin(angle) / self.scale
        mirror = -1.0 if self.flip else 1.0
        # Rows give the place in the old slice, in units of half a side, for each place in the new one.
        matrix = torch.tensor(
            [[[mirror * cos, -mirror * sin, mirror * 2 * self.shift[0]], [sin, cos, 2 * self.shift[1]]]],
            dtype=torch.float32,
        )
        grid = torch.nn.functional.affine_grid(matrix, [1, 1, *shape], align_corners=False)
        if self.elastic_px:
            coarse = torch.randn(1, 2, _CONTROL_POINTS, _CONTROL_POINTS, generator=random) * self.elastic_px
            half_side = torch.tensor([shape[1] / 2, shape[0] / 2]).reshape(1, 2, 1, 1)
            field = torch.nn.functional.interpolate(
                coarse / half_side, tuple(shape), mode="bicubic", align_corners=True
            )
            grid = grid + field.permute(0, 2, 3, 1)
        return grid

    def _scanned(self, image: Tensor, brain: Tensor) -> Tensor:
        from monai.transforms import AdjustContrast, RandBiasField

        field = torch.ones(image.shape[1:])
        if self.bias_field:
            draw = RandBiasField(degree=_BIAS_DEGREE, coeff_range=(-self.bias_field, self.bias_field), prob=1.0)
            draw.set_random_state(seed=self.noise_seed % 2**32)
            field = torch.as_tensor(draw(torch.ones(1, *image.shape[1:])))[0]
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
                values = torch.as_tensor(AdjustContrast(self.gamma[channel])(values[None]))[0]
            scanned[channel][inside] = values
        return scanned


def _sample(image: Tensor, grid: Tensor, mode: str) -> Tensor:
    return torch.nn.functional.grid_sample(image, grid, mode=mode, padding_mode="zeros", align_corners=False)
