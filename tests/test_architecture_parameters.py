"""Architecture parameters and the passes they define."""

from __future__ import annotations

import pytest
import torch

from glioma_nas.strategies.architecture_parameters import ArchitectureParameters

CHOICES = {"op": ["a", "b", "c"], "in": [0, 1], "width": [4, 8, 12], "ends": [8, 12], "branches": ["2_4", "4_8"]}
GROUPS = {"operator": ["op"], "scale": ["in"], "width": ["width"]}


def student() -> ArchitectureParameters:
    return ArchitectureParameters("student", choices=CHOICES, groups=GROUPS, fixed={"ends": 8}, search_widths=True)


def teacher() -> ArchitectureParameters:
    return ArchitectureParameters("teacher", choices=CHOICES, groups=GROUPS, fixed={"ends": 12}, search_widths=False)


def test_weights_cover_every_label_and_sum_to_one() -> None:
    weights = student().weights()
    assert set(weights) == set(CHOICES)
    for label, weight in weights.items():
        assert weight.shape == (len(CHOICES[label]),)
        assert float(weight.sum()) == pytest.approx(1.0)
    assert weights["ends"].tolist() == [1.0, 0.0]
    assert weights["branches"].tolist() == [0.5, 0.5]  # chosen last: until then every branch counts
    assert teacher().weights()["width"].tolist() == [0.0, 0.0, 1.0]


def test_teacher_has_no_widths_to_search_and_is_widest() -> None:
    assert set(teacher().logits) == {"op", "in"}
    for rule in ("max", "sampled"):
        assert teacher().relaxation(rule, differentiable=True).values["width"] == 12
    assert teacher().relaxation("max", differentiable=False).values["ends"] == 12


@pytest.mark.parametrize(("rule", "width"), [("max", 12), ("min", 4)])
def test_sandwich_rules_pick_the_extremes(rule: str, width: int) -> None:
    relaxation = student().relaxation(rule, differentiable=False)
    assert relaxation.values["width"] == width
    assert relaxation.values["ends"] == 8
    assert not relaxation.weights["op"].requires_grad


def test_sampled_width_follows_gamma_and_its_gate_carries_gradient() -> None:
    parameters = student()
    parameters.logits["width"].data = torch.tensor([0.0, 50.0, 0.0])
    relaxation = parameters.relaxation("sampled", differentiable=True)
    assert relaxation.values["width"] == 8
    assert relaxation.gates["width"].tolist() == pytest.approx([0.0, 1.0, 0.0])
    parameters.logits["width"].data = torch.zeros(3)
    relaxation = parameters.relaxation("sampled", differentiable=True)
    relaxation.gates["width"][0].backward()
    gradient = parameters.logits["width"].grad
    assert gradient is not None and float(gradient.abs().sum()) > 0


def test_sampled_widths_come_with_the_probability_of_gamma() -> None:
    parameters = student()
    parameters.logits["width"].data = torch.log(torch.tensor([0.2, 0.5, 0.3]))
    torch.manual_seed(0)
    drawn = [parameters.relaxation("sampled", differentiable=False).values["width"] for _ in range(2000)]
    assert drawn.count(8) / 2000 == pytest.approx(0.5, abs=0.04)
    assert drawn.count(4) / 2000 == pytest.approx(0.2, abs=0.04)


def test_entropy_is_one_undecided_and_zero_decided() -> None:
    parameters = student()
    parameters.logits["op"].data = torch.zeros(3)
    assert parameters.entropy("operator") == pytest.approx(1.0, abs=1e-6)
    parameters.logits["op"].data = torch.tensor([50.0, 0.0, 0.0])
    assert parameters.entropy("operator") == pytest.approx(0.0, abs=1e-6)


def test_unknown_width_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="allowed: max, min, random, sampled"):
        student().relaxation("widest", differentiable=False)
