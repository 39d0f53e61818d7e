"""What is planted in a space is found: a useless operator is avoided, a slow one too, and λ trades Dice for latency."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from test_one_shot import SizeProfiler, make_evaluator
from torch import Tensor

from glioma_nas.costs import OperatorSpec
from glioma_nas.nni_bridge import explore
from glioma_nas.registry import operators
from glioma_nas.search_spaces.nasbranet import NASBraNet
from glioma_nas.search_spaces.operators import Conv3x3
from glioma_nas.seeding import isolated_torch_rng
from glioma_nas.strategies.one_shot import LatencyDarts
from glioma_nas.testing.prepared_phantoms import prepare_phantom_cohort

pytestmark = pytest.mark.slow

OPERATORS = ("conv3x3", "planted_noise", "planted_slow")


class Noise(Conv3x3):
    """Noise that knows nothing of the input."""

    def forward(self, x: Tensor) -> Tensor:
        output = super().forward(x)
        return torch.randn_like(output) + 0.0 * output


class Slow(Conv3x3):
    """A convolution under another name, priced at six times its cost."""


class PlantedProfiler(SizeProfiler):
    @staticmethod
    def price(spec: OperatorSpec) -> float:
        return SizeProfiler.price(spec) * (6 if spec.operator == "planted_slow" else 1)


@pytest.fixture(scope="module", autouse=True)
def planted() -> Iterator[None]:
    entries = {"planted_noise": Noise, "planted_slow": Slow}
    for name, operator in entries.items():
        operators.register(name)(operator)
    yield
    for name in entries:
        operators._entries.pop(name)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_phantom_cohort(tmp_path_factory.mktemp("phantom"), n_patients=8, image_size_px=32)


def search(prepared: Path, folder: Path, latency_weight: float) -> Mapping[str, Any]:
    with isolated_torch_rng(0, "space"):
        space = NASBraNet("tiny", image_size_px=32, in_channels=2, n_classes=2, operators=OPERATORS)
    strategy = LatencyDarts(
        profiler=PlantedProfiler(space),
        latency_weight=latency_weight,
        latency_coefficients=(1.0, 1.0, 1.0),
        pretrain_epochs=2,
        pretrain_widths=("max",),
        search_widths=("sampled",),
        architecture_learning_rate=0.1,
        finetune_steps=0,
        recalibration_batches=1,
        seed=3,
    )
    evaluator = make_evaluator(prepared, folder, epochs=8, steps_per_epoch=8, learning_rate=0.1)
    explore(space, evaluator, strategy)
    parameters = strategy.oneshot_module.architectures["student"]
    alpha = torch.stack([parameters.logits[label].detach().softmax(0) for label in parameters.groups["operator"]])
    found = strategy.found["student"]
    plain = NASBraNet("tiny", image_size_px=32, in_channels=2, n_classes=2, operators=OPERATORS)
    return {
        "alpha": dict(zip(OPERATORS, alpha.mean(0).tolist(), strict=True)),
        "used": [step.operator for step in plain.plan(found.sample()).steps],
        "latency_ms": float(strategy.profiler.profile(found.sample())),
    }


@pytest.fixture(scope="module")
def results(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[float, Mapping[str, Any]]:
    folder = tmp_path_factory.mktemp("searches")
    return {weight: search(prepared, folder / str(weight), weight) for weight in (0.0, 0.0003, 0.003)}


def test_useless_operator_is_avoided_by_its_loss_alone(results: dict[float, Mapping[str, Any]]) -> None:
    alpha = results[0.0]["alpha"]
    assert alpha["planted_noise"] < 0.5 * min(alpha["conv3x3"], alpha["planted_slow"])
    assert "planted_noise" not in results[0.0]["used"]


def test_slow_twin_of_an_operator_is_avoided_once_latency_counts(results: dict[float, Mapping[str, Any]]) -> None:
    for weight in (0.0003, 0.003):
        assert results[weight]["alpha"]["planted_slow"] < 0.5 * results[weight]["alpha"]["conv3x3"]
    assert "planted_slow" not in results[0.003]["used"]


def test_latency_falls_with_every_increase_of_the_latency_weight(results: dict[float, Mapping[str, Any]]) -> None:
    latencies = [results[weight]["latency_ms"] for weight in sorted(results)]
    assert latencies[0] > latencies[1] > latencies[2]
    assert latencies[2] < 0.5 * latencies[0]


def test_widths_that_help_are_wide_while_latency_counts_nothing(prepared: Path, tmp_path: Path) -> None:
    # One channel a scale is too few for anything: width is what is planted. Without a gradient from the loss the
    # probabilities stay where they began, at a ratio of about 1.
    with isolated_torch_rng(1, "space"):
        space = NASBraNet(
            "tiny", image_size_px=32, in_channels=2, n_classes=2, operators=("conv3x3", "zoomed_conv"), widths=(1, 2, 4)
        )
    strategy = LatencyDarts(
        latency_weight=0.0,
        pretrain_epochs=2,
        pretrain_widths=("max", "min"),
        search_widths=("sampled", "min"),
        architecture_learning_rate=0.05,
        finetune_steps=0,
        recalibration_batches=1,
        seed=1,
    )
    explore(space, make_evaluator(prepared, tmp_path, epochs=12, steps_per_epoch=10, learning_rate=0.1), strategy)
    parameters = strategy.oneshot_module.architectures["student"]
    probability = torch.stack([parameters.logits[name].detach().softmax(0) for name in parameters.groups["width"]])
    narrow, *_, wide = probability.mean(0).tolist()
    assert wide > 1.5 * narrow
