"""The mixture of a cell's operators, Σ_k w_k·O_k(x), computed together instead of one operator after the other.

Most operators end in batch norm and ReLU. For a weight w ≥ 0, w·ReLU(γ·x̂ + β) = ReLU(wγ·x̂ + wβ): the weight goes into
the affine parameters of the norm, and its gradient comes back through them. The sum is built in one buffer, and for
the backward pass only what enters the norms is kept, not what leaves them, nor the operators' outputs. Enlargement is
linear, so the zoomed convolutions are summed first and enlarged once.

Convolutions that read the same tensor are not merged into one: measured on a CPU, splitting the result for the norms
costs what the larger convolution saves (from about 48 channels on there is nothing to save).

Reference: Rota Bulò et al., In-Place Activated BatchNorm, CVPR 2018 (recompute the activation in the backward pass).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from glioma_nas.relaxation import RelaxedLayer, add_auxiliary_skip, weighted_sum
from glioma_nas.search_spaces.operators import ConvUnits, enlarge
from glioma_nas.search_spaces.super_kernel import SwitchableBatchNorm2d


def fused_mix(choice: RelaxedLayer, x: Tensor) -> Tensor:
    """Return what ``choice(x)`` returns, but for rounding.

    Args:
        choice: Operators of one cell and stride, in a supernet of super-kernels.
        x: The cell's input, shape (N, C, H, W).

    Returns:
        Shape (N, C', H', W').
    """
    current = choice.slot.current
    weights, shares = current.weights[choice.label], current.shares[choice.label]
    chosen = [index for index, share in enumerate(shares) if share > 0]
    # A weight of exactly zero that is differentiable (straight-through) has a gradient that a closed ReLU would hide.
    hidden = weights.requires_grad and len(chosen) < len(shares)
    if not choice.training or hidden or (len(chosen) == 1 and not weights.requires_grad):
        output: Tensor = choice(x)
        return output
    summands: dict[bool, list[tuple[nn.BatchNorm2d, Tensor, Tensor]]] = {False: [], True: []}
    others: list[tuple[Tensor, Tensor]] = []
    for index, weight in enumerate(weights.unbind()):
        if index not in chosen:
            continue
        operator = choice[choice.names[index]]
        if _computes_its_units_alone(operator):
            features, norm = operator.before_last_norm(x)
            assert isinstance(norm, SwitchableBatchNorm2d)
            summands[operator.enlarges].append((norm.of_width(features.shape[1]), features, weight))
        else:
            others.append((weight, operator(x)))
    parts = [_sum(summands[False])] if summands[False] else []
    if summands[True]:
        parts.append(enlarge(_sum(summands[True]), 2))
    if others:
        parts.append(weighted_sum(*zip(*others, strict=True)))
    total = parts[0]
    for part in parts[1:]:
        total = total.add_(part)
    mixture: Tensor = add_auxiliary_skip(total, x, current.auxiliary_skip)
    return mixture


def _computes_its_units_alone(operator: nn.Module) -> TypeGuard[ConvUnits]:
    """Tell whether calling an operator is nothing but running its units.

    A plugin may derive from an operator and change ``forward``, and anyone may hang a hook on one; both must be called.
    """
    if not isinstance(operator, ConvUnits):
        return False
    own = type(operator)
    changed = own.forward is not ConvUnits.forward or own.before_last_norm is not ConvUnits.before_last_norm
    hooks = (
        operator._forward_hooks,
        operator._forward_pre_hooks,
        operator._backward_hooks,
        operator._backward_pre_hooks,
    )
    return not changed and not any(hooks)


def _sum(summands: Sequence[tuple[nn.BatchNorm2d, Tensor, Tensor]]) -> Tensor:
    tensors = []
    for norm, features, weight in summands:
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
        tensors += [features, norm.weight * weight, norm.bias * weight]
    total: Tensor = _NormedSum.apply([norm for norm, *_ in summands], *tensors)
    return total


class _NormedSum(torch.autograd.Function):
    # Σ ReLU(batch_norm(x_k; scale_k, shift_k)) in training mode; differentiable once.
    @staticmethod
    def forward(ctx: Any, norms: Sequence[nn.BatchNorm2d], *tensors: Tensor) -> Tensor:
        total: Tensor | None = None
        saved = []
        for norm, (x, scale, shift) in zip(norms, _triples(tensors), strict=True):
            assert norm.momentum is not None  # `ConvUnits` saw to it
            out, mean, inverse_std = torch.native_batch_norm(
                x, scale, shift, norm.running_mean, norm.running_var, True, norm.momentum, norm.eps
            )
            total = out.relu_() if total is None else total.add_(out.relu_())
            saved += [x, scale, shift, mean, inverse_std]
        assert total is not None
        ctx.save_for_backward(*saved)
        ctx.eps = [norm.eps for norm in norms]
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        saved = ctx.saved_tensors
        found: list[Tensor | None] = [None]
        for index, eps in enumerate(ctx.eps):
            x, scale, shift, mean, inverse_std = saved[5 * index : 5 * index + 5]
            # In evaluation mode with the batch's own statistics: the same numbers for a third of the time.
            variance = inverse_std.pow(-2) - eps
            out, *_ = torch.native_batch_norm(x, scale, shift, mean, variance, False, 0.0, eps)
            passed = torch.ops.aten.threshold_backward(gradient, out, 0)
            needed = ctx.needs_input_grad[1 + 3 * index : 4 + 3 * index]
            found += torch.ops.aten.native_batch_norm_backward(
                passed, x, scale, None, None, mean, inverse_std, True, eps, list(needed)
            )
        return tuple(found)


def _triples(tensors: Sequence[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
    return list(zip(tensors[::3], tensors[1::3], tensors[2::3], strict=True))
