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


class TestIcnet(NetworkSuite):
    name = "icnet"
    options: ClassVar[dict[str, Any]] = {"width": 4, "blocks": [1, 2, 1, 1]}


class TestBisenet(NetworkSuite):
    name = "bisenet"
    options: ClassVar[dict[str, Any]] = {"width": 4}


class TestNasUnet(NetworkSuite):
    name = "nas_unet"
    options: ClassVar[dict[str, Any]] = {"width": 4, "depth": 4}


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
    [
        ("monai_unet", {"channels": [4, 8, 16]}, 4),
        ("monai_basic_unet", {}, 16),
        ("unet_thesis", {"width": 4}, 16),
        ("icnet", {"width": 2}, 32),
        ("bisenet", {"width": 2}, 32),
        ("nas_unet", {"width": 2}, 16),
    ],
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
        ("icnet", {"blocks": [3, 4, 6]}),
        ("bisenet", {"width": -1}),
        ("nas_unet", {"depth": "5"}),
        ("unet_thesis", {"width": 1.5}),
    ],
)
def test_impossible_widths_are_refused(name: str, options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"{name}: .* positive whole number"):
        registry.networks.get(name)(1, 2, **options)


def test_nas_unet_that_never_goes_down_is_refused() -> None:
    with pytest.raises(ConfigError, match="nas_unet: depth is 2; give at least 3"):
        registry.networks.get("nas_unet")(1, 2, depth=2)


@pytest.mark.parametrize(("name", "scales"), [("icnet", {"scale_16", "scale_8"}), ("bisenet", {"scale_16", "scale_8"})])
def test_auxiliary_logits_are_given_while_training_only(name: str, scales: set[str]) -> None:
    network = registry.networks.get(name)(1, 2, width=4)
    image = torch.randn(2, 1, 64, 32)
    trained = network.train()(image)
    assert set(trained) == {"logits", *scales}
    assert all(logits.shape == (2, 2, 64, 32) for logits in trained.values())
    assert isinstance(network.eval()(image), torch.Tensor)


@pytest.mark.parametrize(("height", "width"), [(7, 7), (12, 5), (6, 1)])
def test_pyramid_pooling_is_the_sum_of_adaptive_averages(height: int, width: int) -> None:
    from glioma_nas.plugins.realtime_networks import PyramidPooling

    x = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    expected = x.clone()
    for bins in (1, 2, 3, 6):
        pooled = torch.nn.functional.adaptive_avg_pool2d(x, bins)
        expected += torch.nn.functional.interpolate(pooled, size=(height, width), mode="bilinear")
    torch.testing.assert_close(PyramidPooling((1, 2, 3, 6))(x), expected)


def test_icnet_has_the_parameters_counted_by_hand() -> None:
    width, n_classes, channels = 4, 2, 3
    blocks = (1, 2, 1, 1)

    def conv(before: int, after: int, kernel: int = 3) -> int:
        return kernel * kernel * before * after + 2 * after

    def bottleneck(before: int, after: int, *, projected: bool) -> int:
        inside = after // 4
        body = conv(before, inside, 1) + conv(inside, inside) + conv(inside, after, 1)
        return body + (conv(before, after, 1) if projected else 0)

    w = width
    stages = [(2 * w, 4 * w), (4 * w, 8 * w), (8 * w, 16 * w), (16 * w, 32 * w)]
    expected = conv(channels, w) + conv(w, w) + conv(w, 2 * w)
    for (before, after), count in zip(stages, blocks, strict=True):
        expected += bottleneck(before, after, projected=True) + (count - 1) * bottleneck(after, after, projected=False)
    expected += conv(32 * w, 8 * w, 1)
    expected += conv(channels, w) + conv(w, w) + conv(w, 2 * w)
    expected += conv(8 * w, 4 * w) + conv(8 * w, 4 * w, 1) + conv(4 * w, 4 * w) + conv(2 * w, 4 * w, 1)
    expected += 2 * (4 * w + 1) * n_classes + (8 * w + 1) * n_classes
    assert _count(registry.networks.get("icnet")(channels, n_classes, width=w, blocks=blocks)) == expected


def test_bisenet_context_path_is_a_resnet_18() -> None:
    network: Any = registry.networks.get("bisenet")(3, 2)
    found = _count(network.network.stem) + _count(network.network.stages)
    with torch.device("meta"):
        from torchvision.models import resnet18

        whole = resnet18()
    assert found == _count(whole) - _count(whole.fc)


def test_nas_unet_cell_adds_what_its_wiring_says() -> None:
    from glioma_nas.plugins.nas_unet import Cell

    cell = Cell(((("identity", 0), ("identity", 1)), (("identity", 2), ("identity", 0))), (3, 3), 4).eval()
    first, second = torch.randn(1, 3, 8, 8), torch.randn(1, 3, 8, 8)
    a, b = cell.reduce[0](first), cell.reduce[1](second)
    torch.testing.assert_close(cell(first, second), torch.cat([a + b, a + b + a], dim=1))


def test_nas_unet_has_the_parameters_counted_by_hand() -> None:
    w, k, channels = 4, 2, 3  # fewer than 16 channels: one hidden channel in every channel weighting

    def conv(before: int, after: int, kernel: int = 3) -> int:
        return kernel * kernel * before * after + 2 * after

    weighting = (w + 1) + 2 * w
    depthwise = 9 * w + conv(w, w, 1)
    reduce = 2 * conv(3 * w, w, 1)
    down = reduce + 4 * conv(w, w) + depthwise + (weighting + conv(w, w))
    up = reduce + 2 * (weighting + conv(w, w)) + weighting + conv(w, w)
    expected = conv(channels, 3 * w, 1) + conv(channels, 3 * w) + 2 * down + 3 * up + (3 * w + 1) * k
    assert _count(registry.networks.get("nas_unet")(channels, k, width=w, depth=4)) == expected
