"""Steps that are not finite are not taken, networks that are not are not chosen, and gradients are clipped for all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from test_one_shot import make_evaluator, make_space
from torch import Tensor, nn

from glioma_nas.errors import DivergedError, SearchError
from glioma_nas.evaluators.segmentation_module import SegmentationModule
from glioma_nas.losses import focal_loss
from glioma_nas.nni_bridge import explore
from glioma_nas.strategies.candidate_scoring import finetune, recalibrate_batch_norm
from glioma_nas.strategies.nni_multi_trial import NniRandom
from glioma_nas.strategies.nni_one_shot import NniDarts, NniRandomOneShot
from glioma_nas.strategies.nni_records import StepRecorder
from glioma_nas.strategies.random_paths import RandomWithSharedWeights
from glioma_nas.testing.prepared_phantoms import prepare_phantom_cohort

BATCHES = [{"image": torch.ones(1, 1, 2, 2), "mask": torch.zeros(1, 2, 2, dtype=torch.long), "case": ["a"]}]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_phantom_cohort(tmp_path_factory.mktemp("phantom"), n_patients=8, image_size_px=32)


def infinite_gradient(logits: Tensor, target: Tensor) -> Tensor:
    """Return the focal loss, with a gradient that is NaN although the loss is not."""
    return focal_loss(logits, target) + (0.0 * logits).sum().sqrt()


def now_and_then(bad: Callable[[Tensor, Tensor], Tensor], every: int) -> Callable[[Tensor, Tensor], Tensor]:
    calls: list[int] = []

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        calls.append(1)
        return bad(logits, target) if len(calls) % every == 0 else focal_loss(logits, target)

    return loss


@pytest.mark.parametrize("bad", [infinite_gradient, lambda logits, target: focal_loss(logits, target) * float("nan")])
def test_finetuning_takes_no_step_that_is_not_finite(bad: Any) -> None:
    model = nn.Conv2d(1, 2, 1)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    finetune(model, BATCHES, bad, steps=5, learning_rate=0.1)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    with pytest.raises(DivergedError, match="fine-tuning of a candidate"):
        finetune(model, BATCHES, bad, steps=20, learning_rate=0.1)


def test_no_recalibration_leaves_the_statistics() -> None:
    model = nn.Sequential(nn.BatchNorm2d(1)).train()
    model[0].running_mean.fill_(7.0)
    recalibrate_batch_norm(model, BATCHES, n_batches=0)
    assert float(model[0].running_mean) == 7.0 and not model.training


def test_outputs_that_are_not_finite_are_refused_and_no_dice_of_zero() -> None:
    model = nn.Conv2d(1, 2, 1)
    nn.init.constant_(model.weight, float("nan"))
    module = SegmentationModule(
        loss="focal", auxiliary_weight=1.0, learning_rate=0.1, weight_decay=0.0, epochs=1, schedule="poly"
    )
    with pytest.raises(DivergedError, match="outputs are no finite numbers"):
        module.score(model, BATCHES)


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_refused_step_leaves_weights_that_have_momentum(loss: float) -> None:
    losses = iter([1.0, loss])

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.weight * next(losses)

    module = Module()
    recorder = StepRecorder(module, alternates=False, manual=True)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    weights = []
    for _ in range(2):
        optimizer.zero_grad()
        recorder(None, 0).backward()
        recorder.before_optimizer_step(optimizer)
        optimizer.step()
        weights.append(float(module.weight.detach()))
    assert weights[0] < 1.0 and weights[1] == weights[0]
    assert recorder.figures() == {"loss_weights": 1.0, "skipped_steps": 1}


@pytest.mark.slow
@pytest.mark.parametrize("make", [NniDarts, NniRandomOneShot])
def test_nni_one_shots_count_and_refuse_gradients_that_are_not_finite(
    prepared: Path, tmp_path: Path, make: Any
) -> None:
    maps = 1  # NNI's supernets give one map, so the loss is called once a step
    evaluator = make_evaluator(prepared, tmp_path, loss=now_and_then(infinite_gradient, 3 * maps), epochs=2)
    strategy = explore(make_space(), evaluator, make())
    assert all(bool(torch.isfinite(parameter).all()) for parameter in strategy.supernet.parameters())
    assert pd.read_csv(tmp_path / "history.csv").skipped_steps.sum() >= 1


@pytest.mark.slow
def test_gradients_that_stay_not_finite_end_an_nni_search_with_a_reason(prepared: Path, tmp_path: Path) -> None:
    evaluator = make_evaluator(prepared, tmp_path, loss=infinite_gradient, steps_per_epoch=12, epochs=1)
    with pytest.raises(DivergedError, match="gradient of the weights was not a finite number 11 times in a row"):
        explore(make_space(), evaluator, NniRandomOneShot())


@pytest.mark.slow
@pytest.mark.parametrize("make", [lambda: NniRandom(trials=1), NniRandomOneShot])
def test_weights_are_clipped_whoever_trains_them(prepared: Path, tmp_path: Path, make: Any) -> None:
    steep = 1e6

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        return steep * focal_loss(logits, target)

    explore(make_space(), make_evaluator(prepared, tmp_path, loss=loss, epochs=3), make())
    (path,) = tmp_path.rglob("history.csv")
    history = pd.read_csv(path)
    assert float(history.filter(like="loss").iloc[-1].iloc[0]) / steep < 3.0


@pytest.mark.slow
def test_network_that_computes_nothing_finite_is_never_chosen(prepared: Path, tmp_path: Path) -> None:
    class Poisoned(RandomWithSharedWeights):
        """Spoils one operator of the trained supernet before it chooses."""

        operators: tuple[str, ...] = ("conv3x3",)

        def _choose(self) -> None:
            for name, parameter in self._space().named_parameters():
                if any(f".{operator}." in name for operator in self.operators):
                    nn.init.constant_(parameter.data, float("nan"))
            super()._choose()

    space = make_space()
    strategy = Poisoned(n_candidates=12, recalibration_batches=1, paths=1)
    explore(space, make_evaluator(prepared, tmp_path / "one", epochs=1), strategy)
    assert "conv3x3" not in {step.operator for step in make_space().plan(strategy.found["student"].sample()).steps}
    assert any("what they compute is not finite" in note for note in strategy.notes)

    class AllPoisoned(Poisoned):
        operators = tuple(make_space().layout.operators)

    with pytest.raises(SearchError, match="none of the 2 candidates of the student computes finite numbers"):
        explore(
            make_space(),
            make_evaluator(prepared, tmp_path / "all", epochs=1),
            AllPoisoned(n_candidates=2, recalibration_batches=1, paths=1),
        )
