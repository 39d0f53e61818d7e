from __future__ import annotations

import itertools
import math

import pytest
import torch

from glioma_nas.errors import ConfigError
from glioma_nas.marker_evaluator import build_evaluator, patient_level
from glioma_nas.marker_study import ClassifierSettings
from glioma_nas.plugins.kinet import BRANCH_WEIGHTS, PRESETS, SCALE_WEIGHTS, KiNet
from glioma_nas.roc_analysis import auc
from glioma_nas.seeding import isolated_torch_rng
from glioma_nas.testing.classifier_suite import ClassifierSuite, phantom_cases, phantom_folds

OUTPUTS = {"t1c", "t2f", "s1", "s2", "s3", "s4", "final"}


class TestKiNetClassifier(ClassifierSuite):
    classifier = "kinet"


def channels_into(module, inputs):
    """Return the channel counts of what is concatenated before ``module``, seen from its first convolution."""
    first = next(layer for layer in module.modules() if isinstance(layer, torch.nn.Conv2d))
    assert first.in_channels == sum(inputs)
    return inputs


def out_channels(module):
    return [layer for layer in module.modules() if isinstance(layer, torch.nn.BatchNorm2d)][-1].num_features


def batch(n=2, side=64):
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(n, 2, side, side, generator=generator)
    mask = (torch.rand(n, 1, side, side, generator=generator) > 0.5).float()
    return image, mask, torch.rand(n, 2, generator=generator)


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_kinet_gives_one_logit_for_every_classifier(preset):
    network = KiNet(PRESETS[preset]).eval()
    with torch.no_grad():
        outputs = network(*batch(1, 64))
    assert set(outputs) == OUTPUTS
    assert {logit.shape for logit in outputs.values()} == {(1,)}


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_kinet_concatenates_shallow_features_one_two_one_and_stage_outputs_one_four_one(preset):
    network = KiNet(PRESETS[preset])
    shallow = [out_channels(stem) for stem in (network.t1c_stem, network.merge_stem, network.t2f_stem)]
    assert [width / shallow[0] for width in channels_into(network.main_stages[0], shallow)] == [1, 2, 1]
    first = [out_channels(stages[0]) for stages in (network.t1c_stages, network.main_stages, network.t2f_stages)]
    assert [width / first[0] for width in channels_into(network.main_stages[1], first)] == [1, 4, 1]
    for stage in (2, 3):
        channels_into(network.main_stages[stage], [out_channels(network.main_stages[stage - 1])])


def test_kinet_stages_halve_the_resolution_and_widen():
    network = KiNet(PRESETS["small"]).eval()
    sizes = []
    for stage in network.main_stages:
        stage.register_forward_hook(lambda module, inputs, output: sizes.append(tuple(output.shape[1:])))
    with torch.no_grad():
        network(*batch(1, 96))
    assert [size[1] for size in sizes] == [24, 12, 6, 3]
    assert [size[0] for size in sizes] == sorted(size[0] for size in sizes)


def test_kinet_branches_see_their_own_modality_and_the_mask_only():
    network = KiNet(PRESETS["small"]).eval()
    image, mask, metadata = batch()
    other = image.clone()
    other[:, 1] += 3
    with torch.no_grad():
        before, after = network(image, mask, metadata), network(other, mask, metadata)
        masked = network(image, 1 - mask, metadata)
    assert torch.equal(before["t1c"], after["t1c"])
    assert not torch.equal(before["t2f"], after["t2f"])
    assert not torch.equal(before["t1c"], masked["t1c"])


def test_kinet_loss_weights_are_those_of_the_method():
    assert [SCALE_WEIGHTS[name] for name in ("s1", "s2", "s3", "s4", "final")] == [0.025, 0.025, 0.2, 0.35, 0.4]
    assert (BRANCH_WEIGHTS["t1c"], BRANCH_WEIGHTS["t2f"], BRANCH_WEIGHTS["master"]) == (0.35, 0.25, 0.4)
    assert sum(SCALE_WEIGHTS.values()) == pytest.approx(1.0)
    assert sum(BRANCH_WEIGHTS.values()) == pytest.approx(1.0)


def logits_with_known_losses():
    # BCE of logit z and target 1 is log(1 + e^-z); choose z so that it equals a different whole number for each output.
    losses = dict(zip(("t1c", "t2f", "s1", "s2", "s3", "s4", "final"), range(1, 8), strict=True))
    return {name: torch.tensor([-math.log(math.expm1(loss))]) for name, loss in losses.items()}


def test_kinet_loss_equals_hand_value():
    master = 0.025 * 3 + 0.025 * 4 + 0.2 * 5 + 0.35 * 6 + 0.4 * 7
    loss = KiNet(PRESETS["small"]).loss(logits_with_known_losses(), torch.ones(1))
    assert float(loss) == pytest.approx(0.35 * 1 + 0.25 * 2 + 0.4 * master, rel=1e-5)


def test_kinet_loss_without_multi_scale_judges_the_final_classifier_only():
    loss = KiNet(PRESETS["small"], multi_scale=False).loss(logits_with_known_losses(), torch.ones(1))
    assert float(loss) == pytest.approx(0.35 * 1 + 0.25 * 2 + 0.4 * 7, rel=1e-5)


@pytest.mark.parametrize("switches", list(itertools.product([False, True], repeat=3)))
def test_kinet_runs_every_ablation_with_gradients_everywhere(switches):
    multi_scale, merge_in, metadata = switches
    network = KiNet(PRESETS["small"], multi_scale=multi_scale, merge_in=merge_in, metadata=metadata)
    assert (network.merge_stem is None) is not merge_in
    assert (network.final_head.metadata is not None) is metadata
    network.loss(network(*batch(4, 64)), torch.tensor([0.0, 1.0, 0.0, 1.0])).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize("used", [True, False])
def test_kinet_uses_metadata_in_the_final_classifier_only(used):
    network = KiNet(PRESETS["small"], metadata=used).eval()
    if used:
        torch.nn.init.ones_(network.final_head.metadata.weight)  # 0 before any training
    image, mask, metadata = batch()
    with torch.no_grad():
        before, after = network(image, mask, metadata), network(image, mask, metadata + 1)
    assert (not torch.equal(before["final"], after["final"])) is used
    assert all(torch.equal(before[name], after[name]) for name in OUTPUTS - {"final"})


@pytest.mark.parametrize("seed", range(3))
def test_final_classifier_of_kinet_starts_as_the_mean_of_the_scales(seed):
    with isolated_torch_rng(seed, "weights"):
        network = KiNet(PRESETS["small"]).eval()
    with torch.no_grad():
        outputs = network(*batch(4))
    mean = torch.stack([outputs[name] for name in ("s1", "s2", "s3", "s4")]).mean(dim=0)
    torch.testing.assert_close(outputs["final"], mean)


def test_kinet_refuses_other_than_two_sequences():
    with pytest.raises(ConfigError, match=r"two sequences, T1c then FLAIR, got t1, t1ce, flair"):
        build_evaluator("kinet", ClassifierSettings(sequences=("t1", "t1ce", "flair")), {})


def test_kinet_refuses_an_unknown_preset():
    with pytest.raises(ConfigError, match="unknown preset 'smal': did you mean 'small'"):
        build_evaluator("kinet", ClassifierSettings(sequences=("t1ce", "flair")), {"preset": "smal"})


@pytest.mark.slow
def test_kinet_finds_a_planted_signal(tmp_path):
    cases = phantom_cases(32, n_slices=4, signal=3.0)
    settings = ClassifierSettings(sequences=("t1ce", "flair"), epochs=12, learning_rate=2e-3, image_size_px=32)
    evaluator = build_evaluator("kinet", settings, {})
    patients = patient_level(evaluator.cross_validate(cases, phantom_folds(cases), folder=tmp_path, tune=False))
    assert auc(patients["label"], patients["probability"]) > 0.9
