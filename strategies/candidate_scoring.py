"""Score decoded networks that still carry the supernet's weights, to choose among branch pairs (METHOD eq. 4-1)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import chain, islice, repeat
from typing import Any

import torch
from torch import Tensor, nn

from glioma_nas.training import FiniteGuard

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidate:
    """One decoded network and what it scored.

    Attributes:
        branches: The branch set, for example ``2_8``; none in a space without branches.
        accuracy: Score of the inherited network in [0, 1], higher is better: its Dice, or the blend with ``aucs``.
        latency_ms: Latency from the table; none without a profiler.
        target: Target(m) of eq. 4-1, the figure candidates are ranked by.
        dice: Dice of the inherited network, in [0, 1].
        aucs: Marker → AUC that its masks give, in [0, 1]; empty when markers do not count.
    """

    branches: str | None
    accuracy: float
    latency_ms: float | None
    target: float
    dice: float
    aucs: Mapping[str, float] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """Return plain data for files and tables."""
        plain = asdict(self)
        aucs = plain.pop("aucs")
        return {**plain, **{f"auc_{marker}": value for marker, value in aucs.items()}}


def target_score(
    accuracy: float, latency_ms: float | None, *, target_latency_ms: float | None, exponents: tuple[float, float]
) -> float:
    """Return Target(m) = ACC(m)·(LAT(m)/T)^w with w = a if LAT ≤ T else b.

    Args:
        accuracy: ACC in [0, 1].
        latency_ms: LAT in ms; without one the accuracy alone counts.
        target_latency_ms: T in ms; none only when a = b, where T rescales all candidates alike.
        exponents: (a, b), negative to reward speed.

    Reference:
        Tan et al., MnasNet, CVPR 2019, eq. 2; thesis eq. 4-1.

    >>> round(target_score(0.8, 10.0, target_latency_ms=5.0, exponents=(0.0, -1.0)), 3)
    0.4
    """
    if latency_ms is None:
        return accuracy
    below, above = exponents
    target_ms = 1.0 if target_latency_ms is None else target_latency_ms
    return float(accuracy * (latency_ms / target_ms) ** (below if latency_ms <= target_ms else above))


def warn_about_equal_exponents(exponents: tuple[float, float], target_latency_ms: float | None) -> None:
    """Warn when the target latency cannot change any choice."""
    if exponents[0] == exponents[1] and target_latency_ms is not None:
        _logger.warning(
            "target latency %s ms has no effect: with equal exponents it rescales every candidate alike",
            target_latency_ms,
        )


def finetune(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    loss: Callable[[Any, Tensor], Tensor],
    *,
    steps: int,
    learning_rate: float,
) -> None:
    """Train a decoded network for a few steps with SGD (momentum 0.9), its learning rate falling linearly to zero.

    A step whose loss or gradient is not finite is not taken.

    Args:
        model: The network, with inherited weights; left in training mode.
        batches: Batches with ``image`` and ``mask``; gone through again when they run out.
        loss: Maps the network's outputs and the masks (N, H, W) to a scalar.
        steps: Optimiser steps; 0 does nothing.
        learning_rate: First learning rate.

    Raises:
        DivergedError: More than ten such steps in a row.
    """
    guard = FiniteGuard("fine-tuning of a candidate")
    device = next(model.parameters()).device
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9)
    model.train()
    endless = chain.from_iterable(repeat(batches))
    for step, batch in enumerate(islice(endless, steps)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * (1 - step / steps)
        optimizer.zero_grad()
        value = loss(model(batch["image"].to(device)), batch["mask"].to(device))
        if not guard.accepts(value):
            continue
        value.backward()
        if guard.accepts(torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0), "gradient"):
            optimizer.step()


def ignored_latency_weight(strategy: str, latency_weight: float, instead: str) -> list[str]:
    """Warn when a strategy cannot follow the latency weight, and return the warning for the records.

    Args:
        strategy: Registered name.
        latency_weight: λ as the user gave it; with 0 there is nothing to say.
        instead: What the strategy does about latency.
    """
    if latency_weight == 0:
        return []
    note = f"{strategy} has no latency gradient; latency_weight {latency_weight:g} is ignored: {instead}"
    _logger.warning(note)
    return [note]


@torch.no_grad()
def recalibrate_batch_norm(model: nn.Module, batches: Iterable[Mapping[str, Any]], *, n_batches: int) -> None:
    """Replace the running statistics of every batch norm by their mean over ``n_batches`` batches.

    A subnet cut out of a supernet inherits statistics gathered under soft mixtures, which do not fit it. With
    ``n_batches`` 0 they are left alone. The model is left in evaluation mode.

    Reference:
        Yu & Huang, Universally Slimmable Networks, ICCV 2019, sec. 3.3.
    """
    if n_batches == 0:
        model.eval()
        return
    device = next(model.parameters(), torch.empty(0)).device
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches instead of an exponential one
    model.train()
    for batch in islice(batches, n_batches):
        model(batch["image"].to(device))
    model.eval()
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum
