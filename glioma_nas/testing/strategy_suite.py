"""Conformance suite for search strategies: subclass `StrategySuite` in your tests and name your strategy.

It runs the strategy on the tiny NASBraNet and a phantom cohort, with operators priced by arithmetic, so nothing depends
on the machine's speed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import nni
import numpy as np
import pytest
import torch
from nni.nas.oneshot.pytorch.supermodule.differentiable import GumbelSoftmax
from nni.nas.profiler import Profiler
from nni.nas.strategy.base import Strategy
from torch import Tensor

from glioma_nas.architecture import Architecture
from glioma_nas.costs import OperatorSpec
from glioma_nas.errors import ConfigError
from glioma_nas.nni_bridge import explore, found_architectures, trials_of
from glioma_nas.registry import evaluators, search_spaces, strategies
from glioma_nas.seeding import isolated_torch_rng
from glioma_nas.space_building import construct
from glioma_nas.testing.prepared_phantoms import prepare_phantom_cohort

IMAGE_SIZE_PX = 32
SEQUENCES = ("t1ce", "flair")


class ArithmeticProfiler(Profiler):
    """Prices operators by arithmetic; has what a strategy may ask of a profiler."""

    def __init__(self, model_space: Any) -> None:
        super().__init__(model_space)
        self._model = model_space.cost_model(self.price)

    @staticmethod
    def price(spec: OperatorSpec) -> float:
        """Return a number of the order of milliseconds that grows with channels and size."""
        return 1e-3 * spec.in_channels * spec.out_channels * spec.height / spec.stride

    def profile(self, sample: Mapping[str, Any]) -> float:
        """Return the cost of one sample."""
        return float(self._model.of(sample))

    def expectation(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Return the expected cost, differentiable in all weights."""
        expected: Tensor = self._model.expectation(weights)
        return expected


class _PowerCut(Exception):
    pass


def _history(folder: Path) -> str | None:
    path = folder / "history.csv"
    return path.read_text() if path.is_file() else None


def _temperatures(strategy: Any) -> list[float]:
    """Return τ of every Gumbel-softmax that a supernet of NNI's ends with."""
    supernet = (
        getattr(strategy, "supernet", torch.nn.Module()) if hasattr(type(strategy), "supernet") else torch.nn.Module()
    )
    return [float(module.tau) for module in supernet.modules() if isinstance(module, GumbelSoftmax)]


class StrategySuite:
    """Shared tests of strategies.

    Attributes:
        strategy: Registered name.
        options: Strategy options that make it fast.
        space_options: Options of the tiny space, for a strategy that cannot search all of it.
        epochs: Epochs of the evaluator.
        pretrain_epochs: How many of them train weights only.
    """

    strategy: ClassVar[str]
    options: ClassVar[Mapping[str, Any]] = {}
    space_options: ClassVar[Mapping[str, Any]] = {}
    epochs: ClassVar[int] = 2
    pretrain_epochs: ClassVar[int] = 1

    @pytest.fixture(scope="class")
    def prepared(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return prepare_phantom_cohort(
            tmp_path_factory.mktemp("phantom"), n_patients=8, image_size_px=IMAGE_SIZE_PX, seed=1
        )

    def make_space(self) -> Any:
        """Build the tiny space; the weights it starts with are always the same."""
        with isolated_torch_rng(0, "space"):
            return search_spaces.get("nasbranet")(
                "tiny", image_size_px=IMAGE_SIZE_PX, in_channels=2, n_classes=2, **self.space_options
            )

    def make_strategy(self, space: Any, **options: Any) -> Any:
        """Build the strategy under test as the search stage does."""
        return construct(
            strategies.get(self.strategy),
            {"latency_weight": 0.0, "seed": 5, **self.options, **options},
            where="the suite",
            profiler=ArithmeticProfiler(space),
            pretrain_epochs=self.pretrain_epochs,
        )

    def make_evaluator(self, prepared: Path, folder: Path, *, epochs: int | None = None) -> Any:
        """Build the evaluator of a short search."""
        return evaluators.get("segmentation")(
            str(prepared),
            SEQUENCES,
            folder=str(folder),
            epochs=epochs or self.epochs,
            steps_per_epoch=2,
            batch_size=4,
            seed=5,
        )

    def search(
        self, prepared: Path, folder: Path, *, epochs: int | None = None, **options: Any
    ) -> tuple[Any, dict[str, Architecture]]:
        """Run the strategy under test; return it and what it found."""
        space = self.make_space()
        evaluator = self.make_evaluator(prepared, folder, epochs=epochs)
        strategy = explore(space, evaluator, self.make_strategy(space, **options))
        return strategy, found_architectures(strategy, self.make_space())

    def test_is_a_documented_nni_strategy(self) -> None:
        assert isinstance(self.make_strategy(self.make_space()), Strategy)
        assert next(entry for entry in strategies.entries() if entry.name == self.strategy).summary

    def test_unknown_option_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="unknown option 'no_such_option'"):
            self.make_strategy(self.make_space(), no_such_option=1)

    def test_finds_legal_networks_with_finite_logits(self, prepared: Path, tmp_path: Path) -> None:
        _, found = self.search(prepared, tmp_path)
        plain = self.make_space()
        assert set(found) >= {"teacher", "student"}
        for architecture in found.values():
            assert plain.architecture(architecture.sample()) == architecture
            logits = plain.derive(architecture).eval()(torch.zeros(1, 2, IMAGE_SIZE_PX, IMAGE_SIZE_PX))
            assert logits.shape == (1, 2, IMAGE_SIZE_PX, IMAGE_SIZE_PX) and bool(torch.isfinite(logits).all())

    def test_repeats_when_seed_is_the_same(self, prepared: Path, tmp_path: Path) -> None:
        torch.manual_seed(1)
        first, found = self.search(prepared, tmp_path / "first")
        torch.manual_seed(2)
        np.random.seed(2)
        second, again = self.search(prepared, tmp_path / "second")
        assert again == found
        assert trials_of(second) == trials_of(first)
        assert _history(tmp_path / "second") == _history(tmp_path / "first")

    def test_global_generators_and_current_trial_are_left_alone(self, prepared: Path, tmp_path: Path) -> None:
        torch.manual_seed(3)
        np.random.seed(3)
        expected = torch.rand(()), np.random.random()
        torch.manual_seed(3)
        np.random.seed(3)
        parameter = nni.get_current_parameter()
        self.search(prepared, tmp_path)
        assert (torch.rand(()), np.random.random()) == expected
        assert nni.get_current_parameter() is parameter

    def test_finished_search_run_again_finds_the_same_without_training(self, prepared: Path, tmp_path: Path) -> None:
        _, found = self.search(prepared, tmp_path)
        written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
        _, again = self.search(prepared, tmp_path)
        assert again == found
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == written

    def test_interrupted_and_resumed_search_equals_an_uninterrupted_one(
        self, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        module = type(self.make_evaluator(prepared, tmp_path / "probe").module)
        step = module.training_step
        steps: list[int] = []
        last: list[float] = [float("inf")]

        def counted(self: Any, batch: Any, batch_idx: int) -> Any:
            steps.append(batch_idx)
            if len(steps) > last[0]:
                raise _PowerCut
            return step(self, batch, batch_idx)

        monkeypatch.setattr(module, "training_step", counted)
        # An epoch more, so that the one that is cut off comes after the architecture has moved.
        epochs = self.epochs + 1
        whole, found = self.search(prepared, tmp_path / "whole", epochs=epochs)
        last[0] = 0.8 * len(steps)
        steps.clear()
        with pytest.raises(_PowerCut):
            self.search(prepared, tmp_path / "cut", epochs=epochs)
        last[0] = float("inf")
        resumed, again = self.search(prepared, tmp_path / "cut", epochs=epochs)
        assert again == found
        assert trials_of(resumed) == trials_of(whole)
        assert _history(tmp_path / "cut") == _history(tmp_path / "whole")
        assert _temperatures(resumed) == _temperatures(whole)

    def test_latency_weight_is_followed_or_noted(self, prepared: Path, tmp_path: Path) -> None:
        strategy = self.make_strategy(self.make_space(), latency_weight=0.5)
        followed = getattr(strategy, "latency_weight", 0.0) == 0.5
        noted = any("latency_weight 0.5 is ignored" in note for note in getattr(strategy, "notes", []))
        assert followed != noted
