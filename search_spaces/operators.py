"""The operators a cell chooses from, written once as ordinary modules of NNI mutable layers.

An operator is a class ``(in_channels, out_channels, stride)`` registered in `glioma_nas.registry.operators`. Channels
may be numbers or NNI expressions over width choices; the same class then serves the supernet (sliced super-kernels),
NNI's own strategies, the latency table and the derived network, where the mutable layers become plain ones.

A class with ``is_skip = True`` is a skip connection: at stride 1 the derived network may leave it out.

Reference: Chen et al., FasterSeg, ICLR 2020 (zoomed convolution), https://arxiv.org/abs/1912.10917.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from nni.nas.nn.pytorch import MutableBatchNorm2d, MutableConv2d
from torch import Tensor, nn

from glioma_nas.errors import ArchitectureError
from glioma_nas.registry import operators

Channels = Any
"""A number of channels: an int, or an NNI expression over width choices (NNI ships no types)."""


def conv_bn_relu(in_channels: Channels, out_channels: Channels, kernel_size: int = 3, stride: int = 1) -> nn.Sequential:
    """Build convolution, batch norm and ReLU; the size stays at stride 1 and even sizes halve at stride 2."""
    return nn.Sequential(
        MutableConv2d(in_channels, out_channels, kernel_size, stride=stride, padding=kernel_size // 2, bias=False),
        MutableBatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


_halves: ContextVar[dict[int, tuple[Tensor, Tensor]] | None] = ContextVar("glioma_nas_halves", default=None)


@contextmanager
def sharing_halves() -> Iterator[None]:
    """Compute `halve` of each tensor once inside the block: a cell's candidates all halve the same input."""
    token = _halves.set({})
    try:
        yield
    finally:
        _halves.reset(token)


def halve(x: Tensor) -> Tensor:
    """Shrink by 2; for even sizes the 2×2 mean equals bilinear interpolation at factor 0.5, and every engine runs it
    fast.

    Args:
        x: Shape (N, C, H, W), H and W even.

    Returns:
        Shape (N, C, H/2, W/2).
    """
    # torch.compile cannot read a context variable; in one graph it would find the repetition by itself.
    shared = None if torch.compiler.is_compiling() else _halves.get()
    if shared is None:
        return F.avg_pool2d(x, 2)
    known = shared.get(id(x))
    if known is None:
        # The input is kept beside its half, so that no other tensor can get its identity while the block lasts.
        known = shared[id(x)] = (x, F.avg_pool2d(x, 2))
    return known[1]


def enlarge(x: Tensor, factor: int) -> Tensor:
    """Enlarge bilinearly by a whole factor.

    Args:
        x: Shape (N, C, H, W).

    Returns:
        Shape (N, C, H·factor, W·factor).
    """
    return x if factor == 1 else F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)


def check_stride(stride: int) -> None:
    """Check the stride an operator is asked for.

    Raises:
        ArchitectureError: Neither 1 nor 2.
    """
    if stride not in (1, 2):
        raise ArchitectureError(f"operator stride {stride}: allowed are 1 (keep the scale) and 2 (go down one scale)")


class ConvUnits(nn.Module):
    """Convolutions in a row that end in batch norm and ReLU, perhaps at half the resolution.

    A cell's operators of this kind are mixed in a supernet without ever holding each one's output (`fused_mix`).

    Args:
        stride: 1 or 2.
        body: Ends in convolution, batch norm (affine, with running statistics and a momentum) and ReLU: flat, or as its
            last unit.
        halves: Whether the input is halved first.
        enlarges: Whether the output is enlarged by 2 at last.

    Raises:
        ArchitectureError: The body ends otherwise; derive such an operator from ``nn.Module``.
    """

    def __init__(self, stride: int, body: nn.Sequential, *, halves: bool = False, enlarges: bool = False) -> None:
        super().__init__()
        check_stride(stride)
        ends = list(body[-1]) if isinstance(body[-1], nn.Sequential) else list(body)
        norm = ends[-2] if len(ends) > 1 else None
        fits = isinstance(norm, nn.BatchNorm2d) and norm.affine and norm.track_running_stats
        if not (fits and getattr(norm, "momentum", None) is not None and type(ends[-1]) is nn.ReLU):
            raise ArchitectureError(
                f"{type(self).__name__}: ConvUnits must end in batch norm (affine, with running statistics and a "
                "momentum) and ReLU; derive other operators from nn.Module"
            )
        self.halves = halves
        self.enlarges = enlarges
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C_in, H, W) to (N, C_out, H/stride, W/stride); H and W even where it halves."""
        x = self.body(halve(x) if self.halves else x)
        return enlarge(x, 2) if self.enlarges else x

    def before_last_norm(self, x: Tensor) -> tuple[Tensor, nn.Module]:
        """Stop before the last batch norm: return what it takes, (N, C_out, H', W'), and that batch norm."""
        if self.halves:
            x = halve(x)
        *first, last = self.body
        if isinstance(last, nn.Sequential):
            for unit in first:
                x = unit(x)
            first = list(last)[:-1]
        *first, norm = first
        for layer in first:
            x = layer(x)
        return x, norm


@operators.register("skip")
class Skip(ConvUnits):
    """Skip connection: a 1×1 convolution where it cannot be left out, after a 2×2 mean at stride 2."""

    is_skip = True

    def __init__(self, in_channels: Channels, out_channels: Channels, stride: int) -> None:
        super().__init__(stride, conv_bn_relu(in_channels, out_channels, kernel_size=1), halves=stride == 2)


@operators.register("conv3x3")
class Conv3x3(ConvUnits):
    """One 3×3 convolution."""

    def __init__(self, in_channels: Channels, out_channels: Channels, stride: int) -> None:
        super().__init__(stride, conv_bn_relu(in_channels, out_channels, stride=stride))


@operators.register("conv3x3_x2")
class Conv3x3Twice(ConvUnits):
    """Two 3×3 convolutions, the first one strided."""

    def __init__(self, in_channels: Channels, out_channels: Channels, stride: int) -> None:
        units = conv_bn_relu(in_channels, out_channels, stride=stride), conv_bn_relu(out_channels, out_channels)
        super().__init__(stride, nn.Sequential(*units))


class _Zoomed(ConvUnits):
    # Norm and ReLU stay at the low resolution: a quarter of the work, and engines fuse them into the convolution.
    def __init__(self, in_channels: Channels, out_channels: Channels, stride: int, *, depth: int) -> None:
        units = [conv_bn_relu(in_channels if i == 0 else out_channels, out_channels) for i in range(depth)]
        super().__init__(stride, nn.Sequential(*units), halves=True, enlarges=stride == 1)


@operators.register("zoomed_conv")
class ZoomedConv(_Zoomed):
    """A 3×3 convolution at half the resolution: bilinear down, convolution, bilinear up (not at stride 2)."""

    def __init__(self, in_channels: Channels, out_channels: Channels, stride: int) -> None:
        super().__init__(in_channels, out_channels, stride, depth=1)


@operators.register("zoomed_conv_x2")
class ZoomedConvTwice(_Zoomed):
    """Two 3×3 convolutions at half the resolution: bilinear down, convolutions, bilinear up (not at stride 2)."""

    def __init__(self, in_channels: Channels, out_channels: Channels, stride: int) -> None:
        super().__init__(in_channels, out_channels, stride, depth=2)


def is_skip(name: str) -> bool:
    """Tell whether the operator registered as ``name`` is a skip connection."""
    return bool(getattr(operators.get(name), "is_skip", False))
