"""The differentiable latency of METHOD eq. 4-9: three expectations, one for each kind of choice.

    Lat = w₁·Lat(O | s, χ) + w₂·Lat(s | O, χ) + w₃·Lat(χ | O, s)

Each term is the expected latency over its own variable with the others held: α and β uniform, χ the widest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from glioma_nas.errors import ConfigError
from glioma_nas.latency_sensitivity import Expectation, inverse_weights, latency_sensitivities
from glioma_nas.strategies.architecture_parameters import GROUPS, one_hot


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
        self.sensitivities = latency_sensitivities(
            expectation, groups=self._groups, constants=self._constants, sizes=self._sizes
        )
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
        held = {**self._constants, **self._held()}
        return self._expectation({**held, **{label: weights[label] for label in self._groups[kind]}})

    def _held(self) -> dict[str, Tensor]:
        held = {}
        for kind in GROUPS:
            for label in self._groups[kind]:
                size = self._sizes[label]
                held[label] = one_hot(size, size - 1) if kind == "width" else torch.full((size,), 1 / size)
        return held

    def _resolve(self, coefficients: Any) -> dict[str, float]:
        if coefficients == "auto":
            return inverse_weights(self.sensitivities, self._groups)
        if not isinstance(coefficients, Sequence) or isinstance(coefficients, str) or len(coefficients) != len(GROUPS):
            raise ConfigError(
                f"latency coefficients are {coefficients!r}; give 'auto' or three numbers (operator, scale, width)"
            )
        return dict(zip(GROUPS, (float(value) for value in coefficients), strict=True))
