"""`latency_darts` on model spaces that know nothing of this package.

They offer what the spaces of NNI's own tests of one-shot strategies offer: choices of layers, of inputs, of channels,
of kernel sizes and of features, on small images and ten classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import nni
import pytest
import torch
import torch.nn.functional as F
from nni.nas.evaluator.pytorch import Classification
from nni.nas.nn.pytorch import (
    InputChoice,
    LayerChoice,
    ModelSpace,
    MutableBatchNorm2d,
    MutableConv2d,
    MutableLinear,
    Repeat,
)
from nni.nas.profiler import Profiler
from torch import Tensor, nn

from glioma_nas.errors import ArchitectureError
from glioma_nas.nni_bridge import explore
from glioma_nas.seeding import isolated_torch_rng
from glioma_nas.strategies.one_shot import LatencyDarts

SIDE = 12


class Separable(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(1, 1, 3, padding=1)
        self.pointwise = nn.Conv2d(1, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.depthwise(x))


class LayersAndInputs(ModelSpace):
    """Choices of layers and of one of two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = LayerChoice([nn.Conv2d(1, 8, 3, padding=1), Separable(8)], label="first")
        self.second = LayerChoice({"identity": nn.Identity(), "conv": nn.Conv2d(8, 8, 3, padding=1)}, label="second")
        self.drop = LayerChoice([nn.Dropout(0.1), nn.Dropout(0.5)], label="drop")
        self.source = InputChoice(2, n_chosen=1, label="source")
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        early = F.relu(self.first(x))
        late = F.relu(self.second(early))
        return self.head(self.drop(self.source([early, late])).mean((2, 3)))


class Channels(ModelSpace):
    """Choices of channels, shared between a convolution, its norm and the next layer."""

    def __init__(self) -> None:
        super().__init__()
        channels = nni.choice("channels", [4, 8])
        features = nni.choice("features", [6, 12])
        self.conv = MutableConv2d(1, channels, 3, padding=1)
        self.norm = MutableBatchNorm2d(channels)
        self.hidden = MutableLinear(channels, features)
        self.head = MutableLinear(features, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.hidden(F.relu(self.norm(self.conv(x))).mean((2, 3)))))


class Kernels(ModelSpace):
    """Choices of the kernel size with a padding that follows it."""

    def __init__(self) -> None:
        super().__init__()
        kernel = nni.choice("kernel", [1, 3, 5])
        self.conv = MutableConv2d(1, 8, kernel, padding=kernel // 2)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv(x)).mean((2, 3)))


class TwoInputs(ModelSpace):
    def __init__(self) -> None:
        super().__init__()
        self.source = InputChoice(3, n_chosen=2, label="sources")
        self.head = nn.Linear(1, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.source([x, 2 * x, 3 * x]).mean((2, 3)))


class Depth(ModelSpace):
    def __init__(self) -> None:
        super().__init__()
        self.body = Repeat(lambda index: nn.Conv2d(1, 1, 3, padding=1), (1, 3), label="depth")
        self.head = nn.Linear(1, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


class PricedByIndex(Profiler):
    """The later a value stands in its choice, the slower it is."""

    def __init__(self, space: Any) -> None:
        super().__init__(space)
        self._values = {label: list(mutable.values) for label, mutable in space.simplify().items()}

    def profile(self, sample: Mapping[str, Any]) -> float:
        chosen = {k: v[0] if isinstance(v, list) else v for k, v in sample.items()}
        return float(sum(values.index(chosen[label]) for label, values in self._values.items()))

    def expectation(self, weights: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([w @ torch.arange(len(w), dtype=w.dtype) for w in weights.values()]).sum()


def search(space_class: type[ModelSpace], **options: Any) -> LatencyDarts:
    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.rand(16, 1, SIDE, SIDE), torch.randint(10, (16,)))
    with isolated_torch_rng(0, "space"):
        space = space_class()
    evaluator = Classification(
        train_dataloaders=nni.trace(torch.utils.data.DataLoader)(data, batch_size=4),
        val_dataloaders=nni.trace(torch.utils.data.DataLoader)(data, batch_size=4),
        num_classes=10,
        max_epochs=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    settings = {
        "latency_weight": 0.0,
        "pretrain_epochs": 1,
        "architecture_learning_rate": 0.3,
        "profiler": PricedByIndex(space),
        **options,
    }
    strategy: LatencyDarts = explore(space, evaluator, LatencyDarts(**settings))
    return strategy


@pytest.mark.slow
@pytest.mark.parametrize("space_class", [LayersAndInputs, Channels, Kernels])
def test_search_finds_a_network_of_the_space_that_runs(space_class: type[ModelSpace]) -> None:
    strategy = search(space_class)
    (model,) = strategy.list_models()
    network = model.executable_model()
    assert network(torch.zeros(2, 1, SIDE, SIDE)).shape == (2, 10)
    plain = space_class()
    assert plain.contains(strategy.found["student"].sample())


@pytest.mark.slow
@pytest.mark.parametrize("space_class", [LayersAndInputs, Channels, Kernels])
def test_every_choice_follows_a_heavy_latency_weight(space_class: type[ModelSpace]) -> None:
    strategy = search(space_class, latency_weight=100.0, latency_coefficients=(1.0, 1.0, 1.0))
    assert strategy.profiler.profile(strategy.found["student"].sample()) == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("space_class", [LayersAndInputs, Channels, Kernels])
def test_every_choice_gets_gradient_from_the_loss(space_class: type[ModelSpace]) -> None:
    strategy = search(space_class)
    parameters = strategy.oneshot_module.architectures["student"]
    assert set(parameters.logits) == set(strategy.found["student"].choices)
    for label, logits in parameters.logits.items():
        assert float(logits.detach().abs().max()) > 0.05, label  # Adam at 0.3 has moved it from 1e-3


def test_choice_of_two_inputs_is_refused() -> None:
    with pytest.raises(ArchitectureError, match="'sources' takes 2 inputs; only choices of exactly one"):
        search(TwoInputs)


def test_choice_of_depth_is_refused() -> None:
    with pytest.raises(ArchitectureError, match=r"cannot become a supernet \(.*Repeat.*supported are LayerChoice"):
        search(Depth)
