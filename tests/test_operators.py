from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from nni.nas.space import model_context
from torch import nn

from glioma_nas.errors import ArchitectureError, UnknownNameError
from glioma_nas.registry import operators
from glioma_nas.search_spaces.layout import THESIS_OPERATORS
from glioma_nas.search_spaces.operators import enlarge, halve, is_skip


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
