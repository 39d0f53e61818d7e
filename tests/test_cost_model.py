from __future__ import annotations

import itertools
import zlib
from typing import Any

import pytest
import torch
from supernets import random_sample
from torch import Tensor

from glioma_nas.costs import OperatorSpec
from glioma_nas.errors import ArchitectureError
from glioma_nas.search_spaces.layout import Layout
from glioma_nas.search_spaces.nasbranet import NASBraNet


def price(spec: OperatorSpec) -> float:
    """Return an arbitrary price in [1, 2) that differs between all specs."""
    return 1 + zlib.crc32(spec.key().encode()) / 2**32


def random_weights(layout: Layout, seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {
        label: torch.softmax(torch.randn(len(values), dtype=torch.float64), 0).requires_grad_()
        for label, values in layout.choices.items()
    }


def small_space(**options: Any) -> NASBraNet:
    settings: dict[str, Any] = {"operators": ("skip", "conv3x3"), "scales": (2, 4), "n_layers": 3, "image_size_px": 16}
    return NASBraNet("tiny", **(settings | options))


@pytest.mark.slow
@pytest.mark.parametrize(("n_branches", "fixed_parts"), [(1, False), (1, True), (2, False)])
def test_expectation_equals_the_average_over_all_samples(n_branches: int, fixed_parts: bool) -> None:
    space = small_space(skip_policy="conv", n_branches=n_branches, operators=("skip", "conv3x3"), widths=(2, 4))
    model = space.cost_model(price, fixed_parts=fixed_parts)
    weights = {label: weight.detach() for label, weight in random_weights(space.layout, n_branches).items()}
    labels = list(space.layout.choices)
    expected = 0.0
    for values in itertools.product(*space.layout.choices.values()):
        sample = {label: [v] if label.startswith("in_") else v for label, v in zip(labels, values, strict=True)}
        probability = 1.0
        for label, value in zip(labels, values, strict=True):
            probability *= float(weights[label][space.layout.choices[label].index(value)])
        expected += probability * model.of(sample)
    assert float(model.expectation(weights)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.slow
def test_expectation_counts_sharing_of_three_scales() -> None:
    # Operators and widths are single here, so that all input choices of three scales can be enumerated.
    space = NASBraNet("tiny", operators=("conv3x3",), widths=(2,), end_widths=(2,), n_layers=6, skip_policy="conv")
    model = space.cost_model(price)
    weights = {label: weight.detach() for label, weight in random_weights(space.layout, 0).items()}
    labels = [label for label in space.layout.choices if label.startswith("in_")]
    assert len(labels) == 7
    base = {label: values[0] for label, values in space.layout.choices.items()}
    expected = 0.0
    for branch, inputs in itertools.product(range(3), itertools.product((0, 1), repeat=7)):
        sample = base | {label: [index] for label, index in zip(labels, inputs, strict=True)}
        sample["branches"] = space.layout.choices["branches"][branch]
        probability = float(weights["branches"][branch])
        for label, index in zip(labels, inputs, strict=True):
            probability *= float(weights[label][index])
        expected += probability * model.of(sample)
    assert float(model.expectation(weights)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("policy", ["conv", "remove"])
def test_expectation_is_differentiable_in_every_weight(policy: str) -> None:
    space = NASBraNet("tiny", skip_policy=policy)
    model = space.cost_model(price)
    weights = random_weights(space.layout, 1)
    model.expectation(weights).backward()
    step = 1e-6
    for label, weight in weights.items():
        assert weight.grad is not None and bool(weight.grad.any()), label
        for index in range(len(weight)):
            moved = {name: value.detach().clone() for name, value in weights.items()}
            moved[label][index] += step
            above = float(model.expectation(moved))
            moved[label][index] -= 2 * step
            slope = (above - float(model.expectation(moved))) / (2 * step)
            assert float(weight.grad[index]) == pytest.approx(slope, rel=1e-5, abs=1e-6), label


def test_one_hot_expectation_equals_the_cost_of_that_sample() -> None:
    space = NASBraNet("tiny", skip_policy="conv")
    model = space.cost_model(price)
    for seed in range(10):
        sample = random_sample(space, seed)
        weights = {}
        for label, values in space.layout.choices.items():
            chosen = sample[label][0] if label.startswith("in_") else sample[label]
            weights[label] = torch.tensor([float(value == chosen) for value in values], dtype=torch.float64)
        assert float(model.expectation(weights)) == pytest.approx(model.of(sample))
        assert model.of(space.architecture(sample)) == model.of(sample)


def test_of_counts_shared_cells_once() -> None:
    space = small_space(operators=("conv3x3",), widths=(2,), end_widths=(2,), n_layers=6)
    model = space.cost_model(lambda spec: 1.0)
    base = {label: values[0] for label, values in space.layout.choices.items()}
    sample = base | {f"in_s4_l{layer}": [0 if layer == 5 else 1] for layer in range(3, 7)}
    assert space.layout.branch_sets == {"2_4": (2, 4)}
    # Layers 1 to 3 are shared; the branches have three cells more each.
    assert model.of(sample) == 3 + 3 + 3


def test_removed_skips_cost_nothing() -> None:
    space = small_space(n_layers=6)
    model = space.cost_model(lambda spec: 100.0 if spec.operator == "skip" else 1.0)
    weights = {label: torch.full((len(v),), 1 / len(v)) for label, v in space.layout.choices.items()}
    weights |= {label: torch.tensor([1.0, 0.0]) for label in space.variable_groups()["operator"]}
    weights |= {label: torch.tensor([0.0, 1.0]) for label in space.variable_groups()["scale"]}
    # All skips: only the strided one from (2, 1) to (4, 2) is left.
    assert float(model.expectation(weights)) == pytest.approx(100.0)


def test_width_ends_default_to_the_architecture_and_branches_to_uniform() -> None:
    space = NASBraNet("tiny")
    weights = {k: v.detach() for k, v in random_weights(space.layout, 0).items() if k not in ("width_ends", "branches")}
    for name, one_hot in (("student", [1.0, 0.0]), ("teacher", [0.0, 1.0])):
        model = space.cost_model(price, architecture=name)
        given = weights | {"width_ends": torch.tensor(one_hot).double(), "branches": torch.full((3,), 1 / 3).double()}
        assert float(model.expectation(weights)) == pytest.approx(float(model.expectation(given)))


def test_operator_specs_hold_everything_a_network_contains_once() -> None:
    space = NASBraNet("tiny")
    specs = space.operator_specs()
    assert len(specs) == len(set(specs)) == 5 * 2 * 2 * (3 + 2)
    contained = {spec for seed in range(30) for spec in space.plan(random_sample(space, seed)).specs(space.layout)}
    assert contained <= set(specs)
    assert OperatorSpec("conv3x3", 4, 16, 2, 16, 16) in specs


def test_thesis_table_has_625_entries() -> None:
    layout = Layout.from_options("thesis")
    from glioma_nas.search_spaces.cost_model import operator_specs

    assert len(operator_specs(layout)) == 5 * 25 * 5


def test_expectation_refuses_missing_or_misshapen_weights() -> None:
    space = NASBraNet("tiny")
    model = space.cost_model(price)
    weights = random_weights(space.layout, 0)
    with pytest.raises(ArchitectureError, match=r"'op_s2_l1' have shape \(2,\); expected \(5,\)"):
        model.expectation(weights | {"op_s2_l1": torch.ones(2)})
    del weights["in_s4_l3"]
    with pytest.raises(ArchitectureError, match="the weights lack 'in_s4_l3'"):
        model.expectation(weights)


def test_whole_network_costs_its_stem_and_the_head_of_its_branches() -> None:
    space = NASBraNet("tiny")
    parts = {spec.key(): price(spec) for spec in space.fixed_part_specs()}
    assert len(parts) == 2 + 3 * 2  # a stem for each end width, a head for each of those and each pair of scales
    bare, whole = space.cost_model(price), space.cost_model(price, fixed_parts=True)
    for seed in range(5):
        sample = random_sample(space, seed)
        end, branches = sample["width_ends"], sample["branches"]
        stem = next(value for key, value in parts.items() if key.startswith("stem") and f"->{2 * end} " in key)
        head = parts[f"head_{branches}_4_channels {end}->{space.layout.n_classes} stride 1 32x32"]
        assert whole.of(sample) - bare.of(sample) == pytest.approx(stem + head)


def test_branches_get_a_gradient_from_their_heads() -> None:
    space = small_space(n_branches=1)
    weights = random_weights(space.layout, 0)
    space.cost_model(price, fixed_parts=True).expectation(weights).backward()
    assert all(weight.grad is not None and float(weight.grad.abs().sum()) > 0 for weight in weights.values())


def test_fixed_parts_are_built_with_the_inputs_they_are_measured_with() -> None:
    space = NASBraNet("tiny")
    for spec in space.fixed_part_specs():
        component = space.build_component(spec)
        assert component is not None
        inputs = [torch.zeros(shape) for shape in space.component_input_shapes(spec)]
        side = spec.height // spec.stride
        assert component.eval()(*inputs).shape == (1, spec.out_channels, side, side), spec.key()
    assert space.build_component(OperatorSpec("nosuch", 1, 1, 1, 8, 8)) is None
