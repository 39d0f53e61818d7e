"""Configuration of the inputs: cohort, preprocessing, folds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, field_validator, model_validator

from glioma_nas.config.section import Section

# Files are named after sequences, so a sequence must not lead out of their folder.
SequenceName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]


class CohortConfig(Section):
    """Which patients and which of their files."""

    sheet: Path = Field(
        description="sheet (.csv, .tsv, .xlsx) with one row per case, or a BIDS, BraTS or nnU-Net folder, or one that "
        "`cohort import-dicom` filled"
    )
    format: Literal["auto", "sheet", "bids", "brats", "nnunet"] = Field(
        "auto", description="what a folder is; auto goes by the files in it"
    )
    columns: dict[str, str] = Field(
        default_factory=dict, description="our name: heading in the sheet, where headings are not recognised"
    )
    clinical: Path | None = Field(
        None, description="sheet that adds age, sex, labels and patient_id to the cases, by case_id or else patient_id"
    )
    follow_links: bool = Field(False, description="allow links that lead out of the cohort's folder")
    hash_ids: bool = Field(
        False, description="replace case and patient ids by pseudonyms everywhere: folders, logs, reports"
    )
    salt_file: Path = Field(
        Path("glioma_nas.salt"), description="secret that makes the pseudonyms, made if absent; keep it, share it never"
    )
    sequences: tuple[SequenceName, ...] = Field(
        ("t1ce", "flair"), min_length=1, description="sequences the segmentation network sees, in channel order"
    )
    missing_sequence: Literal["error", "exclude", "zero", "indicator", "drop"] = Field(
        "error",
        description="when a case lacks one: stop, leave the case out, feed a zero channel, do so and tell the networks "
        "by a channel for each sequence, or drop the sequence from the whole run",
    )
    dropped_sequences: tuple[str, ...] = Field(
        (), description="sequences that missing_sequence: drop took out; the run fills this in"
    )
    mask_labels: tuple[int, ...] = Field(
        (1, 2, 3, 4), description="mask values that count as tumour; any other non-zero value is an error"
    )

    @property
    def channels(self) -> tuple[str, ...]:
        """Input channels of the segmentation networks: the sequences, and their indicators if there are any."""
        return (*self.sequences, *(indicator_of(name) for name in self.sequences if self.has_indicators))

    @property
    def has_indicators(self) -> bool:
        """Whether a channel for each sequence says that a case has it."""
        return self.missing_sequence == "indicator"

    @property
    def feeds_zeros(self) -> bool:
        """Whether a missing sequence becomes a channel of zeros."""
        return self.missing_sequence in ("zero", "indicator")

    @field_validator("sequences")
    @classmethod
    def _unique(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) != len(value):
            raise ValueError(f"sequences repeat: {', '.join(value)}")
        return value


_INDICATOR = "_is_present"


def indicator_of(sequence: str) -> str:
    """Return the name of the channel that is 1 inside the brain where a case has ``sequence``, and 0 where not."""
    return f"{sequence}{_INDICATOR}"


def indicated_by(channel: str) -> str | None:
    """Return the sequence that an indicator channel speaks of, or None for any other channel."""
    return channel.removesuffix(_INDICATOR) if channel.endswith(_INDICATOR) else None


class PreprocessConfig(Section):
    """From scans to normalised axial slices."""

    steps: tuple[str, ...] = Field(
        ("orient", "zscore", "crop_pad", "resize"),
        min_length=1,
        description="registered preprocess steps, in order; raw scans need more, see docs/preprocessing.md",
    )
    step_options: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="keyword arguments of steps, by step name"
    )
    reference: str | None = Field(
        None, description="sequence the others are brought to; none: t1ce, or the first there is where it is missing"
    )
    mask_sequence: str | None = Field(
        None, description="sequence the masks were drawn on; none: told by its grid, the reference first"
    )
    crop_size_px: int = Field(224, ge=32, description="side of the square around the brain, in native pixels")
    image_size_px: int = Field(224, ge=32, description="side of the slices the networks see")
    min_tumour_px: int = Field(
        10, ge=0, description="tumour pixels, at the networks' size, below which a slice counts as free of tumour"
    )
    training_slices: Literal["all", "brain", "tumour"] = Field(
        "all", description="slices that may be trained on, by area; every slice is predicted all the same"
    )
    max_failed_share: float = Field(
        0.5, ge=0, lt=1, description="share of cases that cannot be prepared from which the stage fails"
    )
    workers: int = Field(2, ge=1, description="processes; the result is the same for any number")

    def option_files(self) -> list[Path]:
        """Return the files that options of steps name, such as landmarks; their contents count, not their names."""
        values = [value for options in self.step_options.values() for value in options.values()]
        return sorted(Path(value) for value in values if isinstance(value, str) and Path(value).is_file())

    @model_validator(mode="after")
    def _options_of_steps(self) -> PreprocessConfig:
        for name in self.step_options:
            if name not in self.steps:
                raise ValueError(f"step_options names '{name}', which is not one of the steps {', '.join(self.steps)}")
        if len(set(self.steps)) != len(self.steps):
            raise ValueError(f"steps repeat: {', '.join(self.steps)}")
        return self


class FoldsConfig(Section):
    """Patient-level cross-validation."""

    n_folds: int = Field(5, ge=2)
    stratify_by: tuple[str, ...] | None = Field(
        None,
        description="label columns kept balanced over the folds where known; none: the markers' columns, and the site "
        "where the cohort has that column",
    )
    site_column: str = Field("site", description="column whose values are balanced jointly with the labels")
    repeats: int = Field(1, ge=1, description="complete cross-validations that are drawn and written")
    use_repeat: int = Field(0, ge=0, description="the repeat this run uses, from 0")
    inner_folds: int | None = Field(None, ge=2, description="folds of each fold's training patients; none: not drawn")
    file: Path | None = Field(
        None, description="folds.json of another run or nnU-Net's splits_final.json, used instead of drawing"
    )
