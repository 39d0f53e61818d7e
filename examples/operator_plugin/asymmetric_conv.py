"""A new operator in one file: a 3×3 convolution factored into a row and a column.

Use it by name: ``plugins: [asymmetric_conv.py]`` and, in ``search.space_options``, ``operators: [skip, conv3x3,
asymmetric_conv]``. The supernet, the latency table, the decoder, the derived network and the export need no change.

Reference: Szegedy et al., Rethinking the Inception Architecture, CVPR 2016, https://arxiv.org/abs/1512.00567.
"""

from __future__ import annotations

from typing import Any

from nni.nas.nn.pytorch import MutableBatchNorm2d, MutableConv2d
from torch import Tensor, nn

from glioma_nas.registry import operators


@operators.register("asymmetric_conv")
class AsymmetricConv(nn.Module):
    """A 1×3 convolution, then a 3×1 convolution: two thirds of the work of a 3×3 one.

    Args:
        in_channels: Channels of the input; a number or an expression of width choices.
        out_channels: Channels of the output, likewise.
        stride: 1 keeps the size, 2 halves it.
    """

    def __init__(self, in_channels: Any, out_channels: Any, stride: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            MutableConv2d(in_channels, out_channels, (1, 3), stride=(1, stride), padding=(0, 1), bias=False),
            MutableConv2d(out_channels, out_channels, (3, 1), stride=(stride, 1), padding=(1, 0), bias=False),
            MutableBatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H/stride, W/stride)."""
        return self.layers(x)  # type: ignore[no-any-return]  # nn.Sequential is untyped
