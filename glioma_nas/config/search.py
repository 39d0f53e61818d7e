"""Configuration of the search and of the training from scratch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from glioma_nas.config.section import Section


class SearchConfig(Section):
    """Search for the architecture."""

    space: str = "nasbranet"
    space_options: dict[str, Any] = Field(default_factory=lambda: {"preset": "small"})
    strategy: str = "co_search"
    strategy_options: dict[str, Any] = Field(default_factory=dict)
    pretrain_epochs: int = Field(20, ge=0, description="epochs that train the weights only")
    search_epochs: int = Field(30, ge=1, description="epochs that alternate architecture and weights")
    steps_per_epoch: int | None = Field(None, ge=1, description="optimiser steps of an epoch; none: every slice once")
    batch_size: int = Field(8, ge=1)
    learning_rate: float = Field(0.02, gt=0)
    precision: Literal["32-true", "bf16-mixed"] = Field(
        "32-true", description="mixed precision; 16-mixed would need scaled losses, which alternating steps do not have"
    )
    compile: bool = Field(
        False, description="let torch.compile take over the supernet's stems and heads; cells change their shapes"
    )
    weight_decay: float = Field(5e-4, ge=0, description="L2 penalty of the weights, not of α, β and γ")
    loss: str = Field("focal", description="focal, dice_ce, ohem, or the name of a plugin's loss")
    auxiliary_weight: float = Field(1.0, ge=0, description="weight of the loss of each scale alone")
    logit_weights: dict[str, float] = Field(
        default_factory=dict, description="weights of single maps in the loss: pair_2_8: 2, scale_4: 0; others 1"
    )
    latency_weight: float = Field(0.01, ge=0, description="λ of eq. 4-11, per millisecond; acts on the student only")
    latency_calibration: Path | None = Field(
        None, description="calibration.json of `latency calibrate`; none: the bare sum over the latency table"
    )
    marker_weight: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of the markers' AUC in the accuracy that ranks networks, the rest is Dice; 0: Dice alone. "
        "Above 0 every ranked network costs a cross-validation of each marker's classifier (docs/strategies.md)",
    )
    marker_classifier: str | None = Field(
        None, description="classifier that gives these AUCs; none: each marker's own. radiomics takes seconds on a CPU"
    )
    tumour_slice_fraction: float = Field(0.7, ge=0, le=1, description="share of drawn slices that show tumour")
    tensorboard: bool = Field(True, description="write every epoch's figures and probabilities for TensorBoard")


class TrainConfig(Section):
    """Train teacher, student and baselines from scratch, once for every fold."""

    epochs: int = Field(100, ge=1)
    steps_per_epoch: int | None = Field(None, ge=1)
    batch_size: int = Field(8, ge=1)
    learning_rate: float = Field(0.01, gt=0)
    weight_decay: float = Field(5e-4, ge=0)
    loss: str = Field("dice_ce", description="focal, dice_ce, ohem, or the name of a plugin's loss")
    tumour_slice_fraction: float = Field(0.7, ge=0, le=1)
    augment: bool = True
    kd_weight: float = Field(
        1.0, ge=0, description="weight of KL(teacher || student) per pixel; 0 switches distillation off"
    )
    kd_temperature: float = Field(1.0, gt=0)
    kd_direction: Literal["teacher_student", "student_teacher"] = "teacher_student"
    kd_norm: Literal["pixel", "element", "image"] = Field(
        "pixel", description="what the distillation loss is averaged over; element is FasterSeg's"
    )
    ema_decay: float = Field(0.0, ge=0, lt=1, description="keep an exponential moving average of the weights; 0: no")
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = Field(
        "32-true", description="mixed precision; 16-mixed needs a GPU"
    )
    compile: bool = Field(False, description="let torch.compile take over each network; compiling takes minutes")
    validation_fraction: float = Field(
        0.0, ge=0, lt=1, description="share of each fold's training patients that validates instead of training"
    )
    checkpoint: Literal["last", "best"] = Field(
        "last", description="weights kept: the last epoch's, or the best by Dice on the validation patients"
    )
    tensorboard: bool = False
    devices: int = Field(1, ge=1, description="devices that train one network together: GPUs, or processes on the CPU")
    baselines: tuple[str, ...] = Field((), description="registered networks trained with the student's budget")
    baseline_options: dict[str, dict[str, Any]] = Field(default_factory=dict)
