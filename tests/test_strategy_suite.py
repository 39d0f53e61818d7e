"""The conformance suite on our strategies and on NNI's."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest

from glioma_nas.testing.strategy_suite import StrategySuite

pytestmark = pytest.mark.slow

needs_tianshou = pytest.mark.skipif(
    importlib.util.find_spec("tianshou") is None or importlib.util.find_spec("gym") is None,
    reason="tianshou and gym are not installed",
)

ONE_WIDTH: Mapping[str, Any] = {"widths": [4], "end_widths": [4]}


class TestCoSearch(StrategySuite):
    strategy = "co_search"
    options: ClassVar[Mapping[str, Any]] = {"recalibration_batches": 1, "finetune_steps": 1}


class TestLatencyDarts(StrategySuite):
    strategy = "latency_darts"
    options: ClassVar[Mapping[str, Any]] = {"recalibration_batches": 1, "finetune_steps": 1}


class TestRandomWithSharedWeights(StrategySuite):
    strategy = "random_with_shared_weights"
    options: ClassVar[Mapping[str, Any]] = {"recalibration_batches": 1, "n_candidates": 3, "paths": 2}


class TestNniDarts(StrategySuite):
    strategy = "nni.darts"


class TestNniGumbelDarts(StrategySuite):
    strategy = "nni.gumbel_darts"


class TestNniProxyless(StrategySuite):
    strategy = "nni.proxyless"
    space_options = ONE_WIDTH


class TestNniRandomOneShot(StrategySuite):
    strategy = "nni.random_one_shot"


@needs_tianshou
class TestNniEnas(StrategySuite):
    strategy = "nni.enas"
    options: ClassVar[Mapping[str, Any]] = {"batches_per_update": 2}


class TestNniRandom(StrategySuite):
    strategy = "nni.random"
    options: ClassVar[Mapping[str, Any]] = {"trials": 3}


class TestNniGrid(StrategySuite):
    strategy = "nni.grid"
    options: ClassVar[Mapping[str, Any]] = {"trials": 3}


class TestNniEvolution(StrategySuite):
    strategy = "nni.evolution"
    options: ClassVar[Mapping[str, Any]] = {"trials": 4, "population_size": 2}


class TestNniTpe(StrategySuite):
    strategy = "nni.tpe"
    options: ClassVar[Mapping[str, Any]] = {"trials": 4}


@needs_tianshou
class TestNniPolicyRl(StrategySuite):
    strategy = "nni.policy_rl"
    options: ClassVar[Mapping[str, Any]] = {"trials": 3, "samples_per_update": 2}
