"""Ranking networks by what their masks do for markers: who is scored, what is blended, and that nothing leaks."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from test_one_shot import SizeProfiler, make_space
from torch import Tensor, nn

from glioma_nas.config import RunConfig, parse_config
from glioma_nas.downstream import DownstreamScore, blended_accuracy, marker_strata
from glioma_nas.errors import ConfigError, LabelError, LeakageError
from glioma_nas.evaluators.segmentation import SegmentationEvaluator, split_training_cases
from glioma_nas.files import read_json, sha256_file
from glioma_nas.marker_study import ClassifierSettings, MarkerStudy, cases_of_study
from glioma_nas.nni_bridge import explore
from glioma_nas.nni_experiments.experiment_folder import ExperimentOptions, shareable
from glioma_nas.nni_experiments.trial_channel import TrialChannel
from glioma_nas.nni_experiments.trial_metrics import TrialResult
from glioma_nas.nni_experiments.trial_run import run_trial
from glioma_nas.nni_experiments.trial_settings import TrialSettings
from glioma_nas.pipeline import MANIFEST, Pipeline
from glioma_nas.prepared import PreparedCohort
from glioma_nas.progress import Silent
from glioma_nas.strategies.nni_multi_trial import NniRandom
from glioma_nas.strategies.one_shot import CoSearch, LatencyDarts
from glioma_nas.testing.phantoms import write_phantom_cohort
from glioma_nas.testing.prepared_phantoms import prepare_phantom_cohort

CLASSIFY = {"markers": {"idh": {"column": "idh", "positive": "mutant"}}, "slices_per_case": 3, "image_size_px": 32}


def make_config(folder: Path, *, weight: float = 0.5, **classify: Any) -> RunConfig:
    return parse_config(
        {
            "cohort": {"sheet": "cohort.csv", "sequences": ["t1ce", "flair"]},
            "search": {"marker_weight": weight, "marker_classifier": "radiomics"},
            "classify": {**CLASSIFY, **classify},
        },
        source="test",
        folder=folder,
    )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_phantom_cohort(tmp_path_factory.mktemp("phantom"), n_patients=22, image_size_px=32)


class Bright(nn.Module):
    """Calls bright FLAIR tumour."""

    def forward(self, x: Tensor) -> Tensor:
        smooth = nn.functional.avg_pool2d(x[:, 1:2], 3, stride=1, padding=1)
        return torch.cat([torch.zeros_like(smooth), smooth - 0.8], dim=1)


class Corner(nn.Module):
    """Calls the same corner of every slice tumour, where nobody has any tissue."""

    def forward(self, x: Tensor) -> Tensor:
        logits = torch.zeros_like(x[:, :2])
        logits[:, 1] = -1.0
        logits[:, 1, :4, :4] = 1.0
        return logits


def score_of(prepared: Path, case_ids: Sequence[str], network_patients: Sequence[str]) -> DownstreamScore:
    return DownstreamScore(
        make_config(prepared), prepared, network_patients=network_patients, case_ids=case_ids, seed=3
    )


def halves(prepared: Path) -> tuple[list[str], list[str]]:
    cases = sorted(PreparedCohort.load(prepared).cases)
    return cases[:8], cases[8:16]


@given(
    dice=st.floats(0, 1),
    aucs=st.dictionaries(st.sampled_from(["idh", "ki67"]), st.floats(0, 1), min_size=1),
    weight=st.floats(0, 1),
)
def test_blend_lies_between_dice_and_auc_and_is_dice_when_off(
    dice: float, aucs: dict[str, float], weight: float
) -> None:
    mean = float(np.mean(list(aucs.values())))
    blended = blended_accuracy(dice, aucs, weight)
    assert min(dice, mean) - 1e-12 <= blended <= max(dice, mean) + 1e-12
    assert blended_accuracy(dice, {}, 0.0) == dice


def test_masks_that_show_the_tumour_are_worth_more_than_masks_that_do_not(prepared: Path) -> None:
    training, scored = halves(prepared)
    score = score_of(prepared, scored, training)
    good, bad = score.aucs(Bright()), score.aucs(Corner())
    assert good["idh"] > bad["idh"]
    assert score.aucs(Bright()) == good  # folds and classifiers are the same for every network
    assert score.patients["idh"] == (8, 4)
    assert score.trainings == 9
    assert "idh (n = 8, 4 positive): 9 classifiers trained" in score.note()


def test_patient_that_trains_the_network_is_never_scored(prepared: Path) -> None:
    training, scored = halves(prepared)
    with pytest.raises(LeakageError, match=f"patient {scored[0]} trains the network"):
        score_of(prepared, scored, [*training, scored[0]])


def test_every_scored_patient_is_tested_once_by_a_classifier_that_has_not_seen_him(prepared: Path) -> None:
    training, scored = halves(prepared)
    study = MarkerStudy(
        preprocess_folder=prepared,
        marker="idh",
        config=make_config(prepared).classify.markers["idh"],
        sheet=Path("cohort.csv"),
        network_sequences=("t1ce", "flair"),
        network_patients=tuple(training),
        case_ids=tuple(scored),
        own_folds=3,
    )
    _, folds = cases_of_study(Bright(), study, ClassifierSettings(sequences=("t1ce", "flair"), image_size_px=32))
    tested = [case for fold in range(folds.n) for case in folds.test(fold)]
    assert sorted(tested) == scored
    for fold in range(folds.n):
        assert set(folds.train(fold)) == set(scored) - set(folds.test(fold))
        assert not set(folds.train(fold)) & set(training)


def test_labels_and_images_of_all_other_patients_do_not_count(prepared: Path, tmp_path: Path) -> None:
    training, scored = halves(prepared)
    before = score_of(prepared, scored, training).aucs(Bright())
    copy = tmp_path / "preprocess"
    shutil.copytree(prepared, copy)
    for case in training:  # the half that trains the network, test patients among it
        for path in copy.rglob(f"{case}*"):
            if path.is_file() and path.suffix == ".npy":
                np.save(path, np.zeros_like(np.load(path)))
    assert score_of(copy, scored, training).aucs(Bright()) == before


def test_too_few_patients_of_a_class_are_found_before_anything_is_searched(prepared: Path) -> None:
    training, scored = halves(prepared)
    mutants = scored[::2]
    with pytest.raises(LabelError, match="marker 'idh' cannot score networks on the 4 cases"):
        score_of(prepared, mutants, training)


def test_weight_without_markers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"search\.marker_weight needs classify\.markers"):
        make_config(tmp_path, markers={})


def make_evaluator(prepared: Path, folder: Path, *, weight: float) -> SegmentationEvaluator:
    def downstream(**patients: Any) -> DownstreamScore:
        return DownstreamScore(make_config(prepared, weight=weight), prepared, seed=3, **patients)

    return SegmentationEvaluator(
        str(prepared),
        ("t1ce", "flair"),
        folder=str(folder),
        epochs=2,
        steps_per_epoch=2,
        batch_size=4,
        seed=5,
        downstream=downstream if weight else None,
        strata=marker_strata(make_config(prepared), prepared) if weight else None,
    )


@pytest.mark.parametrize("seed", range(6))
def test_both_halves_of_a_search_hold_both_classes(prepared: Path, seed: int) -> None:
    strata = marker_strata(make_config(prepared), prepared)
    cohort = PreparedCohort.load(prepared)
    for half in split_training_cases(cohort, fold=0, split="search", seed=seed, strata=strata):
        assert min(sum(case.labels["idh"] == value for case in half) for value in ("mutant", "wildtype")) >= 2


@pytest.mark.slow
def test_student_is_ranked_by_markers_and_the_teacher_is_not(prepared: Path, tmp_path: Path) -> None:
    space = make_space()
    strategy = CoSearch(
        profiler=SizeProfiler(space),
        pretrain_epochs=1,
        pretrain_widths=("max",),
        search_widths=("sampled",),
        finetune_steps=0,
        recalibration_batches=1,
        seed=2,
    )
    evaluator = make_evaluator(prepared, tmp_path, weight=0.25)
    explore(space, evaluator, strategy)
    for candidate in strategy.candidates["student"]:
        assert candidate.accuracy == pytest.approx(0.75 * candidate.dice + 0.25 * candidate.aucs["idh"])
        assert candidate.row()["auc_idh"] == candidate.aucs["idh"]
    assert all(not item.aucs and item.accuracy == item.dice for item in strategy.candidates["teacher"])
    # A fold's test patients are neither trained on nor scored.
    cohort = PreparedCohort.load(prepared)
    test = {cohort.cases[case].patient_id for case in cohort.folds.test(0)}
    assert evaluator.downstream is not None
    scored = set(evaluator.validation_patients)
    assert not scored & set(evaluator.training_patients)
    assert not scored & test
    assert evaluator.downstream.patients["idh"][0] == len(scored)


@pytest.mark.slow
def test_trials_of_a_multi_trial_strategy_report_the_blend(prepared: Path, tmp_path: Path) -> None:
    space = make_space()
    strategy = NniRandom(profiler=SizeProfiler(space), trials=1, seed=2)
    explore(space, make_evaluator(prepared, tmp_path, weight=0.5), strategy)
    (record,) = (read_json(path) for path in tmp_path.glob("trials/*/result.json"))
    assert record["accuracy"] == pytest.approx(0.5 * record["dice"] + 0.5 * record["auc"]["auc_idh"])
    (model,) = strategy.list_models()
    assert model.metric == record["accuracy"]


@pytest.mark.slow
def test_search_without_the_key_is_what_it_was(prepared: Path, tmp_path: Path) -> None:
    space = make_space()
    strategy = LatencyDarts(
        latency_weight=0,
        pretrain_epochs=1,
        pretrain_widths=("max",),
        search_widths=("sampled",),
        finetune_steps=0,
        recalibration_batches=1,
        seed=2,
    )
    evaluator = make_evaluator(prepared, tmp_path, weight=0.0)
    explore(space, evaluator, strategy)
    assert evaluator.downstream is None
    assert all(item.accuracy == item.dice and not item.aucs for item in strategy.candidates["student"])


def test_trial_is_ranked_by_the_blend_of_the_markers_it_was_asked_for() -> None:
    result = TrialResult(
        dice=0.8, hd95_mm=None, latency_ms=8.3, latency_p95_ms=9.0, macs_g=1.0, params_m=1.0, auc_idh=0.6, auc_ki67=0.9,
        fold=0, seed=0,
    )  # fmt: skip
    target = {"target_latency_ms": 8.3, "target_exponents": (-0.07, -0.07)}
    assert result.final_metrics(**target)["default"] == pytest.approx(0.8)
    blended = result.final_metrics(**target, marker_weight=0.5, markers=("idh",))
    assert blended["default"] == pytest.approx(0.7)
    assert blended["dice"] == 0.8


class RecordingChannel(TrialChannel):
    """The trial's side of NNI, without NNI at the other end: what it would be told is kept."""

    def report_final(self, metrics: Mapping[str, float | None]) -> None:
        self.final = dict(metrics)


@pytest.mark.slow
def test_trial_searches_and_is_ranked_with_the_key_switched_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NNI_OUTPUT_DIR", str(tmp_path / "output"))
    (tmp_path / "output").mkdir()
    sheet = write_phantom_cohort(tmp_path / "cohort", 16, 0)
    config = parse_config(
        {
            "cohort": {"sheet": str(sheet), "sequences": ["t1ce", "flair"]},
            "preprocess": {"crop_size_px": 48, "image_size_px": 32, "workers": 1},
            "folds": {"n_folds": 2, "stratify_by": ["idh"]},
            "latency": {"backend": "torch", "threads": 1, "warmup_runs": 0, "runs": 1, "network_runs": 3},
            "search": {
                "strategy": "latency_darts",
                "strategy_options": {"recalibration_batches": 1, "finetune_steps": 1},
                "space_options": {"preset": "tiny", "operators": ["skip", "conv3x3"]},
                "pretrain_epochs": 1,
                "search_epochs": 1,
                "steps_per_epoch": 2,
                "batch_size": 4,
                "marker_weight": 0.5,
                "marker_classifier": "radiomics",
            },
            "train": {"epochs": 1, "steps_per_epoch": 2, "batch_size": 4},
            "classify": CLASSIFY,
        },
        source="test",
        folder=tmp_path,
    )
    with pytest.raises(ConfigError, match=r"marker_weight is 0\.5: trials are ranked by markers too; name them"):
        ExperimentOptions().check(config)
    Pipeline(config, tmp_path / "run", Silent()).run(["preprocess", "latency"])
    settings = TrialSettings(
        kind="co-search",
        run_folder=tmp_path / "run",
        trials_folder=tmp_path / "trials",
        inputs={stage: sha256_file(tmp_path / "run" / stage / MANIFEST) for stage in ("preprocess", "latency")},
        target_latency_ms=8.0,
        target_exponents=(0.0, 0.0),
        markers=("idh",),
        config=shareable(config, ()),
    )
    path = tmp_path / "trial.yaml"
    path.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    channel = RecordingChannel()
    channel.parameters = {}
    run_trial(path, channel)
    assert channel.final["default"] == pytest.approx(0.5 * channel.final["dice"] + 0.5 * channel.final["auc_idh"])
    assert channel.final["auc_ki67"] is None

    Pipeline(config, tmp_path / "run", Silent()).run(["search"])
    results = read_json(tmp_path / "run" / "search" / MANIFEST)["results"]
    assert results["downstream"]["markers"]["idh"]["n_patients"] == 4
    assert results["downstream"]["classifiers_trained"] == 2 * len(results["student"]["candidates"]) == 6
    assert "6 classifiers trained" in results["strategy_notes"][-1]
    assert {"dice", "auc_idh"} <= set(results["student"]["candidates"][0])

    longer = config.classify.model_copy(update={"epochs": 7})
    assert Pipeline(config, tmp_path / "run", Silent()).done("search")
    assert not Pipeline(config.model_copy(update={"classify": longer}), tmp_path / "run", Silent()).done("search")

    blind = config.model_copy(
        update={"search": config.search.model_copy(update={"strategy": "nni.darts", "strategy_options": {}})}
    )
    with pytest.raises(ConfigError, match=r"marker_weight: 'nni\.darts' ranks no single networks"):
        Pipeline(blind, tmp_path / "run", Silent()).run(["search"])
