"""Training from scratch: distillation, averaged weights, mixed precision, and which epoch is kept."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from test_one_shot import make_evaluator
from torch import nn

from glioma_nas.errors import CohortError, ConfigError, DivergedError
from glioma_nas.evaluators.segmentation import split_training_cases
from glioma_nas.evaluators.segmentation_module import SegmentationModule, batch_dice
from glioma_nas.losses import distillation_loss
from glioma_nas.prepared import PreparedCohort
from glioma_nas.testing.prepared_phantoms import prepare_phantom_cohort


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_phantom_cohort(tmp_path_factory.mktemp("phantom"), n_patients=8, image_size_px=32)


def network() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))


def train(prepared: Path, folder: Path, **options: Any) -> tuple[nn.Module, Any]:
    net = network()
    settings = {"split": "train", "schedule": "poly", "learning_rate": 0.1, **options}
    evaluator = make_evaluator(prepared, folder, **settings)
    evaluator.evaluate(net)
    return net, evaluator


@pytest.mark.parametrize(("norm", "factor"), [("pixel", 1.0), ("element", 1 / 3), ("image", 20.0)])
def test_distillation_norms_differ_by_the_sizes_they_divide_by(norm: str, factor: float) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    p, q = teacher.softmax(1), student.softmax(1)
    per_pixel = (p * (p / q).log()).sum(1)
    expected = factor * float(per_pixel.mean())
    assert float(distillation_loss(student, teacher, norm=norm)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("options", [{"norm": "batch"}, {"direction": "both"}])
def test_unknown_distillation_option_is_refused(options: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="allowed are teacher_student, student_teacher, and pixel, element, image"):
        distillation_loss(torch.zeros(1, 2, 1, 1), torch.zeros(1, 2, 1, 1), **options)


def test_batch_dice_equals_hand_count() -> None:
    mask = torch.tensor([[[1, 1], [0, 0]]])
    logits = torch.stack([torch.zeros(1, 2, 2), torch.tensor([[[1.0, -1.0], [1.0, -1.0]]])], dim=1)
    assert batch_dice(logits, mask) == 0.5  # one of two found, one of two true
    assert batch_dice(-logits.abs(), torch.zeros(1, 2, 2, dtype=torch.int64)) == 1.0


def test_validation_part_is_of_training_patients_and_the_same_for_every_seed(prepared: Path) -> None:
    cohort = PreparedCohort.load(prepared)
    parts = [
        split_training_cases(cohort, fold=0, split="train", seed=seed, validation_fraction=0.25) for seed in (0, 1)
    ]
    train_ids, held = ({case.patient_id for case in part} for part in parts[0])
    assert held and not held & train_ids
    assert held == {case.patient_id for case in parts[1][1]}
    assert held | train_ids == {cohort.cases[case].patient_id for case in cohort.folds.train(0)}


@pytest.mark.parametrize("fraction", [1.0, -0.5])
def test_impossible_validation_fraction_is_refused(prepared: Path, fraction: float) -> None:
    with pytest.raises(ConfigError, match="validation_fraction is"):
        split_training_cases(PreparedCohort.load(prepared), fold=0, split="train", seed=0, validation_fraction=fraction)


def test_validation_of_a_single_patient_is_refused(tmp_path: Path) -> None:
    folder = prepare_phantom_cohort(tmp_path, n_patients=2, image_size_px=32)
    with pytest.raises(CohortError, match="validation needs at least 2"):
        split_training_cases(PreparedCohort.load(folder), fold=0, split="train", seed=0, validation_fraction=0.5)


@pytest.mark.slow
def test_best_epoch_is_kept_and_both_are_reported(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, torch.Tensor]] = []

    def planned(self: Any, model: nn.Module, batches: Any) -> float:
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return (0.3, 0.6, 0.5)[len(seen) - 1] if len(seen) <= 3 else 0.6

    monkeypatch.setattr(SegmentationModule, "score", planned)
    net, evaluator = train(prepared, tmp_path, checkpoint="best", validation_fraction=0.3)
    assert evaluator.kept == {
        "checkpoint": "best",
        "epoch": 1,
        "averaged": False,
        "last_validation_dice": 0.5,
        "best_epoch": 1,
        "best_validation_dice": 0.6,
    }
    assert all(torch.equal(value, seen[1][name]) for name, value in net.state_dict().items())
    assert list(pd.read_csv(tmp_path / "history.csv").validation_dice) == [0.3, 0.6, 0.5]


@pytest.mark.slow
def test_last_epoch_is_kept_although_another_was_better(prepared: Path, tmp_path: Path) -> None:
    _, evaluator = train(prepared, tmp_path, validation_fraction=0.3)
    assert evaluator.kept["epoch"] == 2
    assert evaluator.kept["best_validation_dice"] >= evaluator.kept["last_validation_dice"]


@pytest.mark.slow
def test_averaged_weights_follow_the_moving_average_of_the_steps(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decay, steps = 0.5, []
    end = SegmentationModule.on_train_batch_end

    def watched(self: Any, *arguments: Any) -> None:
        steps.append(self.model[0].weight.detach().clone())
        end(self, *arguments)

    monkeypatch.setattr(SegmentationModule, "on_train_batch_end", watched)
    net, _ = train(prepared, tmp_path, ema_decay=decay)
    expected = steps[0]
    for weight in steps[1:]:
        expected = decay * expected + (1 - decay) * weight
    assert torch.allclose(net[0].weight, expected, atol=1e-6)  # type: ignore[index]
    assert not torch.allclose(net[0].weight, steps[-1], atol=1e-6)  # type: ignore[index]


class _PowerCut(Exception):
    pass


@pytest.mark.slow
def test_interrupted_training_with_average_and_best_equals_an_uninterrupted_one(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"ema_decay": 0.8, "validation_fraction": 0.3, "checkpoint": "best"}
    whole, first = train(prepared, tmp_path / "whole", **options)
    step = SegmentationModule.training_step

    def fail_in_epoch_2(self: Any, batch: Any, batch_idx: int) -> Any:
        if self.trainer.current_epoch == 2:
            raise _PowerCut
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patched:
        patched.setattr(SegmentationModule, "training_step", fail_in_epoch_2)
        with pytest.raises(_PowerCut):
            train(prepared, tmp_path / "cut", **options)
    resumed, second = train(prepared, tmp_path / "cut", **options)
    assert second.kept == first.kept
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())


@pytest.mark.slow
def test_mixed_precision_trains_on_the_cpu_too(prepared: Path, tmp_path: Path) -> None:
    net, _ = train(prepared, tmp_path, precision="bf16-mixed")
    history = pd.read_csv(tmp_path / "history.csv")
    assert history.loss.iloc[-1] < history.loss.iloc[0]
    assert all(value.dtype == torch.float32 for value in net.parameters())


def test_half_precision_without_a_gpu_is_refused(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="precision '16-mixed' needs a GPU"):
        train(prepared, tmp_path, precision="16-mixed")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checkpoint": "best"}, r"needs validation patients; set train\.validation_fraction"),
        ({"checkpoint": "first"}, "unknown checkpoint 'first'"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0; give a number of at least 0 and less than 1"),
    ],
)
def test_impossible_option_is_refused(prepared: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train(prepared, tmp_path, **options)


@pytest.mark.slow
def test_gradients_that_are_not_finite_are_skipped_counted_and_then_end_the_training(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = SegmentationModule.step_loss
    steep = {"first": 1}

    def sometimes(self: Any, batch: Any) -> Any:
        value = loss(self, batch)
        steep["first"] -= 1
        return value if steep["first"] < 0 else value + (value - value.detach()).abs().sqrt()  # infinite slope

    monkeypatch.setattr(SegmentationModule, "step_loss", sometimes)
    net, _ = train(prepared, tmp_path / "once")
    assert list(pd.read_csv(tmp_path / "once" / "history.csv").skipped_steps) == [1, 0, 0]
    assert all(bool(torch.isfinite(value).all()) for value in net.parameters())
    steep["first"] = 1000
    with pytest.raises(DivergedError, match="the gradient was not a finite number 11 times in a row"):
        train(prepared, tmp_path / "always", epochs=8)


@pytest.mark.slow
def test_network_whose_statistics_are_spoilt_is_refused(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = SegmentationModule.on_train_batch_end

    def spoil(self: Any, *arguments: Any) -> None:
        end(self, *arguments)
        self.model[1].running_mean.fill_(math.nan)

    monkeypatch.setattr(SegmentationModule, "on_train_batch_end", spoil)
    with pytest.raises(DivergedError, match=r"not finite, the first is 1\.running_mean"):
        train(prepared, tmp_path)
