"""The split-attention block of ResNeSt, its parameters named as in timm so that published weights fit.

Reference:
    Zhang et al., ResNeSt: Split-Attention Networks, CVPR Workshops 2022, https://arxiv.org/abs/2004.08955, sec. 3.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SplitAttention(nn.Module):
    """3×3 convolution into R splits that are added with weights of their own for every channel.

    With U_r the splits and s = GAP(Σ_r U_r), the weights are a_r = softmax_r(W₂·ReLU(BN(W₁ s))) for each channel, and
    the output is Σ_r a_r ⊙ U_r (ResNeSt, eq. 1 and 2, with one cardinal group). Each split sees its own 1/R of the
    input channels.

    Args:
        in_channels: Channels of the input; divisible by ``radix``.
        channels: Channels of the output.
        radix: Number of splits R.
        reduction: W₁ maps to max(32, channels·R/reduction) channels, as published, but never to more than ``channels``.
    """

    def __init__(self, in_channels: int, channels: int, *, radix: int = 2, reduction: int = 4) -> None:
        super().__init__()
        self.radix = radix
        hidden = min(channels, max(32, channels * radix // reduction))
        self.conv = nn.Conv2d(in_channels, channels * radix, 3, padding=1, groups=radix, bias=False)
        self.bn0 = nn.BatchNorm2d(channels * radix)
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.fc2 = nn.Conv2d(hidden, channels * radix, 1)

    def splits(self, x: Tensor) -> Tensor:
        """Return U of (N, in_channels, H, W) as (N, R, channels, H, W)."""
        both: Tensor = self.bn0(self.conv(x))
        split: Tensor = torch.relu(both).unflatten(1, (self.radix, -1))
        return split

    def weights(self, splits: Tensor) -> Tensor:
        """Return the attention of splits (N, R, F, H, W), (N, R, F, 1, 1), which sums to 1 over R."""
        pooled = splits.sum(dim=1).mean(dim=(2, 3), keepdim=True)
        raw = self.fc2(torch.relu(self.bn1(self.fc1(pooled))))
        return torch.softmax(raw.unflatten(1, (self.radix, -1)), dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, channels, H, W) of (N, in_channels, H, W)."""
        splits = self.splits(x)
        weighted: Tensor = self.weights(splits) * splits
        return weighted.sum(dim=1)


class SplitAttentionBlock(nn.Module):
    """Residual bottleneck around a `SplitAttention`: 1×1, split attention, average pooling for the stride, 1×1.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output; the bottleneck has a quarter, at least 4.
        stride: 1 or 2; both paths are pooled, as in ResNeSt.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        width = max(4, out_channels // 4)
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = SplitAttention(width, width)
        self.pool: nn.Module = nn.AvgPool2d(3, stride, 1) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.AvgPool2d(stride, stride, ceil_mode=True) if stride > 1 else nn.Identity(),
                nn.Conv2d(in_channels, out_channels, 1, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, out_channels, ⌈H/stride⌉, ⌈W/stride⌉)."""
        narrow = self.pool(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(self.bn3(self.conv3(narrow)) + self.downsample(x))
