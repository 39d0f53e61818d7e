"""Losses against hand-computed values."""

from __future__ import annotations

import math

import pytest
import torch

from glioma_nas.errors import ConfigError, UnknownNameError
from glioma_nas.losses import dice_ce_loss, distillation_loss, focal_loss, ohem_loss, segmentation_loss


def logits_of(*probabilities: float) -> torch.Tensor:
    """Return two-class logits (1, 2, 1, W) whose softmax gives these foreground probabilities."""
    foreground = torch.tensor(probabilities, dtype=torch.float64)
    return torch.stack([(1 - foreground).log(), foreground.log()])[None, :, None, :]


TARGET = torch.tensor([[[1, 0]]])


def test_focal_loss_equals_the_value_by_hand() -> None:
    # p of the true class is 0.8 and 0.4: (0.2² · -ln 0.8 + 0.6² · -ln 0.4) / 2
    expected = (0.04 * -math.log(0.8) + 0.36 * -math.log(0.4)) / 2
    assert float(focal_loss(logits_of(0.8, 0.6), TARGET)) == pytest.approx(expected, rel=1e-9)


def test_focal_loss_without_focus_is_cross_entropy() -> None:
    logits = logits_of(0.8, 0.6)
    expected = torch.nn.functional.cross_entropy(logits, TARGET)
    assert float(focal_loss(logits, TARGET, gamma=0.0)) == pytest.approx(float(expected))


def test_ohem_keeps_the_hardest_pixels_only() -> None:
    assert float(ohem_loss(logits_of(0.8, 0.6), TARGET, fraction=0.5)) == pytest.approx(-math.log(0.4))


def test_dice_ce_equals_the_value_by_hand() -> None:
    # overlap 0.8, sum of probabilities 1.4, sum of truth 1, smoothing 1
    dice = (2 * 0.8 + 1) / (1.4 + 1 + 1)
    cross_entropy = -(math.log(0.8) + math.log(0.4)) / 2
    assert float(dice_ce_loss(logits_of(0.8, 0.6), TARGET)) == pytest.approx(cross_entropy + 1 - dice, rel=1e-6)


def test_maps_are_averaged_with_auxiliary_weight() -> None:
    loss = segmentation_loss("focal", auxiliary_weight=0.5)
    good, bad = logits_of(0.9, 0.1).float(), logits_of(0.1, 0.9).float()
    expected = (float(focal_loss(good, TARGET)) + 0.5 * float(focal_loss(bad, TARGET))) / 1.5
    assert float(loss({"logits": good, "scale_4": bad}, TARGET)) == pytest.approx(expected, rel=1e-6)


def test_unknown_loss_is_refused_with_the_allowed_ones() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown loss 'focl': did you mean 'focal'\?"):
        segmentation_loss("focl")


def test_single_maps_may_weigh_what_one_likes() -> None:
    loss = segmentation_loss("focal", logit_weights={"pair_2_4": 3.0, "scale_4": 0.0})
    good, bad = logits_of(0.9, 0.1).float(), logits_of(0.1, 0.9).float()
    expected = (3 * float(focal_loss(good, TARGET)) + float(focal_loss(bad, TARGET))) / 4
    maps = {"pair_2_4": good, "pair_2_8": bad, "scale_4": bad}
    assert float(loss(maps, TARGET)) == pytest.approx(expected, rel=1e-6)
    assert float(loss({"logits": good}, TARGET)) == pytest.approx(float(focal_loss(good, TARGET)), rel=1e-6)


def test_any_function_is_a_loss() -> None:
    loss = segmentation_loss(lambda logits, target: logits.square().mean())
    assert float(loss({"logits": torch.full((1, 2, 1, 2), 3.0)}, TARGET)) == 9.0


def test_impossible_logit_weights_are_refused() -> None:
    good = logits_of(0.9, 0.1).float()
    with pytest.raises(ConfigError, match=r"logit_weights.scale_4 is -1; give a number of at least 0"):
        segmentation_loss("focal", logit_weights={"scale_4": -1})
    with pytest.raises(ConfigError, match=r"logit_weights.pair_2_16: no such map; allowed: pair_2_4, scale_4"):
        segmentation_loss("focal", logit_weights={"pair_2_16": 1})({"pair_2_4": good, "scale_4": good}, TARGET)
    with pytest.raises(ConfigError, match="no logit map has weight"):
        segmentation_loss("focal", logit_weights={"logits": 0})({"logits": good}, TARGET)


def test_distillation_is_the_divergence_from_teacher_to_student() -> None:
    student, teacher = logits_of(0.5), logits_of(0.9)
    forward = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    backward = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert float(distillation_loss(student, teacher)) == pytest.approx(forward, rel=1e-9)
    assert float(distillation_loss(student, teacher, direction="student_teacher")) == pytest.approx(backward, rel=1e-9)
    assert float(distillation_loss(teacher, teacher)) == pytest.approx(0.0, abs=1e-12)


def test_distillation_trains_the_student_only() -> None:
    student, teacher = logits_of(0.5).requires_grad_(), logits_of(0.9).requires_grad_()
    distillation_loss(student, teacher, temperature=2.0).backward()
    assert student.grad is not None and float(student.grad.abs().sum()) > 0
    assert teacher.grad is None
