"""A new operator as a pip package: a 7×7 depthwise convolution between the channels' 1×1 mixing.

``pip install ./examples/operator_package``, then name it: ``operators: [skip, conv3x3, large_kernel]``.

Reference: Liu et al., A ConvNet for the 2020s, CVPR 2022, https://arxiv.org/abs/2201.03545.
"""

from __future__ import annotations

from typing import Any

from nni.nas.nn.pytorch import MutableBatchNorm2d, MutableConv2d
from torch import Tensor, nn

from glioma_nas.registry import operators


@operators.register("large_kernel")
class LargeKernel(nn.Module):
    """A 7×7 convolution of each channel by itself, then a 1×1 convolution across channels.

    Args:
        in_channels: Channels of the input; a number or an expression of width choices.
        out_channels: Channels of the output, likewise.
        stride: 1 keeps the size, 2 halves it.
    """

    def __init__(self, in_channels: Any, out_channels: Any, stride: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            MutableConv2d(in_channels, in_channels, 7, stride=stride, padding=3, groups=in_channels, bias=False),
            MutableBatchNorm2d(in_channels),
            MutableConv2d(in_channels, out_channels, 1, bias=False),
            MutableBatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H/stride, W/stride)."""
        return self.layers(x)  # type: ignore[no-any-return]  # nn.Sequential is untyped
