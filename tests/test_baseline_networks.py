from __future__ import annotations

from itertools import pairwise
from typing import Any, ClassVar

import pytest
import torch

from glioma_nas import registry
from glioma_nas.errors import ConfigError, ImageError
from glioma_nas.network_size import network_size
from glioma_nas.testing.network_suite import NetworkSuite


class TestMonaiUnet(NetworkSuite):
    name = "monai_unet"
    options: ClassVar[dict[str, Any]] = {"channels": [4, 8, 16]}


class TestMonaiBasicUnet(NetworkSuite):
    name = "monai_basic_unet"
    options: ClassVar[dict[str, Any]] = {"features": [4, 4, 8, 8, 16, 4]}


class TestUnetThesis(NetworkSuite):
    name = "unet_thesis"
    options: ClassVar[dict[str, Any]] = {"width": 4}


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _plain_unet_parameters(in_channels: int, n_classes: int, width: int) -> int:
    levels = [width * factor for factor in (1, 2, 4, 8, 16)]

    def double(before: int, after: int) -> int:
        return 9 * before * after + 9 * after * after + 2 * 2 * after  # two convolutions, two pairs of scale and shift

    down = sum(double(before, after) for before, after in pairwise([in_channels, *levels]))
    up = sum(4 * below * above + above + double(2 * above, above) for above, below in pairwise(levels))
    return down + up + width * n_classes + n_classes


@pytest.mark.parametrize(("in_channels", "n_classes", "width"), [(2, 2, 4), (1, 3, 6)])
def test_plain_unet_has_the_parameters_counted_by_hand(in_channels: int, n_classes: int, width: int) -> None:
    assert _count(registry.networks.get("unet_thesis")(in_channels, n_classes, width=width)) == _plain_unet_parameters(
        in_channels, n_classes, width
    )


def test_plain_unet_is_the_31_million_one_by_default() -> None:
    with torch.device("meta"):
        network = registry.networks.get("unet_thesis")(2, 2)
    assert _count(network) == _plain_unet_parameters(2, 2, 64)
    assert 31.0e6 < _count(network) < 31.1e6


def test_plain_unet_multiplications_match_the_hand_count() -> None:
    width, size = 2, 16
    levels = [width * factor for factor in (1, 2, 4, 8, 16)]
    expected = 0
    before = 3
    for level, channels in enumerate(levels):
        pixels = (size >> level) ** 2
        expected += 9 * pixels * (before * channels + channels * channels)
        before = channels
    for level in range(3, -1, -1):
        above, below, pixels = levels[level], levels[level + 1], (size >> level) ** 2
        expected += pixels * above * below  # each output pixel of a 2×2 transposed convolution sees one input pixel
        expected += 9 * pixels * (2 * above * above + above * above)
    expected += size * size * width * 2
    found = network_size(registry.networks.get("unet_thesis")(3, 2, width=width), (1, 3, size, size))
    assert found.macs_g * 1e9 == pytest.approx(expected)


def test_further_input_channel_adds_only_first_layer_weights() -> None:
    build = registry.networks.get("monai_basic_unet")
    features = [4, 4, 8, 8, 16, 4]
    assert _count(build(3, 2, features=features)) - _count(build(2, 2, features=features)) == 9 * 4


@pytest.mark.parametrize(
    ("name", "options", "multiple"),
    [("monai_unet", {"channels": [4, 8, 16]}, 4), ("monai_basic_unet", {}, 16), ("unet_thesis", {"width": 4}, 16)],
)
def test_image_that_is_not_divisible_is_refused_with_the_remedy(
    name: str, options: dict[str, object], multiple: int
) -> None:
    network = registry.networks.get(name)(1, 2, **options).eval()
    with pytest.raises(ImageError, match=f"48×30 pixels.*divisible by {multiple}; set preprocess.image_size_px"):
        network(torch.zeros(1, 1, 48, 30))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("monai_unet", {"channels": [16]}),
        ("monai_unet", {"channels": [16, 0]}),
        ("monai_unet", {"channels": 16}),
        ("monai_basic_unet", {"features": [4, 4, 8]}),
        ("unet_thesis", {"width": 0}),
        ("unet_thesis", {"width": 1.5}),
    ],
)
def test_impossible_widths_are_refused(name: str, options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"{name}: .* positive whole number"):
        registry.networks.get(name)(1, 2, **options)
