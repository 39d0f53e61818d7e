"""Run a segmentation network over the slices of a prepared case."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from glioma_nas.errors import CohortError, did_you_mean

BATCH_SLICES = 16

THRESHOLD = 0.5
"""A pixel is tumour from this probability on: with two classes, where tumour is at least as likely as not."""


@torch.no_grad()
def predict_probability(
    network: Any, images: NDArray[np.float32], order: Sequence[str], sequences: Sequence[str], *, device: str = "cpu"
) -> NDArray[np.float32]:
    """Return the tumour probability of every pixel, float32 (Z, H, W) in [0, 1]: one minus that of class 0.

    Args:
        network: Takes (N, C, H, W) and gives logits (N, K, H, W); left on ``device``, in the mode it came in.
        images: Prepared slices, float32 (Z, C, H, W).
        order: Sequences in the order of the prepared channels.
        sequences: Input channels of the network, in order.
        device: ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        CohortError: A sequence was not prepared.
    """
    for sequence in sequences:
        if sequence not in order:
            raise CohortError(f"sequence '{sequence}' was not prepared: {did_you_mean(sequence, order)}")
    channels = [list(order).index(sequence) for sequence in sequences]
    was_training = network.training
    network.to(device).eval()
    parts = []
    for start in range(0, len(images), BATCH_SLICES):
        batch = np.ascontiguousarray(images[start : start + BATCH_SLICES][:, channels], dtype=np.float32)
        logits = network(torch.from_numpy(batch).to(device))
        logits = logits["logits"] if isinstance(logits, Mapping) else logits
        parts.append((1 - logits.softmax(dim=1)[:, 0]).cpu().numpy())
    network.train(was_training)
    return np.concatenate(parts).astype(np.float32)
