"""How a network is trained from scratch, the same in the train stage and in the trials that rank networks for it."""

from __future__ import annotations

from typing import Any

from glioma_nas.config import RunConfig

AUXILIARY_WEIGHT = 0.4


def training_recipe(config: RunConfig) -> dict[str, Any]:
    """Return what the configuration says about it, as keyword arguments of the ``segmentation`` evaluator.

    Who trains, who validates and which teacher there is, is for the caller to say.
    """
    train = config.train
    return {
        "epochs": train.epochs,
        "steps_per_epoch": train.steps_per_epoch,
        "batch_size": train.batch_size,
        "learning_rate": train.learning_rate,
        "weight_decay": train.weight_decay,
        "loss": train.loss,
        "auxiliary_weight": AUXILIARY_WEIGHT,
        "schedule": "poly",
        "tumour_slice_fraction": train.tumour_slice_fraction,
        "augment": train.augment,
        "augmentation": config.augmentation.model_dump(),
        "kd_weight": train.kd_weight,
        "kd_temperature": train.kd_temperature,
        "kd_direction": train.kd_direction,
        "kd_norm": train.kd_norm,
        "ema_decay": train.ema_decay,
        "precision": train.precision,
        "compiled": train.compile,
        "device": config.device,
    }
