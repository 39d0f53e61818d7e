"""Running a network over prepared slices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from glioma_nas.errors import CohortError
from glioma_nas.segmentation_inference import BATCH_SLICES, predict_probability


class FirstChannel(nn.Module):
    """Two-class logits (0, first channel): the tumour probability is the sigmoid of the first channel it is given."""

    def __init__(self, *, named: bool = False) -> None:
        super().__init__()
        self.named = named

    def forward(self, image: Tensor) -> Tensor | dict[str, Tensor]:
        logits = torch.stack([torch.zeros_like(image[:, 0]), image[:, 0]], dim=1)
        return {"logits": logits} if self.named else logits


def volume() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(BATCH_SLICES + 3, 3, 4, 4)).astype(np.float32)


@pytest.mark.parametrize("named", [False, True])
def test_probability_is_taken_from_the_networks_own_channels_over_all_batches(named: bool) -> None:
    images = volume()
    found = predict_probability(FirstChannel(named=named), images, ("t1", "t1ce", "flair"), ("flair", "t1"))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-images[:, 2])), rtol=1e-5)


def test_network_keeps_its_mode() -> None:
    network = FirstChannel().train()
    predict_probability(network, volume(), ("t1", "t1ce", "flair"), ("t1",))
    assert network.training


def test_sequence_that_was_not_prepared_is_refused() -> None:
    with pytest.raises(CohortError, match="sequence 't2' was not prepared: Allowed: flair, t1, t1ce"):
        predict_probability(FirstChannel(), volume(), ("t1", "t1ce", "flair"), ("t2",))
