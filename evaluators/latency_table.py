"""The latency table as an NNI profiler, for our own strategies and for NNI's filters and penalties."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nni.nas.profiler import Profiler
from torch import Tensor

from glioma_nas.costs import OperatorSpec
from glioma_nas.latency_calibration import Calibration
from glioma_nas.latency_records import Environment, LatencyTable
from glioma_nas.registry import evaluators, search_spaces


@evaluators.register("latency_table")
class LatencyTableProfiler(Profiler):
    """Latency of a network in milliseconds: the sum of table entries over its operators, stem and head.

    With a calibration it is a·Σ + b with the coefficients that were fitted on measured networks, and what is returned
    is comparable with a clock; without one the sum ranks networks but leaves out what they cost beside their operators.

    NNI's own ``ExpectationProfilerPenalty`` takes probabilities as Python floats, so nothing reaches the architecture
    parameters through it; `expectation` takes tensors and is differentiable in each of them.

    Args:
        model_space: A search space with ``cost_model``; a space with ``fixed_part_specs`` has stem and heads priced.
        table: The table, or the JSON file that holds it.
        calibration: The calibration, or the JSON file that holds it; none for the bare sum.
        environment: What the networks are going to run on, `LatencyBackend.environment`; the table is compared with it.
            None: whatever the table is of.

    Raises:
        BackendError: An operator is not in the table, the table is of another device or engine than ``environment``, or
            the calibration is of another device, engine or space.

    Reference: METHOD eq. 4-9; Cai et al., ProxylessNAS, ICLR 2019, eq. 2.
    """

    _intercept_ms = 0.0

    def __init__(
        self,
        model_space: Any,
        table: LatencyTable | Path | str,
        calibration: Calibration | Path | str | None = None,
        *,
        environment: Environment | None = None,
    ) -> None:
        super().__init__(model_space)
        self.table = table if isinstance(table, LatencyTable) else LatencyTable.load(Path(table))
        if environment is not None:
            self.table.require_same_environment(environment)
        price: Callable[[OperatorSpec], float] = self.table.lookup
        if calibration is not None:
            found = calibration if isinstance(calibration, Calibration) else Calibration.load(Path(calibration))
            layout = getattr(model_space, "layout", None)
            found.require_space(_name_of(type(model_space)), layout.options() if layout is not None else {})
            price, self._intercept_ms = found.price(self.table), found.intercept_ms
        whole = {"fixed_parts": True} if hasattr(model_space, "fixed_part_specs") else {}
        self._model = model_space.cost_model(price, **whole)

    def profile(self, sample: Mapping[str, Any]) -> float:
        """Return the latency of one sample in milliseconds; NNI's filters call it for each sample drawn."""
        return float(self._model.of(sample)) + self._intercept_ms

    def expectation(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Return the expected latency in milliseconds, a scalar, when each label is drawn with its ``weights``.

        Args:
            weights: Mutable label → probabilities over its values in their order, shape (n,), sum 1.
        """
        expected: Tensor = self._model.expectation(weights)
        return expected + self._intercept_ms


def _name_of(space: type[Any]) -> str:
    """Return the name that a space is registered under; a class that nobody registered goes by its own."""
    names = [entry.name for entry in search_spaces.entries() if entry.component is space]
    return names[0] if names else space.__name__
