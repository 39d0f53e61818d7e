"""Configuration of the molecular markers."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from glioma_nas.config.section import Section


class MarkerConfig(Section):
    """One molecular marker: a sheet column, its positive class and the classifier that predicts it."""

    column: str = Field(description="column of the cohort sheet")
    positive: str | None = Field(None, description="value of the positive class, for a column of words")
    threshold: float | None = Field(None, description="smallest value of the positive class, for a column of numbers")
    classifier: str = Field("idh", description="registered classifier")
    sequences: tuple[str, ...] = ("t1ce", "flair")
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_rule(self) -> MarkerConfig:
        if (self.positive is None) == (self.threshold is None):
            raise ValueError("give either 'positive' (a word) or 'threshold' (a number)")
        return self


class ClassifyConfig(Section):
    """Predict molecular markers from images, out-of-fold masks, age and sex."""

    markers: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_]*$")], MarkerConfig] = Field(
        default_factory=dict, description="by name, which becomes a folder: letters, digits and underscores"
    )
    epochs: int = Field(30, ge=1)
    batch_size: int = Field(16, ge=1)
    learning_rate: float = Field(1e-3, gt=0)
    slices_per_case: int = Field(8, ge=1, description="axial slices with the largest predicted tumour area")
    image_size_px: int = Field(96, ge=32)
    bootstrap_samples: int = Field(1000, ge=100)
