"""The latency table as an NNI profiler, for our own strategies and for NNI's filters and penalties."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nni.nas.profiler import Profiler
from torch import Tensor

from glioma_nas.latency_records import LatencyTable
from glioma_nas.registry import evaluators


@evaluators.register("latency_table")
class LatencyTableProfiler(Profiler):
    """Sum of table entries over the operators of a network, in milliseconds.

    NNI's own ``ExpectationProfilerPenalty`` takes probabilities as Python floats, so nothing reaches the architecture
    parameters through it; `expectation` takes tensors and is differentiable in each of them.

    Args:
        model_space: A search space with ``cost_model``.
        table: The table, or the JSON file that holds it.

    Reference: METHOD eq. 4-9; Cai et al., ProxylessNAS, ICLR 2019, eq. 2.
    """

    def __init__(self, model_space: Any, table: LatencyTable | Path | str) -> None:
        super().__init__(model_space)
        self.table = table if isinstance(table, LatencyTable) else LatencyTable.load(Path(table))
        self._model = model_space.cost_model(self.table.lookup)

    def profile(self, sample: Mapping[str, Any]) -> float:
        """Return the latency of one sample in milliseconds; NNI's filters call it for each sample drawn."""
        return float(self._model.of(sample))

    def expectation(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Return the expected latency in milliseconds, a scalar, when each label is drawn with its ``weights``.

        Args:
            weights: Mutable label → probabilities over its values in their order, shape (n,), sum 1.
        """
        expected: Tensor = self._model.expectation(weights)
        return expected
