from __future__ import annotations

import nni
import pytest
import torch
import torch.nn.functional as F
from nni.mutable import frozen_context
from torch import nn

from glioma_nas.errors import ArchitectureError
from glioma_nas.relaxation import Relaxation, RelaxationSlot
from glioma_nas.search_spaces.super_kernel import (
    ActiveWidths,
    SlicedConv2d,
    SwitchableBatchNorm2d,
    inherit_weights,
)

SLOT = RelaxationSlot()
ACTIVE = ActiveWidths(SLOT, {"teacher": {"ends": 4}}, (2, 4))


def choice(label: str = "w") -> nni.mutable.Categorical:
    return nni.choice(label, [2, 4])


def using(**values: int):  # type: ignore[no-untyped-def]
    return SLOT.using(Relaxation("student", {}, values))


@pytest.mark.parametrize("width", [2, 4])
def test_sliced_conv_equals_a_small_conv_with_the_sliced_weight(width: int) -> None:
    conv = SlicedConv2d({"in_channels": 6, "out_channels": choice() * 3, "kernel_size": 3, "padding": 1}, ACTIVE)
    assert conv.weight.shape == (12, 6, 3, 3)
    small = nn.Conv2d(5, width * 3, 3, padding=1)
    with torch.no_grad():
        small.weight.copy_(conv.weight[: width * 3, :5])
        small.bias.copy_(conv.bias[: width * 3])
    x = torch.randn(2, 5, 7, 7)
    with using(w=width):
        torch.testing.assert_close(conv(x), small(x))


def test_sliced_conv_sends_gradient_to_its_slice_only() -> None:
    conv = SlicedConv2d({"in_channels": choice("i"), "out_channels": choice(), "kernel_size": 1}, ACTIVE)
    with using(w=2, i=2):
        conv(torch.randn(1, 2, 4, 4)).square().sum().backward()
    reached = conv.weight.grad[:, :, 0, 0] != 0
    assert reached[:2, :2].all()
    assert not reached[2:].any()
    assert not reached[:, 2:].any()


@pytest.mark.parametrize("width", [2, 4])
def test_sliced_conv_slices_depthwise_groups(width: int) -> None:
    channels = choice() * 2
    conv = SlicedConv2d(
        {"in_channels": channels, "out_channels": channels, "groups": channels, "kernel_size": 3, "bias": False}, ACTIVE
    )
    x = torch.randn(1, width * 2, 5, 5)
    with using(w=width):
        torch.testing.assert_close(conv(x), F.conv2d(x, conv.weight[: width * 2], groups=width * 2))


@pytest.mark.parametrize(("incoming", "outgoing"), [(4, 4), (4, 8), (8, 4), (8, 8)])
def test_sliced_conv_slices_each_of_a_fixed_number_of_groups(incoming: int, outgoing: int) -> None:
    conv = SlicedConv2d(
        {"in_channels": choice("i") * 2, "out_channels": choice() * 2, "groups": 2, "kernel_size": 3}, ACTIVE
    )
    assert conv.weight.shape == (8, 4, 3, 3)
    small = nn.Conv2d(incoming, outgoing, 3, groups=2)
    half_in, half_out = incoming // 2, outgoing // 2
    with torch.no_grad():
        # The second group's kernels start at row 4 of the widest, whatever the width.
        small.weight.copy_(torch.cat([conv.weight[:half_out, :half_in], conv.weight[4 : 4 + half_out, :half_in]]))
        small.bias.copy_(torch.cat([conv.bias[:half_out], conv.bias[4 : 4 + half_out]]))
    x = torch.randn(1, incoming, 5, 5)
    with using(w=outgoing // 2, i=incoming // 2):
        torch.testing.assert_close(conv(x), small(x))


def test_sliced_conv_refuses_channels_that_groups_do_not_divide() -> None:
    with pytest.raises(ArchitectureError, match="in 4 groups cannot have 2 out_channels; choose widths"):
        SlicedConv2d({"in_channels": 4, "out_channels": choice(), "groups": 4, "kernel_size": 1}, ACTIVE)


def test_sliced_conv_refuses_a_choice_of_kernel_size() -> None:
    with pytest.raises(ArchitectureError, match="choice in kernel_size"):
        SlicedConv2d({"in_channels": 2, "out_channels": 2, "kernel_size": nni.choice("k", [3, 5])}, ACTIVE)


def test_sliced_conv_refuses_more_channels_than_it_has() -> None:
    conv = SlicedConv2d({"in_channels": 2, "out_channels": choice(), "kernel_size": 1}, ACTIVE)
    with using(w=2), pytest.raises(ArchitectureError, match="cannot be sliced to 2x3"):
        conv(torch.randn(1, 3, 4, 4))


def test_batch_norm_statistics_do_not_leak_between_widths() -> None:
    norm = SwitchableBatchNorm2d({"num_features": choice() * 2, "momentum": 0.5})
    before = {name: value.clone() for name, value in norm.of_width(8).state_dict().items()}
    norm(torch.randn(3, 4, 5, 5) + 7)
    assert float(norm.of_width(4).running_mean.mean()) > 3
    for name, value in norm.of_width(8).state_dict().items():
        torch.testing.assert_close(value, before[name])


def test_batch_norm_names_its_widths_when_given_another() -> None:
    norm = SwitchableBatchNorm2d({"num_features": choice()})
    with pytest.raises(ArchitectureError, match="no batch norm for 3 channels; allowed: 2, 4"):
        norm(torch.randn(1, 3, 2, 2))


def test_active_widths_prefer_what_the_architecture_fixes() -> None:
    with SLOT.using(Relaxation("teacher", {}, {"ends": 2, "w": 2})):
        assert ACTIVE("ends") == 4
        assert ACTIVE("w") == 2
        with pytest.raises(ArchitectureError, match="gives no value for 'other'"):
            ACTIVE("other")


def test_inherit_weights_copies_the_slice_and_the_norm_of_that_width() -> None:
    with frozen_context():
        source = nn.Sequential(
            SlicedConv2d({"in_channels": 4, "out_channels": choice(), "kernel_size": 1}, ACTIVE),
            SwitchableBatchNorm2d({"num_features": choice()}),
        )
    source[1].of_width(2).running_mean.fill_(5.0)
    target = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2))
    inherit_weights(target, source)
    torch.testing.assert_close(target[0].weight, source[0].weight[:2, :3])
    torch.testing.assert_close(target[1].running_mean, torch.full((2,), 5.0))
    target[0].weight.data.zero_()
    assert bool(source[0].weight.any())


def test_inherit_weights_refuses_another_structure() -> None:
    with pytest.raises(ArchitectureError, match="no module '0'"):
        inherit_weights(nn.Sequential(nn.Conv2d(1, 1, 1)), nn.Sequential())
