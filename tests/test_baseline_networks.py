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


class TestMonaiDints(NetworkSuite):
    name = "monai_dints"
    options: ClassVar[dict[str, Any]] = {"channel_multiplier": 0.125, "blocks": 2, "depths": 2}


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
        ("monai_dints", {"channel_multiplier": 0.125, "blocks": 1, "depths": 3}, 16),
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


def test_dints_has_the_parameters_counted_by_hand() -> None:
    channels, n_classes, blocks = 3, 2, 2
    full, finest, coarse = 4, 8, 16  # 32, 64, 128 times 1/8

    def cell(width: int) -> int:
        return 9 * width * width + 2 * width

    up, down = finest * coarse + 2 * finest, finest * coarse + 2 * coarse  # 1×1 convolutions and their norms
    layer = cell(finest) + (up + cell(finest)) + (down + cell(coarse)) + cell(coarse)
    stems = sum(
        9 * channels * wide + 2 * wide + 9 * wide * below + 2 * below + (9 * below * wide + 2 * wide)
        for wide, below in ((full, finest), (finest, coarse))
    )
    end = 9 * full * full + 2 * full + full * n_classes + n_classes
    network = registry.networks.get("monai_dints")(
        channels, n_classes, channel_multiplier=0.125, blocks=blocks, depths=2
    )
    assert _count(network) == blocks * layer + stems + end


def test_monai_basic_unet_has_the_parameters_counted_by_hand() -> None:
    features, channels, n_classes = (4, 6, 8, 10, 12, 5), 3, 2

    def double(before: int, after: int) -> int:
        return (9 * before * after + 3 * after) + (9 * after * after + 3 * after)  # bias, scale and shift each

    f0, f1, f2, f3, f4, last = features
    down = double(channels, f0) + sum(double(a, b) for a, b in pairwise((f0, f1, f2, f3, f4)))
    up = 0
    for below, skip, after, halved in (
        (f4, f3, f3, True),
        (f3, f2, f2, True),
        (f2, f1, f1, True),
        (f1, f0, last, False),
    ):
        enlarged = below // 2 if halved else below
        up += 4 * below * enlarged + enlarged + double(skip + enlarged, after)
    network = registry.networks.get("monai_basic_unet")(channels, n_classes, features=features)
    assert _count(network) == down + up + last * n_classes + n_classes


def test_monai_residual_unet_has_the_parameters_counted_by_hand() -> None:
    (a, b, c), channels, n_classes = (4, 8, 16), 3, 2

    def conv(before: int, after: int, kernel: int = 3) -> int:
        return kernel * kernel * before * after + after

    def unit(before: int, after: int, *, strided: bool, convolutions: int, plain_end: bool = False) -> int:
        body = (
            conv(before, after) + (convolutions - 1) * conv(after, after) + convolutions - plain_end
        )  # PReLU: one each
        if strided:
            return body + conv(before, after)
        return body + (conv(before, after, 1) if before != after else 0)

    down = unit(channels, a, strided=True, convolutions=2) + unit(a, b, strided=True, convolutions=2)
    bottom = unit(b, c, strided=False, convolutions=2)
    up = conv(b + c, a) + 1 + unit(a, a, strided=False, convolutions=1)
    up += conv(a + a, n_classes) + 1 + unit(n_classes, n_classes, strided=False, convolutions=1, plain_end=True)
    network = registry.networks.get("monai_unet")(channels, n_classes, channels=(a, b, c))
    assert _count(network) == down + bottom + up


# Forward passes that can be followed by hand: all weights 0 but for a few that pass a map on as it is. ----------------


def _silent(network: torch.nn.Module) -> Any:
    """Set every weight to 0; batch norms then give 0 and are told apart from what a test sets by hand."""
    for name, value in network.state_dict().items():
        if value.is_floating_point() and not name.endswith("running_var"):
            value.zero_()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eps = 1e-12
    return network.eval()


def _passes_on(conv_bn: torch.nn.Sequential, channel: int = 0) -> None:
    """Let convolution and norm give the input's ``channel``, at the centre of the kernel, on output channel 0."""
    weight = conv_bn[0].weight
    assert isinstance(weight, torch.Tensor)
    with torch.no_grad():
        weight[0, channel, weight.shape[2] // 2, weight.shape[3] // 2] = 1
        conv_bn[1].weight[0] = 1


def _positive_image(side: int) -> torch.Tensor:
    return torch.rand(1, 1, side, side, generator=torch.Generator().manual_seed(3)) + 0.1


@torch.no_grad()
def test_plain_unet_gives_the_maxima_of_blocks_through_its_bottom() -> None:
    network: Any = _silent(registry.networks.get("unet_thesis")(1, 2, width=1))
    unet = network.network
    for block in unet.down:
        for first in (0, 3):
            _passes_on(block[first : first + 2])
    for up, merge in zip(unet.up, unet.merge, strict=True):
        up.weight[0, 0] = 1  # each pixel becomes 2×2 equal ones
        for first, channel in ((0, 1 * up.weight.shape[1]), (3, 0)):
            _passes_on(merge[first : first + 2], channel)  # behind the skip's channels: what came from below
    unet.classify.weight[1, 0] = 1
    image = _positive_image(32)
    blocks = image.reshape(1, 1, 2, 16, 2, 16).amax((3, 5))
    expected = blocks.repeat_interleave(16, 2).repeat_interleave(16, 3)
    torch.testing.assert_close(network(image), torch.cat([torch.zeros_like(expected), expected], dim=1))


@torch.no_grad()
def test_plain_unet_gives_the_image_through_its_first_skip() -> None:
    network: Any = _silent(registry.networks.get("unet_thesis")(1, 2, width=1))
    unet = network.network
    for block in (unet.down[0], unet.merge[-1]):
        for first in (0, 3):
            _passes_on(block[first : first + 2])
    unet.classify.weight[0, 0] = 2
    unet.classify.bias[1] = -1
    image = _positive_image(32)
    torch.testing.assert_close(network(image), torch.cat([2 * image, -torch.ones_like(image)], dim=1))


def _enlarged(x: torch.Tensor, side: int) -> torch.Tensor:
    return torch.nn.functional.interpolate(x, size=(side, side), mode="bilinear", align_corners=False)


@torch.no_grad()
def test_icnet_gives_every_eighth_pixel_through_its_detail_branch() -> None:
    network: Any = _silent(registry.networks.get("icnet")(1, 2, width=4, blocks=(1, 1, 1, 1)))
    icnet = network.network
    for layer in (*icnet.detail, icnet.fuse_full.fine):
        _passes_on(layer)
    icnet.classify.weight[1, 0] = 1
    image = _positive_image(64)
    expected = _enlarged(_enlarged(image[:, :, ::8, ::8], 16), 64)
    found = network(image)
    torch.testing.assert_close(found[:, 1:], expected)
    assert not found[:, 0].any()


@torch.no_grad()
def test_bisenet_weights_detail_by_one_and_a_half_without_context() -> None:
    network: Any = _silent(registry.networks.get("bisenet")(1, 2, width=2))
    bisenet = network.network
    for layer in (*bisenet.spatial, bisenet.fuse.merge, bisenet.classify[0]):
        _passes_on(layer)
    bisenet.classify[1].weight[1, 0] = 1
    image = _positive_image(64)
    # Feature fusion gives x + x · sigmoid(0).
    torch.testing.assert_close(network(image)[:, 1:], 1.5 * _enlarged(image[:, :, ::8, ::8], 64))


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "options", "last"),
    [
        ("nas_unet", {"width": 2, "depth": 3}, "network.classify"),
        ("monai_basic_unet", {"features": [2, 2, 2, 2, 2, 2]}, "network.final_conv"),
        ("monai_dints", {"channel_multiplier": 0.125, "blocks": 1, "depths": 2}, "network.stem_finals.1"),
    ],
)
def test_logits_come_from_the_last_layer_as_they_are(name: str, options: dict[str, Any], last: str) -> None:
    network = registry.networks.get(name)(1, 2, **options).eval()
    final = network.get_submodule(last)
    final.weight.zero_()
    final.bias.copy_(torch.tensor([-3.0, 4.0]))
    found = network(_positive_image(32))
    torch.testing.assert_close(found, torch.tensor([-3.0, 4.0]).reshape(1, 2, 1, 1).expand(1, 2, 32, 32))
