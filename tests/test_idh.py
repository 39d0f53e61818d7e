from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from glioma_nas.binary_statistics import bootstrap_interval
from glioma_nas.errors import ConfigError, StorageError
from glioma_nas.marker_evaluator import build_evaluator, load_evaluator, patient_level, save_evaluator
from glioma_nas.marker_study import ClassifierSettings
from glioma_nas.plugins.backbones import backbone_design
from glioma_nas.plugins.idh import IdhNetwork
from glioma_nas.roc_analysis import auc, auc_within
from glioma_nas.slice_classifier import _aggregate
from glioma_nas.testing.classifier_suite import ClassifierSuite, phantom_cases, phantom_folds

SETTINGS = ClassifierSettings(sequences=("t1ce", "flair"), epochs=8, batch_size=16, image_size_px=32)


class TestIdhClassifier(ClassifierSuite):
    classifier = "idh"


class TestIdhClassifierWithAttention(ClassifierSuite):
    classifier = "idh"
    options: ClassVar = {"aggregate": "attention", "fusion": "middle2"}


class TestIdhClassifierThatChoosesItsAggregation(ClassifierSuite):
    classifier = "idh"
    options: ClassVar = {"aggregate": "auto"}


@pytest.mark.parametrize(("mode", "channels"), [("IMG", 2), ("ROI", 2), ("MIX", 3)])
def test_idh_network_takes_the_channels_of_its_mode(mode, channels):
    network = IdhNetwork(2, backbone="small_resnet", mode=mode, metadata=True).eval()
    stem = next(module for module in network.modules() if isinstance(module, torch.nn.Conv2d))
    assert stem.in_channels == channels
    logits = network(torch.randn(3, 2, 64, 64), torch.ones(3, 1, 64, 64), torch.zeros(3, 2))["final"]
    assert logits.shape == (3,)


def test_idh_roi_mode_does_not_see_outside_the_mask():
    torch.manual_seed(0)
    network = IdhNetwork(2, backbone="small_resnet", mode="ROI", metadata=False).eval()
    image, mask, metadata = torch.randn(1, 2, 64, 64), torch.zeros(1, 1, 64, 64), torch.zeros(1, 2)
    mask[..., 20:40, 20:40] = 1
    changed = image + 5 * (1 - mask)
    assert torch.equal(network(image, mask, metadata)["final"], network(changed, mask, metadata)["final"])
    inside = image + 5 * mask
    assert not torch.equal(network(image, mask, metadata)["final"], network(inside, mask, metadata)["final"])


@pytest.mark.parametrize("used", [True, False])
def test_idh_network_uses_metadata_only_when_switched_on(used):
    torch.manual_seed(0)
    network = IdhNetwork(2, backbone="small_resnet", mode="IMG", metadata=used).eval()
    if used:
        torch.nn.init.ones_(network.classifier.metadata.weight)  # 0 before any training
    image, mask = torch.randn(1, 2, 64, 64), torch.zeros(1, 1, 64, 64)
    young, old = torch.tensor([[0.2, 0.0]]), torch.tensor([[0.8, 1.0]])
    differs = not torch.equal(network(image, mask, young)["final"], network(image, mask, old)["final"])
    assert differs is used


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "MIXED"}, "unknown mode 'MIXED': did you mean 'MIX'"),
        ({"backbone": "resnet5"}, "unknown backbone 'resnet5': did you mean 'resnet50'"),
        ({"aggregate": "median"}, "unknown aggregate 'median'"),
        ({"pretrained": "/nowhere/weights.pt"}, "/nowhere/weights.pt: no such weights file"),
        ({"fusion": "erly"}, "unknown fusion 'erly': did you mean 'early'"),
        ({"fuson": "early"}, "classifier 'idh' has no option 'fuson': did you mean 'fusion'"),
    ],
)
def test_idh_refuses_options_it_does_not_know(options, message):
    with pytest.raises(ConfigError, match=message):
        build_evaluator("idh", SETTINGS, options)


def test_slices_become_a_patient_by_mean_maximum_or_learnt_weights():
    """The same three slice logits, aggregated in each way by hand; attention weighs the last slice twice the others."""
    logits = torch.tensor([-1.0, 0.5, 2.0])
    outputs = {"final": logits, "attention": torch.tensor([0.0, 0.0, math.log(2)])}
    log_odds = 0.3
    shares = [1 / (1 + math.exp(-float(logit) - log_odds)) for logit in logits]
    assert _aggregate(outputs, "mean", log_odds) == pytest.approx(np.mean(shares))
    assert _aggregate(outputs, "max", log_odds) == pytest.approx(max(shares))
    weighted = (-1.0 + 0.5 + 2 * 2.0) / 4 + log_odds
    assert _aggregate(outputs, "attention", log_odds) == pytest.approx(1 / (1 + math.exp(-weighted)))


def test_idh_predictions_do_not_need_the_pretrained_file_any_more(tmp_path):
    weights = tmp_path / "weights.safetensors"
    design = backbone_design("small_resnet")
    save_file({**design.build_stem(3).state_dict(), **design.build_stages().state_dict()}, weights)
    evaluator = build_evaluator("idh", SETTINGS, {"pretrained": str(weights)})
    evaluator.settings = ClassifierSettings(sequences=("t1ce", "flair"), epochs=1, batch_size=8, image_size_px=32)
    cases = phantom_cases(8)
    frame = evaluator.cross_validate(cases, phantom_folds(cases), folder=tmp_path / "run")
    save_evaluator(tmp_path / "run", "idh", evaluator)
    weights.unlink()
    ids = set(frame.query("fold == 0")["case_id"])
    again = load_evaluator(tmp_path / "run").predict(
        tmp_path / "run" / "fold0", [case for case in cases if case.case_id in ids]
    )
    assert again == pytest.approx(frame.query("fold == 0")["probability_uncalibrated"].to_numpy(), rel=1e-6)


def test_idh_prediction_is_refused_when_fold_is_not_trained(tmp_path):
    with pytest.raises(StorageError, match="no such file; run the classify stage first"):
        build_evaluator("idh", SETTINGS, {}).predict(tmp_path, phantom_cases(2))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["IMG", "ROI", "MIX"])
def test_idh_finds_a_planted_signal(tmp_path, mode):
    cases = phantom_cases(32, n_slices=4, signal=3.0)
    evaluator = build_evaluator("idh", SETTINGS, {"mode": mode})
    patients = patient_level(evaluator.cross_validate(cases, phantom_folds(cases), folder=tmp_path, tune=False))
    assert auc(patients["label"], patients["probability"]) > 0.9


def cases_with_decoys(n_patients, *, seed):
    """Add discs as bright as a tumour may be, each bright or not at random: only the mask tells which one is meant."""
    generator = np.random.default_rng(seed)
    rows, columns = np.mgrid[:32, :32]
    cases = []
    for case in phantom_cases(n_patients, n_slices=3, signal=2.5, seed=seed):
        images = case.images.copy()
        for _ in range(5):
            centre = generator.uniform(5, 27, size=2)
            disc = (rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 <= generator.uniform(4, 6) ** 2
            decoy = disc & (case.mask[0] == 0)
            images[:, 0] += 2.5 * float(generator.integers(2)) * decoy
            images[:, 1] += decoy
        cases.append(replace(case, images=images))
    return cases


@pytest.mark.slow
def test_idh_from_images_and_true_masks_beats_images_alone_over_seeds(tmp_path):
    areas = {"MIX": [], "IMG": []}
    for seed in range(2):
        cases = cases_with_decoys(40, seed=seed)
        for mode, found in areas.items():
            evaluator = build_evaluator("idh", SETTINGS, {"mode": mode, "metadata": False})
            frame = evaluator.cross_validate(
                cases, phantom_folds(cases), folder=tmp_path / f"{mode}{seed}", seed=seed, tune=False
            )
            patients = patient_level(frame)
            found.append(auc(patients["label"], patients["probability"]))
    gaps = [mix - img for mix, img in zip(areas["MIX"], areas["IMG"], strict=True)]
    assert min(gaps) > 0 and np.mean(gaps) > 0.05, areas


def pooled_over_cohorts(folder, *, signal):
    """Return the AUC over pairs of the same test fold in three cohorts of phantoms, and its interval over patients."""
    labels, probabilities, groups = [], [], []
    for seed in range(3):
        cases = phantom_cases(40, n_slices=2, signal=signal, seed=seed)
        evaluator = build_evaluator("idh", SETTINGS, {"metadata": False})
        frame = evaluator.cross_validate(cases, phantom_folds(cases), folder=folder / str(seed), seed=seed, tune=False)
        patients = patient_level(frame)
        labels += patients["label"].tolist()
        probabilities += patients["probability"].tolist()
        groups += [f"{seed} {fold}" for fold in patients["fold"]]
    generator = np.random.default_rng(0)
    low, high = bootstrap_interval(labels, [probabilities, groups], auc_within, samples=300, generator=generator)
    return low, auc_within(labels, probabilities, groups), high


@pytest.mark.slow
def test_idh_stays_at_chance_without_a_signal_and_finds_a_weak_one(tmp_path):
    low, value, high = pooled_over_cohorts(tmp_path / "none", signal=0.0)
    assert low < 0.5 < high, (low, value, high)
    # Narrow enough to notice a leak: a signal of four tenths of the noise is found.
    low, value, high = pooled_over_cohorts(tmp_path / "weak", signal=0.4)
    assert low > 0.5, (low, value, high)
