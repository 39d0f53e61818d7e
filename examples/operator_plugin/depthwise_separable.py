"""A new operator in one file: depthwise-separable convolution.

Use it by name: ``plugins: [depthwise_separable.py]`` and, in ``search.space_options``, ``operators: [skip, conv3x3,
depthwise_separable]``. The supernet, the latency table, the decoder, the derived network and the export need no change.

Reference: Chollet, Xception, CVPR 2017, https://arxiv.org/abs/1610.02357.
"""

from __future__ import annotations

from typing import Any

from nni.nas.nn.pytorch import MutableBatchNorm2d, MutableConv2d
from torch import Tensor, nn

from glioma_nas.registry import operators


@operators.register("depthwise_separable")
class DepthwiseSeparable(nn.Module):
    """A 3×3 convolution of each channel by itself, then a 1×1 convolution across channels.

    Args:
        in_channels: Channels of the input; a number or an expression of width choices.
        out_channels: Channels of the output, likewise.
        stride: 1 keeps the size, 2 halves it.
    """

    def __init__(self, in_channels: Any, out_channels: Any, stride: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            MutableConv2d(in_channels, in_channels, 3, stride=stride, padding=1, groups=in_channels, bias=False),
            MutableBatchNorm2d(in_channels),
            nn.ReLU(inplace=True),
            MutableConv2d(in_channels, out_channels, 1, bias=False),
            MutableBatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H/stride, W/stride)."""
        return self.layers(x)  # type: ignore[no-any-return]  # nn.Sequential is untyped
