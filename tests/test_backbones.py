from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from glioma_nas.errors import ConfigError
from glioma_nas.plugins.backbones import BACKBONES, backbone_design
from glioma_nas.plugins.fusion import FUSIONS, FusedBackbone
from glioma_nas.plugins.pretrained import adapt_inputs
from glioma_nas.plugins.split_attention import SplitAttention, SplitAttentionBlock


def inputs(n=2, channels=3, side=64):
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(n, channels, side, side, generator=generator)
    return image, (torch.rand(n, 1, side, side, generator=generator) > 0.5).float()


@pytest.mark.parametrize("name", sorted(BACKBONES))
@pytest.mark.parametrize("channels", [1, 5])
def test_backbone_maps_any_channels_to_features(name, channels):
    design = backbone_design(name)
    stem, stages = design.build_stem(channels).eval(), design.build_stages().eval()
    with torch.no_grad():
        maps = stages(stem(torch.randn(2, channels, 64, 64)))
    assert maps.shape == (2, design.feature_channels, 2, 2)


@pytest.mark.parametrize(
    ("name", "published", "classifier"),
    [("resnet18", 11_689_512, 512), ("resnet50", 25_557_032, 2048), ("resnest50", 27_483_240, 2048)],
)
def test_backbone_has_the_published_number_of_parameters(name, published, classifier):
    design = backbone_design(name)
    modules = (design.build_stem(3), design.build_stages())
    parameters = sum(parameter.numel() for module in modules for parameter in module.parameters())
    assert parameters == published - classifier * 1000 - 1000


def test_split_attention_weights_sum_to_one_over_the_splits():
    block = SplitAttention(8, 12).eval()
    weights = block.weights(torch.randn(2, 2, 12, 5, 5))
    assert weights.shape == (2, 2, 12, 1, 1)
    assert torch.allclose(weights.sum(dim=1), torch.ones(2, 12, 1, 1))


def test_split_attention_equals_weighted_sum_by_hand():
    block = SplitAttention(4, 6).eval()
    x = torch.randn(1, 4, 7, 7)
    both = torch.relu(block.bn0(block.conv(x)))
    first, second = both[:, :6], both[:, 6:]
    raw = block.fc2(torch.relu(block.bn1(block.fc1((first + second).mean(dim=(2, 3), keepdim=True)))))
    share = 1 / (1 + torch.exp(raw[:, 6:] - raw[:, :6]))
    assert torch.allclose(block(x), share * first + (1 - share) * second, atol=1e-6)


@pytest.mark.parametrize("side", [8, 9])
def test_split_attention_block_halves_the_size_rounding_up(side):
    block = SplitAttentionBlock(6, 16, stride=2)
    assert block(torch.randn(2, 6, side, side)).shape == (2, 16, (side + 1) // 2, (side + 1) // 2)


@pytest.mark.parametrize(
    ("fusion", "stems", "trunks", "entering"),
    [("early", 1, 1, 16), ("late", 3, 3, 16), ("middle1", 3, 1, 48), ("middle2", 3, 1, 64)],
)
def test_fusion_brings_the_streams_together_where_the_method_says(fusion, stems, trunks, entering):
    network = FusedBackbone(3, backbone="small_resnet", mode="MIX", fusion=fusion).eval()
    assert (len(network.stems), len(network.stages)) == (stems, trunks)
    first = next(module for module in network.stages[0].modules() if isinstance(module, torch.nn.Conv2d))
    assert first.in_channels == entering
    # MIX: a stream is a sequence and the mask; early fusion has every sequence and the mask once.
    assert network.stems[0].conv1.in_channels == (4 if fusion == "early" else 2)
    with torch.no_grad():
        assert network(*inputs()).shape == (2, network.feature_channels) == (2, 96 * trunks)


def test_middle_two_adds_a_reduced_copy_to_what_middle_one_has():
    network = FusedBackbone(2, backbone="small_resnet", mode="IMG", fusion="middle2").eval()
    image, mask = inputs(channels=2)
    entered = []
    network.stages[0].register_forward_pre_hook(lambda module, given: entered.append(given[0]))
    with torch.no_grad():
        network(image, mask)
        streams = torch.cat([stem(image[:, k : k + 1]) for k, stem in enumerate(network.stems)], dim=1)
        expected = torch.cat([streams, network.reduce(streams)], dim=1)
    assert torch.equal(entered[0], expected)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_sequence_reaches_the_features(fusion):
    torch.manual_seed(0)
    network = FusedBackbone(3, backbone="small_resnet", mode="MIX", fusion=fusion).eval()
    image, mask = inputs()
    with torch.no_grad():
        before = network(image, mask)
        for channel in range(3):
            changed = image.clone()
            changed[:, channel] += 1
            assert not torch.allclose(network(changed, mask), before)


def test_adapted_weight_answers_equal_channels_as_before():
    weight = torch.randn(4, 3, 7, 7)
    picture = torch.randn(1, 1, 16, 16)
    before = torch.nn.functional.conv2d(picture.expand(-1, 3, -1, -1), weight)
    after = torch.nn.functional.conv2d(picture.expand(-1, 5, -1, -1), adapt_inputs(weight, 5))
    assert torch.allclose(before, after, atol=1e-5)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_torchvision_weights_are_loaded_into_an_n_channel_stem(tmp_path, suffix):
    import torchvision

    source = torchvision.models.resnet18(weights=None).state_dict()
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(source, path)
    else:
        # As training scripts save it: wrapped, from a parallel model.
        torch.save({"epoch": 3, "state_dict": {f"module.{key}": value for key, value in source.items()}}, path)
    network = FusedBackbone(3, backbone="resnet18", mode="MIX", pretrained=path)
    stem, stages = network.stems[0].state_dict(), network.stages[0].state_dict()
    assert torch.equal(stages["layer4.1.conv2.weight"], source["layer4.1.conv2.weight"])
    assert torch.allclose(stem["conv1.weight"][:, 2], source["conv1.weight"].mean(dim=1) * 3 / 4)


def test_loaded_torchvision_network_computes_the_same_features(tmp_path):
    import torchvision

    model = torchvision.models.resnet50(weights=None).eval()
    model.fc = torch.nn.Identity()
    path = tmp_path / "weights.safetensors"
    save_file(model.state_dict(), path)
    network = FusedBackbone(3, backbone="resnet50", mode="IMG", pretrained=path).eval()
    image, mask = inputs()
    with torch.no_grad():
        assert torch.allclose(network(image, mask), model(image), atol=1e-5)


def timm_resnest50_shapes():
    """Return names and shapes of the entries of ResNeSt-50 (fast) in timm's layout, written out from its design."""
    shapes = {}

    def norm(name, channels):
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.{part}"] = (channels,)

    for index, (out, given, side) in {0: (32, 3, 3), 3: (32, 32, 3), 6: (64, 32, 3)}.items():
        shapes[f"conv1.{index}.weight"] = (out, given, side, side)
    norm("conv1.1", 32)
    norm("conv1.4", 32)
    norm("bn1", 64)
    before = 64
    for stage, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), start=1):
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            hidden = max(32, width // 2)
            shapes[f"{name}.conv1.weight"] = (width, before, 1, 1)
            norm(f"{name}.bn1", width)
            shapes[f"{name}.conv2.conv.weight"] = (2 * width, width // 2, 3, 3)
            norm(f"{name}.conv2.bn0", 2 * width)
            shapes[f"{name}.conv2.fc1.weight"], shapes[f"{name}.conv2.fc1.bias"] = (hidden, width, 1, 1), (hidden,)
            norm(f"{name}.conv2.bn1", hidden)
            shapes[f"{name}.conv2.fc2.weight"] = (2 * width, hidden, 1, 1)
            shapes[f"{name}.conv2.fc2.bias"] = (2 * width,)
            shapes[f"{name}.conv3.weight"] = (4 * width, width, 1, 1)
            norm(f"{name}.bn3", 4 * width)
            if block == 0:
                shapes[f"{name}.downsample.1.weight"] = (4 * width, before, 1, 1)
                norm(f"{name}.downsample.2", 4 * width)
            before = 4 * width
    shapes["fc.weight"], shapes["fc.bias"] = (1000, 2048), (1000,)
    return shapes


def test_timm_weights_fill_every_parameter_of_resnest50(tmp_path):
    source = {key: torch.full(shape, 0.01) for key, shape in timm_resnest50_shapes().items()}
    path = tmp_path / "weights.safetensors"
    save_file(source, path)
    network = FusedBackbone(3, backbone="resnest50", mode="MIX", pretrained=path)
    loaded = {**network.stems[0].state_dict(), **network.stages[0].state_dict()}
    wanted = {key for key in loaded if "num_batches_tracked" not in key}
    assert wanted == {key for key in source if not key.startswith("fc.")}
    assert torch.allclose(loaded["conv1.0.weight"], torch.tensor(0.01 * 3 / 4))
    assert all(torch.equal(loaded[key], source[key]) for key in wanted - {"conv1.0.weight"})


@pytest.mark.parametrize("fusion", ["late", "middle1", "middle2"])
def test_weights_are_loaded_into_every_stream(tmp_path, fusion):
    design = backbone_design("small_resnet")
    source = {**design.build_stem(3).state_dict(), **design.build_stages().state_dict()}
    path = tmp_path / "weights.safetensors"
    save_file(source, path)
    network = FusedBackbone(3, backbone="small_resnet", mode="MIX", fusion=fusion, pretrained=path)
    for stem in network.stems:
        assert torch.allclose(stem.conv1.weight[:, 0], source["conv1.weight"].mean(dim=1) * 3 / 2)
    for trunk in network.stages:
        assert torch.equal(trunk.state_dict()["layer3.0.conv1.weight"], source["layer3.0.conv1.weight"])


def test_pretrained_is_refused_when_file_is_missing(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.pt: no such weights file"):
        FusedBackbone(3, backbone="resnet18", mode="IMG", pretrained=tmp_path / "none.pt")


@pytest.mark.parametrize("content", [b"not weights", b""])
def test_pretrained_is_refused_when_file_is_no_state_dict(tmp_path, content):
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="not a state dict of tensors"):
        FusedBackbone(3, backbone="resnet18", mode="IMG", pretrained=path)


def test_pretrained_is_refused_when_it_belongs_to_another_network(tmp_path):
    design = backbone_design("small_resnet")
    path = tmp_path / "weights.safetensors"
    save_file({**design.build_stem(3).state_dict(), **design.build_stages().state_dict()}, path)
    with pytest.raises(ConfigError, match=r"not weights of 'resnet18': 'conv1\.weight' has shape"):
        FusedBackbone(3, backbone="resnet18", mode="IMG", pretrained=path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": "resnet5"}, "unknown backbone 'resnet5': did you mean 'resnet50'"),
        ({"fusion": "midle1"}, "unknown fusion 'midle1': did you mean 'middle1'"),
        ({"mode": "MX"}, "unknown mode 'MX': did you mean 'MIX'"),
    ],
)
def test_fused_backbone_is_refused_when_a_name_is_unknown(changes, message):
    with pytest.raises(ConfigError, match=message):
        FusedBackbone(3, **{"backbone": "small_resnet", "mode": "IMG", "fusion": "early", **changes})
