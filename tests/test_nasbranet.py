from __future__ import annotations

import copy
import itertools
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from nni.mutable import Categorical, CategoricalMultiple
from nni.nas.nn.pytorch import LayerChoice
from nni.nas.oneshot.pytorch.supermodule.base import BaseSuperNetModule
from nni.nas.space import model_context
from nni.nas.strategy import DARTS, GumbelDARTS, RandomOneShot
from supernets import SlotStrategy, one_hot, random_sample, soft, tiny_supernet
from torch import nn

from glioma_nas.architecture import Architecture
from glioma_nas.errors import ArchitectureError, UnknownNameError
from glioma_nas.registry import search_spaces
from glioma_nas.relaxation import channel_mask
from glioma_nas.search_spaces.layout import THESIS_OPERATORS
from glioma_nas.search_spaces.nasbranet import NASBraNet
from glioma_nas.search_spaces.super_kernel import SlicedConv2d, SwitchableBatchNorm2d

IMAGE = torch.randn(2, 2, 32, 32, generator=torch.Generator().manual_seed(1))
PAIRS = ("2_4", "2_8", "4_8")
EXTRA_OPERATORS = ("skip", "grouped_conv", "dilated_conv", "depthwise_separable", "mbconv")


def test_space_is_registered_by_name() -> None:
    assert search_spaces.get("nasbranet") is NASBraNet


@pytest.mark.slow
def test_importing_the_space_first_leaves_nni_strategies_usable() -> None:
    # NNI's modules import each other in a circle; entered at the wrong place, its strategies are silently replaced.
    code = "import glioma_nas.search_spaces.nasbranet, nni.nas.strategy as s; print(s.DARTS.__name__)"
    found = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "DARTS"


def test_simplify_gives_one_nni_mutable_for_each_choice() -> None:
    space = NASBraNet("tiny")
    found = space.simplify()
    assert list(found) == list(space.layout.choices)
    for label, mutable in found.items():
        assert isinstance(mutable, CategoricalMultiple if label.startswith("in_") else Categorical)
        assert tuple(mutable.values) == space.layout.choices[label]


def test_simplify_is_the_same_before_and_after_mutation() -> None:
    space, _ = tiny_supernet()
    assert {k: repr(v) for k, v in space.simplify().items()} == {
        k: repr(v) for k, v in NASBraNet("tiny").simplify().items()
    }


def test_own_mutables_agree_with_those_nni_finds_in_the_modules() -> None:
    # The space lists its choices itself; NNI's hooks read them from the modules. Both must be the same.
    space = NASBraNet("tiny")
    in_modules: dict[str, Any] = {}
    for module in space.modules():
        for mutable in getattr(module, "mutables", []) if module is not space else []:
            in_modules.update(mutable.simplify())
    assert {label: mutable.extra_repr() for label, mutable in in_modules.items()} == {
        label: mutable.extra_repr() for label, mutable in space.simplify().items()
    }


def test_keep_and_down_share_one_operator_choice() -> None:
    cell = NASBraNet("tiny").cells["s2_l2"]
    assert isinstance(cell.keep, LayerChoice)
    assert cell.keep.label == cell.down.label == "op_s2_l2"


def test_forward_without_strategy_gives_logits() -> None:
    assert NASBraNet("tiny", n_classes=3)(IMAGE).shape == (2, 3, 32, 32)


@pytest.mark.parametrize("options", [{}, {"operators": EXTRA_OPERATORS}, {"merge": "output"}], ids=str)
@pytest.mark.parametrize("strategy", [DARTS, GumbelDARTS, RandomOneShot])
def test_nni_one_shot_strategy_trains_the_space_unmodified(strategy: type, options: dict[str, Any]) -> None:
    space = NASBraNet("tiny", **options)
    strategy().mutate_model(space)
    if strategy is RandomOneShot:
        drawn: dict[str, Any] = {}
        for module in space.modules():
            if isinstance(module, BaseSuperNetModule):
                drawn.update(module.resample(drawn))
        assert set(drawn) == set(space.simplify())
    logits = space(IMAGE)
    assert logits.shape == (2, 2, 32, 32)
    logits.square().mean().backward()
    gradients = [p.grad for name, p in space.named_parameters() if "_arch_alpha" in name]
    assert (strategy is RandomOneShot) == (not gradients)
    assert all(gradient is not None for gradient in gradients)
    assert any(bool(gradient.any()) for gradient in gradients) or not gradients


def test_random_sample_freezes_to_a_network() -> None:
    space = NASBraNet("tiny")
    sample: dict[str, Any] = {}
    network = space.random(sample)
    assert set(sample) == set(space.simplify())
    assert network.eval()(IMAGE).shape == (2, 2, 32, 32)


def test_space_created_in_a_model_context_is_the_derived_network() -> None:
    space = NASBraNet("tiny")
    sample = random_sample(space, 3)
    with model_context(sample):
        model = NASBraNet("tiny")
    assert sorted(p.shape for p in model.parameters()) == sorted(p.shape for p in space.freeze(sample).parameters())
    assert model.eval()(IMAGE).shape == (2, 2, 32, 32)


def test_hooks_are_left_to_nni_when_the_strategy_has_no_slot() -> None:
    assert NASBraNet("tiny").extra_oneshot_hooks(DARTS()) == []


def test_supernet_returns_all_logits_in_training_and_pairs_in_evaluation() -> None:
    space, slot = tiny_supernet()
    relaxation, *_ = soft(space.layout, "student")
    with slot.using(relaxation):
        outputs = space.train()(IMAGE)
        evaluated = space.eval()(IMAGE)
    assert list(outputs) == ["pair_2_4", "pair_2_8", "pair_4_8", "scale_2", "scale_4", "scale_8"]
    assert list(evaluated) == ["pair_2_4", "pair_2_8", "pair_4_8"]
    assert all(logits.shape == (2, 2, 32, 32) for logits in outputs.values())


def test_supernet_is_deterministic() -> None:
    space, slot = tiny_supernet()
    relaxation, *_ = soft(space.layout, "teacher", width_index=1)
    with slot.using(relaxation):
        first, second = space.eval()(IMAGE), space(IMAGE)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_gradient_reaches_every_architecture_parameter_and_gate() -> None:
    space, slot = tiny_supernet()
    relaxation, parameters, gates = soft(space.layout, "student", width_index=1)
    with slot.using(relaxation):
        loss = sum(logits.square().mean() for logits in space.train()(IMAGE).values())
    loss.backward()
    for label, parameter in parameters.items():
        if label != "branches":
            assert parameter.grad is not None and bool(parameter.grad.any()), label
    for label, gate in gates.items():
        assert gate.grad is not None and float(gate.grad[1] - gate.grad[0]) != 0, label


def width_gradients(epsilon: float, width_index: int, **options: Any) -> torch.Tensor:
    """Return the gradient of every gate, shape (nodes, widths), with one epsilon for all batch norms."""
    space, slot = tiny_supernet(**options)
    for module in space.double().modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = epsilon
    relaxation, _, gates = soft(space.layout, "student", width_index)
    with slot.using(relaxation):
        loss = sum((logits - 1).square().mean() for logits in space.train()(IMAGE.double()).values())
    loss.backward()
    return torch.stack([gate.grad for gate in gates.values() if gate.grad is not None])


@pytest.mark.parametrize("merge", ["input", "output"])
@pytest.mark.parametrize("width_index", [0, 1])
def test_gradient_of_widths_is_no_leftover_of_batch_norms_epsilon(merge: str, width_index: int) -> None:
    # Batch norm undoes a factor on all active channels but for ε: what tells widths apart must not fall with ε.
    usual, small = (width_gradients(epsilon, width_index, merge=merge).diff(dim=1) for epsilon in (1e-5, 1e-12))
    assert usual.shape == (len(NASBraNet("tiny").variable_groups()["width"]), 1)
    assert bool((small != 0).all())
    assert 0.5 < float(small.norm() / usual.norm()) < 2


def test_gradient_of_a_width_that_was_not_sampled_is_that_of_turning_its_channels_on() -> None:
    space, slot = tiny_supernet()
    space.double()
    relaxation, _, gates = soft(space.layout, "student", 0)
    label = next(iter(gates))

    def loss(wider: float) -> torch.Tensor:
        gate = torch.tensor([1.0, wider], dtype=torch.float64, requires_grad=True)
        others = {name: other.detach() for name, other in gates.items()}
        constant = {name: weight.detach() for name, weight in relaxation.weights.items()}
        with slot.using(replace(relaxation, weights=constant, gates={**others, label: gate})):
            value = sum((logits - 1).square().mean() for logits in space.train()(IMAGE.double()).values())
        value.backward()
        assert gate.grad is not None
        slopes.append(float(gate.grad[1]))
        return value.detach()

    slopes: list[float] = []
    step = 1e-6
    loss(0.0)
    measured = float(loss(step) - loss(-step)) / (2 * step)
    assert slopes[0] == pytest.approx(measured, rel=1e-3)


def test_width_mask_passes_the_sampled_channels_and_gives_each_width_the_gradient_of_its_own() -> None:
    gate = torch.tensor([0.0, 1.0, 0.0], requires_grad=True)
    mask = channel_mask(gate, [2, 3, 5])
    assert mask.tolist() == [1.0, 1.0, 1.0, 0.0, 0.0]
    (mask * torch.tensor([1.0, 10.0, 100.0, 1000.0, 10000.0])).sum().backward()
    assert gate.grad is not None and gate.grad.tolist() == [11.0, 111.0, 11111.0]


def test_stem_and_heads_belong_to_one_architecture_and_cells_to_both() -> None:
    space, slot = tiny_supernet()
    relaxation, *_ = soft(space.layout, "student")
    with slot.using(relaxation):
        sum(logits.square().mean() for logits in space.train()(IMAGE).values()).backward()
    for part in (space.stem, space.heads, space.auxiliary):
        assert all(p.grad is not None for p in part.copies["student"].parameters())
        assert all(p.grad is None for p in part.copies["teacher"].parameters())
    assert space.stem.copies["student"].body[0][0].out_channels == 2 * 2
    assert space.stem.copies["teacher"].body[0][0].out_channels == 4 * 2


def test_supernet_holds_one_super_kernel_for_each_convolution_of_the_cells() -> None:
    space, _ = tiny_supernet()
    convolutions = [module for module in space.cells.modules() if isinstance(module, nn.Conv2d)]
    assert convolutions and all(isinstance(module, SlicedConv2d) for module in convolutions)
    norms = [module for module in space.cells.modules() if isinstance(module, SwitchableBatchNorm2d)]
    assert len(norms) == len(convolutions)


def check_same_logits(space: NASBraNet, slot: Any, sample: dict[str, Any]) -> None:
    architecture = "student" if sample["width_ends"] == space.layout.end_widths[0] else "teacher"
    network = space.derive(sample, inherit=True).eval()
    with slot.using(one_hot(space.layout, sample, architecture)), torch.no_grad():
        expected = space.eval()(IMAGE)[f"pair_{sample['branches']}"]
        logits = network(IMAGE)
    difference = float((logits - expected).abs().max())
    assert float(expected.std(dim=(2, 3)).min()) > max(100 * difference, 1e-6), "constant logits prove nothing"
    torch.testing.assert_close(logits, expected)


# The five widths of the thesis, an eighth of each, so that every pair of them is met in seconds.
FIVE_WIDTHS: dict[str, Any] = {"widths": (2, 3, 4, 5, 6), "end_widths": (4, 6), "skip_policy": "conv"}
ALL_OPERATORS = tuple(dict.fromkeys((*THESIS_OPERATORS, *EXTRA_OPERATORS)))


def lively_supernet(**options: Any) -> tuple[NASBraNet, Any]:
    """Return a supernet whose ReLUs let most of what comes through: with four channels all of a path may be dead."""
    space, slot = tiny_supernet(operators=ALL_OPERATORS, **FIVE_WIDTHS, **options)
    for module in space.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.bias, 0.5, 1.5)
    return space, slot


@pytest.fixture(scope="module")
def five_widths() -> tuple[NASBraNet, Any]:
    return lively_supernet()


@pytest.mark.slow
@pytest.mark.parametrize(("pair", "operator"), itertools.product(PAIRS, ALL_OPERATORS))
def test_one_hot_supernet_equals_derived_network(five_widths: tuple[NASBraNet, Any], pair: str, operator: str) -> None:
    space, slot = five_widths
    for number, width in enumerate(space.layout.widths):
        sample = random_sample(space, number)
        for label in sample:
            if label.startswith(("op_", "width_s")):
                sample[label] = operator if label.startswith("op_") else width
        check_same_logits(space, slot, sample | {"branches": pair, "width_ends": space.layout.end_widths[number % 2]})


@pytest.mark.slow
@pytest.mark.parametrize("merge", ["input", "output"])
def test_one_hot_supernet_equals_derived_network_for_random_samples(merge: str) -> None:
    space, slot = lively_supernet(merge=merge)
    for seed in range(25):
        check_same_logits(space, slot, random_sample(space, seed))


def test_merge_output_runs_a_cell_on_both_inputs_and_mixes_what_comes_out() -> None:
    space, slot = tiny_supernet(merge="output", operators=["conv3x3"])
    relaxation = replace(soft(space.layout, "student")[0], gates={})
    cell = space.eval().cells["s4_l3"]
    finer, same = torch.randn(2, 1, 8, 8, 8)
    with slot.using(relaxation), torch.no_grad():
        keep, down = cell(finer, same)
        both = [cell(x, None)[0] for x in (finer, same)]
    torch.testing.assert_close(keep, 0.5 * (both[0] + both[1]))
    assert down.shape == (1, 16, 4, 4)
    space_before, slot_before = tiny_supernet(merge="input", operators=["conv3x3"])
    with slot_before.using(relaxation), torch.no_grad():
        mixed, _ = space_before.eval().cells["s4_l3"](finer, same)
    assert not torch.allclose(mixed, keep), "a sum before a ReLU is not the sum after it"


def test_supernet_runs_in_channels_last_and_gives_the_logits_of_the_usual_layout() -> None:
    space, slot = tiny_supernet()
    relaxation, *_ = soft(space.layout, "student")
    seen: list[bool] = []
    for name in ("s2_l2", "s4_l3"):
        convolution = space.cells[name].keep["conv3x3"].body[0]
        convolution.register_forward_hook(
            lambda *given: seen.append(given[-1].is_contiguous(memory_format=torch.channels_last))
        )
    with slot.using(relaxation), torch.no_grad():
        found = space.eval()(IMAGE)
        assert seen == [True, True]
        expected = space.to(memory_format=torch.contiguous_format)(IMAGE)
    for name, logits in expected.items():
        torch.testing.assert_close(found[name], logits, atol=1e-4, rtol=1e-4)


def test_constant_choices_run_only_what_reaches_a_head() -> None:
    space, slot = tiny_supernet()
    sample = random_sample(space, 0) | {"in_s4_l3": [1], "in_s4_l4": [1], "in_s8_l4": [1]}
    ran: list[str] = []
    for name, cell in space.cells.items():
        cell.keep.register_forward_hook(lambda *_, name=name: ran.append(f"{name} keep"))
        if cell.down is not None:
            cell.down.register_forward_hook(lambda *_, name=name: ran.append(f"{name} down"))
    with slot.using(one_hot(space.layout, sample, "student")), torch.no_grad():
        space.eval()(IMAGE)
    assert [name for name in ran if name.endswith("down")] == ["s2_l1 down", "s4_l2 down"]
    assert len(ran) == 4 + 3 + 2 + 2


def test_copy_of_a_supernet_has_its_own_slot_and_equal_logits() -> None:
    space, slot = tiny_supernet()
    copied = copy.deepcopy(space)
    relaxation = one_hot(space.layout, random_sample(space, 0), "student")
    with slot.using(relaxation):
        expected = space.eval()(IMAGE)
        with pytest.raises(RuntimeError, match="without a relaxation"):
            copied.eval()(IMAGE)
    strategy_slot = copied._active.slot
    with strategy_slot.using(relaxation):
        for name, logits in copied(IMAGE).items():
            torch.testing.assert_close(logits, expected[name])


def test_supernet_state_dict_round_trips() -> None:
    space, slot = tiny_supernet()
    other = NASBraNet("tiny")
    strategy = SlotStrategy()
    strategy.mutate_model(other)
    other.load_state_dict(space.state_dict())
    relaxation = one_hot(space.layout, random_sample(space, 0), "teacher")
    with slot.using(relaxation), strategy.relaxation_slot.using(relaxation), torch.no_grad():
        first, second = space.eval()(IMAGE), other.eval()(IMAGE)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_architecture_holds_resolved_options_and_a_complete_sample() -> None:
    space = NASBraNet("tiny", in_channels=3)
    record = space.architecture(random_sample(space, 0))
    assert "preset" not in record.options
    assert record.options["in_channels"] == 3
    again = Architecture.from_json(record.to_json())
    rebuilt = search_spaces.get(again.space)(**again.space_options())
    assert rebuilt.layout == space.layout
    assert set(again.sample()) == set(rebuilt.simplify())
    rebuilt.derive(again)
    rebuilt.freeze(again.sample())


def test_fixed_choices_give_student_and_teacher_their_end_widths() -> None:
    assert NASBraNet("tiny").fixed_choices == {"student": {"width_ends": 2}, "teacher": {"width_ends": 4}}
    assert NASBraNet("tiny", end_widths=[4]).fixed_choices == {"student": {}, "teacher": {}}


def test_space_with_single_values_has_no_width_mutable_and_runs() -> None:
    space, slot = tiny_supernet(widths=[4], end_widths=[4], n_branches=1)
    assert not [label for label in space.simplify() if label.startswith("width")]
    relaxation, *_ = soft(space.layout, "student")
    with slot.using(relaxation):
        assert list(space.eval()(IMAGE)) == ["pair_2", "pair_4", "pair_8"]


def test_space_with_three_branches_runs() -> None:
    space = NASBraNet("tiny", n_branches=3)
    assert space.simplify()["branches"].values == ["2_4_8"]
    assert space(IMAGE).shape == (2, 2, 32, 32)


@pytest.mark.parametrize("stem", ["light", "two", "fasterseg"])
@pytest.mark.parametrize("scales", [(2, 4, 8), (8, 16)])
def test_stem_brings_the_image_to_the_finest_scale(stem: str, scales: tuple[int, ...]) -> None:
    space = NASBraNet("tiny", stem=stem, scales=scales, n_branches=1)
    assert space.stem(IMAGE).shape == (2, 2 * scales[0], 32 // scales[0], 32 // scales[0])


def test_space_refuses_an_unknown_operator() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'conv3x3'"):
        NASBraNet("tiny", operators=["conv3x"])


def test_space_refuses_a_sample_with_a_missing_choice() -> None:
    space = NASBraNet("tiny")
    sample = random_sample(space, 0)
    del sample["op_s4_l2"]
    with pytest.raises(ArchitectureError, match="lacks the choice 'op_s4_l2'"):
        space.freeze(sample)


def test_space_refuses_a_record_of_another_space_or_other_options() -> None:
    space = NASBraNet("tiny")
    sample = random_sample(space, 0)
    with pytest.raises(ArchitectureError, match="is of space 'other'"):
        space.derive(Architecture("other", {}, sample))
    with pytest.raises(ArchitectureError, match="made with in_channels=3, this space has 2"):
        space.derive(NASBraNet("tiny", in_channels=3).architecture(sample))


def test_space_refuses_images_of_another_size_or_channel_number() -> None:
    space = NASBraNet("tiny")
    with pytest.raises(ArchitectureError, match="40x32 pixels: both must be divisible by 16"):
        space(torch.zeros(1, 2, 40, 32))
    with pytest.raises(ArchitectureError, match=r"expected \(N, 2, H, W\)"):
        space(torch.zeros(1, 3, 32, 32))


def test_supernet_refuses_an_architecture_without_end_width() -> None:
    with pytest.raises(ArchitectureError, match="architecture 'giant' has no end width; allowed: student, teacher"):
        SlotStrategy(("giant",)).mutate_model(NASBraNet("tiny"))


def test_inherit_needs_a_supernet_and_an_unambiguous_owner() -> None:
    space = NASBraNet("tiny")
    sample = random_sample(space, 0)
    with pytest.raises(ArchitectureError, match="only a supernet"):
        space.derive(sample, inherit=True)
    supernet, _ = tiny_supernet(end_widths=[4])
    with pytest.raises(ArchitectureError, match="inherit= one of student, teacher"):
        supernet.derive(random_sample(supernet, 0), inherit=True)
    supernet.derive(random_sample(supernet, 0), inherit="teacher")


def test_decode_gives_a_legal_record_for_random_weights() -> None:
    space = NASBraNet("tiny")
    rng = np.random.default_rng(0)
    for _ in range(20):
        weights = {label: rng.dirichlet(np.ones(len(values))) for label, values in space.layout.choices.items()}
        for name in ("student", "teacher"):
            record = space.decode(weights, architecture=name)
            assert space.contains(record.sample())
            assert record.choices["width_ends"] == space.fixed_choices[name]["width_ends"]
