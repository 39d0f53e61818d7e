"""NNI's own one-shot strategies by name, with what NNI 3.0 lacks: seeds, records, and limits said aloud.

Each takes the keywords that the search stage gives to every strategy (profiler, latency_weight, pretrain_epochs, seed)
and NNI's own options. What they do is NNI's; docs/strategies.md lists what is worked round.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
from nni.mutable import CategoricalMultiple
from nni.nas.nn.pytorch import InputChoice, LayerChoice, ModelSpace, MutableModule, Repeat
from nni.nas.strategy import DARTS, ENAS, GumbelDARTS, Proxyless, RandomOneShot

from glioma_nas.errors import ConfigError
from glioma_nas.registry import strategies
from glioma_nas.seeding import derive_seed
from glioma_nas.strategies.nni_faults import (
    SeededOneShot,
    SeededSampling,
    TaggedBatches,
    isolated_numpy_rng,
    random_sample,
    require_reinforcement_learning,
)

_FOLLOWS_NO_LATENCY = "the network is searched for accuracy only"


@strategies.register("nni.darts")
class NniDarts(SeededOneShot, DARTS):
    """NNI's DARTS: first order, widths searched as mixtures of channel masks, no latency.

    Args:
        profiler: Not used: NNI's own latency penalty has no gradient to the architecture parameters.
        latency_weight: Not used; noted when it is not 0.
        pretrain_epochs: Epochs that train the weights only.
        seed: Seed of everything drawn.
        arc_learning_rate: Adam's learning rate of the architecture parameters; its weight decay is NNI's 1e-3.
        gradient_clip_val: Largest norm of the gradient of the weights; none for no limit.
    """

    mixes_operators = True  # a pass runs every operator and keeps what each gave: the search's memory is counted first

    def __init__(
        self,
        *,
        profiler: Any = None,
        latency_weight: float = 0.0,
        pretrain_epochs: int = 0,
        seed: int = 0,
        arc_learning_rate: float = 3e-4,
        gradient_clip_val: float | None = 5.0,
    ) -> None:
        super().__init__(
            arc_learning_rate=arc_learning_rate, gradient_clip_val=gradient_clip_val, warmup_epochs=pretrain_epochs
        )
        self.record_run(
            "nni.darts",
            latency_weight=latency_weight,
            seed=seed,
            instead=_FOLLOWS_NO_LATENCY,
            searches_from=pretrain_epochs,
        )


@strategies.register("nni.gumbel_darts")
class NniGumbelDarts(SeededOneShot, GumbelDARTS):
    """NNI's DARTS with Gumbel-softmax whose temperature falls linearly.

    Args:
        profiler: See `NniDarts`.
        latency_weight: See `NniDarts`.
        pretrain_epochs: See `NniDarts`.
        seed: See `NniDarts`.
        temperature: First and last temperature, or one for both.
        arc_learning_rate: See `NniDarts`.
        gradient_clip_val: See `NniDarts`.
    """

    mixes_operators = True

    def __init__(
        self,
        *,
        profiler: Any = None,
        latency_weight: float = 0.0,
        pretrain_epochs: int = 0,
        seed: int = 0,
        temperature: Any = (1.0, 0.33),
        arc_learning_rate: float = 3e-4,
        gradient_clip_val: float | None = 5.0,
    ) -> None:
        # A YAML list is no tuple and a whole number no float, which NNI insists on.
        first, last = temperature if isinstance(temperature, list | tuple) else (temperature, temperature)
        super().__init__(
            temperature=(float(first), float(last)),
            arc_learning_rate=arc_learning_rate,
            gradient_clip_val=gradient_clip_val,
            warmup_epochs=pretrain_epochs,
        )
        self.record_run(
            "nni.gumbel_darts",
            latency_weight=latency_weight,
            seed=seed,
            instead=_FOLLOWS_NO_LATENCY,
            searches_from=pretrain_epochs,
        )


@strategies.register("nni.proxyless")
class NniProxyless(SeededOneShot, Proxyless):
    """NNI's ProxylessNAS: one drawn path a step; searches operators and inputs, not widths.

    Args:
        profiler: See `NniDarts`.
        latency_weight: See `NniDarts`.
        pretrain_epochs: See `NniDarts`.
        seed: See `NniDarts`.
        arc_learning_rate: See `NniDarts`.
        gradient_clip_val: See `NniDarts`.
    """

    def __init__(
        self,
        *,
        profiler: Any = None,
        latency_weight: float = 0.0,
        pretrain_epochs: int = 0,
        seed: int = 0,
        arc_learning_rate: float = 3e-4,
        gradient_clip_val: float | None = 5.0,
    ) -> None:
        super().__init__(
            arc_learning_rate=arc_learning_rate, gradient_clip_val=gradient_clip_val, warmup_epochs=pretrain_epochs
        )
        self.record_run(
            "nni.proxyless",
            latency_weight=latency_weight,
            seed=seed,
            instead=_FOLLOWS_NO_LATENCY,
            searches_from=pretrain_epochs,
        )

    def check_space(self, space: Any) -> None:
        """Look at a space before anything is searched.

        Raises:
            ConfigError: The space searches values inside layers.
        """
        for module in space.modules():
            chooses = isinstance(module, LayerChoice | InputChoice | Repeat | ModelSpace)
            if isinstance(module, MutableModule) and module.mutables and not chooses:
                labels = sorted({label for mutable in module.mutables for label in mutable.simplify()})
                raise ConfigError(
                    f"nni.proxyless cannot search values inside layers such as '{labels[0]}'; give the space one value "
                    "for each, for example space_options: {widths: [8], end_widths: [8]}"
                )

    def mutate_model(self, model: Any) -> Any:
        """Turn the space into NNI's supernet; see `check_space`."""
        self.check_space(model)
        return super().mutate_model(model)

    def list_models(self, sort: bool = True, limit: int | None = 1) -> Iterator[Any]:
        """Yield the most probable model; NNI's export draws one."""
        module: Any = self.oneshot_module
        module.set_model(self.supernet)
        space: Any = self.model_space
        sample: dict[str, Any] = {}
        mutables = space.simplify()
        for label, probabilities in module.export_probs().items():
            best = max(probabilities, key=probabilities.__getitem__)
            sample[label] = [best] if isinstance(mutables[label], CategoricalMultiple) else best
        yield space.freeze(sample)


@strategies.register("nni.random_one_shot")
class NniRandomOneShot(SeededOneShot, RandomOneShot):
    """NNI's uniform path sampling; the network it exports is drawn, not chosen.

    Args:
        profiler: For ``filter``.
        latency_weight: Not used; noted when it is not 0.
        pretrain_epochs: Not used: all epochs train weights.
        seed: Seed of everything drawn.
        gradient_clip_val: See `NniDarts`.
        filter: ``{min: ms, max: ms}``: only paths of such latency are drawn, while training and for export.
    """

    alternates = False
    manual = False

    def __init__(
        self,
        *,
        profiler: Any = None,
        latency_weight: float = 0.0,
        pretrain_epochs: int = 0,
        seed: int = 0,
        gradient_clip_val: float | None = 5.0,
        filter: Mapping[str, float] | None = None,  # NNI's own name
    ) -> None:
        self._gradient_clip = gradient_clip_val
        super().__init__(filter=None if filter is None else {"profiler": profiler, **filter})
        self.record_run(
            "nni.random_one_shot",
            latency_weight=latency_weight,
            seed=seed,
            instead="set its 'filter' to bound the latency",
            searches_from=math.inf,
        )
        self.notes.append("nni.random_one_shot exports a random network; random_with_shared_weights chooses one")

    def mutate_model(self, model: Any) -> Any:
        """Turn the space into NNI's supernet.

        Raises:
            ConfigError: A filter without a profiler.
        """
        if self.filter is not None and self.filter.profiler is None:
            raise ConfigError("nni.random_one_shot: 'filter' needs a profiler; build a latency table")
        return super().mutate_model(model)

    def nni_module(self, training_module: Any) -> Any:
        """Build NNI's module so that it draws reproducibly."""
        return SeededSampling(training_module, self.filter, gradient_clip=self._gradient_clip)

    def list_models(self, sort: bool = True, limit: int | None = 1) -> Iterator[Any]:
        """Yield one random model that passes the filter; NNI draws it from the system's entropy."""
        space: Any = self.model_space
        state = np.random.RandomState(derive_seed(self.seed, "export") % 2**32)
        for _ in range(1000):
            sample = random_sample(space, state)
            if self.filter is None or self.filter(sample):
                yield space.freeze(sample)
                return
        raise ConfigError("nni.random_one_shot: none of 1000 random networks passes the filter; widen it")


@strategies.register("nni.enas")
class NniEnas(SeededOneShot, ENAS):
    """NNI's ENAS: a reinforcement-learned controller samples paths of shared weights; needs tianshou.

    Each epoch trains weights first and lets the controller learn afterwards, so it must not be cut off by time.

    Args:
        profiler: Not used.
        latency_weight: Not used; noted when it is not 0.
        pretrain_epochs: Epochs before the controller learns.
        seed: Seed of everything drawn.
        gradient_clip_val: See `NniDarts`.
        batches_per_update: Validation batches for one update of the controller.
        reward_metric_name: What is logged as the reward; ``default`` is the evaluator's score of a batch.

    Raises:
        PluginError: tianshou or gym is not installed.
    """

    alternates = False
    needs_whole_epochs = True

    def __init__(
        self,
        *,
        profiler: Any = None,
        latency_weight: float = 0.0,
        pretrain_epochs: int = 0,
        seed: int = 0,
        gradient_clip_val: float | None = 5.0,
        batches_per_update: int = 20,
        reward_metric_name: str = "default",
    ) -> None:
        require_reinforcement_learning("nni.enas")
        self._gradient_clip = gradient_clip_val
        super().__init__(
            batches_per_update=batches_per_update,
            reward_metric_name=reward_metric_name,
            warmup_epochs=pretrain_epochs,
        )
        self.record_run(
            "nni.enas",
            latency_weight=latency_weight,
            seed=seed,
            instead="the reward is accuracy only",
            searches_from=pretrain_epochs,
        )

    def nni_module(self, training_module: Any) -> Any:
        """Build NNI's module; an evaluator that can score a network rewards the controller with that score."""
        if hasattr(training_module, "score"):

            def validation_step(batch: Any, batch_idx: int) -> None:
                training_module.log("default", training_module.score(training_module.model, [batch]), on_step=True)

            training_module.validation_step = validation_step
        module = super().nni_module(training_module)
        module.advance_optimization = partial(module.advance_optimization, gradient_clip_val=self._gradient_clip)
        return module

    def train_dataloader(self, train_dataloader_fn: Any, val_dataloader_fn: Any) -> Any:
        """Give NNI's module the batches of both loaders, marked."""
        return TaggedBatches(train_dataloader_fn(), val_dataloader_fn())

    def _run(self) -> None:
        with isolated_numpy_rng(self.seed):
            super()._run()
