"""torch.compile as an option of the search and of the training: what it takes over computes the same."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from nni.nas.space import model_context
from nni.nas.strategy import DARTS
from supernets import random_sample, soft, tiny_supernet
from torch import nn
from torch._dynamo.utils import counters

from glioma_nas.compilation import compile_for_training, why_not
from glioma_nas.config import parse_config
from glioma_nas.errors import ConfigError
from glioma_nas.evaluators.segmentation import SegmentationEvaluator
from glioma_nas.nni_bridge import explore
from glioma_nas.registry import operators
from glioma_nas.search_spaces.nasbranet import NASBraNet
from glioma_nas.strategies.one_shot import CoSearch
from glioma_nas.testing.prepared_phantoms import prepare_phantom_cohort

IMAGE = torch.randn(2, 2, 32, 32, generator=torch.Generator().manual_seed(1))

SMALL: dict[str, Any] = {"operators": ["skip", "zoomed_conv"], "scales": (2, 4), "n_layers": 3, "n_branches": 1}

# Whether a network can be captured in one piece, without the compiler itself, which takes minutes.
QUICK = "eager"


def compiled_graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def gradients_of_a_step(space: NASBraNet, slot: Any) -> list[torch.Tensor]:
    relaxation, *_ = soft(space.layout, "student", 1)
    with slot.using(relaxation):
        outputs = space.train()(IMAGE)
    sum(logits.square().mean() for logits in outputs.values()).backward()
    found = [p.grad for p in space.parameters() if p.grad is not None]
    space.zero_grad()
    return found


@pytest.mark.slow
def test_supernet_with_compiled_stems_and_heads_has_the_same_gradients() -> None:
    space, slot = tiny_supernet(**SMALL)
    expected = gradients_of_a_step(space, slot)
    parts = compile_for_training(space, QUICK)
    assert len(parts) == 2 * 3  # stem, heads and auxiliary heads of student and teacher
    assert all(cell._compiled_call_impl is None for cell in space.cells.values())
    before = compiled_graphs()
    found = gradients_of_a_step(space, slot)
    assert compiled_graphs() == before + 3
    assert len(found) == len(expected) > 20
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, atol=1e-5, rtol=1e-3)


@pytest.mark.slow
def test_search_and_training_run_compiled_and_end_where_they_would(tmp_path: Path) -> None:
    prepared = prepare_phantom_cohort(tmp_path, n_patients=4, image_size_px=32)
    losses, weights = [], []
    for name, compiled in (("eager", False), ("compiled", QUICK)):
        options: dict[str, Any] = {"steps_per_epoch": 2, "batch_size": 4, "seed": 3, "compiled": compiled}
        evaluator = SegmentationEvaluator(
            str(prepared), ("t1ce", "flair"), folder=str(tmp_path / f"{name}_search"), epochs=2, **options
        )
        torch.manual_seed(0)
        space = NASBraNet("tiny", **SMALL)
        explore(
            space,
            evaluator,
            CoSearch(latency_weight=0, pretrain_epochs=1, finetune_steps=0, recalibration_batches=1, seed=1),
        )
        losses.append(evaluator.history()["loss_weights"].tolist())
        torch.manual_seed(0)
        plain = NASBraNet("tiny", **SMALL)
        network = plain.derive(random_sample(plain, 0))
        SegmentationEvaluator(
            str(prepared),
            ("t1ce", "flair"),
            folder=str(tmp_path / name),
            split="train",
            ema_decay=0.5,
            epochs=1,
            **options,
        ).evaluate(network)
        assert (network._compiled_call_impl is not None) == bool(compiled)
        assert copy.deepcopy(network)._compiled_call_impl is None
        weights.append(network.state_dict())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert list(weights[0]) == list(weights[1])
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, atol=1e-4, rtol=1e-2, msg=key)


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x).relu()


@pytest.mark.slow
def test_inductor_compiles_a_network_for_training() -> None:
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    network = Normed()
    plain = copy.deepcopy(network)
    compile_for_training(network)
    before = compiled_graphs()
    for module in (network, plain):
        module(IMAGE).square().sum().backward()
    assert compiled_graphs() == before + 1
    torch.testing.assert_close(network.norm.weight.grad, plain.norm.weight.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_every_operator_that_ships_is_compiled_in_one_piece() -> None:
    before, compiled = compiled_graphs(), 0
    for entry in operators.entries():
        if entry.origin != "in-tree":
            continue
        for stride in (1, 2):
            with model_context({}):
                operator = entry.component(2, 4, stride).train()
            plain = copy.deepcopy(operator)
            compile_for_training(operator, QUICK)
            torch.testing.assert_close(operator(IMAGE), plain(IMAGE), atol=1e-5, rtol=1e-4)
            compiled += 1
    assert compiled_graphs() == before + compiled >= before + 2 * 9


def test_supernet_of_nni_has_nothing_to_compile() -> None:
    space = NASBraNet("tiny", operators=["skip"])
    DARTS().mutate_model(space)
    with pytest.raises(ConfigError, match="NASBraNet has no part whose shapes stay the same with this strategy"):
        compile_for_training(space, QUICK)


def test_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match=r"compile: true cannot be used here: no C\+\+ compiler .*install g\+\+"):
        compile_for_training(nn.ReLU())


def test_compiling_is_off_unless_it_is_asked_for() -> None:
    data = {"cohort": {"sheet": "none.csv", "sequences": ["flair"]}}
    config = parse_config(data, source="test", folder=Path())
    assert (config.search.compile, config.train.compile) == (False, False)
    config = parse_config({**data, "train": {"compile": True}}, source="test", folder=Path())
    assert config.train.compile
