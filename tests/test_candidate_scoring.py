"""Ranking decoded candidates."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from glioma_nas.strategies.candidate_scoring import (
    finetune,
    recalibrate_batch_norm,
    target_score,
    warn_about_equal_exponents,
)


def test_target_score_equals_mnasnet_formula() -> None:
    exponents = (-0.07, -0.3)
    assert target_score(0.8, 4.0, target_latency_ms=8.0, exponents=exponents) == pytest.approx(0.8 * 0.5**-0.07)
    assert target_score(0.8, 16.0, target_latency_ms=8.0, exponents=exponents) == pytest.approx(0.8 * 2**-0.3)


def test_target_cannot_change_the_ranking_when_exponents_are_equal() -> None:
    candidates = [(0.80, 9.0), (0.78, 5.0), (0.82, 14.0)]
    order = []
    for target in (1.0, 8.3, 100.0):
        scores = [target_score(a, ms, target_latency_ms=target, exponents=(-0.07, -0.07)) for a, ms in candidates]
        order.append(sorted(range(3), key=scores.__getitem__))
    assert order[0] == order[1] == order[2]


def test_equal_exponents_with_a_target_are_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        warn_about_equal_exponents((-0.07, -0.07), 8.3)
    assert "has no effect" in caplog.text
    caplog.clear()
    warn_about_equal_exponents((0.0, -0.07), 8.3)
    assert not caplog.text


def test_accuracy_alone_counts_without_latency() -> None:
    assert target_score(0.7, None, target_latency_ms=None, exponents=(-0.07, -0.07)) == 0.7


def test_finetuning_lowers_the_loss_and_repeats_short_data() -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(1, 2, 1)
    image = torch.tensor([[[[1.0, -1.0]]]])
    batches = [{"image": image, "mask": torch.tensor([[[1, 0]]])}]
    loss = nn.functional.cross_entropy
    before = float(loss(model(image), batches[0]["mask"]))
    finetune(model, batches, loss, steps=20, learning_rate=0.5)
    assert float(loss(model(image), batches[0]["mask"])) < 0.5 * before


def test_no_finetuning_leaves_the_weights() -> None:
    model = nn.Conv2d(1, 2, 1)
    before = model.weight.detach().clone()
    finetune(model, [], nn.functional.cross_entropy, steps=0, learning_rate=0.5)
    assert torch.equal(model.weight, before)


def test_recalibrated_statistics_are_the_mean_over_the_batches() -> None:
    model = nn.Sequential(nn.BatchNorm2d(1))
    model[0].running_mean.fill_(99.0)
    batches = [{"image": torch.full((2, 1, 4, 4), value)} for value in (1.0, 3.0, 100.0)]
    recalibrate_batch_norm(model, batches, n_batches=2)
    assert float(model[0].running_mean) == pytest.approx(2.0)
    assert model[0].momentum == 0.1
    assert not model.training
