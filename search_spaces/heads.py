"""Stem, branch-merging head and auxiliary heads: what stands before and behind the searched cells.

They belong to one architecture each (student, teacher) and are never shared, because their widths are fixed.

Reference: METHOD §2 (heads); Chen et al., FasterSeg, ICLR 2020 (feature fusion of branches).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from nni.nas.nn.pytorch import MutableConv2d
from torch import Tensor, nn

from glioma_nas.search_spaces.operators import Channels, conv_bn_relu, enlarge


class Stem(nn.Module):
    """Bring the image to the finest scale.

    Args:
        kind: ``light`` (one strided 3×3 convolution for each halving), ``two`` (one more at stride 1) or ``fasterseg``
            (one strided convolution, then pairs of convolutions, strided while halvings are left).
        in_channels: Sequences of the image.
        out_channels: Channels of its output.
        scale: The finest scale, a power of two.
    """

    def __init__(self, kind: str, in_channels: int, out_channels: Channels, scale: int) -> None:
        super().__init__()
        strides = [2] * (scale.bit_length() - 1)
        if kind == "two":
            strides.append(1)
        elif kind == "fasterseg":
            rest = strides[1:] or [1]
            strides = [2, *(stride for strided in rest for stride in (strided, 1))]
        units = [
            conv_bn_relu(in_channels if index == 0 else out_channels, out_channels, stride=stride)
            for index, stride in enumerate(strides)
        ]
        self.body = nn.Sequential(*units)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C_out, H/scale, W/scale)."""
        output: Tensor = self.body(x)
        return output


class FusionHead(nn.Module):
    """Merge the branches that end at ``scales`` and classify every pixel.

    From the coarsest branch on: 1×1 convolution, bilinear enlargement, concatenation with the next finer branch, 3×3
    convolution. The result and the finest branch are concatenated, fused by a 1×1 convolution, and classified by a 3×3
    and a 1×1 convolution, enlarged to the input's size.

    Args:
        scales: Final scales, increasing.
        end_width: Each branch brings ``end_width · scale`` channels.
        channels: Channels inside the head.
        n_classes: Channels of the logits.
        given: Scales of the features that it is called with, in their order; by default just ``scales``.
    """

    def __init__(
        self,
        scales: Sequence[int],
        end_width: Channels,
        channels: int,
        n_classes: int,
        *,
        given: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.scales = tuple(scales)
        self._position = {scale: index for index, scale in enumerate(scales if given is None else given)}
        coarse_to_fine = self.scales[::-1]
        self.reduce = nn.ModuleList()
        self.refine = nn.ModuleList()
        incoming = end_width * coarse_to_fine[0]
        for finer in coarse_to_fine[1:]:
            self.reduce.append(conv_bn_relu(incoming, channels, kernel_size=1))
            self.refine.append(conv_bn_relu(end_width * finer + channels, channels))
            incoming = channels
        joined = end_width * self.scales[0] + (channels if len(self.scales) > 1 else 0)
        self.fuse = conv_bn_relu(joined, channels, kernel_size=1)
        self.classify = nn.Sequential(conv_bn_relu(channels, channels), MutableConv2d(channels, n_classes, 1))

    def forward(self, *features: Tensor) -> Tensor:
        """Return logits.

        Args:
            features: For each scale s that is given (N, end_width·s, H/s, W/s). One by one and not as a mapping: NNI's
                Proxyless strategy saves what a choice is called with, and can save tensors only.

        Returns:
            Shape (N, K, H, W), at the size of the network's input.
        """
        coarse_to_fine = [features[self._position[scale]] for scale in self.scales[::-1]]
        x, below = coarse_to_fine[0], self.scales[-1]
        for index, (finer, scale) in enumerate(zip(coarse_to_fine[1:], self.scales[-2::-1], strict=True)):
            x = enlarge(self.reduce[index](x), below // scale)
            x, below = self.refine[index](torch.cat([finer, x], dim=1)), scale
        if len(self.scales) > 1:
            x = torch.cat([coarse_to_fine[-1], x], dim=1)
        return enlarge(self.classify(self.fuse(x)), self.scales[0])


class AuxiliaryHead(nn.Module):
    """Classify every pixel from one branch alone; used in training only.

    Args:
        scale: Downsampling rate of the branch's end.
        end_width: The branch brings ``end_width · scale`` channels.
        channels: Channels inside the head.
        n_classes: Channels of the logits.
    """

    def __init__(self, scale: int, end_width: Channels, channels: int, n_classes: int) -> None:
        super().__init__()
        self.scale = scale
        self.body = nn.Sequential(
            conv_bn_relu(end_width * scale, channels, kernel_size=1), MutableConv2d(channels, n_classes, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, end_width·s, H/s, W/s) to logits (N, K, H, W)."""
        return enlarge(self.body(x), self.scale)


class AuxiliaryHeads(nn.Module):
    """One `AuxiliaryHead` for each final scale."""

    def __init__(self, scales: Sequence[int], end_width: Channels, channels: int, n_classes: int) -> None:
        super().__init__()
        self.heads = nn.ModuleDict(
            {str(scale): AuxiliaryHead(scale, end_width, channels, n_classes) for scale in scales}
        )

    def forward(self, features: Mapping[int, Tensor]) -> dict[str, Tensor]:
        """Return ``scale_<s>`` → logits (N, K, H, W)."""
        return {f"scale_{name}": head(features[int(name)]) for name, head in self.heads.items()}
