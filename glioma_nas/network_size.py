"""Count a network's parameters and multiply-accumulate operations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class NetworkSize:
    """How large a network is.

    Attributes:
        params_m: Trainable parameters, millions (10⁶).
        macs_g: Multiply-accumulate operations of one forward pass, billions (10⁹), of convolutions and matrix products;
            one MAC is two floating-point operations. Resizing, normalisation and activations are not counted.
    """

    params_m: float
    macs_g: float


def network_size(module: nn.Module, input_shape: tuple[int, ...]) -> NetworkSize:
    """Count ``module`` in evaluation mode on one input of ``input_shape``, batch first."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            module(torch.zeros(input_shape))
    finally:
        for part, training in modes.items():
            part.training = training
    params = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    return NetworkSize(params / 1e6, counter.get_total_flops() / 2 / 1e9)
