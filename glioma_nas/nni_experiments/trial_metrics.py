"""The figures every trial reports: flat, numeric, the same keys always, so that they become columns, charts and CSV."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from glioma_nas.downstream import blended_accuracy
from glioma_nas.errors import DivergedError

SMALLEST_DEFAULT = 1e-6
"""NNI's web UI shows 0 for a trial without a result, so a result is never 0."""

FINAL_KEYS = (
    "default",
    "dice",
    "latency_ms",
    "latency_p95_ms",
    "macs_g",
    "params_m",
    "fold",
    "seed",
    "hd95_mm",
    "auc_idh",
    "auc_ki67",
)
"""Those that may be missing come last: a line of NNI's hyper-parameter chart ends where a value is not measured."""

_MAY_BE_UNMEASURED = ("hd95_mm", "auc_idh", "auc_ki67")


@dataclass(frozen=True)
class TrialResult:
    """What a finished trial measured. None means not measured.

    Attributes:
        dice: Mean Dice over validation patients, in [0, 1].
        hd95_mm: Median over validation patients of the 95th percentile surface distance.
        latency_ms: Median inference time of one slice.
        latency_p95_ms: Its 95th percentile.
        macs_g: 10⁹ multiply-accumulates of one slice.
        params_m: Million parameters.
        auc_idh: Patient-level AUC of IDH mutation predicted from the network's masks.
        auc_ki67: The same of Ki67.
        fold: Fold whose training patients were used.
        seed: Seed of the trial.
    """

    dice: float
    hd95_mm: float | None
    latency_ms: float
    latency_p95_ms: float
    macs_g: float
    params_m: float
    auc_idh: float | None
    auc_ki67: float | None
    fold: int
    seed: int

    def final_metrics(
        self,
        *,
        target_latency_ms: float,
        target_exponents: tuple[float, float],
        marker_weight: float = 0.0,
        markers: Sequence[str] = (),
    ) -> dict[str, float | None]:
        """Return the dict for NNI; ``default`` is Target(m) = ACC·(latency_ms/T)^w, w = a if latency_ms ≤ T else b.

        ACC is the Dice or, with ``marker_weight``, `glioma_nas.downstream.blended_accuracy` with the AUC of the
        ``markers``, which then have been measured.

        Raises:
            DivergedError: A figure is NaN or infinite.

        Reference:
            Tan et al., MnasNet, CVPR 2019, eq. 2.
        """
        below, above = target_exponents
        exponent = below if self.latency_ms <= target_latency_ms else above
        values = {"idh": self.auc_idh, "ki67": self.auc_ki67}
        aucs = {name: value for name in markers if (value := values[name]) is not None}
        target = blended_accuracy(self.dice, aucs, marker_weight) * (self.latency_ms / target_latency_ms) ** exponent
        return check_final({"default": max(target, SMALLEST_DEFAULT), **asdict(self)})


def check_final(metrics: Mapping[str, float | None]) -> dict[str, float | None]:
    """Return the metrics in the fixed order.

    Raises:
        DivergedError: A figure is NaN or infinite, or one that every trial has is missing.
    """
    for name in FINAL_KEYS:
        value = metrics[name]
        if value is None and name in _MAY_BE_UNMEASURED:
            continue
        if value is None or not math.isfinite(value):
            raise DivergedError(f"the trial's '{name}' is {value}, not a finite number; it counts as failed")
    return {name: metrics[name] for name in FINAL_KEYS}


def intermediate_metrics(stage: int, epoch: int, figures: Mapping[str, float]) -> dict[str, float]:
    """Return the dict of one epoch; ``default`` = 1/(1 + loss) rises towards 1 as the loss falls, for assessors.

    Args:
        stage: Number of the stage, from 0.
        epoch: Number of the epoch within its stage, from 0.
        figures: What the training loop published; its own losses and latencies come along.

    Raises:
        DivergedError: No loss is among the figures: none was finite in this epoch.
    """
    losses = [figures[name] for name in ("loss", "loss_weights", "loss_architecture_student") if name in figures]
    if not losses:
        raise DivergedError(f"epoch {epoch + 1}: no finite loss; lower the learning rate")
    loss = max(losses[0], 0.0)
    return {"default": 1 / (1 + loss), **figures, "loss": loss, "stage": stage, "epoch": epoch}
