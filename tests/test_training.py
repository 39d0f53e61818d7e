"""Resumable training: an interrupted run, continued, must equal one that was never interrupted."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from nni.nas.evaluator.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from glioma_nas.errors import ConfigError, DivergedError, StorageError
from glioma_nas.training import HISTORY_FILE, LAST_CHECKPOINT, FiniteGuard, fit


class Points(Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> Tensor:
        return torch.linspace(-1, 1, 16)[index].repeat(4)


class Regression(LightningModule):
    """Dropout and momentum make the result depend on the generator's and the optimiser's state."""

    def __init__(self, *, stop_in_epoch: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.stop_in_epoch = stop_in_epoch
        self.losses: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if self.stop_in_epoch == self.trainer.current_epoch and batch_idx == 1:
            raise RuntimeError("power cut")
        loss = (self.net(batch).squeeze(1) - batch.sum(1)).square().mean()
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.005, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]

    def epoch_figures(self) -> dict[str, float]:
        losses, self.losses = self.losses, []
        return {"loss": sum(losses) / len(losses)}


def train(folder: Path, module: Regression, epochs: int = 4) -> pd.DataFrame:
    return fit(module, DataLoader(Points(), batch_size=4), folder=folder, epochs=epochs, seed=5)


def test_interrupted_and_resumed_training_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = Regression()
    expected = train(tmp_path / "whole", whole)
    with pytest.raises(RuntimeError, match="power cut"):
        train(tmp_path / "cut", Regression(stop_in_epoch=2))
    resumed = Regression()
    history = train(tmp_path / "cut", resumed)
    pd.testing.assert_frame_equal(history, expected)
    for name, value in whole.net.state_dict().items():
        assert torch.equal(value, resumed.net.state_dict()[name]), name
    assert list(pd.read_csv(tmp_path / "cut" / HISTORY_FILE).epoch) == [0, 1, 2, 3]


def test_training_leaves_the_global_generator_as_it_was(tmp_path: Path) -> None:
    module = Regression()
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    train(tmp_path, module, epochs=1)
    assert torch.equal(torch.rand(3), expected)


def test_finished_training_is_not_repeated_when_run_again(tmp_path: Path) -> None:
    train(tmp_path, Regression(), epochs=2)
    again = Regression(stop_in_epoch=0)
    history = train(tmp_path, again, epochs=2)
    assert len(history) == 2
    assert torch.load(tmp_path / LAST_CHECKPOINT, weights_only=True)["epoch"] == 1


def test_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    train(tmp_path, Regression(), epochs=1)
    checkpoint = tmp_path / LAST_CHECKPOINT
    checkpoint.write_bytes(checkpoint.read_bytes()[:200])
    with pytest.raises(StorageError, match=r"last.ckpt: damaged checkpoint; delete it to start"):
        train(tmp_path, Regression(), epochs=2)


def test_unknown_device_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="allowed are cpu, cuda and cuda:N"):
        fit(Regression(), DataLoader(Points()), folder=tmp_path, epochs=1, seed=0, device="tpu")


def test_guard_stops_with_a_reason_when_losses_stay_non_finite() -> None:
    guard = FiniteGuard("search", patience=2)
    assert guard.accepts(torch.tensor(1.0))
    assert not guard.accepts(torch.tensor(math.nan))
    assert not guard.accepts(torch.tensor(math.inf))
    assert guard.accepts(torch.tensor(0.5))
    guard.accepts(torch.tensor(math.nan))
    guard.accepts(torch.tensor(math.nan))
    with pytest.raises(DivergedError, match="search: the loss was not a finite number 3 times"):
        guard.accepts(torch.tensor(math.nan))
    assert guard.take_skipped() == 5
    assert guard.take_skipped() == 0


def test_guard_is_not_reassured_about_gradients_by_good_losses() -> None:
    guard = FiniteGuard("search", patience=1)
    guard.accepts(1.0)
    guard.accepts(math.inf, "gradient")
    guard.accepts(1.0)
    with pytest.raises(DivergedError, match="the gradient was not a finite number 2 times"):
        guard.accepts(None, "gradient")
