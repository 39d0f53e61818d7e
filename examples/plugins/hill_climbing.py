"""A strategy in one file: start from a random network, change one choice at a time, keep what scores better.

``plugins: [hill_climbing.py]`` and ``search: {strategy: hill_climbing, strategy_options: {trials: 12}}``. It is an NNI
multi-trial strategy: it submits frozen models to the engine, each of which trains one network.

Reference: White et al., Local search is state of the art for neural architecture search benchmarks, 2020,
https://arxiv.org/abs/2005.02960.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from nni.nas.strategy.base import Strategy

from glioma_nas.errors import ConfigError
from glioma_nas.registry import strategies


@strategies.register("hill_climbing")
class HillClimbing(Strategy):
    """Change one choice of the best network so far; ranked by the evaluator's score.

    Args:
        profiler: Latency of a sample in ms; not used here.
        latency_weight: Not used; noted when it is not 0.
        pretrain_epochs: Not used: a trial's epochs are all alike.
        trials: Networks to train.
        seed: Seed of everything drawn.
    """

    def __init__(
        self,
        *,
        profiler: Any = None,
        latency_weight: float = 0.0,
        pretrain_epochs: int = 0,
        trials: int = 12,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if trials < 1:
            raise ConfigError(f"hill_climbing: trials is {trials}; give at least 1")
        self.trials = trials
        self.seed = seed
        self.notes = ["hill_climbing ranks by Dice alone; latency_weight is not used"] if latency_weight else []

    def _run(self) -> None:
        state = np.random.RandomState(self.seed % 2**32)
        choices = self.model_space.simplify()
        best_sample: dict[str, Any] = {}
        best_score = -np.inf
        for _ in range(self.trials):
            sample = dict(best_sample)
            # With nothing to start from, every choice is drawn; later, one.
            for label in [state.choice(sorted(choices))] if best_sample else choices:
                sample.pop(label, None)
                choices[label].random(sample, state)
            if not self.wait_for_resource():
                return
            model = self.model_space.freeze(sample)
            self.engine.submit_models(model)
            self.engine.wait_models(model)
            if model.metric is not None and model.metric > best_score:
                best_sample, best_score = sample, model.metric
