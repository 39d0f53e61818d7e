"""Configuration of the augmentation of training slices."""

from __future__ import annotations

from pydantic import Field

from glioma_nas.config.section import Section


class AugmentationConfig(Section):
    """How training slices of the segmentation networks are varied; 0 switches a part off."""

    rotation_degrees: float = Field(15.0, ge=0, le=180, description="largest in-plane rotation")
    scale: float = Field(0.1, ge=0, lt=1, description="largest change of size, as a share")
    shift: float = Field(0.05, ge=0, le=0.5, description="largest translation, as a share of the side")
    flip_probability: float = Field(0.5, ge=0, le=1, description="left and right swapped")
    elastic_px: float = Field(0.0, ge=0, description="deviation of the displacement of control points")
    elastic_probability: float = Field(0.3, ge=0, le=1)
    bias_field: float = Field(0.3, ge=0, description="largest coefficient of the bias field's polynomial")
    bias_probability: float = Field(0.2, ge=0, le=1)
    gamma: float = Field(0.3, ge=0, description="deviation of the logarithm of gamma, each sequence by itself")
    gamma_probability: float = Field(0.2, ge=0, le=1)
    gain: float = Field(0.1, ge=0, description="deviation of the logarithm of a sequence's factor")
    offset: float = Field(0.1, ge=0, description="deviation of a sequence's addend, in deviations of the brain")
    noise: float = Field(0.1, ge=0, description="largest deviation of Gaussian noise, in deviations of the brain")
    sequence_dropout: float = Field(
        0.0, ge=0, lt=1, description="chance of each sequence to be fed as missing; one always stays"
    )
