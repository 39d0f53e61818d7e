"""Rank untrained networks by one batch each, so that on a CPU only promising ones are scored or trained further.

Reference: Abdelfattah et al., Zero-Cost Proxies for Lightweight NAS, ICLR 2021 (grad-norm, synflow); Tanaka et al.,
Pruning Neural Networks without Any Data by Iteratively Conserving Synaptic Flow, NeurIPS 2020 (synflow); Mellor et al.,
Neural Architecture Search without Training, ICML 2021 (naswot).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from glioma_nas.errors import ConfigError
from glioma_nas.losses import main_logits

Loss = Callable[[Any, Tensor], Tensor]
Proxy = Callable[[nn.Module, Tensor, Tensor, Loss], float]

_UNITS = 4096


def synflow(network: nn.Module, image: Tensor, mask: Tensor, loss: Loss) -> float:
    """Return log Σ |θ·∂R/∂θ| with R the summed output for an input of ones and all weights made positive.

    It uses no data. Batch norms pass features on as they are, and one image is enough.

    Args:
        network: Untrained network; left as it is.
        image: (N, C, H, W); only its shape counts.
        mask: Not used.
        loss: Not used.
    """
    flow = copy.deepcopy(network).double().eval()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.abs_()
    main_logits(flow(torch.ones_like(image[:1], dtype=torch.float64))).sum().backward()
    gained = [(item * item.grad).abs().sum() for item in flow.parameters() if item.grad is not None]
    total = float(torch.stack(gained).sum()) if gained else 0.0
    return math.log(total) if total > 0 else -math.inf


def naswot(network: nn.Module, image: Tensor, mask: Tensor, loss: Loss) -> float:
    """Return log |det K|, where K counts on how many units two images of the batch agree in being active.

    The code of an image is which units of an evenly spaced part of every ReLU's output are active, (N, bits).

    Args:
        network: Untrained network; left as it is.
        image: (N, C, H, W), N at least 2.
        mask: Not used.
        loss: Not used.

    Raises:
        ConfigError: The network has no ReLU, so that it has no code either.
    """
    observed = copy.deepcopy(network).train()
    codes: list[Tensor] = []

    def note(module: nn.Module, inputs: Any, output: Tensor) -> None:
        # All units of all ReLUs would be millions of bits for each image; a part of each is enough to compare images.
        flat = (output.detach() > 0).flatten(1)
        step = max(1, flat.shape[1] // _UNITS)
        codes.append(flat[:, ::step].double())

    for module in observed.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(note)
    with torch.no_grad():
        observed(image)
    if not codes:
        raise ConfigError(
            "naswot looks at which ReLUs are active, and this network has none; take synflow or grad_norm"
        )
    code = torch.cat(codes, dim=1)
    agreement = code @ code.T + (1 - code) @ (1 - code).T
    return float(torch.linalg.slogdet(agreement).logabsdet)


def gradient_norm(network: nn.Module, image: Tensor, mask: Tensor, loss: Loss) -> float:
    """Return the Euclidean norm of the loss's gradient for one batch.

    Args:
        network: Untrained network; left as it is.
        image: (N, C, H, W).
        mask: (N, H, W), int64.
        loss: Maps the network's outputs and ``mask`` to a scalar.
    """
    trained = copy.deepcopy(network).train()
    loss(trained(image), mask).backward()
    gradients = [item.grad for item in trained.parameters() if item.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients))


def ranked(scores: Sequence[float]) -> list[int]:
    """Return the positions of proxy scores, best first; one that is no finite number ranks last.

    >>> ranked([1.0, float("nan"), 3.0])
    [2, 0, 1]
    """
    return sorted(range(len(scores)), key=lambda index: -scores[index] if math.isfinite(scores[index]) else math.inf)


PROXIES: Mapping[str, Proxy] = {"synflow": synflow, "naswot": naswot, "grad_norm": gradient_norm}
