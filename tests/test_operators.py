from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from nni.nas.space import model_context
from torch import nn

from glioma_nas.errors import ArchitectureError, UnknownNameError
from glioma_nas.registry import operators
from glioma_nas.search_spaces.layout import THESIS_OPERATORS, Layout
from glioma_nas.search_spaces.operators import enlarge, halve, is_skip, sharing_halves
from glioma_nas.testing.operator_suite import OperatorSuite


def plain(name: str, in_channels: int = 3, out_channels: int = 5, stride: int = 1) -> nn.Module:
    with model_context({}):
        return operators.get(name)(in_channels, out_channels, stride)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", THESIS_OPERATORS)
def test_operator_maps_channels_and_size(name: str, stride: int) -> None:
    output = plain(name, stride=stride)(torch.randn(2, 3, 16, 24))
    assert output.shape == (2, 5, 16 // stride, 24 // stride)


@pytest.mark.parametrize("name", THESIS_OPERATORS)
def test_operator_is_made_of_plain_layers_in_a_model_context(name: str) -> None:
    assert {type(module).__module__.split(".")[0] for module in plain(name).modules()} <= {"torch", "glioma_nas"}


def test_halve_equals_bilinear_interpolation_for_even_sizes() -> None:
    x = torch.randn(2, 3, 12, 18)
    torch.testing.assert_close(halve(x), F.interpolate(x, scale_factor=0.5, mode="bilinear", align_corners=False))


def test_enlarge_keeps_a_linear_ramp_linear() -> None:
    x = torch.arange(8.0).view(1, 1, 1, 8).expand(1, 1, 4, 8)
    inner = enlarge(x, 2)[0, 0, 0, 1:-1]
    torch.testing.assert_close(inner.diff(), torch.full((13,), 0.5))


@pytest.mark.parametrize(
    ("name", "convolutions"), [("conv3x3", 1), ("conv3x3_x2", 2), ("zoomed_conv", 1), ("zoomed_conv_x2", 2)]
)
def test_operator_has_its_number_of_convolutions(name: str, convolutions: int) -> None:
    sizes = [module.kernel_size for module in plain(name).modules() if isinstance(module, nn.Conv2d)]
    assert sizes == [(3, 3)] * convolutions


def test_zoomed_conv_equals_its_definition() -> None:
    operator = plain("zoomed_conv").eval()
    (conv,) = (module for module in operator.modules() if isinstance(module, nn.Conv2d))
    (norm,) = (module for module in operator.modules() if isinstance(module, nn.BatchNorm2d))
    norm.running_mean += 0.1
    x = torch.randn(1, 3, 8, 8)
    small = F.interpolate(x, scale_factor=0.5, mode="bilinear", align_corners=False)
    expected = F.interpolate(F.relu(norm(conv(small))), scale_factor=2, mode="bilinear", align_corners=False)
    torch.testing.assert_close(operator(x), expected)


def test_zoomed_conv_sees_twice_as_far_as_conv3x3() -> None:
    # The gradient of one output pixel reaches the receptive field.
    def reach(name: str) -> int:
        operator = plain(name, 1, 1).eval()
        for module in operator.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.ones_(module.weight)
        x = torch.ones(1, 1, 32, 32, requires_grad=True)
        operator(x)[0, 0, 16, 16].backward()
        assert x.grad is not None
        return int((x.grad[0, 0] != 0).any(dim=0).sum())

    assert reach("conv3x3") == 3
    assert reach("zoomed_conv") >= 6


def test_operator_refuses_other_strides() -> None:
    with pytest.raises(ArchitectureError, match="stride 3: allowed are 1"):
        plain("conv3x3", stride=3)


def test_is_skip_tells_the_skip_only() -> None:
    assert [name for name in THESIS_OPERATORS if is_skip(name)] == ["skip"]


def test_is_skip_names_the_nearest_operator_when_unknown() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'zoomed_conv'"):
        is_skip("zomed_conv")


def test_halves_are_shared_inside_a_block_only() -> None:
    x = torch.randn(1, 2, 8, 8)
    with sharing_halves():
        assert halve(x) is halve(x)
        assert halve(x.clone()) is not halve(x)
    assert halve(x) is not halve(x)
    torch.testing.assert_close(halve(x), F.avg_pool2d(x, 2))


def registered_in_tree() -> list[str]:
    return [entry.name for entry in operators.entries() if entry.origin == "in-tree"]


# The shared suite over every operator that ships, so that none can be added without it.
for _name in registered_in_tree():
    _title = "Test" + _name.title().replace("_", "")
    globals()[_title] = type(_title, (OperatorSuite,), {"name": _name})


def test_operators_beside_the_five_are_offered_but_not_in_a_space_by_default() -> None:
    extra = {"grouped_conv", "dilated_conv", "depthwise_separable", "mbconv"}
    assert set(registered_in_tree()) == set(THESIS_OPERATORS) | extra
    assert Layout.from_options("thesis").operators == THESIS_OPERATORS


def test_grouped_conv_has_two_groups_and_dilated_conv_rate_two() -> None:
    def only_conv(name: str) -> nn.Conv2d:
        (conv,) = (module for module in plain(name, 4, 8).modules() if isinstance(module, nn.Conv2d))
        return conv

    assert only_conv("grouped_conv").groups == 2
    assert only_conv("grouped_conv").weight.shape == (8, 2, 3, 3)
    assert only_conv("dilated_conv").dilation == (2, 2)


def test_depthwise_separable_convolves_each_channel_by_itself() -> None:
    groups = [m.groups for m in plain("depthwise_separable", 6, 4).modules() if isinstance(m, nn.Conv2d)]
    assert groups == [6, 1]


def test_mbconv_adds_its_input_where_shapes_agree() -> None:
    x = torch.randn(1, 4, 8, 8)
    for out_channels, stride, added in ((4, 1, True), (8, 1, False), (4, 2, False)):
        module = plain("mbconv", 4, out_channels, stride).eval()
        expected = module.body(x) + x if added else module.body(x)
        torch.testing.assert_close(module(x), expected)
