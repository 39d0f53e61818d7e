"""Run an NNI strategy over a model space in this process.

It does what ``nni.nas.experiment.NasExperiment`` does for a sequential experiment, without an entry in the user's list
of NNI experiments. The strategies also run inside a `NasExperiment`; this is for the pipeline, which keeps records of
its own.
"""

from __future__ import annotations

from typing import Any

import nni
import nni.trial
from nni.nas.execution import SequentialExecutionEngine
from nni.nas.space import RawFormatModelSpace

from glioma_nas.architecture import Architecture


def explore(space: Any, evaluator: Any, strategy: Any) -> Any:
    """Let ``strategy`` explore ``space`` with ``evaluator`` and return the strategy, which then knows its best models.

    Args:
        space: An NNI ``ModelSpace``; one-shot strategies turn it into a supernet in place.
        evaluator: An NNI ``Evaluator``; one-shot strategies need a Lightning evaluator.
        strategy: An NNI ``Strategy`` that has not run yet.
    """
    # A sequential run leaves its last model behind as "the current trial's parameters"; an evaluator that is called
    # later, outside any trial, would then report to a trial that is over.
    before = nni.trial._params
    try:
        strategy(RawFormatModelSpace.from_model(space, evaluator), SequentialExecutionEngine())
    finally:
        nni.trial._params = before
    return strategy


def found_architectures(strategy: Any, space: Any) -> dict[str, Architecture]:
    """Return the architectures a strategy found, by role.

    Our strategies name them (``teacher``, ``student``). Of any other strategy the best model is the student. A missing
    teacher is the student's network at its widest.

    Args:
        strategy: A strategy that has run.
        space: The space as it was before a one-shot strategy changed it.

    Raises:
        RuntimeError: The strategy found no model: every trial failed.
    """
    found: dict[str, Architecture] = dict(getattr(strategy, "found", {}))
    if not found:
        models = list(strategy.list_models(limit=1))
        if not models:
            raise RuntimeError("the strategy found no model; every trial failed (see the log above)")
        found["student"] = space.architecture(models[0].sample)
    if "teacher" not in found:
        widest = {label: list(space.simplify()[label].values)[-1] for label in space.variable_groups()["width"]}
        fixed = space.fixed_choices.get("teacher", {})
        found["teacher"] = space.architecture({**found["student"].sample(), **widest, **fixed})
    return found
