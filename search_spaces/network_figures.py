"""What an operator or a network costs, without running it: MACs, parameters, activation memory, receptive field.

Modules are built and called on PyTorch's meta device, where tensors have shapes but no numbers, so nothing is computed
and plugin operators are counted as exactly as our own. Only the receptive field of a single operator is found by
sending one gradient through four channels of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch
from nni.nas.space import model_context
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from glioma_nas.costs import OperatorSpec
from glioma_nas.registry import operators
from glioma_nas.search_spaces.derived_network import DerivedNetwork
from glioma_nas.search_spaces.heads import Stem
from glioma_nas.search_spaces.layout import Layout
from glioma_nas.search_spaces.plan import NetworkPlan

_PROBE_CHANNELS = 4
_CONV3X3_FIELD_PX = 3


@dataclass(frozen=True)
class OperatorFigures:
    """One operator at one place of a network, batch 1, float32.

    Attributes:
        macs: Multiply-accumulate operations of convolutions in one forward pass.
        params: Trainable parameters.
        activation_bytes: What a training pass keeps for the backward pass, its input included.
        receptive_field_px: Side of the square of input pixels that one output pixel sees.
    """

    macs: int
    params: int
    activation_bytes: int
    receptive_field_px: int

    @property
    def relative_receptive_field(self) -> float:
        """Receptive field relative to that of one 3×3 convolution, as in table 4-1 of the thesis."""
        return self.receptive_field_px / _CONV3X3_FIELD_PX


@dataclass(frozen=True)
class ArchitectureFigures:
    """One derived network at the space's image size, batch 1, float32.

    Attributes:
        macs_g: Multiply-accumulate operations of one prediction, billions (10⁹), stem and head included.
        params_m: Trainable parameters of the exported network, millions (10⁶).
        auxiliary_params_m: Parameters of the auxiliary heads, which exist in training only, millions.
        activation_mb: What a training pass keeps for the backward pass, MB (10⁶ bytes).
        receptive_field_px: Final scale → side of the square of image pixels that one feature at the end of that branch
            sees, before the head.
        image_size_px: Side of the image.
    """

    macs_g: float
    params_m: float
    auxiliary_params_m: float
    activation_mb: float
    receptive_field_px: Mapping[int, int]
    image_size_px: int

    @property
    def relative_receptive_field(self) -> dict[int, float]:
        """Receptive field of each branch as a share of the image's side."""
        return {scale: field / self.image_size_px for scale, field in self.receptive_field_px.items()}

    def row(self) -> dict[str, Any]:
        """Return plain data for files and tables."""
        return {**asdict(self), "receptive_field_px": {str(k): v for k, v in self.receptive_field_px.items()}}


@lru_cache(maxsize=4096)
def operator_figures(spec: OperatorSpec) -> OperatorFigures:
    """Count one operator.

    Raises:
        UnknownNameError: No operator has that name.
    """
    with model_context({}), torch.device("meta"):
        module = operators.get(spec.operator)(spec.in_channels, spec.out_channels, spec.stride)
        x = torch.empty(1, spec.in_channels, spec.height, spec.width)
    return OperatorFigures(
        macs=count_macs(module, x),
        params=count_params(module),
        activation_bytes=count_saved_bytes(module, x),
        receptive_field_px=_operator_field(spec.operator, spec.stride),
    )


def architecture_figures(layout: Layout, plan: NetworkPlan) -> ArchitectureFigures:
    """Count one network.

    Args:
        layout: The space.
        plan: The network.
    """
    with torch.device("meta"):
        network = DerivedNetwork(plan, layout)
        x = torch.empty(1, layout.in_channels, layout.image_size_px, layout.image_size_px)
    auxiliary = count_params(network.auxiliary)
    return ArchitectureFigures(
        macs_g=count_macs(network, x) / 1e9,
        params_m=(count_params(network) - auxiliary) / 1e6,
        auxiliary_params_m=auxiliary / 1e6,
        activation_mb=count_saved_bytes(network, x) / 1e6,
        receptive_field_px={scale: _branch_field(layout, plan, scale) for scale in plan.outputs},
        image_size_px=layout.image_size_px,
    )


def count_macs(module: nn.Module, x: Tensor) -> int:
    """Count multiply-accumulate operations of convolutions and matrix products in evaluation mode."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module.eval()(x)
    return int(counter.get_total_flops()) // 2


def count_params(module: nn.Module) -> int:
    """Count trainable parameters."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def count_saved_bytes(module: nn.Module, x: Tensor) -> int:
    """Count the bytes that a training pass of ``module`` keeps for the backward pass, parameters excluded."""
    with saved_bytes(module) as saved:
        module.train()(x)
    return saved.total


class SavedBytes:
    """Bytes kept for a backward pass, each storage counted once."""

    def __init__(self, excluded: set[int]) -> None:
        self._excluded = excluded
        # The tensors themselves are kept, so that no storage is freed and its place taken by another.
        self._seen: dict[int, Tensor] = {}

    @property
    def total(self) -> int:
        """Bytes so far."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self._seen.values())

    def see(self, tensor: Tensor) -> Tensor:
        """Note a tensor that autograd saves."""
        key = tensor.untyped_storage()._cdata
        if key not in self._excluded:
            self._seen[key] = tensor
        return tensor


@contextmanager
def saved_bytes(module: nn.Module) -> Iterator[SavedBytes]:
    """Count what autograd saves inside the block, except parameters and buffers of ``module``."""
    own = {tensor.untyped_storage()._cdata for tensor in (*module.parameters(), *module.buffers())}
    saved = SavedBytes(own)
    with torch.autograd.graph.saved_tensors_hooks(saved.see, lambda tensor: tensor):
        yield saved


def _branch_field(layout: Layout, plan: NetworkPlan, scale: int) -> int:
    field = _stem_field(layout.stem, layout.scales[0])
    # Pixels of the image between two neighbours of the present feature map.
    spacing = layout.scales[0]
    for index in plan.branch_steps(scale):
        step = plan.steps[index]
        field += (_operator_field(step.operator, step.stride) - 1) * spacing
        spacing *= step.stride
    return field


@lru_cache(maxsize=256)
def _operator_field(operator: str, stride: int) -> int:
    with torch.random.fork_rng(devices=[]), model_context({}):
        return _field(operators.get(operator)(_PROBE_CHANNELS, _PROBE_CHANNELS, stride), stride)


@lru_cache(maxsize=16)
def _stem_field(kind: str, scale: int) -> int:
    with torch.random.fork_rng(devices=[]), model_context({}):
        return _field(Stem(kind, _PROBE_CHANNELS, _PROBE_CHANNELS, scale), scale)


def _field(module: nn.Module, stride: int) -> int:
    # With positive weights nothing cancels and no ReLU closes, so the gradient of an output pixel covers what it sees.
    for parameter in module.eval().parameters():
        nn.init.constant_(parameter, 0.1)
    side = 32 * stride
    while True:
        x = torch.ones(1, _PROBE_CHANNELS, side, side, requires_grad=True)
        output = module(x)
        widest = 0
        # Behind an enlargement neighbouring pixels see differently far.
        for offset in (0, 1):
            middle = output.shape[-1] // 2 + offset
            (gradient,) = torch.autograd.grad(output[0, :, middle, middle].sum(), x, retain_graph=True)
            reached = (gradient[0].abs().sum(0) != 0).nonzero()
            extent = reached.amax(0) - reached.amin(0) + 1
            widest = max(widest, int(extent.max()))
        if widest < side // 2:
            return widest
        side *= 2
