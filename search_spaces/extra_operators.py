"""Operators beside the five of the thesis: offered by name, in no space unless its options name them.

Table 4-1 of the thesis profiles the grouped and the dilated convolution beside the zoomed one; depthwise-separable
convolutions and inverted bottlenecks are what other efficient networks are made of.

Reference: Krizhevsky et al., NeurIPS 2012 (groups); Yu & Koltun, ICLR 2016 (dilation); Chollet, Xception, CVPR 2017,
https://arxiv.org/abs/1610.02357; Sandler et al., MobileNetV2, CVPR 2018, https://arxiv.org/abs/1801.04381.
"""

from __future__ import annotations

from nni.nas.nn.pytorch import MutableBatchNorm2d, MutableConv2d
from torch import Tensor, nn

from glioma_nas.registry import operators
from glioma_nas.search_spaces.operators import Channels, ConvUnits, check_stride, conv_bn_relu

MBCONV_EXPANSION = 4
"""Hidden channels of `MBConv` for each channel of its input."""


def _depthwise_bn_relu(channels: Channels, stride: int) -> list[nn.Module]:
    return [
        MutableConv2d(channels, channels, 3, stride=stride, padding=1, groups=channels, bias=False),
        MutableBatchNorm2d(channels),
        nn.ReLU(inplace=True),
    ]


@operators.register("grouped_conv")
class GroupedConv(ConvUnits):
    """One 3×3 convolution in two groups: half of the channels see half of the input. Channels must be even."""

    def __init__(self, in_channels: Channels, out_channels: Channels, stride: int) -> None:
        conv = MutableConv2d(in_channels, out_channels, 3, stride=stride, padding=1, groups=2, bias=False)
        super().__init__(stride, nn.Sequential(conv, MutableBatchNorm2d(out_channels), nn.ReLU(inplace=True)))


@operators.register("dilated_conv")
class DilatedConv(ConvUnits):
    """One 3×3 convolution whose taps are two pixels apart."""

    def __init__(self, in_channels: Channels, out_channels: Channels, stride: int) -> None:
        conv = MutableConv2d(in_channels, out_channels, 3, stride=stride, padding=2, dilation=2, bias=False)
        super().__init__(stride, nn.Sequential(conv, MutableBatchNorm2d(out_channels), nn.ReLU(inplace=True)))


@operators.register("depthwise_separable")
class DepthwiseSeparable(ConvUnits):
    """A 3×3 convolution of each channel by itself, then a 1×1 convolution across channels."""

    def __init__(self, in_channels: Channels, out_channels: Channels, stride: int) -> None:
        mixing = conv_bn_relu(in_channels, out_channels, kernel_size=1)
        super().__init__(stride, nn.Sequential(*_depthwise_bn_relu(in_channels, stride), *mixing))


@operators.register("mbconv")
class MBConv(nn.Module):
    """Inverted bottleneck: widen four times, 3×3 depthwise, project; its input is added where the shapes agree."""

    def __init__(self, in_channels: Channels, out_channels: Channels, stride: int) -> None:
        super().__init__()
        check_stride(stride)
        hidden = in_channels * MBCONV_EXPANSION
        self.body = nn.Sequential(
            *conv_bn_relu(in_channels, hidden, kernel_size=1),
            *_depthwise_bn_relu(hidden, stride),
            MutableConv2d(hidden, out_channels, 1, bias=False),
            MutableBatchNorm2d(out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C_in, H, W) to (N, C_out, H/stride, W/stride)."""
        output: Tensor = self.body(x)
        # Decided by the shapes and not at construction: in a supernet the widths differ from pass to pass, and the
        # derived network of those widths must do the same.
        return output + x if output.shape == x.shape else output
