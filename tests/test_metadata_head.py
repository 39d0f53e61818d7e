from __future__ import annotations

import pytest
import torch

from glioma_nas.plugins.metadata_head import METADATA_GAIN, MetadataHead
from glioma_nas.seeding import isolated_torch_rng


def built(seed, features, **options):
    with isolated_torch_rng(seed, "weights"):
        return MetadataHead(features, **options)


@pytest.mark.parametrize("metadata", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_head_over_logits_starts_as_their_mean(seed, metadata):
    head = built(seed, 4, metadata=metadata, start="mean")
    logits, ages = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed)), torch.rand(5, 2)
    torch.testing.assert_close(head(logits, ages), logits.mean(dim=1))


def test_head_is_one_linear_layer_over_features_and_metadata():
    head = built(0, 3, metadata=True)
    torch.nn.init.constant_(head.metadata.weight, 0.1)
    features, metadata = torch.randn(4, 3), torch.rand(4, 2)
    weight = torch.cat([head.features.weight[0], METADATA_GAIN * head.metadata.weight[0]])
    shift = head.features.bias - 0.5 * METADATA_GAIN * head.metadata.weight.sum()
    torch.testing.assert_close(head(features, metadata), torch.cat([features, metadata], dim=1) @ weight + shift)


def test_two_hundred_steps_are_enough_for_an_effect_of_age():
    generator = torch.Generator().manual_seed(0)
    metadata = torch.stack([0.2 + 0.6 * torch.rand(400, generator=generator), torch.zeros(400)], dim=1)
    # Odds double every ten years: a coefficient of 7 for age in hundreds.
    target = (torch.rand(400, generator=generator) < torch.sigmoid(7 * (metadata[:, 0] - 0.5))).float()
    head = built(0, 1, metadata=True)
    optimiser = torch.optim.AdamW(head.parameters(), lr=1e-3)
    for step in range(200):
        rows = torch.arange(16) + 16 * (step % 25)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(
            head(torch.zeros(16, 1), metadata[rows]), target[rows]
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert METADATA_GAIN * float(head.metadata.weight[0, 0]) > 3.5
