"""Prove that an engine computes what PyTorch computes, on real slices, or refuse it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from glioma_nas.config import ExportConfig
from glioma_nas.errors import BackendError
from glioma_nas.latency_backend import Array, Engine


@dataclass(frozen=True)
class Parity:
    """How far an engine is from PyTorch.

    Attributes:
        max_abs_logit_difference: Largest difference of a logit over all slices, classes and pixels.
        mask_dice: Dice of the two tumour masks over all pixels of all slices together, in [0, 1]; 1 if both are empty.
        tumour_px: Pixels that PyTorch calls tumour; with 0 the Dice says nothing.
        n_slices: Slices compared.
    """

    max_abs_logit_difference: float
    mask_dice: float
    tumour_px: int
    n_slices: int

    def no_evidence(self, *, reduced: bool) -> str | None:
        """Return why the comparison says nothing about the engine; none where it does.

        Engines of fewer bits are judged by their masks alone, and two empty masks agree whatever the engine computes.
        """
        if not reduced or self.tumour_px > 0:
            return None
        return f"PyTorch outlines no tumour on the {self.n_slices} slices, so masks in fewer bits say nothing"

    def require(self, limits: ExportConfig, *, engine: str, reduced: bool = False) -> None:
        """Refuse an engine that is beyond tolerance.

        Args:
            limits: The tolerances.
            engine: What to call it in the message.
            reduced: Whether it computes in fewer bits than 32: its logits differ anyhow, and its masks may a little.

        Raises:
            BackendError: It is; both figures and both limits are named. Or the comparison says nothing.
        """
        largest = math.inf if reduced else limits.max_abs_logit_difference
        least = limits.min_reduced_mask_dice if reduced else limits.min_mask_dice
        # Written so that a NaN is refused as well.
        if not (self.max_abs_logit_difference <= largest and self.mask_dice >= least):
            raise BackendError(
                f"{engine} does not compute what PyTorch computes on {self.n_slices} slices: largest logit difference "
                f"{self.max_abs_logit_difference:.3g} (allowed {largest:g}), Dice of the masks "
                f"{self.mask_dice:.5f} (at least {least:g}); the engine is refused"
            )
        empty = self.no_evidence(reduced=reduced)
        if empty is not None:
            raise BackendError(f"{engine} cannot be judged: {empty}")


def compare(module: nn.Module, engine: Engine, images: Sequence[Array]) -> Parity:
    """Run both on every image and compare logits and masks.

    Args:
        module: The network in evaluation mode.
        engine: The engine made of it, for batches of 1.
        images: Slices, each float32 (C, H, W).

    Raises:
        BackendError: There are no slices, or the engine's output has another shape.
    """
    if not images:
        raise BackendError("no slices to compare the engine on; the fold has no test cases")
    largest, common, ours, theirs = 0.0, 0, 0, 0
    for image in images:
        batch = np.ascontiguousarray(image, dtype=np.float32)[None]
        with torch.inference_mode():
            expected = module(torch.from_numpy(batch)).numpy()
        given = engine.run([batch])[0]
        if given.shape != expected.shape:
            raise BackendError(
                f"the engine gives logits of shape {given.shape}, PyTorch {expected.shape}; the engine is refused"
            )
        largest = float(np.maximum(largest, np.abs(given - expected).max()))  # np.maximum keeps NaN, max() may drop it
        a, b = _tumour(expected), _tumour(given)
        common += int((a & b).sum())
        ours += int(a.sum())
        theirs += int(b.sum())
    dice = 2 * common / (ours + theirs) if ours + theirs else 1.0
    return Parity(largest, dice, ours, len(images))


def _tumour(logits: Array) -> NDArray[np.bool_]:
    return np.asarray(logits.argmax(axis=1) > 0)
