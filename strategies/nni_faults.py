"""What NNI 3.0's strategies need around them: seeds, records, and ways round their faults (docs/strategies.md)."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import nni.nas.strategy  # noqa: F401 - before nni.nas.oneshot: the other order makes NNI lose its one-shot strategies
import numpy as np
import torch
from nni.nas.oneshot.pytorch.sampling import RandomSamplingLightningModule
from nni.nas.oneshot.pytorch.strategy import OneShotStrategy

from glioma_nas.errors import PluginError
from glioma_nas.seeding import derive_seed, isolated_torch_rng
from glioma_nas.strategies.candidate_scoring import ignored_latency_weight
from glioma_nas.strategies.nni_records import EpochRecord, StepRecorder
from glioma_nas.training import interruptible, require_finite_weights

REINFORCEMENT_PACKAGES = ("tianshou", "gym")
REINFORCEMENT_INSTALL = "pip install 'tianshou<0.5' 'gym<0.27' tensorboard"


def require_reinforcement_learning(strategy: str) -> None:
    """Check for the packages that NNI's reinforcement learning needs and does not declare.

    Raises:
        PluginError: One is not installed.
    """
    missing = [name for name in REINFORCEMENT_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise PluginError(f"{strategy} needs {' and '.join(missing)}; install with: {REINFORCEMENT_INSTALL}")


@contextmanager
def isolated_numpy_rng(seed: int) -> Iterator[None]:
    """Seed NumPy's global generator, from which tianshou draws, inside the block and put it back afterwards."""
    before = np.random.get_state()
    np.random.seed(derive_seed(seed, "numpy") % 2**32)
    try:
        yield
    finally:
        np.random.set_state(before)


class SeededOneShot(OneShotStrategy):
    """What all of them share; stands before NNI's class in the bases.

    NNI draws architecture parameters and weights from the global generator, keeps no history, and crashes on a step
    that the evaluator skips.
    """

    alternates = True
    manual = True
    searches_from: float = math.inf
    seed: int
    notes: list[str]

    def record_run(self, name: str, *, latency_weight: float, seed: int, instead: str, searches_from: float) -> None:
        """Keep the seed and say what cannot be followed; called by each constructor."""
        self.seed = seed
        self.notes = ignored_latency_weight(name, latency_weight, instead)
        self.searches_from = searches_from

    def mutate_model(self, model: Any) -> Any:
        """Turn the space into NNI's supernet, everything drawn from this strategy's seed."""
        with isolated_torch_rng(self.seed, "supernet"):
            return super().mutate_model(model)

    def configure_oneshot_module(self, training_module: Any) -> Any:
        """Build NNI's module with guards, and records of each epoch."""
        recorder = StepRecorder(training_module, alternates=self.alternates, manual=self.manual)
        training_module.training_step = recorder
        module = self.nni_module(training_module)
        module.on_before_optimizer_step = recorder.before_optimizer_step
        EpochRecord(module, recorder, self.probability_rows, searches_from=self.searches_from)
        if hasattr(module, "arch_parameters"):
            module.arch_parameters = partial(_in_order, module)
        return module

    def nni_module(self, training_module: Any) -> Any:
        """Build NNI's module alone."""
        return super().configure_oneshot_module(training_module)

    def probability_rows(self) -> list[dict[str, Any]]:
        """Return one row for every value of every choice that has parameters, for the history of the search."""
        model_space: Any = self.model_space
        space = model_space.model_space
        mutables = space.simplify()
        kinds = space.variable_groups() if hasattr(space, "variable_groups") else {}
        kind_of = {label: kind for kind, labels in kinds.items() for label in labels}
        rows = []
        for label, alpha in getattr(self, "_arch_parameters", {}).items():
            logits = alpha.detach().cpu()
            if len(logits) > 1:
                values = mutables[label].values
                rows += [
                    {
                        "architecture": "student",
                        "kind": kind_of.get(label, "choice"),
                        "label": label,
                        "value": str(value),
                        "logit": float(logit),
                        "probability": float(probability),
                    }
                    for value, logit, probability in zip(values, logits, logits.softmax(-1), strict=True)
                ]
        return rows

    def list_models(self, sort: bool = True, limit: int | None = 1) -> Iterator[Any]:
        """Yield the one model that NNI exports."""
        with isolated_torch_rng(self.seed, "export"):
            models = list(super().list_models(sort=sort, limit=1))
        yield from models

    def _run(self) -> None:
        with interruptible(), isolated_torch_rng(self.seed, "search"):
            super()._run()
        require_finite_weights(self.oneshot_module, "search", statistics=False)


class SeededSampling(RandomSamplingLightningModule):
    """NNI's module, drawing from PyTorch's generator, which every epoch seeds, instead of from the system's entropy.

    Args:
        training_module: The evaluator's module.
        filter: NNI's filter of samples; none for all.
        gradient_clip: Largest norm of a gradient; none for no limit.
    """

    def __init__(self, training_module: Any, filter: Any, *, gradient_clip: float | None) -> None:
        super().__init__(training_module, filter)
        self._gradient_clip = gradient_clip

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        """See Lightning."""
        self.clip_gradients(optimizer, gradient_clip_val=self._gradient_clip or 0.0, gradient_clip_algorithm="norm")

    def resample(self) -> dict[str, Any]:
        """Draw one path that passes the filter."""
        sample: dict[str, Any] = self._repeat_until_valid(self._draw)
        return sample

    def _draw(self) -> dict[str, Any]:
        sample = random_sample(self.model, np.random.RandomState(int(torch.randint(2**31 - 1, ()))))
        for module in self.supernet_modules():
            module.resample(memo=sample)
        return sample


class TaggedBatches:
    """All training batches, then all validation batches, each as (batch, ``train`` or ``val``).

    NNI's own loader gives the batch alone under Lightning 2.6, and its module then cannot tell one from the other.
    """

    def __init__(self, train: Any, validation: Any) -> None:
        self._loaders = {"train": train, "val": validation}

    def __len__(self) -> int:
        return sum(len(loader) for loader in self._loaders.values())

    def __iter__(self) -> Iterator[tuple[Any, str]]:
        for name, loader in self._loaders.items():
            for batch in loader:
                yield batch, name

    @property
    def sampler(self) -> TaggedBatches:
        """What Lightning tells the epoch."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on to the samplers of both loaders."""
        for loader in self._loaders.values():
            if hasattr(loader.sampler, "set_epoch"):
                loader.sampler.set_epoch(epoch)


def _in_order(module: Any) -> list[torch.nn.Parameter]:
    """Return the architecture parameters in the order of the modules.

    NNI puts them through a set, so their order differs from process to process, and an optimiser state that is loaded
    from a checkpoint goes to the wrong ones.
    """
    owners = [item for item in module.supernet_modules() if hasattr(item, "arch_parameters")]
    return list(dict.fromkeys(parameter for owner in owners for parameter in owner.arch_parameters()))


def random_sample(space: Any, state: np.random.RandomState) -> dict[str, Any]:
    """Draw every choice of a space uniformly."""
    sample: dict[str, Any] = {}
    for mutable in space.simplify().values():
        mutable.random(sample, state)
    return sample
