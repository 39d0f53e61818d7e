"""Run an NNI strategy over a model space in this process.

It does what ``nni.nas.experiment.NasExperiment`` does for a sequential experiment, without an entry in the user's list
of NNI experiments. The strategies also run inside a `NasExperiment`; this is for the pipeline, which keeps records of
its own.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import nni
import nni.trial
from nni.nas.execution import SequentialExecutionEngine
from nni.nas.space import ModelStatus, RawFormatModelSpace

from glioma_nas.architecture import Architecture
from glioma_nas.errors import DivergedError, SearchError
from glioma_nas.files import canonical_json, sha256_text
from glioma_nas.seeding import isolated_torch_rng

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trial:
    """One trial of a multi-trial strategy.

    Attributes:
        sample: NNI sample: mutable label → chosen value.
        status: NNI's word for how it ended: ``trained``, ``failed`` …
        metric: What the evaluator reported; none when it failed.
    """

    sample: Mapping[str, Any]
    status: str
    metric: float | None


class TrialEngine(SequentialExecutionEngine):
    """NNI's in-process engine with reproducible trials, one of which may diverge without ending the search.

    Args:
        seed: The weights that a candidate starts from depend on this seed and on its choices only, not on the trials
            before it.
        max_trials: Trials before the budget counts as used up; none for no limit.
    """

    def __init__(self, *, seed: int, max_trials: int | None) -> None:
        super().__init__(max_model_count=max_trials)
        self._seed = seed

    def _run_single_model(self, model: Any) -> None:
        if model.sample is None:  # a supernet: its strategy sees to its seeds
            super()._run_single_model(model)
            return
        key = sample_key(model.sample)
        try:
            with isolated_torch_rng(self._seed, "trial", key):
                super()._run_single_model(model)
        except DivergedError as err:
            _logger.warning("trial %s failed and counts as a trial: %s", key, err)


def sample_key(sample: Mapping[str, Any]) -> str:
    """Return twelve hexadecimal digits that depend on a sample's content only."""
    return sha256_text(canonical_json(dict(sample)))[:12]


def in_trial() -> bool:
    """Tell whether NNI is waiting for the result of a trial in this process.

    NNI's in-process engine leaves the last model behind as the current parameters; one that is completed waits for
    nothing.
    """
    parameters = nni.get_current_parameter()
    status = getattr(parameters, "status", None)
    return parameters is not None and not (isinstance(status, ModelStatus) and status.completed())


def current_sample() -> Mapping[str, Any] | None:
    """Return the choices of the model that NNI is evaluating right now; none outside a multi-trial strategy's trial."""
    sample: Mapping[str, Any] | None = getattr(nni.get_current_parameter(), "sample", None) if in_trial() else None
    return sample


def explore(space: Any, evaluator: Any, strategy: Any) -> Any:
    """Let ``strategy`` explore ``space`` with ``evaluator`` and return the strategy, which then knows its best models.

    A strategy with an attribute ``trials`` gets that many; its ``seed`` decides the weights candidates start from.

    Args:
        space: An NNI ``ModelSpace``; one-shot strategies turn it into a supernet in place.
        evaluator: An NNI ``Evaluator``; one-shot strategies need a Lightning evaluator.
        strategy: An NNI ``Strategy`` that has not run yet.
    """
    # A sequential run leaves its last model behind as "the current trial's parameters"; an evaluator that is called
    # later, outside any trial, would then report to a trial that is over.
    before = nni.trial._params
    engine = TrialEngine(seed=getattr(strategy, "seed", 0), max_trials=getattr(strategy, "trials", None))
    try:
        strategy(RawFormatModelSpace.from_model(space, evaluator), engine)
    finally:
        nni.trial._params = before
    return strategy


def trials_of(strategy: Any) -> list[Trial]:
    """Return the trials of a multi-trial strategy that has run, in order; empty for a one-shot strategy."""
    if hasattr(type(strategy), "oneshot_module"):
        return []
    return [
        Trial(dict(model.sample), str(model.status.value), model.metric) for model in strategy.list_models(sort=False)
    ]


def found_architectures(strategy: Any, space: Any) -> dict[str, Architecture]:
    """Return the architectures a strategy found, by role.

    Our strategies name them (``teacher``, ``student``). Of any other strategy the best model is the student. A missing
    teacher is the student's network at its widest.

    Args:
        strategy: A strategy that has run.
        space: The space as it was before a one-shot strategy changed it.

    Raises:
        SearchError: The strategy found no model: every trial failed.
    """
    found: dict[str, Architecture] = dict(getattr(strategy, "found", {}))
    if not found:
        models = list(strategy.list_models(limit=1))
        if not models:
            raise SearchError(
                "the strategy found no model: every trial failed; the log above says why of each, commonly a loss that "
                "is no finite number (lower search.learning_rate)"
            )
        found["student"] = space.architecture(models[0].sample)
    if "teacher" not in found:
        widest = {label: list(space.simplify()[label].values)[-1] for label in space.variable_groups()["width"]}
        fixed = space.fixed_choices.get("teacher", {})
        found["teacher"] = space.architecture({**found["student"].sample(), **widest, **fixed})
    return found
