"""From a table of operators to the latency of a whole network: a·Σ table + b, fitted on networks that were measured.

An operator timed alone is not what it is inside a network: its input comes from memory, not from the cache, its output
may need another layout, and every call costs something of its own. The fit is a weighted least squares of relative
errors. Beside the sum, the number of operators and the size of what they write may each get a coefficient, and do where
that lowers the leave-one-out error of the networks fitted on; networks held out say how good the choice was. All terms
are sums over operators, so a calibrated table still gives an exact and differentiable expectation.

Reference: METHOD §6.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glioma_nas.costs import OperatorSpec
from glioma_nas.errors import BackendError, StorageError
from glioma_nas.files import read_json, write_json
from glioma_nas.latency_records import Environment, LatencyTable

FORMAT_VERSION = 1

TERMS: dict[str, Callable[[OperatorSpec], float]] = {
    "operators": lambda spec: 1.0,
    "output_m": lambda spec: spec.out_channels * spec.height * spec.width / spec.stride**2 / 1e6,
}
"""Further terms a calibration may use: the operators, and the values they write in millions."""

_WORTH = 0.95  # further terms must lower the leave-one-out error to this fraction of what it is without
_MIN_NETWORKS = 8

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Accuracy:
    """How well predicted latencies agree with measured ones.

    Attributes:
        mape: Mean absolute error relative to the measured latency, as a fraction.
        kendall_tau: Rank correlation τ_b in [-1, 1]; none for fewer than two networks.
        n: Networks compared.
    """

    mape: float
    kendall_tau: float | None
    n: int


@dataclass(frozen=True)
class Calibration:
    """Coefficients of the latency of a whole network.

    Attributes:
        environment: Where table and networks were measured.
        space: Name of the search space, and ``options``: those it was made with.
        options: See ``space``.
        table_factor: a, of the sum over the table.
        intercept_ms: b, milliseconds.
        terms_ms: Further terms' coefficients, milliseconds; see `TERMS`.
        fitted: Accuracy on the networks fitted on.
        held_out: Accuracy on the others.
        plain_held_out: Accuracy of a·Σ + b alone on the others.
    """

    environment: Environment
    space: str
    options: dict[str, Any]
    table_factor: float
    intercept_ms: float
    terms_ms: dict[str, float]
    fitted: Accuracy
    held_out: Accuracy
    plain_held_out: Accuracy

    def price(self, table: LatencyTable) -> Callable[[OperatorSpec], float]:
        """Return what an operator adds to the latency of a network, in ms; the network's own part is the intercept.

        Raises:
            BackendError: The table was measured elsewhere. What is returned raises it for an operator without entry.
        """
        table.require_same_environment(self.environment)

        def price(spec: OperatorSpec) -> float:
            further = sum(factor * TERMS[name](spec) for name, factor in self.terms_ms.items())
            return self.table_factor * table.lookup(spec) + further

        return price

    def require_space(self, name: str, options: dict[str, Any]) -> None:
        """Make sure that the calibration is of this search space.

        Raises:
            BackendError: It is of another one.
        """
        different = sorted(key for key in {*self.options, *options} if self.options.get(key) != options.get(key))
        if self.space != name or different:
            what = f"{different[0]}={self.options.get(different[0])!r}" if different else f"space '{self.space}'"
            raise BackendError(
                f"the calibration is of another search space ({what}); run `glioma-nas latency calibrate` for this one"
            )

    def save(self, path: Path) -> None:
        """Write to a JSON file atomically."""
        write_json(path, {"format": FORMAT_VERSION, **dataclasses.asdict(self)})

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read a file written by `save`.

        Raises:
            StorageError: The file is missing, not JSON, not a calibration of this format, or holds a figure that is no
                finite number.
        """
        data = read_json(path)
        try:
            impossible = [name for name, value in _figures(data) if not math.isfinite(value)]
            if impossible:
                raise StorageError(f"{path}: {impossible[0]} is no finite number; calibrate again")
            if data.pop("format") != FORMAT_VERSION:
                raise StorageError(f"{path}: calibration of another format than {FORMAT_VERSION}; calibrate again")
            data |= {key: Accuracy(**data[key]) for key in ("fitted", "held_out", "plain_held_out")}
            unknown = set(data["terms_ms"]) - set(TERMS)
            if unknown:
                raise StorageError(f"{path}: unknown terms {', '.join(sorted(unknown))}; calibrate again")
            return cls(**{**data, "environment": Environment(**data["environment"])})
        except (KeyError, TypeError, AttributeError) as err:
            raise StorageError(f"{path}: not a calibration ({err!r}); run `glioma-nas latency calibrate`") from err


def _figures(data: dict[str, Any]) -> Iterator[tuple[str, float]]:
    yield from ((name, float(data[name])) for name in ("table_factor", "intercept_ms"))
    yield from ((name, float(value)) for name, value in data["terms_ms"].items())
    for name in ("fitted", "held_out", "plain_held_out"):
        yield f"{name}.mape", float(data[name]["mape"])
        if data[name]["kendall_tau"] is not None:
            yield f"{name}.kendall_tau", float(data[name]["kendall_tau"])


@dataclass(frozen=True)
class MeasuredNetwork:
    """A network's operators, stem and head included, and the latency it was measured with.

    Attributes:
        specs: Its priced parts, a shared one once.
        latency_ms: Median, milliseconds.
    """

    specs: tuple[OperatorSpec, ...]
    latency_ms: float


def calibrate(
    networks: Sequence[MeasuredNetwork],
    table: LatencyTable,
    *,
    environment: Environment,
    n_held_out: int,
    space: str,
    options: dict[str, Any],
) -> tuple[Calibration, Vector]:
    """Fit on all but the last ``n_held_out`` networks and judge on those.

    Args:
        networks: Measured networks.
        table: Prices of their operators.
        environment: Where the networks were measured.
        n_held_out: How many of them judge.
        space: Name of the search space they are of.
        options: Those it was made with.

    Returns:
        The calibration, and the predicted latency of each network in ms, shape (n,).

    Raises:
        BackendError: The table was measured elsewhere than the networks; too few networks to fit on or to judge by; an
            operator is not in the table.
    """
    table.require_same_environment(environment)
    n_fit = len(networks) - n_held_out
    if n_held_out < 2 or n_fit < _MIN_NETWORKS:
        raise BackendError(
            f"{len(networks)} measured networks, {n_held_out} of them held out: at least {_MIN_NETWORKS} are needed to "
            "fit on and 2 to judge by; measure more with --networks"
        )
    measured = np.array([network.latency_ms for network in networks])
    names = list(TERMS)
    candidates: list[tuple[str, ...]] = [
        chosen for size in range(len(names) + 1) for chosen in combinations(names, size)
    ]
    matrices = {chosen: _matrix(networks, table, chosen) for chosen in candidates}
    errors = {chosen: _leave_one_out(matrices[chosen][:n_fit], measured[:n_fit]) for chosen in candidates}
    best = min(candidates, key=lambda chosen: errors[chosen])
    chosen = best if errors[best] <= _WORTH * errors[()] else ()
    coefficients = _fit(matrices[chosen][:n_fit], measured[:n_fit])
    predicted: Vector = matrices[chosen] @ coefficients
    plain = matrices[()] @ _fit(matrices[()][:n_fit], measured[:n_fit])
    calibration = Calibration(
        environment=table.environment,
        space=space,
        options=options,
        table_factor=float(coefficients[0]),
        intercept_ms=float(coefficients[1]),
        terms_ms={name: float(value) for name, value in zip(chosen, coefficients[2:], strict=True)},
        fitted=accuracy(predicted[:n_fit], measured[:n_fit]),
        held_out=accuracy(predicted[n_fit:], measured[n_fit:]),
        plain_held_out=accuracy(plain[n_fit:], measured[n_fit:]),
    )
    return calibration, predicted


def accuracy(predicted: Vector, measured: Vector) -> Accuracy:
    """Compare predicted with measured latencies, both (n,) in the same unit.

    >>> accuracy(np.array([1.1, 1.8]), np.array([1.0, 2.0]))
    Accuracy(mape=0.1, kendall_tau=1.0, n=2)
    """
    from scipy.stats import kendalltau

    tau = float(kendalltau(predicted, measured).statistic) if len(measured) > 1 else math.nan
    mape = float(np.mean(np.abs(predicted - measured) / measured))
    return Accuracy(round(mape, 6), round(tau, 6) if math.isfinite(tau) else None, len(measured))


def _matrix(networks: Sequence[MeasuredNetwork], table: LatencyTable, terms: Sequence[str]) -> Vector:
    return np.array(
        [
            [
                sum(table.lookup(spec) for spec in network.specs),
                1.0,
                *(sum(TERMS[name](spec) for spec in network.specs) for name in terms),
            ]
            for network in networks
        ]
    )


def _fit(matrix: Vector, measured: Vector) -> Vector:
    # Divided by the latency, so that the squares are of relative errors and slow networks do not rule.
    solution = np.linalg.lstsq(matrix / measured[:, None], np.ones(len(measured)), rcond=None)[0]
    return np.asarray(solution, dtype=np.float64)


def _leave_one_out(matrix: Vector, measured: Vector) -> float:
    errors = []
    for index in range(len(measured)):
        kept = np.arange(len(measured)) != index
        predicted = float(matrix[index] @ _fit(matrix[kept], measured[kept]))
        errors.append(abs(predicted - measured[index]) / measured[index])
    return float(np.mean(errors))
