"""Layers that hold every width of a search space in one weight, for the supernet of our own one-shot strategies.

A super-kernel is one convolution weight of the maximal size; a pass with a smaller width uses the slice ``W[:out,
:in]`` and its gradient reaches only that slice. Batch norm is switchable: statistics and affine parameters of their
own for every width, because features of different widths have different distributions.

Reference: Yu et al., Slimmable Neural Networks, ICLR 2019 (switchable batch norm), https://arxiv.org/abs/1812.08928;
Chen et al., FasterSeg, ICLR 2020 (searchable superkernel).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import nni.nas.strategy  # noqa: F401  # first: nni.nas.oneshot before it leaves NNI's one-shot strategies unusable
import torch
import torch.nn.functional as F
from nni.mutable import MutableExpression
from nni.nas.nn.pytorch import MutableBatchNorm2d, MutableConv2d
from nni.nas.oneshot.pytorch.supermodule.base import BaseSuperNetModule
from torch import Tensor, nn

from glioma_nas.errors import ArchitectureError
from glioma_nas.relaxation import RelaxationSlot, channel_mask

MutationHook = Callable[[nn.Module, str, dict[str, Any], dict[str, Any]], Any]


class SilentSuperNetModule(BaseSuperNetModule):
    """A supernet module that neither draws nor exports: the strategy does both."""

    def resample(self, memo: dict[str, Any]) -> dict[str, Any]:
        """Draw nothing."""
        return {}

    def export(self, memo: dict[str, Any]) -> dict[str, Any]:
        """Export nothing."""
        return {}

    def export_probs(self, memo: dict[str, Any]) -> dict[str, Any]:
        """Export nothing."""
        return {}


class ActiveWidths:
    """Answer which width a label has in the pass that runs now.

    Where the choice itself has a gradient (its gate), the widest one runs and a mask turns off what the sampled width
    has not: without the channels of the other widths there would be nothing to compare.

    Args:
        slot: Where the strategy puts its choices.
        fixed: Architecture name → label → value that is never searched.
        widths: Values of every choice that has a gate, increasing.
    """

    def __init__(self, slot: RelaxationSlot, fixed: Mapping[str, Mapping[str, int]], widths: Sequence[int]) -> None:
        self.slot = slot
        self._fixed = fixed
        self._widths = tuple(widths)

    def __call__(self, label: str) -> Any:
        """Return the active value of ``label``; a fixed choice of the architecture comes before the strategy's.

        Raises:
            ArchitectureError: Neither fixes it.
        """
        current = self.slot.current
        fixed = self._fixed.get(current.architecture, {})
        if label in fixed:
            return fixed[label]
        if label not in current.values:
            raise ArchitectureError(
                f"the relaxation of '{current.architecture}' gives no value for '{label}'; put one into its `values`"
            )
        if label in current.gates:
            return self._widths[-1]
        return current.values[label]

    def mask(self, label: str, unit: int) -> Tensor | None:
        """Return the mask over a node's ``unit``·width channels, see `channel_mask`; none without a gate."""
        gate = self.slot.current.gates.get(label)
        return None if gate is None else channel_mask(gate, [width * unit for width in self._widths])


class ChannelRule:
    """A channel expression, evaluated once for every combination of its widths (a pass asks well over a thousand
    times).

    Args:
        expression: NNI expression over width choices.
        active: Widths of the pass that runs now.
    """

    def __init__(self, expression: MutableExpression[int], active: ActiveWidths) -> None:
        self._expression = expression
        self._labels = tuple(expression.simplify())
        self._active = active
        self._known: dict[tuple[Any, ...], int] = {}

    def __call__(self) -> int:
        """Return the active number of channels."""
        key = tuple(self._active(label) for label in self._labels)
        if key not in self._known:
            self._known[key] = int(self._expression.freeze(dict(zip(self._labels, key, strict=True))))
        return self._known[key]


def channel_values(channels: Any) -> list[int]:
    """Return every value a number of channels can take, increasing."""
    return sorted({int(value) for value in channels.grid()}) if isinstance(channels, MutableExpression) else [channels]


class SlicedConv2d(SilentSuperNetModule, nn.Conv2d):
    """A convolution whose weight is sliced to the active widths.

    Output channels (and groups) follow their expressions; input channels follow the input, which is what the layer
    before was sliced to. With a fixed number of groups each group is sliced by itself, so that its kernels stay its own
    at every width; with as many groups as channels (depthwise) the first groups are used.
    """

    def __init__(self, arguments: Mapping[str, Any], active: ActiveWidths) -> None:
        mutable = {name: value for name, value in arguments.items() if isinstance(value, MutableExpression)}
        unsupported = sorted(set(mutable) - {"in_channels", "out_channels", "groups"})
        if unsupported:
            raise ArchitectureError(
                f"a convolution has a choice in {', '.join(unsupported)}; super-kernels slice in_channels, "
                "out_channels and groups only: offer each other value as an operator of its own"
            )
        sizes = {name: channel_values(value)[-1] for name, value in mutable.items()}
        if "groups" in mutable:
            sizes["groups"] = _max_groups(arguments)
        self._check_groups(arguments, mutable)
        super().__init__(**{**arguments, **sizes})
        # Channels last: a slice of the channels stays a layout that convolutions take without copying, and on CPU and
        # GPU alike they run faster in it. What flows through the supernet follows the weights.
        self.weight.data = self.weight.data.contiguous(memory_format=torch.channels_last)
        self._rules = {name: ChannelRule(value, active) for name, value in mutable.items() if name != "in_channels"}

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C_in, H, W) to (N, C_out, H', W') with the active C_out."""
        out = self._rules["out_channels"]() if "out_channels" in self._rules else self.out_channels
        groups = self._rules["groups"]() if "groups" in self._rules else self.groups
        weight, bias = self.sliced(x.shape[1], out, groups)
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            return F.conv2d(x, weight, bias, self.stride, 0, self.dilation, groups)
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, groups)

    @staticmethod
    def _check_groups(arguments: Mapping[str, Any], mutable: Mapping[str, Any]) -> None:
        groups = arguments.get("groups", 1)
        if "groups" in mutable or groups == 1:
            return
        for name in ("in_channels", "out_channels"):
            odd = [value for value in channel_values(arguments[name]) if value % groups]
            if odd:
                raise ArchitectureError(
                    f"a convolution in {groups} groups cannot have {odd[0]} {name}; choose widths that are multiples "
                    f"of {groups}, or leave the operator out"
                )

    def sliced(self, in_channels: int, out_channels: int, groups: int) -> tuple[Tensor, Tensor | None]:
        """Return the part of weight (out, in/groups, kh, kw) and bias (out,) that a convolution of these sizes uses."""
        if (
            out_channels > self.out_channels
            or in_channels // groups > self.weight.shape[1]
            or out_channels % groups
            or in_channels % groups
        ):
            raise ArchitectureError(
                f"a super-kernel of {self.out_channels}x{self.in_channels} channels cannot be sliced to "
                f"{out_channels}x{in_channels} in {groups} group(s)"
            )
        if (out_channels, in_channels // groups) == tuple(self.weight.shape[:2]):
            return self.weight, self.bias  # the gradient of a slice would be written into zeros of the same size first
        return (
            self._first_of_each_group(self.weight, out_channels, groups)[:, : in_channels // groups],
            None if self.bias is None else self._first_of_each_group(self.bias, out_channels, groups),
        )

    def _first_of_each_group(self, tensor: Tensor, out_channels: int, groups: int) -> Tensor:
        if groups == 1 or "groups" in self._rules or out_channels == self.out_channels:
            return tensor[:out_channels]
        grouped: Tensor = tensor.unflatten(0, (groups, self.out_channels // groups))
        return grouped[:, : out_channels // groups].flatten(0, 1)


def _max_groups(arguments: Mapping[str, Any]) -> int:
    # The kernel's second axis is in_channels/groups: with a constant ratio (depthwise: 1) the largest groups fit the
    # largest channels.
    sizes = {
        (max(channel_values(arguments["in_channels"]))) // max(channel_values(arguments["groups"])),
        (min(channel_values(arguments["in_channels"]))) // min(channel_values(arguments["groups"])),
    }
    if len(sizes) != 1:
        raise ArchitectureError("a convolution's groups must be a constant fraction of its in_channels")
    return max(channel_values(arguments["groups"]))


class SwitchableBatchNorm2d(SilentSuperNetModule):
    """Batch norm with running statistics and affine parameters of its own for every width; the input's width picks."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        super().__init__()
        options = {name: value for name, value in arguments.items() if name != "num_features"}
        if any(isinstance(value, MutableExpression) for value in options.values()):
            raise ArchitectureError(
                "a batch norm has a choice besides num_features, which a super-kernel cannot switch"
            )
        self.by_width = nn.ModuleDict(
            {str(width): nn.BatchNorm2d(width, **options) for width in channel_values(arguments["num_features"])}
        )

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (N, C, H, W) with the statistics of width C."""
        output: Tensor = self.of_width(x.shape[1])(x)
        return output

    def of_width(self, width: int) -> nn.BatchNorm2d:
        """Return the batch norm of one width.

        Raises:
            ArchitectureError: The layer never has that width.
        """
        if str(width) not in self.by_width:
            raise ArchitectureError(f"no batch norm for {width} channels; allowed: {', '.join(self.by_width)}")
        norm = self.by_width[str(width)]
        assert isinstance(norm, nn.BatchNorm2d)
        return norm


def super_kernel_hook(active: ActiveWidths) -> MutationHook:
    """Return an NNI mutation hook that turns mutable convolutions and batch norms into super-kernels."""

    def mutate(module: nn.Module, name: str, memo: dict[str, Any], mutate_kwargs: dict[str, Any]) -> Any:
        if isinstance(module, MutableConv2d):
            return SlicedConv2d(module.trace_kwargs, active), True
        if isinstance(module, MutableBatchNorm2d):
            return SwitchableBatchNorm2d(module.trace_kwargs), True
        return None

    return mutate


def inherit_weights(target: nn.Module, source: nn.Module) -> None:
    """Copy the weights of a supernet's module into a plain one of the same structure and smaller or equal widths.

    Args:
        target: Module of plain torch layers.
        source: The supernet's module, with super-kernels where ``target`` has convolutions and batch norms.

    Raises:
        ArchitectureError: The structures differ.
    """
    sources = dict(source.named_modules())
    for name, module in target.named_modules():
        own = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
        if not own:
            continue
        twin = sources.get(name)
        if isinstance(twin, SlicedConv2d) and isinstance(module, nn.Conv2d):
            weight, bias = twin.sliced(module.in_channels, module.out_channels, module.groups)
            state: dict[str, Tensor] = {"weight": weight.detach()}
            if bias is not None:
                state["bias"] = bias.detach()
        elif isinstance(twin, SwitchableBatchNorm2d) and isinstance(module, nn.BatchNorm2d):
            state = dict(twin.of_width(module.num_features).state_dict())
        elif twin is not None:
            state = dict(twin.named_parameters(recurse=False)) | dict(twin.named_buffers(recurse=False))
        else:
            raise ArchitectureError(f"the supernet has no module '{name}' to inherit weights from")
        for key, value in own.items():
            if key not in state or state[key].shape != value.shape:
                raise ArchitectureError(f"weights of '{name}.{key}' do not fit between supernet and derived network")
            value.data.copy_(state[key].data)
