"""Our one-shot strategies on the tiny space and a phantom cohort, inside NNI's own experiment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nni
import pandas as pd
import pytest
import torch
from nni.nas.experiment import NasExperiment
from nni.tools.nnictl.config_utils import Experiments

from glioma_nas.costs import OperatorSpec
from glioma_nas.errors import ConfigError
from glioma_nas.evaluators.latency_table import LatencyTableProfiler
from glioma_nas.evaluators.segmentation import SegmentationEvaluator, split_training_cases
from glioma_nas.nni_bridge import explore, found_architectures
from glioma_nas.prepared import PreparedCohort
from glioma_nas.search_spaces.nasbranet import NASBraNet
from glioma_nas.seeding import isolated_torch_rng
from glioma_nas.strategies.one_shot import CoSearch, LatencyDarts
from glioma_nas.testing.prepared_phantoms import prepare_phantom_cohort

EPOCHS = 3


class SizeProfiler(LatencyTableProfiler):
    """Prices operators by arithmetic instead of by the clock, so that tests do not depend on the machine."""

    def __init__(self, model_space: Any) -> None:
        self._model = model_space.cost_model(self.price)

    @staticmethod
    def price(spec: OperatorSpec) -> float:
        return 1e-3 * spec.in_channels * spec.out_channels * spec.height / spec.stride


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_phantom_cohort(tmp_path_factory.mktemp("phantom"), n_patients=8, image_size_px=32)


def make_space() -> NASBraNet:
    with isolated_torch_rng(0, "space"):
        return NASBraNet("tiny", image_size_px=32, in_channels=2, n_classes=2)


def make_evaluator(prepared: Path, folder: Path, **options: Any) -> SegmentationEvaluator:
    settings = {"epochs": EPOCHS, "steps_per_epoch": 2, "batch_size": 4, "seed": 1, **options}
    return SegmentationEvaluator(str(prepared), ("t1ce", "flair"), folder=str(folder), **settings)


def make_co_search(space: NASBraNet, **options: Any) -> CoSearch:
    settings: dict[str, Any] = {
        "pretrain_epochs": 1,
        "pretrain_widths": ("max", "min"),
        "search_widths": ("min", "sampled"),
        "finetune_steps": 2,
        "recalibration_batches": 1,
        "architecture_learning_rate": 0.05,
        "seed": 2,
    }
    return CoSearch(profiler=SizeProfiler(space), **{**settings, **options})


@pytest.mark.slow
def test_co_search_runs_in_a_plain_nas_experiment(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # NNI keeps a list of experiments in the home folder that it knew when it was imported.
    monkeypatch.setattr(Experiments.__init__, "__defaults__", (str(tmp_path),))
    space = make_space()
    strategy = make_co_search(space)
    experiment = NasExperiment(space, make_evaluator(prepared, tmp_path / "run"), strategy)
    experiment.config.experiment_working_directory = str(tmp_path)
    experiment.run()
    assert experiment.id in json.loads((tmp_path / ".experiment").read_text())
    models = experiment.export_top_models(top_k=2, formatter="instance")
    assert len(models) == 2
    image = torch.zeros(1, 2, 32, 32)
    assert all(model.eval()(image).shape == (1, 2, 32, 32) for model in models)
    teacher = strategy.found["teacher"].sample()
    plain = make_space()
    widest = {label: plain.layout.choices[label][-1] for label in plain.variable_groups()["width"]}
    assert {label: teacher[label] for label in widest} == widest
    assert teacher["width_ends"] == plain.fixed_choices["teacher"]["width_ends"]
    assert strategy.found["student"].sample()["width_ends"] == plain.fixed_choices["student"]["width_ends"]
    assert len(strategy.candidates["student"]) == 3
    experiment.stop()


class _PowerCut(Exception):
    pass


@pytest.mark.slow
def test_interrupted_and_resumed_search_equals_an_uninterrupted_one(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_space = make_space()
    whole = make_co_search(whole_space)
    explore(whole_space, make_evaluator(prepared, tmp_path / "whole"), whole)

    cut_space = make_space()
    cut = make_co_search(cut_space)
    evaluator = make_evaluator(prepared, tmp_path / "cut")
    step = type(evaluator.module).training_step

    def fail_in_epoch_2(self: Any, batch: Any, batch_idx: int) -> Any:
        if self.trainer.current_epoch == 2 and batch_idx == 1:
            raise _PowerCut
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patched:
        patched.setattr(type(evaluator.module), "training_step", fail_in_epoch_2)
        with pytest.raises(_PowerCut):
            explore(cut_space, evaluator, cut)

    resumed_space = make_space()
    resumed = make_co_search(resumed_space)
    explore(resumed_space, make_evaluator(prepared, tmp_path / "cut"), resumed)

    pd.testing.assert_frame_equal(
        pd.read_csv(tmp_path / "cut" / "history.csv"), pd.read_csv(tmp_path / "whole" / "history.csv")
    )
    assert resumed.found == whole.found
    for name in ("teacher", "student"):
        expected = whole.oneshot_module.architectures[name].state_dict()
        for key, value in resumed.oneshot_module.architectures[name].state_dict().items():
            assert torch.equal(value, expected[key]), key


@pytest.mark.slow
def test_search_cut_off_while_candidates_are_scored_gives_the_same_scores(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_space = make_space()
    whole = make_co_search(whole_space)
    explore(whole_space, make_evaluator(prepared, tmp_path / "whole"), whole)

    def fail(*arguments: Any, **options: Any) -> None:
        raise _PowerCut

    cut_space = make_space()
    with monkeypatch.context() as patched:
        patched.setattr(CoSearch, "_score", fail)
        with pytest.raises(_PowerCut):
            explore(cut_space, make_evaluator(prepared, tmp_path / "cut"), make_co_search(cut_space))
    resumed_space = make_space()
    resumed = make_co_search(resumed_space)
    explore(resumed_space, make_evaluator(prepared, tmp_path / "cut"), resumed)
    assert resumed.candidates == whole.candidates
    assert resumed.found == whole.found


@pytest.mark.slow
def test_architecture_parameters_rest_while_pretraining_and_move_while_searching(
    prepared: Path, tmp_path: Path
) -> None:
    def movement(pretrain_epochs: int, folder: str) -> float:
        space = make_space()
        strategy = make_co_search(space, pretrain_epochs=pretrain_epochs)
        before = nni.get_current_parameter()  # NNI's experiment of another test leaves its last model behind
        explore(space, make_evaluator(prepared, tmp_path / folder, epochs=1), strategy)
        assert nni.get_current_parameter() is before  # nothing left that a later evaluation could report to
        student = strategy.oneshot_module.architectures["student"]
        return max(float(logits.detach().abs().max()) for logits in student.logits.values())

    assert movement(1, "rest") < 0.01  # still at 1e-3·randn
    assert movement(0, "move") > 0.02  # Adam at 0.05 has stepped


@pytest.mark.slow
def test_latency_darts_with_a_heavy_latency_weight_finds_faster_networks(prepared: Path, tmp_path: Path) -> None:
    latencies = []
    for weight in (0.0, 1000.0):
        space = make_space()
        strategy = LatencyDarts(
            profiler=SizeProfiler(space),
            latency_weight=weight,
            latency_coefficients=(1.0, 1.0, 1.0),
            pretrain_epochs=0,
            search_widths=("min", "sampled"),
            finetune_steps=0,
            architecture_learning_rate=0.1,
            recalibration_batches=1,
            seed=3,
        )
        explore(space, make_evaluator(prepared, tmp_path / str(weight), epochs=6), strategy)
        latencies.append({item.branches: item.latency_ms for item in strategy.candidates["student"]})
        plain = make_space()
        teacher = found_architectures(strategy, plain)["teacher"]
        assert teacher.sample()["width_ends"] == plain.fixed_choices["teacher"]["width_ends"]
    # Over the branch sets together: without a price, a single one may be fast by chance.
    assert sum(latencies[1].values()) < 0.8 * sum(latencies[0].values()), latencies


def test_search_halves_hold_disjoint_patients_and_no_test_patient(prepared: Path) -> None:
    cohort = PreparedCohort.load(prepared)
    first, second = split_training_cases(cohort, fold=0, split="search", seed=0)
    patients = [{case.patient_id for case in half} for half in (first, second)]
    assert patients[0] and patients[1]
    assert not patients[0] & patients[1]
    tested = {cohort.cases[case].patient_id for case in cohort.folds.test(0)}
    assert not tested & (patients[0] | patients[1])


def test_networks_of_different_seeds_can_be_compared_on_the_same_patients(prepared: Path, tmp_path: Path) -> None:
    def halves(**options: Any) -> set[tuple[str, ...]]:
        return {
            tuple(make_evaluator(prepared, tmp_path, seed=seed, **options).validation_patients) for seed in range(6)
        }

    assert len(halves()) > 1
    assert len(halves(split_seed=0)) == 1


def test_latency_weight_without_a_profiler_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs a profiler"):
        CoSearch(latency_weight=0.1)


def test_unequal_exponents_without_a_target_are_refused() -> None:
    with pytest.raises(ConfigError, match="need target_latency_ms"):
        CoSearch(latency_weight=0, target_exponents=(0.0, -0.07))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_exponents": [1]}, r"target_exponents is \[1\]; give two numbers"),
        ({"gradient_clip": "abc"}, "gradient_clip is 'abc'; give a number"),
        ({"finetune_steps": -1}, "finetune_steps is -1; give a number of at least 0"),
        ({"decode": "jont"}, r"unknown decoding 'jont': did you mean 'joint'\?"),
    ],
)
def test_impossible_option_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CoSearch(latency_weight=0, **options)


def test_unknown_width_rule_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown width rule 'widest'"):
        CoSearch(latency_weight=0, search_widths=("widest",))


def test_unknown_split_is_refused(prepared: Path) -> None:
    with pytest.raises(ConfigError, match="allowed: search, train"):
        split_training_cases(PreparedCohort.load(prepared), fold=0, split="test", seed=0)
