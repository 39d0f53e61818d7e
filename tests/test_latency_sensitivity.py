"""Table 4-2: how much each kind of choice can change the latency."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from glioma_nas.costs import OperatorSpec
from glioma_nas.latency_sensitivity import latency_sensitivities
from glioma_nas.search_spaces.nasbranet import NASBraNet
from glioma_nas.strategies.architecture_parameters import choices_of, groups_of


def test_slowest_value_is_chosen_in_each_place_by_itself() -> None:
    def opposed(weights: Mapping[str, Tensor]) -> Tensor:
        return weights["a"] @ torch.tensor([1.0, 5.0]) + weights["b"] @ torch.tensor([7.0, 2.0, 4.0])

    found = latency_sensitivities(opposed, groups={"operator": ["a", "b"]}, constants={}, sizes={"a": 2, "b": 3})
    # One and the same position everywhere would give 8 - 7 ms.
    assert found == {"operator": pytest.approx((5 + 7) - (1 + 2))}


def test_kind_without_labels_or_without_influence_has_none() -> None:
    found = latency_sensitivities(
        lambda weights: torch.tensor(3.0), groups={"operator": ["a"], "width": []}, constants={}, sizes={"a": 2}
    )
    assert found == {"operator": 0.0, "width": 0.0}


def cost_of(spec: OperatorSpec) -> float:
    """Price an operator so that the slowest one is another at each scale, and narrow inputs are dear at one."""
    work = {"skip": 1.0, "conv3x3": 2.0, "zoomed_conv": 5.0 if spec.height < 12 else 0.5}[spec.operator]
    return work * (1 + 0.1 * spec.out_channels) * (spec.height / 8 if spec.height > 4 else 9.0 / spec.in_channels)


@pytest.mark.parametrize("kind", ["operator", "scale", "width"])
def test_sensitivity_equals_brute_force_on_a_small_space(kind: str) -> None:
    space = NASBraNet(
        "tiny",
        scales=(2, 4),
        n_layers=3 if kind == "operator" else 4,
        n_branches=1,
        operators=("skip", "conv3x3", "zoomed_conv"),
        end_widths=(2,),
    )
    expectation = space.cost_model(cost_of).expectation
    groups, choices = groups_of(space), choices_of(space)
    sizes = {label: len(values) for label, values in choices.items()}
    searched = {label for labels in groups.values() for label in labels}
    constants = {label: torch.full((size,), 1 / size) for label, size in sizes.items() if label not in searched}
    found = latency_sensitivities(expectation, groups=groups, constants=constants, sizes=sizes)
    uniform = {label: torch.full((size,), 1 / size) for label, size in sizes.items()}
    labels = groups[kind]
    latencies = [
        float(
            expectation(
                {**uniform, **{label: torch.eye(sizes[label])[i] for label, i in zip(labels, one, strict=True)}}
            )
        )
        for one in itertools.product(*(range(sizes[label]) for label in labels))
    ]
    assert len(latencies) > 3
    assert found[kind] == pytest.approx(max(latencies) - min(latencies), rel=1e-5)
