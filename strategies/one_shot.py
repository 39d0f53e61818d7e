"""Latency-regularised one-shot strategies: ``latency_darts`` for one network, ``co_search`` for teacher and student.

Both are NNI strategies over a Lightning evaluator and run in a plain ``NasExperiment(space, evaluator, strategy)``.

Reference: Liu et al., DARTS, ICLR 2019; Chen et al., FasterSeg, ICLR 2020; thesis 4.3.2-4.3.6.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import nni.nas.strategy  # noqa: F401 - before nni.nas.oneshot: the other order makes NNI lose its own one-shot strategies
from nni.nas.oneshot.pytorch.strategy import OneShotStrategy
from nni.nas.space import RawFormatModelSpace
from pytorch_lightning.utilities.combined_loader import CombinedLoader

from glioma_nas.architecture import Architecture
from glioma_nas.errors import ArchitectureError, ConfigError, did_you_mean
from glioma_nas.registry import strategies
from glioma_nas.relaxation import RelaxationSlot, SlotPolicy, relaxation_hooks
from glioma_nas.seeding import isolated_torch_rng
from glioma_nas.strategies.architecture_parameters import ArchitectureParameters, choices_of, groups_of, skips_of
from glioma_nas.strategies.candidate_choice import BRANCHES_LABEL, CandidateChoice
from glioma_nas.strategies.candidate_scoring import Candidate, warn_about_equal_exponents
from glioma_nas.strategies.latency_term import DecoupledLatency
from glioma_nas.strategies.search_settings import SearchSettings, require_number, two_numbers
from glioma_nas.strategies.supernet_search import SupernetSearch
from glioma_nas.training import interruptible, require_finite_weights

DECODINGS = ("joint", "viterbi", "fasterseg")

_logger = logging.getLogger(__name__)


class LatencyRegularisedSearch(CandidateChoice, OneShotStrategy):
    """Base of both strategies.

    Args:
        profiler: NNI profiler of the space with ``expectation(weights) -> Tensor`` in ms, differentiable, and
            ``profile(sample) -> float``; none searches for accuracy only and requires ``latency_weight=0``.
        latency_weight: λ of eq. 4-11, per ms; acts on the student only. See `SearchSettings`.
        latency_window_ms: See `SearchSettings`.
        latency_coefficients: (w₁, w₂, w₃) of eq. 4-9, or ``auto``.
        pretrain_epochs: See `SearchSettings`.
        pretrain_widths: See `SearchSettings`.
        search_widths: See `SearchSettings`.
        architecture_learning_rate: See `SearchSettings`.
        gradient_clip: See `SearchSettings`.
        auxiliary_skip: See `SearchSettings`.
        beta_decay: See `SearchSettings`.
        max_skip_fraction: See `SearchSettings`.
        min_entropy: See `SearchSettings`.
        gumbel_temperature: See `SearchSettings`.
        operator_relaxation: See `SearchSettings`.
        decode: Decoding of β, see the space's decoder.
        target_latency_ms: T of eq. 4-1.
        target_exponents: (a, b) of eq. 4-1.
        latency_limit_ms: Hard limit in ms: no slower network is chosen, for the student only; the search ends with an
            error when it finds none.
        finetune_steps: Optimiser steps on W's data for each decoded network before it is scored; the supernet's weights
            served soft mixtures and suit no single network. 0 leaves them as they are.
        recalibration_batches: Batches for the batch norms of a decoded network before it is scored; 0 leaves the
            statistics it inherits.
        evolution_generations: Generations of weight-inheriting evolution after the search, see `evolve`; 0 for none.
        evolution_population: Networks of one generation.
        sampled_networks: Networks that are drawn at random after all is chosen and scored with the supernet's weights,
            kept in ``sampled``: to see whether the supernet ranks as training alone does. The same for every seed.
        seed: Seed of everything drawn.
    """

    architectures: tuple[str, ...] = ()
    ranks_networks = True

    def __init__(
        self,
        *,
        profiler: Any = None,
        latency_weight: float = 0.01,
        latency_window_ms: Any = None,
        latency_coefficients: Any = "auto",
        pretrain_epochs: int = 20,
        pretrain_widths: Sequence[str] = ("max", "min", "random", "random"),
        search_widths: Sequence[str] = ("max", "min", "sampled"),
        architecture_learning_rate: float = 3e-4,
        gradient_clip: float = 5.0,
        auxiliary_skip: float = 0.0,
        beta_decay: float = 0.0,
        max_skip_fraction: float | None = None,
        min_entropy: float | None = None,
        gumbel_temperature: Any = 1.0,
        operator_relaxation: str = "softmax",
        decode: str = "joint",
        target_latency_ms: float | None = None,
        target_exponents: tuple[float, float] = (-0.07, -0.07),
        latency_limit_ms: float | None = None,
        finetune_steps: int = 100,
        recalibration_batches: int = 8,
        evolution_generations: int = 0,
        evolution_population: int = 16,
        sampled_networks: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.settings = SearchSettings(
            latency_weight=latency_weight,
            latency_window_ms=latency_window_ms,
            pretrain_epochs=pretrain_epochs,
            pretrain_widths=tuple(pretrain_widths),
            search_widths=tuple(search_widths),
            architecture_learning_rate=architecture_learning_rate,
            gradient_clip=gradient_clip,
            auxiliary_skip=auxiliary_skip,
            beta_decay=beta_decay,
            max_skip_fraction=max_skip_fraction,
            min_entropy=min_entropy,
            gumbel_temperature=gumbel_temperature,
            operator_relaxation=operator_relaxation,
        )
        for needing, given in (("latency_weight > 0", latency_weight > 0), ("latency_limit_ms", latency_limit_ms)):
            if profiler is None and given:
                raise ConfigError(
                    f"{needing} needs a profiler; build a latency table or leave it out (latency_weight: 0)"
                )
        below, above = two_numbers("target_exponents", target_exponents)
        if target_latency_ms is None and below != above:
            raise ConfigError("unequal target_exponents need target_latency_ms")
        for name, value in (
            ("finetune_steps", finetune_steps),
            ("recalibration_batches", recalibration_batches),
            ("evolution_generations", evolution_generations),
            ("sampled_networks", sampled_networks),
            ("latency_limit_ms", latency_limit_ms or 0),
        ):
            require_number(name, value)
        if evolution_population < 2:
            raise ConfigError(f"evolution_population is {evolution_population}; give at least 2")
        if decode not in DECODINGS:
            raise ConfigError(f"unknown decoding '{decode}': {did_you_mean(decode, DECODINGS)}")
        warn_about_equal_exponents((below, above), target_latency_ms)
        self.relaxation_slot = RelaxationSlot()
        self.profiler = profiler
        self.latency_weight = latency_weight
        self.latency_coefficients = latency_coefficients
        self.decode = decode
        self.target_latency_ms = target_latency_ms
        self.target_exponents = (below, above)
        self.latency_limit_ms = latency_limit_ms
        self.finetune_steps = int(finetune_steps)
        self.recalibration_batches = int(recalibration_batches)
        self.evolution_generations = int(evolution_generations)
        self.evolution_population = int(evolution_population)
        self.sampled_networks = int(sampled_networks)
        self.sampled: list[tuple[Architecture, Candidate]] = []
        self.sampled_s = 0.0
        self.seed = seed
        self.notes: list[str] = []
        self.found: dict[str, Architecture] = {}
        self.candidates: dict[str, list[Candidate]] = {}
        self._loaders: dict[str, Any] = {}
        self._evaluator: Any = None

    def default_mutation_hooks(self) -> list[Any]:
        """Return the hooks that relax layer and input choices; the space brings those for its layers."""
        return [*relaxation_hooks(self.relaxation_slot), *super().default_mutation_hooks()]

    def mutate_model(self, model: Any) -> Any:
        """Turn the space into a supernet, its new weights drawn from this strategy's seed.

        Raises:
            ArchitectureError: The space holds a layer with choices that cannot be relaxed.
        """
        self.check_space(model)
        with isolated_torch_rng(self.seed, "supernet"):
            try:
                supernet = super().mutate_model(model)
            except TypeError as err:
                raise ArchitectureError(
                    f"this space cannot become a supernet ({err}); supported are LayerChoice, InputChoice of one "
                    "input, and numeric choices in NNI's mutable layers such as MutableConv2d"
                ) from err
        require_gradients(supernet)
        return supernet

    def check_space(self, space: Any) -> None:
        """Look at a space before anything is searched.

        Raises:
            ConfigError: It cannot do what an option asks for.
        """
        for name in ("evolution_generations", "sampled_networks"):
            if getattr(self, name) and not hasattr(space, "derive"):
                raise ConfigError(
                    f"{name}: {type(space).__name__} has no derive(), so none of its networks can be scored with "
                    f"inherited weights; set {name} to 0"
                )

    def train_dataloader(self, train_dataloader_fn: Any, val_dataloader_fn: Any) -> Any:
        """Pair a batch for W with a batch for the architecture in each step."""
        self._loaders = {"train": train_dataloader_fn(), "val": val_dataloader_fn()}
        return CombinedLoader(dict(self._loaders), mode="min_size")

    def val_dataloader(self, train_dataloader_fn: Any, val_dataloader_fn: Any) -> Any:
        """Return the loader the architecture trains on; the trainer never validates with it."""
        return self._loaders["val"]

    def mutate_evaluator(self, evaluator: Any) -> Any:
        """Wrap the evaluator's training, and remember the evaluator for scoring; called by NNI."""
        self._evaluator = evaluator
        return super().mutate_evaluator(evaluator)

    def configure_oneshot_module(self, training_module: Any) -> SupernetSearch:
        """Build the searching module; called by NNI once the space is a supernet."""
        space = self._space()
        choices, groups = choices_of(space), groups_of(space)
        fixed = getattr(space, "fixed_choices", {})
        with isolated_torch_rng(self.seed, "architecture parameters"):
            parameters = [
                ArchitectureParameters(
                    name,
                    choices=choices,
                    groups=groups,
                    fixed=fixed.get(name, {}),
                    search_widths=self._searches_latency(name),
                )
                for name in self.architectures
            ]
        latencies = {
            item.name: self._latency_term(item, choices, groups)
            for item in parameters
            if self.profiler is not None and self._searches_latency(item.name)
        }
        skips = skips_of(space)
        if self.settings.max_skip_fraction is not None and not skips:
            raise ConfigError("max_skip_fraction: no operator of this space is a skip connection; remove the key")
        return SupernetSearch(
            training_module,
            slot=self.relaxation_slot,
            architectures=parameters,
            latencies=latencies,
            settings=self.settings,
            skips=skips,
            decoded_latency_ms=self._decoded_latency_ms if self.profiler is not None else None,
        )

    def list_models(self, sort: bool = True, limit: int | None = None) -> Iterator[RawFormatModelSpace]:
        """Yield the found networks, the student first; NNI calls it after the run."""
        for architecture in list(self.found.values())[:limit]:
            yield self.model_space.freeze(architecture.sample())

    def _run(self) -> None:
        with interruptible():
            with isolated_torch_rng(self.seed, "search"):
                super()._run()
            # Statistics are taken anew for each network that is scored.
            require_finite_weights(self._module(), "search", statistics=False)
            # A stream of its own: what is chosen must not depend on whether the training above was resumed.
            with isolated_torch_rng(self.seed, "choose"):
                self._choose()
            if self.sampled_networks:
                with isolated_torch_rng(self.seed, "sampled networks"):
                    self._score_sampled()

    def _decode(self, parameters: ArchitectureParameters) -> list[Architecture]:
        """Return what an architecture's parameters mean now: one network for every branch set."""
        space = self._space()
        weights = parameters.decoded()
        if not hasattr(space, "decode"):
            choices = {label: _argmax_choice(space, label, weight) for label, weight in weights.items()}
            return [Architecture(type(space).__name__, {}, choices)]
        return [
            space.decode(weights, architecture=parameters.name, branches=branches, method=self.decode)
            for branches in choices_of(space).get(BRANCHES_LABEL, [None])
        ]

    def _decoded_latency_ms(self, parameters: ArchitectureParameters) -> float:
        """Return the latency of what the parameters mean now, in ms, the mean over branch sets."""
        latencies = [float(self.profiler.profile(item.sample())) for item in self._decode(parameters)]
        return sum(latencies) / len(latencies)

    def _note_missed_window(self) -> None:
        if self.settings.latency_window_ms is None or "student" not in self.found:
            return
        low, high = self.settings.latency_window_ms
        latency_ms = self._latency_ms(self.found["student"])
        if latency_ms is not None and not low <= latency_ms <= high:
            note = (
                f"the student takes {latency_ms:.3g} ms by the latency table, outside latency_window_ms {low:g} to "
                f"{high:g}; the last latency_weight was {self._module().latency_weight:.3g}"
            )
            _logger.warning(note)
            self.notes.append(note)

    def _latency_term(
        self,
        parameters: ArchitectureParameters,
        choices: Mapping[str, Sequence[Any]],
        groups: Mapping[str, Sequence[str]],
    ) -> DecoupledLatency:
        constants = {
            label: weight.detach() for label, weight in parameters.weights().items() if label not in parameters.logits
        }
        return DecoupledLatency(
            self.profiler.expectation,
            groups=parameters.groups,
            constants=constants,
            sizes={label: len(values) for label, values in choices.items()},
            coefficients=self.latency_coefficients,
        )


@strategies.register("co_search")
class CoSearch(LatencyRegularisedSearch):
    """Search a teacher and a student together over one set of weights (thesis 4.3.4)."""

    architectures = ("teacher", "student")


@strategies.register("latency_darts")
class LatencyDarts(LatencyRegularisedSearch):
    """Search one network by DARTS with decoupled, differentiable latency (thesis 4.3.2-4.3.3)."""

    architectures = ("student",)


def require_gradients(supernet: Any) -> None:
    """Make sure that the loss can tell the values of every numeric choice apart.

    Raises:
        ArchitectureError: No layer reads what a choice sets.
    """
    policies = [getattr(module, "sampling_policy", None) for module in supernet.modules()]
    sliced = [policy for policy in policies if isinstance(policy, SlotPolicy)]
    lost = {label for policy in sliced for label in policy.labels} - {
        label for policy in sliced for label in policy.carried
    }
    if lost:
        raise ArchitectureError(
            f"choice '{min(lost)}' gets no gradient: no layer with in_channels, in_features, kdim or vdim of that "
            "choice reads what it sets; fix its value, or choose among layers with LayerChoice"
        )


def _argmax_choice(space: Any, label: str, weight: Any) -> Any:
    mutable = space.simplify()[label]
    value = list(mutable.values)[int(weight.argmax())]
    return [value] if type(mutable).__name__ == "CategoricalMultiple" else value
