from __future__ import annotations

from typing import Any

import pytest
import torch
from supernets import SlotStrategy, random_sample, soft
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from glioma_nas.costs import OperatorSpec
from glioma_nas.errors import ResourceError, UnknownNameError
from glioma_nas.relaxation import Relaxation
from glioma_nas.search_spaces.nasbranet import NASBraNet
from glioma_nas.search_spaces.network_figures import count_saved_bytes, operator_figures, saved_bytes
from glioma_nas.search_spaces.search_memory import SearchMemory

TABLE_4_1 = (32, 64)


def figures(operator: str, stride: int = 1, channels: int = 256) -> Any:
    return operator_figures(OperatorSpec(operator, channels, channels, stride, *TABLE_4_1))


def test_convolution_has_the_macs_and_parameters_of_the_formula() -> None:
    found = figures("conv3x3")
    assert found.macs == 256 * 256 * 9 * 32 * 64
    assert found.params == 256 * 256 * 9 + 2 * 256
    # Input, the convolution's output and the ReLU's, all float32, and mean and deviation of the batch norm.
    assert found.activation_bytes == 4 * (3 * 256 * 32 * 64 + 2 * 256)


def test_operators_of_table_4_1_compare_as_they_must() -> None:
    conv, grouped, dilated, zoomed = (figures(n) for n in ("conv3x3", "grouped_conv", "dilated_conv", "zoomed_conv"))
    assert grouped.macs * 2 == conv.macs
    assert dilated.macs == conv.macs
    assert zoomed.macs * 4 == conv.macs
    # The table prints a quarter of the parameters for the zoomed convolution; zooming changes none.
    assert zoomed.params == dilated.params == conv.params
    assert grouped.params == 256 * 128 * 9 + 2 * 256
    assert conv.relative_receptive_field == 1
    assert dilated.receptive_field_px == 5
    assert figures("conv3x3_x2").receptive_field_px == 5
    assert figures("conv3x3_x2", stride=2).receptive_field_px == 3 + 2 * 2
    assert zoomed.relative_receptive_field >= 2


def test_unknown_operator_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'conv3x3'"):
        figures("conv3x")


@pytest.mark.parametrize("seed", range(4))
def test_architecture_counts_equal_those_of_the_real_network(seed: int) -> None:
    space = NASBraNet("tiny", n_layers=6)
    sample = random_sample(space, seed)
    found, network = space.figures(sample), space.derive(sample)
    image = torch.randn(1, 2, 32, 32)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network.eval()(image)
    assert found.macs_g == pytest.approx(counter.get_total_flops() / 2e9)
    total = sum(parameter.numel() for parameter in network.parameters())
    auxiliary = sum(parameter.numel() for parameter in network.auxiliary.parameters())
    assert found.params_m == pytest.approx((total - auxiliary) / 1e6)
    assert found.auxiliary_params_m == pytest.approx(auxiliary / 1e6)
    assert found.activation_mb == pytest.approx(count_saved_bytes(network, image) / 1e6)
    assert found.row()["macs_g"] == found.macs_g


def test_receptive_field_of_a_branch_covers_what_its_gradient_reaches() -> None:
    space = NASBraNet("tiny", n_layers=4, n_branches=1, operators=["conv3x3"], image_size_px=128)
    sample = random_sample(space, 0) | {"branches": "4", "in_s4_l3": [0], "in_s4_l4": [1]}
    network = space.derive(sample).eval()
    for parameter in network.parameters():
        nn.init.constant_(parameter, 0.01)
    features: list[torch.Tensor] = []
    network.cells["s4_l4_keep"].register_forward_hook(lambda *given: features.append(given[-1]))
    x = torch.ones(1, 2, 128, 128, requires_grad=True)
    network(x)
    (gradient,) = torch.autograd.grad(features[0][0, :, 16, 16].sum(), x)
    reached = (gradient[0].abs().sum(0) != 0).any(0).sum()
    # Stem 3, then at spacing 2: two convolutions, one of them strided, then at spacing 4 two more.
    assert int(reached) == 3 + 2 * 2 + 2 * 2 + 2 * 4 + 2 * 4
    assert space.figures(sample).receptive_field_px == {4: int(reached)}
    assert space.figures(sample).relative_receptive_field == {4: int(reached) / 128}


def test_every_choice_has_figures() -> None:
    space = NASBraNet("tiny", operators=["skip", "mbconv"])
    found = space.operator_figures()
    assert set(found) == set(space.operator_specs())
    assert all(item.macs > 0 and item.params > 0 and item.activation_bytes > 0 for item in found.values())


@pytest.mark.parametrize("train_weights", [True, False])
def test_search_memory_holds_what_a_real_pass_keeps(train_weights: bool) -> None:
    space = NASBraNet("tiny")
    estimate = space.search_memory(2)
    strategy = SlotStrategy()
    strategy.mutate_model(space)
    relaxation, *_ = soft(space.layout, "teacher", width_index=1)
    if train_weights:
        constant = {label: weight.detach() for label, weight in relaxation.weights.items()}
        relaxation = Relaxation("teacher", constant, relaxation.values)
    for parameter in space.parameters():
        parameter.requires_grad_(train_weights)
    with strategy.relaxation_slot.using(relaxation), saved_bytes(space) as saved:
        losses = [logits.log_softmax(1).square().mean() for logits in space.train()(torch.randn(2, 2, 32, 32)).values()]
    assert losses
    # The larger of the two passes is what counts.
    assert saved.total <= estimate.activation_bytes * 1.02
    assert saved.total >= estimate.activation_bytes * 0.5
    assert estimate.gradient_bytes == 4 * sum(parameter.numel() for parameter in space.parameters())


@pytest.mark.slow
def test_search_memory_grows_with_the_batch_and_allocates_nothing() -> None:
    space = NASBraNet("thesis")
    one, two = space.search_memory(1, architectures=("student",)), space.search_memory(2, architectures=("student",))
    assert two.activation_bytes == pytest.approx(2 * one.activation_bytes, rel=0.01)
    assert one.total_bytes > 2e9  # far more than this test takes


def test_search_that_does_not_fit_is_refused_with_advice() -> None:
    memory = SearchMemory(100, 100, 100, 4000, 1000, batch_size=5)
    assert memory.total_bytes == 5300
    memory.require(5300)
    assert memory.largest_batch(5299) == 4
    with pytest.raises(ResourceError, match=r"batches of 5 needs about .* set search.batch_size to 4 or less"):
        memory.require(5299)
    with pytest.raises(ResourceError, match="not even one slice fits: choose a smaller preset"):
        memory.require(500)
