"""A cell's operators mixed in one go give what each of them gives by itself: logits, gradients, statistics."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from supernets import one_hot, random_sample, soft, tiny_supernet
from torch import Tensor, nn

from glioma_nas import registry
from glioma_nas.errors import ArchitectureError
from glioma_nas.relaxation import Relaxation
from glioma_nas.search_spaces.layout import THESIS_OPERATORS
from glioma_nas.search_spaces.network_figures import saved_bytes
from glioma_nas.search_spaces.operators import Conv3x3, ConvUnits
from glioma_nas.search_spaces.supernet import SearchCell

IMAGES = torch.randn(4, 2, 32, 32, generator=torch.Generator().manual_seed(3)).double()

Results = dict[str, Tensor]


def train_step(
    monkeypatch: pytest.MonkeyPatch, *, fused: bool, train_weights: bool = True, **options: object
) -> Results:
    """Return all that one pass changes or gives, in double precision."""
    monkeypatch.setattr(SearchCell, "fused", fused)
    space, slot = tiny_supernet(**options)
    space.double().requires_grad_(train_weights)
    relaxation, parameters, gates = soft(space.layout, "student", 1)
    with slot.using(replace(relaxation, auxiliary_skip=0.3)):
        outputs = space.train()(IMAGES)
    sum((logits - 1).square().mean() for logits in outputs.values()).backward()
    trained = {name: parameter for name, parameter in space.named_parameters() if parameter.grad is not None}
    searched = {f"search {label}": parameter for label, parameter in {**parameters, **gates}.items()}
    gradients = {name: parameter.grad for name, parameter in {**trained, **searched}.items()}
    return {**outputs, **gradients, **{f"buffer {name}": buffer for name, buffer in space.named_buffers()}}


@pytest.mark.parametrize("train_weights", [True, False])
@pytest.mark.parametrize(
    "operators", [THESIS_OPERATORS, ("skip", "grouped_conv", "dilated_conv", "mbconv", "depthwise_separable")]
)
def test_logits_gradients_and_statistics_are_those_of_each_operator_by_itself(
    monkeypatch: pytest.MonkeyPatch, operators: tuple[str, ...], train_weights: bool
) -> None:
    fused = train_step(monkeypatch, fused=True, operators=operators, train_weights=train_weights)
    plain = train_step(monkeypatch, fused=False, operators=operators, train_weights=train_weights)
    assert fused.keys() == plain.keys()
    assert any(name.startswith("cells.") for name in fused) == train_weights
    for name, value in plain.items():
        # Architecture weights are float32.
        torch.testing.assert_close(fused[name], value, rtol=1e-4, atol=1e-7, msg=lambda text, n=name: f"{n}: {text}")


def test_operator_that_changes_forward_is_called_and_not_taken_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    class Twice(Conv3x3):
        """A convolution whose result counts twice."""

        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    registry.operators.register("twice")(Twice)
    try:
        results = [train_step(monkeypatch, fused=fused, operators=("conv3x3", "twice")) for fused in (True, False)]
    finally:
        registry.operators._entries.pop("twice")
    for name, value in results[1].items():
        torch.testing.assert_close(results[0][name], value, rtol=1e-4, atol=1e-7)


def test_a_one_hot_pass_with_gradient_reaches_the_operators_that_were_not_chosen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = {}
    for fused in (True, False):
        monkeypatch.setattr(SearchCell, "fused", fused)
        space, slot = tiny_supernet()
        chosen = one_hot(space.layout, random_sample(space, 0), "student")
        straight = {label: weight.requires_grad_() for label, weight in chosen.weights.items()}
        with slot.using(Relaxation("student", straight, chosen.values)):
            sum(logits.square().mean() for logits in space.train()(IMAGES.float()).values()).backward()
        found[fused] = straight["op_s2_l1"].grad
    assert bool((found[True] != 0).all())
    torch.testing.assert_close(found[True], found[False], rtol=1e-3, atol=1e-6)


def test_a_pass_keeps_less_for_its_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {}
    for fused in (True, False):
        monkeypatch.setattr(SearchCell, "fused", fused)
        space, slot = tiny_supernet()
        relaxation, *_ = soft(space.layout, "student", 1)
        with slot.using(relaxation), saved_bytes(space) as saved:
            outputs = space.train()(IMAGES.float())
        kept[fused] = saved.total
        del outputs
    assert kept[True] < 0.8 * kept[False]


def test_shares_are_the_weights_as_numbers() -> None:
    weights = {"a": torch.tensor([0.25, 0.75], requires_grad=True), "b": torch.tensor([1.0])}
    assert Relaxation("student", weights, {}).shares == {"a": [0.25, 0.75], "b": [1.0]}


@pytest.mark.parametrize(
    "end",
    [[nn.BatchNorm2d(2)], [nn.ReLU()], [nn.BatchNorm2d(2, affine=False), nn.ReLU()], [nn.BatchNorm2d(2), nn.ReLU6()]],
)
def test_units_that_end_in_something_else_are_refused(end: list[nn.Module]) -> None:
    with pytest.raises(ArchitectureError, match=r"ConvUnits must end in batch norm .* and ReLU; derive"):
        ConvUnits(1, nn.Sequential(nn.Conv2d(2, 2, 1), *end))
