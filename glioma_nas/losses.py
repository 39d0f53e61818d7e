"""Segmentation and distillation losses over one or several logit maps.

A segmentation loss is any ``f(logits, target) -> scalar`` under a name: ``@losses.register("tversky")`` in a plugin
makes it one that ``search.loss`` and ``train.loss`` may name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from glioma_nas.errors import ConfigError
from glioma_nas.registry import losses

Outputs = Tensor | Mapping[str, Tensor]
"""Logits (N, K, H, W), or several such maps by name; names that start with ``scale_`` are auxiliary."""

LossFunction = Callable[[Tensor, Tensor], Tensor]

AUXILIARY_PREFIX = "scale_"
PAIR_PREFIX = "pair_"
"""Beginnings of the names of a supernet's maps: of one final scale alone, and of a set of them."""

KD_DIRECTIONS = ("teacher_student", "student_teacher")
KD_NORMS = ("pixel", "element", "image")

FOCAL_GAMMA = 2.0
OHEM_FRACTION = 0.25


@losses.register("focal")
def focal_loss(logits: Tensor, target: Tensor, gamma: float = FOCAL_GAMMA) -> Tensor:
    """Return the multi-class focal loss mean((1 - p)^γ · CE).

    Args:
        logits: (N, K, H, W), float.
        target: (N, H, W), int64, class indices.
        gamma: Focusing exponent γ ≥ 0; 0 gives the cross-entropy.

    Reference:
        Lin et al., Focal Loss for Dense Object Detection, ICCV 2017, eq. 5.
    """
    cross_entropy = F.cross_entropy(logits, target, reduction="none")
    # p is the probability of the true class, so it follows from the cross-entropy -log p.
    return ((1 - torch.exp(-cross_entropy)).pow(gamma) * cross_entropy).mean()


@losses.register("ohem")
def ohem_loss(logits: Tensor, target: Tensor, fraction: float = OHEM_FRACTION) -> Tensor:
    """Return the mean cross-entropy over the hardest ``fraction`` of the pixels.

    Args:
        logits: (N, K, H, W), float.
        target: (N, H, W), int64.
        fraction: Share of pixels kept, in (0, 1].

    Reference:
        Shrivastava et al., Training Region-based Object Detectors with Online Hard Example Mining, CVPR 2016.
    """
    cross_entropy = F.cross_entropy(logits, target, reduction="none").flatten()
    kept = max(1, round(fraction * cross_entropy.numel()))
    return cross_entropy.topk(kept).values.mean()


@losses.register("dice_ce")
def dice_ce_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Return cross-entropy plus soft Dice loss of the foreground classes over the whole batch.

    Dice is taken over the batch, not per slice, because many slices hold no tumour and would count as all wrong.

    Args:
        logits: (N, K, H, W), float.
        target: (N, H, W), int64.

    Reference:
        Isensee et al., nnU-Net, Nature Methods 2021 (sum of both terms, batch Dice for 2-D).
    """
    probability = logits.softmax(1)[:, 1:]
    truth = F.one_hot(target, logits.shape[1]).movedim(-1, 1)[:, 1:].to(probability.dtype)
    axes = (0, 2, 3)
    overlap = (probability * truth).sum(axes)
    total = probability.sum(axes) + truth.sum(axes)
    dice = (2 * overlap + 1.0) / (total + 1.0)
    return F.cross_entropy(logits, target) + (1 - dice).mean()


def segmentation_loss(
    loss: str | LossFunction, *, auxiliary_weight: float = 1.0, logit_weights: Mapping[str, float] | None = None
) -> Callable[[Outputs, Tensor], Tensor]:
    """Return a loss that averages one over every logit map a network gives.

    Args:
        loss: Registered name, such as ``focal``, ``ohem`` or ``dice_ce``, or the function itself: logits (N, K, H, W)
            and class indices (N, H, W) to a scalar.
        auxiliary_weight: Weight of maps called ``scale_…``; the others weigh 1.
        logit_weights: Map → its weight, at least 0, in place of these: ``pair_2_8`` and its like in a supernet,
            ``logits`` in a single network, ``scale_4`` in both.

    Raises:
        UnknownNameError: No loss has that name.
        ConfigError: A weight is negative; later, when the loss is called, no map of a supernet has such a name, or no
            map has weight.
    """
    function: LossFunction = losses.get(loss) if isinstance(loss, str) else loss
    given = dict(logit_weights or {})
    for key, weight in given.items():
        if not weight >= 0:
            raise ConfigError(f"logit_weights.{key} is {weight!r}; give a number of at least 0")

    def averaged(outputs: Outputs, target: Tensor) -> Tensor:
        if isinstance(outputs, Tensor):
            return function(outputs, target)
        unknown = sorted(set(given) - set(outputs))
        # Of a supernet; a single network has neither its pairs nor all of its scales.
        if unknown and any(key.startswith(PAIR_PREFIX) for key in outputs):
            raise ConfigError(f"logit_weights.{unknown[0]}: no such map; allowed: {', '.join(sorted(outputs))}")
        total = target.new_zeros((), dtype=torch.float32)
        weights = 0.0
        for key, logits in outputs.items():
            weight = given.get(key, auxiliary_weight if key.startswith(AUXILIARY_PREFIX) else 1.0)
            if weight > 0:
                total = total + weight * function(logits, target)
                weights += weight
        if weights == 0:
            raise ConfigError(f"no logit map has weight; raise one of {', '.join(sorted(outputs))} in logit_weights")
        return total / weights

    return averaged


def main_logits(outputs: Outputs) -> Tensor:
    """Return the logits (N, K, H, W) that count: ``logits`` if there are any, else the first map not auxiliary."""
    if isinstance(outputs, Tensor):
        return outputs
    if "logits" in outputs:
        return outputs["logits"]
    return next(value for name, value in outputs.items() if not name.startswith(AUXILIARY_PREFIX))


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    direction: str = "teacher_student",
    norm: str = "pixel",
) -> Tensor:
    """Return KL(teacher ‖ student) of every pixel, averaged, times T².

    Args:
        student: Logits (N, K, H, W).
        teacher: Logits of the same shape; no gradient flows into them.
        temperature: T > 0; both logits are divided by it.
        direction: ``teacher_student`` for KL(teacher ‖ student), ``student_teacher`` for the direction that eq. 4-10
            of the thesis prints.
        norm: What the sum over pixels and classes is divided by: ``pixel`` the number of pixels of the batch, so that
            the loss depends on neither image size nor classes; ``element`` pixels times classes, PyTorch's "mean" and
            what FasterSeg's code does; ``image`` the batch size, PyTorch's "batchmean".

    Raises:
        ConfigError: Unknown direction or norm.

    Reference:
        Hinton et al., Distilling the Knowledge in a Neural Network, 2015; thesis eq. 4-10.
    """
    if direction not in KD_DIRECTIONS or norm not in KD_NORMS:
        raise ConfigError(
            f"kd_direction '{direction}', kd_norm '{norm}': allowed are {', '.join(KD_DIRECTIONS)}, and "
            f"{', '.join(KD_NORMS)}"
        )
    log_student = (student / temperature).log_softmax(1)
    log_teacher = (teacher.detach() / temperature).log_softmax(1)
    if direction == "teacher_student":
        divergence = F.kl_div(log_student, log_teacher, reduction="none", log_target=True)
    else:
        divergence = F.kl_div(log_teacher, log_student, reduction="none", log_target=True)
    pixels = divergence.numel() // divergence.shape[1]
    count = {"pixel": pixels, "element": divergence.numel(), "image": divergence.shape[0]}[norm]
    return divergence.sum() / count * temperature**2
