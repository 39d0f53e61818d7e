"""NASBraNet: cells on a grid of scales and layers, each with its own operator and width, merged from several branches.

As an NNI model space it works with NNI's own one-shot and multi-trial strategies. For a one-shot strategy of ours
(one that has a `RelaxationSlot`) `NASBraNet.extra_oneshot_hooks` turns it into a supernet of super-kernels over which
several architectures, such as student and teacher, are searched together, each with a stem and heads of its own.

Reference: METHOD §2-§4, eq. 4-3 to 4-5; Liu et al., Auto-DeepLab, CVPR 2019; Chen et al., FasterSeg, ICLR 2020.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from nni.mutable import Categorical, LabeledMutable, SampleValidationError
from nni.nas.nn.pytorch import LayerChoice, ModelSpace
from nni.nas.space import current_model, model_context
from rich.tree import Tree
from torch import Tensor, nn

from glioma_nas.architecture import Architecture
from glioma_nas.costs import OperatorSpec
from glioma_nas.errors import ArchitectureError
from glioma_nas.registry import search_spaces
from glioma_nas.search_spaces.cost_model import CostModel, operator_specs
from glioma_nas.search_spaces.decoder import decode, rank
from glioma_nas.search_spaces.derived_network import DerivedNetwork, check_input
from glioma_nas.search_spaces.drawing import describe, draw
from glioma_nas.search_spaces.fixed_parts import FixedParts
from glioma_nas.search_spaces.heads import AuxiliaryHeads, FusionHead, Stem
from glioma_nas.search_spaces.layout import BRANCHES_LABEL, FROM_FINER, FROM_SAME, Cell, Layout
from glioma_nas.search_spaces.network_figures import (
    ArchitectureFigures,
    OperatorFigures,
    architecture_figures,
    operator_figures,
)
from glioma_nas.search_spaces.operators import is_skip
from glioma_nas.search_spaces.parameter_arrays import weights_from_arrays
from glioma_nas.search_spaces.plan import NetworkPlan, make_plan
from glioma_nas.search_spaces.raster_drawing import draw_png
from glioma_nas.search_spaces.search_memory import SearchMemory, estimate_search_memory
from glioma_nas.search_spaces.super_kernel import ActiveWidths, MutationHook, inherit_weights, super_kernel_hook
from glioma_nas.search_spaces.supernet import (
    EveryHead,
    InputIndex,
    PerArchitecture,
    SearchCell,
    needed_strides,
    owner_of,
)
from glioma_nas.search_spaces.text_tree import architecture_tree

SPACE_NAME = "nasbranet"


@search_spaces.register(SPACE_NAME)
class NASBraNet(FixedParts, ModelSpace):
    """Multi-resolution, multi-branch segmentation space: operators, downsampling positions, widths and branches.

    Args:
        preset: ``thesis``, ``fasterseg``, ``small`` or ``tiny``; fills in every option that is not given.
        n_layers: L.
        scales: Absolute downsampling rates, powers of two, each twice the one before.
        widths: χ values; a node at scale s has χ·s channels.
        end_widths: χ of the stem's output and of the last layer's outputs: one, or two for student and teacher.
        n_branches: How many of the final scales the head merges.
        operators: Registered operator names.
        stem: ``light``, ``two`` or ``fasterseg``.
        merge: ``input``: a node's inputs are summed before its operator (eq. 4-3); ``output``: the operator runs on
            each and the outputs are summed, at twice the cost (FasterSeg's code).
        pairs: ``all`` sets of ``n_branches`` scales, or the names of some, such as ``["2_4", "2_8"]``.
        skip_policy: What becomes of stride-1 skips in the derived network: ``remove`` or ``conv`` (1×1 convolutions).
        in_channels: Sequences.
        n_classes: Channels of the logits.
        image_size_px: Side of the input, divisible by twice the largest scale.
        head_channels: Channels inside stem-independent heads.

    Raises:
        ArchitectureError: An option is not allowed.
        UnknownNameError: An operator is not registered.
    """

    def __init__(
        self,
        preset: str = "thesis",
        *,
        n_layers: int | None = None,
        scales: Sequence[int] | None = None,
        widths: Sequence[int] | None = None,
        end_widths: Sequence[int] | None = None,
        n_branches: int | None = None,
        operators: Sequence[str] | None = None,
        stem: str | None = None,
        merge: str | None = None,
        pairs: str | Sequence[str] | None = None,
        skip_policy: str | None = None,
        in_channels: int | None = None,
        n_classes: int | None = None,
        image_size_px: int | None = None,
        head_channels: int | None = None,
    ) -> None:
        super().__init__()
        self.layout = Layout.from_options(
            preset,
            n_layers=n_layers,
            scales=scales,
            widths=widths,
            end_widths=end_widths,
            n_branches=n_branches,
            operators=operators,
            stem=stem,
            merge=merge,
            pairs=pairs,
            skip_policy=skip_policy,
            in_channels=in_channels,
            n_classes=n_classes,
            image_size_px=image_size_px,
            head_channels=head_channels,
        )
        self._skips = frozenset(name for name in self.layout.operators if is_skip(name))
        self._active: ActiveWidths | None = None
        self.network = None
        sample = current_model()
        if sample is not None:
            # NNI re-creates a space inside a model context to get one of its models.
            self.network = DerivedNetwork(self.plan(sample), self.layout)
            return
        self._mutables_by_label = {label: self._mutable(label) for label in self.layout.choices}
        ends = self._width(None)
        # Any: once the space is a supernet, these are what the hooks made of them.
        self.stem = self._make_stem(ends)
        self.cells: Any = nn.ModuleDict(
            {cell.name: SearchCell(self.layout, cell, self._width) for cell in self.layout.cells}
        )
        self.heads = LayerChoice(self._make_heads(ends), label=BRANCHES_LABEL)
        self.auxiliary = self._make_auxiliary(ends)

    # What NNI asks for ----------------------------------------------------------------------------------------------

    def leaf_mutables(self, is_leaf: Callable[[Any], bool]) -> Iterable[LabeledMutable]:
        """Yield every choice once, whether or not the space has been turned into a supernet."""
        for mutable in self._mutables_by_label.values():
            yield from mutable.leaf_mutables(is_leaf)

    def check_contains(self, sample: dict[str, Any]) -> SampleValidationError | None:
        """Say why a sample is not one of the space, or return nothing."""
        for label, mutable in self._mutables_by_label.items():
            problem = mutable.check_contains(sample)
            if problem is not None:
                problem.paths.append(label)
                return problem
        return None

    def freeze(self, sample: Mapping[str, Any]) -> DerivedNetwork:
        """Build the network of a sample, with new weights.

        Raises:
            ArchitectureError: A choice is missing, unknown or not allowed.
        """
        return DerivedNetwork(self.plan(sample), self.layout)

    def extra_oneshot_hooks(self, strategy: Any) -> list[MutationHook]:
        """Return the hooks of our supernet, for a strategy with ``relaxation_slot`` and ``architectures``; else none.

        NNI's strategies call this when they mutate the space; without hooks of ours, theirs apply.

        Raises:
            ArchitectureError: An architecture's end width is unknown.
        """
        slot = getattr(strategy, "relaxation_slot", None)
        if slot is None:
            return []
        fixed = self.fixed_choices
        active = ActiveWidths(slot, fixed, self.layout.widths)
        unknown = [name for name in strategy.architectures if name not in fixed and len(self.layout.end_widths) > 1]
        if unknown:
            raise ArchitectureError(
                f"architecture '{unknown[0]}' has no end width; allowed: {', '.join(fixed)}, or give one end width"
            )
        self._active = active
        ends = {name: self._end_width(name) for name in dict.fromkeys(strategy.architectures)}

        def per_architecture(module: nn.Module, name: str, memo: dict[str, Any], mutate_kwargs: dict[str, Any]) -> Any:
            make = {"stem": self._make_stem, "heads": self._every_head, "auxiliary": self._make_auxiliary}.get(name)
            if make is None:
                return None
            with model_context({}):
                return PerArchitecture({key: make(width) for key, width in ends.items()}, active), True

        return [per_architecture, super_kernel_hook(active)]

    def forward(self, x: Tensor) -> Tensor | dict[str, Tensor]:
        """Run the space: a dry run, NNI's supernet or ours.

        Args:
            x: Shape (N, C, H, W), float32.

        Returns:
            Logits (N, K, H, W); in our supernet a dict of them: ``pair_<scales>`` and, in training, ``scale_<s>``.
        """
        if self.network is not None:
            logits: Tensor | dict[str, Tensor] = self.network(x)
            return logits
        check_input(x, self.stem, self.layout.divisor)
        features = self._final_features(x)
        if self._active is None:
            # A dry run of NNI's LayerChoice takes one argument only.
            head = self.heads[self.heads.names[0]] if type(self.heads) is LayerChoice else self.heads
            logits = head(*features.values())
            return logits
        outputs: dict[str, Tensor] = self.heads(features)
        if self.training:
            outputs |= self.auxiliary(features)
        return outputs

    def _final_features(self, x: Tensor) -> dict[int, Tensor]:
        layout = self.layout
        needed = {cell: {1, 2} for cell in layout.cells}
        if self._active is not None:
            needed = needed_strides(layout, self._active.slot.current)
        keep: dict[Cell, Tensor | None] = {}
        down: dict[Cell, Tensor | None] = {}
        if self._active is not None:
            x = x.contiguous(memory_format=torch.channels_last)  # as the super-kernels are
        stem = self.stem(x)
        for cell in layout.cells:
            sources = layout.inputs(cell)
            # Popped, so that memory holds the features of two layers and not of all.
            finer = down.pop(sources[FROM_FINER]) if FROM_FINER in sources else None
            same = keep.pop(sources[FROM_SAME]) if FROM_SAME in sources else None
            mask = None if self._active is None else self._active.mask(f"width_{cell.name}", cell.scale)
            keep[cell], down[cell] = self.cells[cell.name](finer, same if sources else stem, mask, needed[cell])
        return {scale: output for scale in layout.scales if (output := keep[Cell(scale, layout.n_layers)]) is not None}

    # What the rest of the project asks for --------------------------------------------------------------------------

    @property
    def fixed_choices(self) -> dict[str, dict[str, int]]:
        """Architecture name → label → value that it never searches (`Layout.fixed_choices`)."""
        return self.layout.fixed_choices

    def variable_groups(self) -> dict[str, list[str]]:
        """Return the searchable labels by kind: ``operator``, ``scale``, ``width``."""
        return self.layout.variable_groups()

    def plan(self, sample: Mapping[str, Any] | Architecture) -> NetworkPlan:
        """Read a sample or a record of this space; see `make_plan`.

        Raises:
            ArchitectureError: It is of another space, or a choice is missing, unknown or not allowed.
        """
        return make_plan(self.layout, self._sample(sample), self._skips)

    def architecture(self, sample: Mapping[str, Any]) -> Architecture:
        """Record a sample together with every option of the space.

        Raises:
            ArchitectureError: A choice is missing, unknown or not allowed.
        """
        self.layout.check_sample(sample)
        return Architecture(SPACE_NAME, self.layout.options(), dict(sample))

    def decode(
        self,
        weights: Mapping[str, Any],
        *,
        architecture: str = "student",
        branches: str | None = None,
        method: str = "joint",
        down_skips: str = "keep",
    ) -> Architecture:
        """Turn the weights of a relaxed search into one architecture; see `decode` in the decoder module.

        Args:
            weights: Label → probabilities in the order of the choice's values, shape (n,).
            architecture: ``student`` or ``teacher`` (widest, no skips).
            branches: Which set of branches, such as ``2_4``; none: the most probable of ``weights["branches"]``.
            method: ``joint``, ``viterbi`` or ``fasterseg``.
            down_skips: ``keep`` the strided skip where a branch goes down through one, or the ``next_best`` operator.

        Raises:
            ArchitectureError: A label is missing or no probability; an argument is not allowed.
        """
        sample = decode(
            self.layout,
            weights,
            skips=self._skips,
            architecture=architecture,
            branches=branches,
            method=method,
            down_skips=down_skips,
        )
        return self.architecture(sample)

    def decode_best(self, weights: Mapping[str, Any], n: int, **choices: Any) -> list[tuple[Architecture, float]]:
        """Decode the ``n`` best architectures with their log scores, best first; see `rank` in the decoder module.

        Args:
            weights: As in `decode`.
            n: How many.
            choices: ``architecture``, ``branches``, ``method``, ``down_skips``, as in `decode`.
        """
        found = rank(self.layout, weights, n, skips=self._skips, **choices)
        return [(self.architecture(item.sample), item.log_score) for item in found]

    def decode_arrays(
        self, alpha: Any, beta: Any, gamma: Any = None, *, branches: str, logits: bool = True, **choices: Any
    ) -> Architecture:
        """Decode the parameters of a search that was run elsewhere; see `weights_from_arrays` for the exact shapes.

        Args:
            alpha: Operators, shape (scales, layers, operators).
            beta: Inputs, shape (scales, layers, 2): finer, same.
            gamma: Widths, shape (scales, layers, widths); the teacher needs none.
            branches: As in `decode`, like ``choices``.
            logits: Whether a softmax is to be applied.
            choices: ``architecture``, ``method``, ``down_skips``.

        Raises:
            ArchitectureError: A shape or a number does not fit; else as in `decode`.
        """
        weights = weights_from_arrays(self.layout, alpha, beta, gamma, logits=logits)
        return self.decode(weights, branches=branches, **choices)

    def derive(self, architecture: Architecture | Mapping[str, Any], *, inherit: bool | str = False) -> DerivedNetwork:
        """Build the network of an architecture.

        Args:
            architecture: Record or sample of this space.
            inherit: Copy the weights of this supernet; a name says whose stem and heads, ``True`` takes those of the
                architecture with the same end width.

        Raises:
            ArchitectureError: Not of this space, or there is no supernet to inherit from.
        """
        network = DerivedNetwork(self.plan(architecture), self.layout)
        if inherit:
            self._inherit(network, inherit)
        return network

    def cost_model(
        self, cost: Callable[[OperatorSpec], float], *, architecture: str = "student", fixed_parts: bool = False
    ) -> CostModel:
        """Price networks of this space, and its relaxations, by the sum over their operators; see `CostModel`."""
        fixed = self.fixed_choices.get(architecture, {})
        return CostModel(self.layout, cost, self.plan, self._skips, fixed, fixed_parts=fixed_parts)

    def operator_specs(self) -> list[OperatorSpec]:
        """Return every operator that a network of this space can contain, once each."""
        return operator_specs(self.layout)

    def figures(self, architecture: Architecture | Mapping[str, Any]) -> ArchitectureFigures:
        """Count an architecture's MACs, parameters, activation memory and receptive field, without running it."""
        return architecture_figures(self.layout, self.plan(architecture))

    def operator_figures(self) -> dict[OperatorSpec, OperatorFigures]:
        """Count every operator that a network of this space can contain, without running it."""
        return {spec: operator_figures(spec) for spec in self.operator_specs()}

    def search_memory(self, batch_size: int, *, architectures: Sequence[str] = ("teacher", "student")) -> SearchMemory:
        """Estimate the memory of one search step before it starts; its ``require`` refuses what does not fit."""
        return estimate_search_memory(
            lambda: NASBraNet(**self.layout.options()),
            self.layout,
            batch_size=batch_size,
            architectures=architectures,
        )

    def counts(self) -> dict[str, int]:
        """Count cells, input choices, paths and networks; see `Layout.counts`."""
        return self.layout.counts()

    def draw(self, architecture: Architecture | Mapping[str, Any]) -> str:
        """Draw an architecture as SVG text; see `draw` in the drawing module."""
        return draw(self.layout, self.plan(architecture))

    def draw_png(self, architecture: Architecture | Mapping[str, Any], *, dpi: int = 120) -> bytes:
        """Draw an architecture as a PNG file; see `draw_png` in the raster drawing module."""
        return draw_png(self.layout, self.plan(architecture), dpi=dpi)

    def tree(self, architecture: Architecture | Mapping[str, Any]) -> Tree:
        """Show an architecture as a tree for the terminal; see `architecture_tree`."""
        return architecture_tree(self.layout, self.plan(architecture))

    def describe(self, architecture: Architecture | Mapping[str, Any]) -> list[dict[str, Any]]:
        """List an architecture's cells branch by branch; see `describe` in the drawing module."""
        return describe(self.plan(architecture))

    # Building blocks ------------------------------------------------------------------------------------------------

    def _mutable(self, label: str) -> LabeledMutable:
        values = self.layout.choices[label]
        if label.startswith("in_"):
            return InputIndex(values, n_chosen=1, label=label)
        return Categorical(values, label=label)

    def _width(self, node: Cell | None) -> Any:
        label = self.layout.width_label(node)
        return self._mutables_by_label[label] if label else self.layout.width_values(node)[0]

    def _make_stem(self, ends: Any) -> nn.Module:
        finest = self.layout.scales[0]
        return Stem(self.layout.stem, self.layout.in_channels, ends * finest, finest)

    def _make_heads(self, ends: Any) -> dict[str, nn.Module]:
        channels, n_classes, given = self.layout.head_channels, self.layout.n_classes, self.layout.scales
        return {
            name: FusionHead(s, ends, channels, n_classes, given=given) for name, s in self.layout.branch_sets.items()
        }

    def _every_head(self, ends: Any) -> nn.Module:
        return EveryHead(self._make_heads(ends))

    def _make_auxiliary(self, ends: Any) -> nn.Module:
        return AuxiliaryHeads(self.layout.scales, ends, self.layout.head_channels, self.layout.n_classes)

    def _sample(self, sample: Mapping[str, Any] | Architecture) -> dict[str, Any]:
        if not isinstance(sample, Architecture):
            return dict(sample) if isinstance(sample, Mapping) else sample  # `check_sample` says what is expected
        if sample.space != SPACE_NAME:
            raise ArchitectureError(f"architecture {sample.id} is of space '{sample.space}', not '{SPACE_NAME}'")
        given, own = sample.space_options(), self.layout.options()
        different = sorted(name for name in own if given.get(name) != own[name])
        if different:
            raise ArchitectureError(
                f"architecture {sample.id} was made with {different[0]}={given.get(different[0])!r}, this space has "
                f"{own[different[0]]!r}; build the space with the record's own options"
            )
        return sample.sample()

    def _inherit(self, network: DerivedNetwork, whose: bool | str) -> None:
        if self._active is None:
            raise ArchitectureError("only a supernet made by a one-shot strategy has weights to inherit")
        ends = {name: self._end_width(name) for name in self.stem.copies}
        owner = owner_of(ends, network.plan.end_width, whose)
        inherit_weights(network.stem, self.stem.copies[owner])
        inherit_weights(network.head, self.heads.copies[owner].heads[network.plan.branch_set])
        for scale, head in network.auxiliary.heads.items():
            inherit_weights(head, self.auxiliary.copies[owner].heads[scale])
        for step in network.plan.steps:
            cell = self.cells[step.cell.name]
            inherit_weights(network.cells[step.name], (cell.down if step.stride == 2 else cell.keep)[step.operator])

    def _end_width(self, name: str) -> int:
        return self.layout.end_widths[-1 if name == "teacher" else 0]
