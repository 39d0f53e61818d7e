"""Feature extractors of the marker classifiers: residual networks and split-attention (ResNeSt) stages for n channels.

References:
    He et al., Deep Residual Learning for Image Recognition, CVPR 2016.
    Zhang et al., ResNeSt: Split-Attention Networks, CVPR Workshops 2022, https://arxiv.org/abs/2004.08955, sec. 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from glioma_nas.errors import ConfigError, did_you_mean


class Backbone(nn.Module):
    """Maps slices (N, C, H, W) to features (N, `feature_channels`).

    Args:
        body: Network that gives (N, F) or (N, F, 1, 1).
        feature_channels: F.
    """

    def __init__(self, body: nn.Module, feature_channels: int) -> None:
        super().__init__()
        self.body = body
        self.feature_channels = feature_channels

    def forward(self, x: Tensor) -> Tensor:
        """Return float32 (N, F) of float32 (N, C, H, W)."""
        features: Tensor = self.body(x)
        return features.flatten(1)


def conv_norm(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """Return a convolution that keeps the size (before the stride) and batch normalisation."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(out_channels),
    )


def shallow_stem(in_channels: int, out_channels: int, kernel: int = 7) -> nn.Sequential:
    """Return the shallow feature extractor: convolution with stride 2 and 3×3 max pooling with stride 2, ÷4 in all."""
    return nn.Sequential(conv_norm(in_channels, out_channels, kernel, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.first = conv_norm(in_channels, out_channels, 3, stride)
        self.second = conv_norm(out_channels, out_channels, 3)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = conv_norm(in_channels, out_channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, out_channels, H/stride, W/stride)."""
        return torch.relu(self.second(torch.relu(self.first(x))) + self.shortcut(x))


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
        self.split = nn.Sequential(
            nn.Conv2d(in_channels, channels * radix, 3, padding=1, groups=radix, bias=False),
            nn.BatchNorm2d(channels * radix),
            nn.ReLU(),
        )
        self.attend = nn.Sequential(
            nn.Conv2d(channels, hidden, 1),
            nn.BatchNorm2d(hidden),
            nn.ReLU(),
            nn.Conv2d(hidden, channels * radix, 1),
        )

    def weights(self, splits: Tensor) -> Tensor:
        """Return the attention of splits (N, R, F, H, W), (N, R, F, 1, 1), which sums to 1 over R."""
        pooled = splits.sum(dim=1).mean(dim=(2, 3), keepdim=True)
        return torch.softmax(self.attend(pooled).unflatten(1, (self.radix, -1)), dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, channels, H, W) of (N, in_channels, H, W)."""
        splits = self.split(x).unflatten(1, (self.radix, -1))
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
        pool: list[nn.Module] = [nn.AvgPool2d(3, stride, 1)] if stride > 1 else []
        self.body = nn.Sequential(
            conv_norm(in_channels, width, 1),
            nn.ReLU(),
            SplitAttention(width, width),
            *pool,
            conv_norm(width, out_channels, 1),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or in_channels != out_channels:
            average: list[nn.Module] = [nn.AvgPool2d(stride, stride, ceil_mode=True)] if stride > 1 else []
            self.shortcut = nn.Sequential(*average, conv_norm(in_channels, out_channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, out_channels, ⌈H/stride⌉, ⌈W/stride⌉)."""
        return torch.relu(self.body(x) + self.shortcut(x))


def residual_stage(
    block: Callable[[int, int, int], nn.Module], in_channels: int, out_channels: int, *, blocks: int, stride: int
) -> nn.Sequential:
    """Return ``blocks`` blocks, the first with the stride and the change of channels."""
    first = block(in_channels, out_channels, stride)
    return nn.Sequential(first, *(block(out_channels, out_channels, 1) for _ in range(blocks - 1)))


def _staged(
    block: Callable[[int, int, int], nn.Module],
    in_channels: int,
    *,
    stem: int,
    widths: Sequence[int],
    blocks: Sequence[int],
) -> Backbone:
    layers: list[nn.Module] = [shallow_stem(in_channels, stem)]
    before = stem
    for index, (width, count) in enumerate(zip(widths, blocks, strict=True)):
        layers.append(residual_stage(block, before, width, blocks=count, stride=1 if index == 0 else 2))
        before = width
    return Backbone(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1)), before)


def small_resnet(in_channels: int) -> Backbone:
    """Return a residual network of four one-block stages, for CPUs and small cohorts."""
    return _staged(BasicBlock, in_channels, stem=16, widths=(16, 32, 64, 96), blocks=(1, 1, 1, 1))


def small_resnest(in_channels: int) -> Backbone:
    """Return a split-attention network of four one-block stages, for CPUs and small cohorts."""
    return _staged(SplitAttentionBlock, in_channels, stem=16, widths=(32, 64, 96, 128), blocks=(1, 1, 1, 1))


def resnest50(in_channels: int) -> Backbone:
    """Return split-attention stages with the depths and widths of ResNeSt-50."""
    return _staged(SplitAttentionBlock, in_channels, stem=64, widths=(256, 512, 1024, 2048), blocks=(3, 4, 6, 3))


def _torchvision_resnet(name: str, in_channels: int) -> Backbone:
    import torchvision

    network = getattr(torchvision.models, name)(weights=None)
    features = int(network.fc.in_features)
    network.fc = nn.Identity()
    first = network.conv1
    network.conv1 = nn.Conv2d(
        in_channels, first.out_channels, first.kernel_size, first.stride, first.padding, bias=False
    )
    return Backbone(network, features)


def resnet18(in_channels: int) -> Backbone:
    """Return torchvision's ResNet-18 with a stem for ``in_channels``."""
    return _torchvision_resnet("resnet18", in_channels)


def resnet50(in_channels: int) -> Backbone:
    """Return torchvision's ResNet-50 with a stem for ``in_channels``."""
    return _torchvision_resnet("resnet50", in_channels)


BACKBONES: dict[str, Callable[[int], Backbone]] = {
    "small_resnet": small_resnet,
    "small_resnest": small_resnest,
    "resnet18": resnet18,
    "resnet50": resnet50,
    "resnest50": resnest50,
}


def build_backbone(name: str, in_channels: int, *, pretrained: Path | None = None) -> Backbone:
    """Build a backbone by name, from random weights or from a local file.

    A file holds a state dict in the layout of the backbone's body (torchvision's for ``resnet18`` and ``resnet50``;
    entries of a classification layer ``fc`` are ignored), as ``.safetensors`` or as a PyTorch file of tensors only.
    A stem for k input channels is turned into one for n by the mean over its k inputs, repeated n times and scaled by
    k/n, so that equal inputs give the same response as before.

    Args:
        name: One of `BACKBONES`.
        in_channels: Channels of the slices.
        pretrained: Weights file; none for random weights.

    Raises:
        ConfigError: The backbone is unknown, or the file is missing, unreadable or of another network.
    """
    if name not in BACKBONES:
        raise ConfigError(f"unknown backbone '{name}': {did_you_mean(name, BACKBONES)}")
    backbone = BACKBONES[name](in_channels)
    if pretrained is not None:
        _load_pretrained(backbone, pretrained, name)
    return backbone


def _load_pretrained(backbone: Backbone, path: Path, name: str) -> None:
    if not path.is_file():
        raise ConfigError(f"{path}: no such weights file; correct 'pretrained' or leave it out to train from scratch")
    try:
        found = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
        found = {key: value for key, value in found.items() if not key.startswith("fc.")}
    except Exception as err:
        raise ConfigError(
            f"{path}: not a state dict of tensors ({type(err).__name__}); save model.state_dict()"
        ) from err
    wanted = backbone.body.state_dict()
    stem = next(key for key, value in wanted.items() if value.ndim == 4)
    if stem in found and found[stem].ndim == 4:
        found[stem] = adapt_stem(found[stem], wanted[stem].shape[1])
    for key, value in wanted.items():
        if key not in found or found[key].shape != value.shape:
            given = f"has shape {tuple(found[key].shape)}" if key in found else "is missing"
            raise ConfigError(f"{path}: not weights of '{name}': '{key}' {given}, needs {tuple(value.shape)}")
    backbone.body.load_state_dict({key: found[key] for key in wanted})


def adapt_stem(weight: Tensor, in_channels: int) -> Tensor:
    """Return a stem weight (O, n, h, w) made of (O, k, h, w): mean over k, repeated n times, times k/n."""
    given = weight.shape[1]
    if given == in_channels:
        return weight
    return weight.mean(dim=1, keepdim=True).repeat(1, in_channels, 1, 1) * (given / in_channels)
