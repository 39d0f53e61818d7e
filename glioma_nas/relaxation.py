"""What a one-shot strategy sets before each pass through a supernet, and the modules that read it.

A strategy owns the architecture parameters; the supernet owns the weights. Between them stands a `RelaxationSlot`: the
strategy puts a `Relaxation` into it (soft operator and input weights, a sampled width for every node), runs the
supernet, and can put another one, the teacher's instead of the student's, before the next pass over the same weights.

Reference: Liu et al., DARTS, ICLR 2019 (weighted sums); Chen et al., FasterSeg, ICLR 2020 (two architectures over one
supernet, straight-through width sampling).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import islice, pairwise
from typing import Any

import nni.nas.strategy  # noqa: F401  # first: nni.nas.oneshot before it leaves NNI's one-shot strategies unusable
import torch
from nni.mutable import Mutable
from nni.nas.nn.pytorch import InputChoice, LayerChoice, MutableModule
from nni.nas.oneshot.pytorch.supermodule._expression_utils import traverse_all_options
from nni.nas.oneshot.pytorch.supermodule.base import BaseSuperNetModule
from nni.nas.oneshot.pytorch.supermodule.operation import NATIVE_MIXED_OPERATIONS, MixedOperationSamplingPolicy
from torch import Tensor, nn

from glioma_nas.errors import ArchitectureError


@dataclass(frozen=True)
class Relaxation:
    """The choices of one pass.

    Attributes:
        architecture: Whose pass it is, for example ``student``; a space with a stem and heads per architecture picks
            them by this name.
        weights: Mutable label → weights over the choice's values in their order, shape (n,), float32, non-negative, sum
            1. One-hot weights select; soft weights mix and carry gradient to the architecture parameters.
        values: Label → value used in this pass, for mutables inside layer arguments (widths).
        gates: Label → straight-through one-hot of the value used, shape (n,): its gradient reaches the width
            parameters, see `channel_mask`. Labels without a gate are constants in this pass.
        auxiliary_skip: Weight of a skip connection without parameters beside every mixture of operators; 0 for none.
    """

    architecture: str
    weights: Mapping[str, Tensor]
    values: Mapping[str, Any]
    gates: Mapping[str, Tensor] = field(default_factory=dict)
    auxiliary_skip: float = 0.0

    @cached_property
    def shares(self) -> dict[str, list[float]]:
        """Label → weights as plain numbers, all read from the device at once: a pass asks at every cell."""
        numbers = {}
        for device in {weight.device for weight in self.weights.values()}:
            weights = [weight.detach().flatten() for weight in self.weights.values() if weight.device == device]
            numbers[device] = iter(torch.cat(weights).tolist())
        return {label: list(islice(numbers[weight.device], weight.numel())) for label, weight in self.weights.items()}


class RelaxationSlot:
    """Holds the relaxation that is active now; shared by all modules of one supernet and by its strategy."""

    def __init__(self) -> None:
        self._current: Relaxation | None = None

    @property
    def current(self) -> Relaxation:
        """The active relaxation.

        Raises:
            RuntimeError: None is active: the supernet was called outside `using`.
        """
        if self._current is None:
            raise RuntimeError(
                "the supernet was called without a relaxation; wrap the call in RelaxationSlot.using(...)"
            )
        return self._current

    @contextmanager
    def using(self, relaxation: Relaxation) -> Iterator[None]:
        """Make ``relaxation`` the active one inside the block."""
        before, self._current = self._current, relaxation
        try:
            yield
        finally:
            self._current = before

    def __deepcopy__(self, memo: dict[int, Any]) -> RelaxationSlot:
        # A copy of a supernet (frozen weights for a candidate, an average) must not listen to the original's strategy.
        copied = RelaxationSlot()
        memo[id(self)] = copied
        return copied


class _WeightedSum(torch.autograd.Function):
    # One buffer instead of a product and a sum for every term: mixing five operators moves a third of the memory.
    @staticmethod
    def forward(ctx: Any, *weights_and_values: Tensor) -> Tensor:
        half = len(weights_and_values) // 2
        weights, values = weights_and_values[:half], weights_and_values[half:]
        if any(ctx.needs_input_grad[:half]):
            ctx.save_for_backward(*weights_and_values)
        else:
            ctx.save_for_backward(*weights)
        total = values[0] * weights[0]
        for weight, value in zip(weights[1:], values[1:], strict=True):
            total.addcmul_(value, weight)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        half = len(ctx.needs_input_grad) // 2
        needed, saved = ctx.needs_input_grad, ctx.saved_tensors
        weights = saved[:half]
        to_weights = [
            torch.mul(gradient, saved[half + i]).sum().to(weights[i].dtype) if needed[i] else None for i in range(half)
        ]
        to_values = [gradient * weights[i] if needed[half + i] else None for i in range(half)]
        return (*to_weights, *to_values)


def weighted_sum(weights: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    """Return Σ_k w_k·v_k, differentiable once in both.

    Args:
        weights: Scalars.
        values: Tensors of one shape.
    """
    total: Tensor = _WeightedSum.apply(*weights, *values)
    return total


def channel_mask(gate: Tensor, channels: Sequence[int]) -> Tensor:
    """Return a mask over the widest choice's channels: 1 for those that the gate's width has, 0 for the others.

    Channel c carries Σ of the gates of all widths that have it. With the straight-through one-hot of a sample, what
    passes is the sampled width's, and every width's gate gets the gradient of its own channels, those that were turned
    off included. One factor 1 for all channels of a sampled width would carry none: batch norm undoes what scales
    a whole tensor.

    Args:
        gate: Straight-through one-hot over the widths, shape (n,).
        channels: Channels of each width, increasing.

    Returns:
        Shape (channels[-1],).

    Reference: Wan et al., FBNetV2, CVPR 2020, sec. 3.2 (channel masks).
    """
    from_width_on = gate.flip(0).cumsum(0).flip(0)
    blocks = torch.tensor([channels[0], *(wide - narrow for narrow, wide in pairwise(channels))], device=gate.device)
    return from_width_on.repeat_interleave(blocks, output_size=channels[-1])


def add_auxiliary_skip(mixture: Any, x: Any, weight: float) -> Any:
    """Return ``mixture + weight·x``, with ``x`` brought to the mixture's shape without any parameter.

    Where sizes shrink, ``x`` is averaged; channels that ``x`` lacks are zero, and those it has too many are left out
    (He et al., Deep Residual Learning, CVPR 2016, shortcut A). What no such skip fits, such as an output larger than
    the input or not an image, is returned as it is.

    Args:
        mixture: Mixed outputs of the candidates, (N, C', H', W') when a skip fits.
        x: Their input, (N, C, H, W).
        weight: Weight of the skip.
    """
    if weight == 0 or not isinstance(x, Tensor) or not isinstance(mixture, Tensor):
        return mixture
    if x.dim() != 4 or mixture.dim() != 4 or any(a < b for a, b in zip(x.shape[2:], mixture.shape[2:], strict=True)):
        return mixture
    if x.shape[2:] != mixture.shape[2:]:
        x = nn.functional.adaptive_avg_pool2d(x, (mixture.shape[2], mixture.shape[3]))
    shared = min(x.shape[1], mixture.shape[1])
    if shared == mixture.shape[1]:
        return torch.add(mixture, x[:, :shared], alpha=weight)
    return torch.cat([torch.add(mixture[:, :shared], x, alpha=weight), mixture[:, shared:]], dim=1)


class RelaxedLayer(LayerChoice, BaseSuperNetModule):
    """A `LayerChoice` in a supernet: Σ_k w_k·O_k(x) with the active weights of its label (METHOD eq. 4-4, 4-5).

    Candidates whose weight is a constant zero are not run, so a one-hot relaxation costs one operator.
    """

    def __init__(self, source: LayerChoice, slot: RelaxationSlot) -> None:
        super().__init__(source.candidates, label=source.label)
        self.slot = slot

    def forward(self, x: Any) -> Any:
        """Mix the candidates' outputs; ``x`` is whatever one candidate takes."""
        weights = self.slot.current.weights[self.label]
        skip = self.slot.current.auxiliary_skip
        if weights.requires_grad:
            mixture: Any = weighted_sum(weights.unbind(), [self[name](x) for name in self.names])
            return add_auxiliary_skip(mixture, x, skip)
        shares = self.slot.current.shares[self.label]
        chosen = [index for index, share in enumerate(shares) if share != 0.0]
        if len(chosen) == 1 and shares[chosen[0]] == 1.0:
            return self[self.names[chosen[0]]](x)
        mixture = weighted_sum([weights[index] for index in chosen], [self[self.names[index]](x) for index in chosen])
        return add_auxiliary_skip(mixture, x, skip)

    def resample(self, memo: dict[str, Any]) -> dict[str, Any]:
        """Draw nothing: the strategy draws."""
        return {}

    def export(self, memo: dict[str, Any]) -> dict[str, Any]:
        """Export nothing: the strategy decodes."""
        return {}

    def export_probs(self, memo: dict[str, Any]) -> dict[str, Any]:
        """Export nothing: the strategy keeps the history."""
        return {}


class RelaxedInput(InputChoice, BaseSuperNetModule):
    """An `InputChoice` in a supernet: Σ_i w_i·x_i with the active weights of its label (METHOD eq. 4-3)."""

    def __init__(self, source: InputChoice, slot: RelaxationSlot) -> None:
        super().__init__(source.n_candidates, n_chosen=1, reduction=source.reduction, label=source.label)
        self.slot = slot

    def forward(self, candidate_inputs: list[Tensor]) -> Tensor:
        """Mix the inputs, all of one shape."""
        weights = self.slot.current.weights[self.label]
        shares = self.slot.current.shares[self.label]
        if not weights.requires_grad and max(shares) == 1.0:
            return candidate_inputs[shares.index(1.0)]
        return weighted_sum(weights.unbind(), candidate_inputs)

    resample = RelaxedLayer.resample
    export = RelaxedLayer.export
    export_probs = RelaxedLayer.export_probs


class SlotPolicy(MixedOperationSamplingPolicy):
    """Give NNI's sliced layers the values of the active relaxation, and their weights the gradient of its gates.

    Where a choice has a gate, layers run at their widest and what *reads* channels, or holds a kernel, masks its
    weights: NNI sums the slices of all values, weighted by the straight-through one-hot. What passes is the chosen
    value's, and every value's gate gets the gradient of its own slice. One factor 1 at a layer's output would carry
    none where batch norm follows, and masks at both ends of a channel would hide from each end what the other turned
    off.

    Args:
        slot: Where the relaxation stands.
        operation: The sliced layer.
        memo: Not used.
        mutate_kwargs: Not used.

    Raises:
        ArchitectureError: An argument is chosen that a supernet cannot mix so.

    Reference:
        Wan et al., FBNetV2, CVPR 2020, sec. 3.2 (channels); Stamoulis et al., Single-Path NAS, ECML 2019 (kernels).
    """

    _MASKED = ("in_channels", "in_features", "kernel_size", "kdim", "vdim")
    _WIDEST = ("out_channels", "out_features", "num_features", "groups", "padding")

    def __init__(self, slot: RelaxationSlot, operation: Any, memo: Any, mutate_kwargs: Any) -> None:
        arguments = operation.mutable_arguments
        self._slot = slot
        self._labels = {name: list(item.simplify()) for name, item in arguments.items()}
        self.labels = {label for labels in self._labels.values() for label in labels}
        obstacle = self._obstacle(operation, arguments)
        if obstacle:
            raise ArchitectureError(
                f"{', '.join(sorted(self.labels))}: a {operation.bound_type.__name__} whose {obstacle} cannot be "
                "searched by gradient; fix the value, or choose among layers with LayerChoice"
            )
        # The channels of grouped convolutions have no common weights to mask: their neighbours carry the gradient.
        grouped = {"in_channels"} if "groups" in arguments else set()
        self._masked = {name for name in arguments if name in self._MASKED} - grouped
        self._widest = {name: max(traverse_all_options(item)) for name, item in arguments.items()}
        self.carried = {label for name in self._masked for label in self._labels[name]}

    def forward_argument(self, operation: Any, name: str) -> Any:
        """Return the active value of one argument, or value → weight; called by NNI in every pass."""
        if name not in operation.mutable_arguments:
            return operation.init_arguments[name]
        current, chosen = self._slot.current, operation.mutable_arguments[name]
        if not any(label in current.gates for label in self._labels[name]):
            return chosen.freeze(dict(current.values))
        if name not in self._masked:
            return self._widest[name]
        weights = {
            label: current.gates[label]
            if label in current.gates
            else [float(value == current.values[label]) for value in mutable.values]
            for label, mutable in chosen.simplify().items()
        }
        return dict(traverse_all_options(chosen, weights=weights))

    def _obstacle(self, operation: Any, arguments: Mapping[str, Any]) -> str | None:
        for name in arguments:
            if name not in (*self._MASKED, *self._WIDEST):
                return f"{name} is chosen"
        if "padding" in arguments and "kernel_size" not in arguments:
            return "padding is chosen and kernel_size is not"
        if "groups" in arguments and not _in_proportion(arguments):
            return "groups are chosen out of proportion to in_channels and out_channels"
        if "groups" not in arguments and "in_channels" in arguments and operation.init_arguments["groups"] != 1:
            return "in_channels is chosen and groups are not"
        for name in ("kdim", "vdim"):
            if name in arguments and operation.init_arguments["embed_dim"] in traverse_all_options(arguments[name]):
                return f"{name} may equal its embed_dim (NNI 3.0 has no weights for that case)"
        if "kernel_size" in arguments and not _is_centred(operation):
            return "padding does not follow its kernel_size (padding=kernel_size // 2)"
        return None

    resample = RelaxedLayer.resample
    export = RelaxedLayer.export
    export_probs = RelaxedLayer.export_probs


def _in_proportion(arguments: Mapping[str, Any]) -> bool:
    """Whether the channels of each group of a convolution are always the same."""
    if not {"in_channels", "out_channels"} <= set(arguments):
        return False
    ratios = [arguments[name] / arguments["groups"] for name in ("in_channels", "out_channels")]
    return all(len(traverse_all_options(ratio)) == 1 for ratio in ratios)


def _is_centred(operation: Any) -> bool:
    """Whether every kernel of a convolution reads what the middle of the largest one reads."""
    kernel = operation.mutable_arguments["kernel_size"]
    padding = operation.mutable_arguments.get("padding", operation.init_arguments["padding"])
    dilation = _side(operation.init_arguments["dilation"])
    sample: dict[str, Any] = {}
    margins = set()
    for size in kernel.grid(memo=sample):
        if isinstance(padding, Mutable) and not set(padding.simplify()) <= set(sample):
            return False
        pad = _side(padding.freeze(sample) if isinstance(padding, Mutable) else padding)
        side = _side(size)
        if side is None or pad is None or dilation is None:
            return False
        margins.add(dilation * (side - 1) - 2 * pad)
    return len(margins) == 1


def _side(value: Any) -> int | None:
    """Return a number, or that of equal ones for rows and columns; none for anything else."""
    values = set(value) if isinstance(value, tuple) else {value}
    only = values.pop() if len(values) == 1 else None
    return only if isinstance(only, int) else None


def relaxation_hooks(slot: RelaxationSlot) -> list[Any]:
    """Return NNI mutation hooks that turn every choice into its relaxed form over ``slot``.

    These are layer choices, input choices of one input, and numeric choices in the arguments of NNI's mutable layers
    (``MutableConv2d`` …), whose weight NNI slices. A space that slices by itself brings hooks that come before.
    """

    def relax(module: nn.Module, name: str, memo: dict[str, Any], mutate_kwargs: dict[str, Any]) -> Any:
        if type(module) is LayerChoice:
            return RelaxedLayer(module, slot), True
        if type(module) is InputChoice:
            if module.n_chosen != 1:
                raise ArchitectureError(
                    f"input choice '{module.label}' takes {module.n_chosen or 'any number of'} inputs; only choices of "
                    "exactly one input can be relaxed"
                )
            return RelaxedInput(module, slot), True
        return None

    def slice_weights(module: nn.Module, name: str, memo: dict[str, Any], mutate_kwargs: dict[str, Any]) -> Any:
        if not isinstance(module, MutableModule) or not module.mutables:
            return None
        arguments = {**mutate_kwargs, "mixed_op_sampling": partial(SlotPolicy, slot)}
        for operation in NATIVE_MIXED_OPERATIONS:
            sliced = operation.mutate(module, name, memo, arguments)
            if sliced is not None:
                return sliced, True
        return None

    return [relax, slice_weights]
