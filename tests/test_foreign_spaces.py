"""`latency_darts` on model spaces that know nothing of this package.

They offer what the spaces of NNI's own tests of one-shot strategies offer: choices of layers, of inputs, of channels,
of kernel sizes and of features, on small images and ten classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    MutableMultiheadAttention,
    Repeat,
)
from nni.nas.profiler import Profiler
from torch import Tensor, nn

from glioma_nas.errors import ArchitectureError, ConfigError, SearchError
from glioma_nas.nni_bridge import explore
from glioma_nas.relaxation import Relaxation, RelaxationSlot
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


class NormedKernels(ModelSpace):
    """Choices of the kernel size and, depthwise, of channels, each before a batch norm, which undoes any factor."""

    def __init__(self) -> None:
        super().__init__()
        kernel = nni.choice("kernel", [1, 3, 5])
        channels = nni.choice("channels", [4, 8])
        self.first = MutableConv2d(1, channels, kernel, padding=kernel // 2)
        self.first_norm = MutableBatchNorm2d(channels)
        self.depthwise = MutableConv2d(channels, channels, 3, padding=1, groups=channels)
        self.depthwise_norm = MutableBatchNorm2d(channels)
        self.head = MutableLinear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first_norm(self.first(x)))
        x = F.relu(self.depthwise_norm(self.depthwise(x)))
        return self.head(x.square().mean((2, 3)))


class DilatedKernels(ModelSpace):
    """A choice of kernels whose taps lie two pixels apart."""

    def __init__(self) -> None:
        super().__init__()
        kernel = nni.choice("kernel", [1, 3, 5])
        self.first = MutableConv2d(1, 8, kernel, padding=kernel - 1, dilation=(2, 2))
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x).square().mean((2, 3)))


class Attention(ModelSpace):
    """A choice of what attention reads; ``chosen`` makes one inside it, where nothing can be mixed."""

    def __init__(self, chosen: Callable[[], dict[str, Any]] = dict) -> None:
        super().__init__()
        channels = nni.choice("channels", [4, 8])
        self.embed = MutableLinear(SIDE, channels)
        self.query = nn.Linear(SIDE, 16)
        arguments = {"embed_dim": 16, "num_heads": 2, "batch_first": True, **chosen()}
        self.attention = MutableMultiheadAttention(**arguments, kdim=channels, vdim=channels)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.squeeze(1)
        read = self.embed(rows)
        return self.head(self.attention(self.query(rows), read, read)[0].mean(1))


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


SPACES = [LayersAndInputs, Channels, Kernels, NormedKernels, Attention]


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


class SlowAlways(PricedByIndex):
    """Nothing is fast."""

    def profile(self, sample: Mapping[str, Any]) -> float:
        return 9.0


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
@pytest.mark.parametrize("space_class", SPACES)
def test_search_finds_a_network_of_the_space_that_runs(space_class: type[ModelSpace]) -> None:
    strategy = search(space_class)
    (model,) = strategy.list_models()
    network = model.executable_model()
    assert network(torch.zeros(2, 1, SIDE, SIDE)).shape == (2, 10)
    plain = space_class()
    assert plain.contains(strategy.found["student"].sample())


@pytest.mark.slow
@pytest.mark.parametrize("space_class", SPACES)
def test_every_choice_follows_a_heavy_latency_weight(space_class: type[ModelSpace]) -> None:
    strategy = search(space_class, latency_weight=100.0, latency_coefficients=(1.0, 1.0, 1.0))
    assert strategy.profiler.profile(strategy.found["student"].sample()) == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("space_class", SPACES)
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


def supernet_of(space: ModelSpace) -> tuple[ModelSpace, RelaxationSlot]:
    torch.manual_seed(0)
    strategy = LatencyDarts(latency_weight=0.0)
    strategy.mutate_model(space)
    for module in space.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.3)
            nn.init.constant_(module.bias, 0.5)  # nothing is dead behind a ReLU
    return space, strategy.relaxation_slot


@pytest.mark.parametrize("space_class", [Channels, Kernels, NormedKernels, DilatedKernels, Attention])
def test_pass_with_gates_computes_the_chosen_network_and_every_gate_learns(space_class: type[ModelSpace]) -> None:
    space, slot = supernet_of(space_class())
    space.eval()
    image = torch.rand(4, 1, SIDE, SIDE)
    values = {label: list(mutable.values) for label, mutable in space.simplify().items()}
    for index in (0, -1):
        chosen = {label: options[index] for label, options in values.items()}
        gates = {}
        for label, options in values.items():
            gates[label] = torch.zeros(len(options))
            gates[label][index] = 1.0
            gates[label].requires_grad_()
        with slot.using(Relaxation("student", {}, chosen)):
            expected = space(image)
        with slot.using(Relaxation("student", {}, chosen, gates)):
            found = space(image)
        assert torch.allclose(found, expected, atol=1e-5)
        F.cross_entropy(found, torch.tensor([1, 2, 3, 4])).backward()
        for label, gate in gates.items():
            assert gate.grad is not None and float(gate.grad.abs().min()) > 1e-6, label


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Attention(lambda: {"num_heads": nni.choice("heads", [1, 2])}), "whose num_heads is chosen cannot be"),
        (lambda: Attention(lambda: {"dropout": nni.choice("drop", [0.1, 0.5])}), "drop: .*whose dropout is chosen"),
        (lambda: Attention(lambda: {"embed_dim": 8}), "whose kdim may equal its embed_dim"),
        (
            lambda: Layer(lambda: MutableConv2d(1, 8, nni.choice("kernel", [1, 3]), padding=1)),
            "kernel: .*whose padding does not follow its kernel_size",
        ),
        (
            lambda: Layer(lambda: MutableConv2d(1, 8, (k := nni.choice("kernel", [3, 5])), padding=k // 2, dilation=2)),
            "kernel: .*whose padding does not follow its kernel_size",
        ),
        (lambda: Layer(lambda: MutableConv2d(1, 8, 3, stride=nni.choice("stride", [1, 2]))), "whose stride is chosen"),
        (lambda: Layer(lambda: MutableConv2d(1, nni.choice("width", [4, 8]), 3)), "choice 'width' gets no gradient"),
    ],
)
def test_choice_without_gradient_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ArchitectureError, match=message):
        supernet_of(make())


class Layer(ModelSpace):
    """One layer, whose output is summed up."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.layer = make()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).mean((1, 2, 3))


def test_hard_limit_binds_a_space_that_cannot_derive_networks() -> None:
    with pytest.raises(SearchError, match=r"no network of the student keeps latency_limit_ms 0\.5: the fastest of 1"):
        search(Channels, latency_limit_ms=0.5, profiler=SlowAlways(Channels()))


def test_what_needs_inherited_weights_is_refused_before_the_search() -> None:
    with pytest.raises(ConfigError, match=r"evolution_generations: Channels has no derive\(\)"):
        search(Channels, evolution_generations=2)
