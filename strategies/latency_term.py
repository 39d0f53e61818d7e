"""The differentiable latency of METHOD eq. 4-9: three expectations, one for each kind of choice.

    Lat = w₁·Lat(O | s, χ) + w₂·Lat(s | O, χ) + w₃·Lat(χ | O, s)

Each term is the expected latency over its own variable with the others held: α and β uniform, χ the widest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from glioma_nas.errors import ConfigError
from glioma_nas.strategies.architecture_parameters import GROUPS, one_hot

Expectation = Callable[[Mapping[str, Tensor]], Tensor]

# A variable whose choice hardly changes the latency would get an unbounded weight; the thesis' own ratio is 1:1000.
_SENSITIVITY_FLOOR = 1e-3


class DecoupledLatency:
    """Expected latency in milliseconds with separate weights for operators, scales and widths.

    Args:
        expectation: Expected latency in ms of weights for every label, differentiable (an NNI profiler's method).
        groups: Kind → searched labels.
        constants: Label → one-hot weights of labels that are not searched.
        sizes: Label → number of values.
        coefficients: (w₁, w₂, w₃) for operator, scale, width, or ``auto`` for inverse sensitivities.
    """

    def __init__(
        self,
        expectation: Expectation,
        *,
        groups: Mapping[str, Sequence[str]],
        constants: Mapping[str, Tensor],
        sizes: Mapping[str, int],
        coefficients: Any = "auto",
    ) -> None:
        self._expectation = expectation
        self._groups = {kind: list(groups[kind]) for kind in GROUPS}
        self._constants = dict(constants)
        self._sizes = dict(sizes)
        self.sensitivities = self._measure_sensitivities()
        self.coefficients = self._resolve(coefficients)

    def __call__(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted sum of eq. 4-9 for an architecture's weights, a scalar in ms on the CPU.

        The costs lie on the CPU, where these few small sums are faster than on any GPU; gradient flows back across.
        """
        weights = {label: weight.cpu() for label, weight in weights.items()}
        terms = [self.coefficients[kind] * self.term(kind, weights) for kind in GROUPS if self._groups[kind]]
        return torch.stack(terms).sum()

    def expected(self, weights: Mapping[str, Tensor]) -> float:
        """Return the plain expectation over all kinds at once, in ms; what the history shows."""
        return float(
            self._expectation({**self._constants, **{label: weight.cpu() for label, weight in weights.items()}})
        )

    def term(self, kind: str, weights: Mapping[str, Tensor]) -> Tensor:
        """Return one term of eq. 4-9: the expectation over ``kind`` alone, a scalar in ms."""
        held = {**self._constants, **self._held("uniform", widest=True)}
        return self._expectation({**held, **{label: weights[label] for label in self._groups[kind]}})

    def _held(self, rule: str, *, widest: bool) -> dict[str, Tensor]:
        held = {}
        for kind in GROUPS:
            for label in self._groups[kind]:
                size = self._sizes[label]
                held[label] = one_hot(size, size - 1) if kind == "width" and widest else torch.full((size,), 1 / size)
        return held

    def _measure_sensitivities(self) -> dict[str, float]:
        """Return Δ of each kind: latency with the slowest choice everywhere minus the fastest, others uniform."""
        sensitivities = {}
        uniform = {**self._constants, **self._held("uniform", widest=False)}
        for kind in GROUPS:
            labels = self._groups[kind]
            sizes = {self._sizes[label] for label in labels}
            latencies = []
            for index in range(max(sizes, default=0)):
                chosen = {label: one_hot(self._sizes[label], min(index, self._sizes[label] - 1)) for label in labels}
                latencies.append(float(self._expectation({**uniform, **chosen})))
            sensitivities[kind] = max(latencies) - min(latencies) if latencies else 0.0
        return sensitivities

    def _resolve(self, coefficients: Any) -> dict[str, float]:
        if coefficients == "auto":
            floor = _SENSITIVITY_FLOOR * max(self.sensitivities.values())
            if floor <= 0:
                raise ConfigError("no choice changes the latency, so it cannot steer the search; set latency_weight: 0")
            inverse = {kind: 1 / max(self.sensitivities[kind], floor) if self._groups[kind] else 0.0 for kind in GROUPS}
            total = sum(inverse.values())
            return {kind: value / total for kind, value in inverse.items()}
        if not isinstance(coefficients, Sequence) or isinstance(coefficients, str) or len(coefficients) != len(GROUPS):
            raise ConfigError(
                f"latency coefficients are {coefficients!r}; give 'auto' or three numbers (operator, scale, width)"
            )
        return dict(zip(GROUPS, (float(value) for value in coefficients), strict=True))
