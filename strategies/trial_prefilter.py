"""Choose which networks of NNI's strategies become trials: by a zero-cost proxy, and within a latency limit.

NNI 3.0 has no place for either (``model_filter`` is gone), but its random search and the first generation of its
evolution get every network from one method, ``random``. Its other strategies propose networks in an order of their
own, or must be told the result of each one they propose: there a filter would skip or starve them, and is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from nni.mutable import SampleValidationError

from glioma_nas.errors import ConfigError, SearchError, did_you_mean
from glioma_nas.seeding import isolated_torch_rng
from glioma_nas.strategies.zero_cost import PROXIES, ranked

_TRIES = 500
"""Draws in a row that may be slower than the limit."""

_STEPS = 10_000
"""Networks of a walk in a row that may be slower than the limit; a large grid holds more than anyone can wait for."""


def require_prefilter(prefilter: str | None, draws: int) -> None:
    """Check the options of a pre-filter.

    Raises:
        ConfigError: There is no such proxy, or fewer than one draw for each network that is kept.
    """
    if prefilter is not None and prefilter not in PROXIES:
        raise ConfigError(f"unknown prefilter '{prefilter}': {did_you_mean(str(prefilter), PROXIES)}")
    if draws < 1:
        raise ConfigError(f"prefilter_draws is {draws}; give at least 1")


def refuse_prefilter(strategy: str, prefilter: str | None) -> None:
    """Say why a strategy takes no pre-filter.

    Raises:
        ConfigError: One was asked for.
    """
    if prefilter is not None:
        raise ConfigError(
            f"{strategy}: NNI lets no filter between its proposals and the trials; prefilter works with nni.random, "
            "nni.evolution (its random networks) and random_with_shared_weights"
        )


def walk_in_limit(
    models: Iterable[Any],
    keeps_limit: Callable[[Mapping[str, Any]], bool],
    *,
    limit_ms: float | None,
    wanted: int,
    notes: list[str],
) -> Iterator[Any]:
    """Yield models of NNI's walk through a grid, each with a sample of its own; with a limit those that keep it.

    Args:
        models: The walk.
        keeps_limit: Tells whether a sample does.
        limit_ms: The limit; none: all models.
        wanted: How many at most under a limit.
        notes: Gets a note when the walk is given up after some were found.

    Raises:
        SearchError: Thousands in a row were too slow, and none was found before them.
    """
    found = too_slow = 0
    for model in models:
        # NNI walks the grid by changing one dict, which every model it yields keeps as its sample and freezes only
        # when its turn comes: by then the dict says something else, or has lost the labels walked back over.
        model.sample = copy.deepcopy(model.sample)
        if limit_ms is None or keeps_limit(model.sample):
            found, too_slow = found + 1, 0
            yield model
            if limit_ms is not None and found == wanted:
                return  # one more might take long to find, and would not be tried
            continue
        too_slow += 1
        if too_slow == _STEPS:
            told = f"{_STEPS} networks of the grid in a row exceed latency_limit_ms {limit_ms:g}"
            if not found:
                raise SearchError(f"{told}; raise the limit, or search at random")
            # Those may still wait in NNI's buffer: the end of the walk lets them become trials.
            notes.append(f"{told}: the walk ended with {found} found before them")
            return


class TrialPrefilter:
    """Mixin before NNI's class: ``random`` returns the draw that the proxy ranks highest.

    Every draw counts as tried, so a network that was passed over does not come again where NNI avoids repeats.
    """

    prefilter: str | None = None
    prefilter_draws: int = 1
    seed: int
    notes: list[str]
    keeps_limit: Callable[[Mapping[str, Any]], bool]

    def record_prefilter(self, prefilter: str | None, draws: int) -> None:
        """Keep the options; called by the constructor after ``notes`` are set.

        Raises:
            ConfigError: See `require_prefilter`.
        """
        require_prefilter(prefilter, draws)
        self.prefilter, self.prefilter_draws = prefilter, draws
        if prefilter is not None:
            self.notes.append(f"{prefilter} chose every randomly drawn network among {draws} draws")

    def random(self, *args: Any) -> Any:
        """Return NNI's next random model, or the best by proxy of several; called by NNI for each random network."""
        of_nni: Callable[..., Any] = super().random  # type: ignore[misc]  # NNI's class stands behind this one

        def draw(*args: Any) -> Any:
            return self.first_in_limit(partial(of_nni, *args))

        if self.prefilter is None:
            return draw(*args)
        drawn = []
        for _ in range(self.prefilter_draws):
            try:
                drawn.append(draw(*args))
            except SampleValidationError:  # a repeat; NNI tries again when nothing new is left among the draws
                continue
        if not drawn:
            return draw(*args)
        scores = [self._proxy(model) for model in drawn]
        return drawn[ranked(scores)[0]]

    def first_in_limit(self, draw: Callable[[], Any]) -> Any:
        """Return the first model drawn that keeps the strategy's latency limit.

        Raises:
            SearchError: Hundreds were too slow.
        """
        for _ in range(_TRIES):
            model = draw()
            if self.keeps_limit(model.sample):
                return model
        raise SearchError(f"none of {_TRIES} networks drawn in a row keeps latency_limit_ms; raise the limit")

    def _proxy(self, model: Any) -> float:
        assert self.prefilter is not None
        evaluator = model.evaluator
        if not hasattr(getattr(evaluator, "module", None), "loss"):
            raise ConfigError("prefilter needs an evaluator with training data and a loss; leave it out")
        # The same batch, and the same start, for all: what differs is the network.
        with isolated_torch_rng(self.seed, "prefilter"):
            batch = next(iter(evaluator.train_dataloaders))
            network = model.executable_model()
        return PROXIES[self.prefilter](network, batch["image"], batch["mask"], evaluator.module.loss)
