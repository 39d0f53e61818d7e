from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from glioma_nas.errors import ConfigError
from glioma_nas.plugins.backbones import (
    BACKBONES,
    SplitAttention,
    SplitAttentionBlock,
    adapt_stem,
    build_backbone,
)


@pytest.mark.parametrize("name", sorted(BACKBONES))
@pytest.mark.parametrize("channels", [1, 5])
def test_backbone_maps_any_channels_to_features(name, channels):
    backbone = build_backbone(name, channels).eval()
    with torch.no_grad():
        assert backbone(torch.randn(2, channels, 64, 64)).shape == (2, backbone.feature_channels)


def test_resnet50_has_the_published_number_of_parameters():
    parameters = sum(parameter.numel() for parameter in build_backbone("resnet50", 3).parameters())
    assert parameters == 25_557_032 - 2048 * 1000 - 1000


def test_split_attention_weights_sum_to_one_over_the_splits():
    block = SplitAttention(8, 12, radix=3 - 1).eval()
    weights = block.weights(torch.randn(2, 2, 12, 5, 5))
    assert weights.shape == (2, 2, 12, 1, 1)
    assert torch.allclose(weights.sum(dim=1), torch.ones(2, 12, 1, 1))


def test_split_attention_equals_weighted_sum_by_hand():
    block = SplitAttention(4, 6).eval()
    x = torch.randn(1, 4, 7, 7)
    splits = block.split(x)
    first, second = splits[:, :6], splits[:, 6:]
    raw = block.attend((first + second).mean(dim=(2, 3), keepdim=True))
    share = 1 / (1 + torch.exp(raw[:, 6:] - raw[:, :6]))
    assert torch.allclose(block(x), share * first + (1 - share) * second, atol=1e-6)


@pytest.mark.parametrize("side", [8, 9])
def test_split_attention_block_halves_the_size_rounding_up(side):
    block = SplitAttentionBlock(6, 16, stride=2)
    assert block(torch.randn(2, 6, side, side)).shape == (2, 16, (side + 1) // 2, (side + 1) // 2)


def test_adapted_stem_answers_equal_channels_as_before():
    weight = torch.randn(4, 3, 7, 7)
    picture = torch.randn(1, 1, 16, 16)
    before = torch.nn.functional.conv2d(picture.expand(-1, 3, -1, -1), weight)
    after = torch.nn.functional.conv2d(picture.expand(-1, 5, -1, -1), adapt_stem(weight, 5))
    assert torch.allclose(before, after, atol=1e-5)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_pretrained_weights_are_loaded_into_an_n_channel_stem(tmp_path, suffix):
    import torchvision

    source = torchvision.models.resnet18(weights=None).state_dict()
    path = tmp_path / f"weights{suffix}"
    save_file(source, path) if suffix == ".safetensors" else torch.save(source, path)
    body = build_backbone("resnet18", 4, pretrained=path).body.state_dict()
    assert torch.equal(body["layer4.1.conv2.weight"], source["layer4.1.conv2.weight"])
    assert torch.allclose(body["conv1.weight"][:, 2], source["conv1.weight"].mean(dim=1) * 3 / 4)


def test_pretrained_is_refused_when_file_is_missing(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.pt: no such weights file"):
        build_backbone("resnet18", 4, pretrained=tmp_path / "none.pt")


def test_pretrained_is_refused_when_file_is_no_state_dict(tmp_path):
    path = tmp_path / "weights.pt"
    path.write_bytes(b"not weights")
    with pytest.raises(ConfigError, match="not a state dict of tensors"):
        build_backbone("resnet18", 4, pretrained=path)


def test_pretrained_is_refused_when_it_belongs_to_another_network(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(build_backbone("small_resnet", 3).body.state_dict(), path)
    with pytest.raises(ConfigError, match=r"not weights of 'resnet18': 'conv1\.weight' is missing"):
        build_backbone("resnet18", 3, pretrained=path)


def test_backbone_is_refused_when_unknown():
    with pytest.raises(ConfigError, match="did you mean 'resnet50'"):
        build_backbone("resnet5", 3)
