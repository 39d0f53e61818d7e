"""Configuration of the molecular markers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from glioma_nas.config.cohort import SequenceName
from glioma_nas.config.section import Section


class MarkerConfig(Section):
    """One molecular marker: a sheet column, its positive class and the classifier that predicts it."""

    column: str = Field(description="column of the cohort sheet")
    positive: str | None = Field(None, description="value of the positive class, for a column of words")
    threshold: float | None = Field(None, description="smallest value of the positive class, for a column of numbers")
    classifier: str = Field("idh", description="registered classifier")
    sequences: tuple[SequenceName, ...] = ("t1ce", "flair")
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_rule(self) -> MarkerConfig:
        if (self.positive is None) == (self.threshold is None):
            raise ValueError("give either 'positive' (a word) or 'threshold' (a number)")
        return self


class MeasuredConfig(Section):
    """A marker of the subtype rules that the sheet holds as measured in tissue."""

    column: str = Field(description="column of the cohort sheet")
    altered: str = Field(description="value that means altered")
    wildtype: str = Field(description="value that means not altered")


class SubtypeConfig(Section):
    """Integrate markers into a subtype."""

    rules: str = Field("cns5_2021", description="registered subtype rules")
    tau: float = Field(0.6, gt=0, le=1, description="nothing is called below this probability")
    predicted: dict[str, str] = Field(
        min_length=1, description="marker of the rules: configured marker whose positive class means altered"
    )
    measured: dict[str, MeasuredConfig] = Field(default_factory=dict, description="marker of the rules: column")


class ClassifyConfig(Section):
    """Predict molecular markers from images, out-of-fold masks, age and sex."""

    markers: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_]*$")], MarkerConfig] = Field(
        default_factory=dict, description="by name, which becomes a folder: letters, digits and underscores"
    )
    epochs: int = Field(30, ge=1)
    batch_size: int = Field(16, ge=1)
    learning_rate: float = Field(1e-3, gt=0)
    masks: str = Field(
        "student",
        description="whose out-of-fold masks: student, teacher, a baseline network, expert (the sheet's, drawn by "
        "people) or given (the sheet's, made by networks that mask_provenance describes)",
    )
    mask_provenance: Path | None = Field(
        None, description="for masks: given; JSON of case id → {network, train_patients}; relative to the sheet"
    )
    baselines: tuple[str, ...] = Field(
        ("age_sex", "tumour_volume", "radiomics"), description="classifiers shown beside every marker's own"
    )
    inner_folds: int = Field(
        3, ge=2, description="folds of the training patients on which threshold and temperature are chosen"
    )
    slices_per_case: int = Field(8, ge=1, description="axial slices with the largest predicted tumour area")
    image_size_px: int = Field(96, ge=32)
    bootstrap_samples: int = Field(1000, ge=100)
    permutation_samples: int = Field(1000, ge=100)
    subgroups: tuple[str, ...] = Field(
        ("sex", "age", "grade", "site"), description="columns to split the results by, where the sheet has them"
    )
    tta_copies: int = Field(
        4,
        ge=0,
        description="altered copies of a patient that the classifier is asked about too; no call is made when its "
        "answers lie on both sides of the threshold; 0 turns it off",
    )
    abstain_margin: float = Field(
        0.0, ge=0, lt=0.5, description="make no call for a patient whose probability is this near to the threshold"
    )
    subtype: SubtypeConfig | None = Field(None, description="integrate the markers into a subtype")
    grad_cam_cases: int = Field(4, ge=0, description="patients whose Grad-CAM maps are drawn, for each marker")
