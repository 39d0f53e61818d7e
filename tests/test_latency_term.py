"""The differentiable latency of eq. 4-9."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from glioma_nas.costs import OperatorSpec
from glioma_nas.errors import ConfigError
from glioma_nas.search_spaces.nasbranet import NASBraNet
from glioma_nas.strategies.architecture_parameters import GROUPS, ArchitectureParameters, choices_of, groups_of
from glioma_nas.strategies.latency_term import DecoupledLatency

GROUP_LABELS = {"operator": ["op"], "scale": ["in"], "width": ["width"]}
SIZES = {"op": 2, "in": 2, "width": 2}


def bilinear(weights: Mapping[str, Tensor]) -> Tensor:
    """Latency of a toy network: 10 or 2 ms of operator, halved at width 0, plus 1 ms for input 1."""
    operator = weights["op"] @ torch.tensor([2.0, 10.0])
    width = weights["width"] @ torch.tensor([0.5, 1.0])
    return operator * width + weights["in"][1]


def decoupled(coefficients: object = "auto") -> DecoupledLatency:
    return DecoupledLatency(bilinear, groups=GROUP_LABELS, constants={}, sizes=SIZES, coefficients=coefficients)


def test_sensitivities_are_slowest_minus_fastest_with_the_others_uniform() -> None:
    # Uniform width averages to 0.75, uniform operator to 6 ms.
    assert decoupled().sensitivities == pytest.approx({"operator": 8 * 0.75, "scale": 1.0, "width": 6 * 0.5})


def test_automatic_coefficients_are_inverse_sensitivities() -> None:
    inverse = {"operator": 1 / 6, "scale": 1.0, "width": 1 / 3}
    total = sum(inverse.values())
    assert decoupled().coefficients == pytest.approx({kind: value / total for kind, value in inverse.items()})


def test_thesis_sensitivities_give_the_thesis_coefficients() -> None:
    """Table 4-2: 10.42, 0.01 and 5.54 ms give .001, .997, .002."""

    def table_4_2(weights: Mapping[str, Tensor]) -> Tensor:
        return 10.42 * weights["op"][1] + 0.01 * weights["in"][1] + 5.54 * weights["width"][1]

    term = DecoupledLatency(table_4_2, groups=GROUP_LABELS, constants={}, sizes=SIZES)
    assert [round(term.coefficients[kind], 3) for kind in GROUPS] == [0.001, 0.997, 0.002]


def test_term_holds_the_other_variables_uniform_and_widest() -> None:
    weights = {"op": torch.tensor([0.0, 1.0]), "in": torch.tensor([1.0, 0.0]), "width": torch.tensor([1.0, 0.0])}
    term = decoupled()
    assert float(term.term("operator", weights)) == pytest.approx(10.0 * 1.0 + 0.5)
    assert float(term.term("scale", weights)) == pytest.approx(6.0 * 1.0 + 0.0)
    assert float(term.term("width", weights)) == pytest.approx(6.0 * 0.5 + 0.5)


def test_whole_is_the_weighted_sum_of_its_terms() -> None:
    weights = {"op": torch.tensor([0.3, 0.7]), "in": torch.tensor([0.6, 0.4]), "width": torch.tensor([0.2, 0.8])}
    term = decoupled((1.0, 2.0, 3.0))
    expected = sum((i + 1) * float(term.term(kind, weights)) for i, kind in enumerate(GROUPS))
    assert float(term(weights)) == pytest.approx(expected)


@pytest.mark.parametrize("coefficients", [(1.0, 2.0), "car", 3])
def test_malformed_coefficients_are_refused(coefficients: object) -> None:
    with pytest.raises(ConfigError, match="give 'auto' or three numbers"):
        decoupled(coefficients)


def test_latency_without_any_choice_is_refused() -> None:
    with pytest.raises(ConfigError, match="no choice changes the latency"):
        DecoupledLatency(lambda weights: torch.tensor(1.0), groups=GROUP_LABELS, constants={}, sizes=SIZES)


def cost_of(spec: OperatorSpec) -> float:
    """Price an operator by its size, so that every choice of the space matters."""
    work = 1.0 + 0.01 * spec.in_channels + 0.02 * spec.out_channels
    return work * (1 + len(spec.operator)) * spec.height / (8 * spec.stride)


@pytest.mark.parametrize("merge", ["input", "output"])
@pytest.mark.parametrize("kind", GROUPS)
def test_gradient_of_each_term_reaches_its_parameters_and_equals_finite_differences(kind: str, merge: str) -> None:
    space = NASBraNet("tiny", merge=merge)
    torch.manual_seed(0)
    parameters = ArchitectureParameters(
        "student",
        choices=choices_of(space),
        groups=groups_of(space),
        fixed=space.fixed_choices["student"],
        search_widths=True,
    )
    for logits in parameters.logits.values():
        logits.data.normal_()
    parameters.double()
    model = space.cost_model(cost_of)

    def in_double_precision(weights: Mapping[str, Tensor]) -> Tensor:
        return model.expectation({label: weight.double() for label, weight in weights.items()})

    latency = DecoupledLatency(
        in_double_precision,
        groups=parameters.groups,
        constants={k: v for k, v in parameters.weights().items() if k not in parameters.logits},
        sizes={label: len(values) for label, values in choices_of(space).items()},
        coefficients=(1.0, 1.0, 1.0),
    )

    def value() -> Tensor:
        return latency.term(kind, parameters.weights())

    value().backward()
    step = 1e-4
    for label, logits in parameters.logits.items():
        if label not in parameters.groups[kind]:
            assert logits.grad is None, f"{label}: the term of '{kind}' holds the other variables fixed"
            continue
        assert logits.grad is not None and float(logits.grad.abs().max()) > 1e-6, f"{label}: no gradient"
        for index in range(len(logits)):
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    logits[index] += sign * step
                    values.append(float(value()))
                    logits[index] -= sign * step
            difference = (values[0] - values[1]) / (2 * step)
            assert float(logits.grad[index]) == pytest.approx(difference, rel=1e-5, abs=1e-8), (label, index)


@pytest.mark.parametrize("coefficients", ["auto", (1.0, 2.0, 3.0), (0.001, 0.997, 0.002)])
def test_gradient_of_the_whole_is_that_of_the_weighted_terms(coefficients: object) -> None:
    term = decoupled(coefficients)
    logits = {label: torch.tensor([0.3, -0.2], requires_grad=True) for label in SIZES}
    term({label: value.softmax(0) for label, value in logits.items()}).backward()
    whole = {label: value.grad for label, value in logits.items()}
    for kind in GROUPS:
        fresh = {label: value.detach().clone().requires_grad_() for label, value in logits.items()}
        term.term(kind, {label: value.softmax(0) for label, value in fresh.items()}).backward()
        (label,) = GROUP_LABELS[kind]
        expected = fresh[label].grad
        assert expected is not None and float(expected.abs().max()) > 0
        assert torch.allclose(whole[label], term.coefficients[kind] * expected)
