"""The configuration of a run: one YAML file, every key checked, units in the names.

Unknown keys are errors with a suggestion. Relative paths are taken from the folder of the YAML file. The resolved
configuration, defaults filled in, is written to the run folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from glioma_nas.errors import ConfigError, did_you_mean


class Section(BaseModel):
    """Base of every section: unknown keys are refused, values cannot be changed afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class CohortConfig(Section):
    """Which patients and which of their files."""

    sheet: Path = Field(description="CSV with one row per case; paths inside are relative to it")
    sequences: tuple[str, ...] = Field(
        ("t1ce", "flair"), min_length=1, description="sequences the segmentation network sees, in channel order"
    )
    missing_sequence: Literal["error", "exclude", "zero"] = Field(
        "error", description="what to do with a case that lacks one: stop, leave the case out, or feed a zero channel"
    )
    mask_labels: tuple[int, ...] = Field(
        (1, 2, 3, 4), description="mask values that count as tumour; any other non-zero value is an error"
    )

    @field_validator("sequences")
    @classmethod
    def _unique(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) != len(value):
            raise ValueError(f"sequences repeat: {', '.join(value)}")
        return value


class PreprocessConfig(Section):
    """From scans to normalised axial slices."""

    steps: tuple[str, ...] = Field(
        ("orient", "zscore", "crop_pad", "resize"), description="registered preprocess steps, in order"
    )
    crop_size_px: int = Field(224, ge=32, description="side of the square around the brain, in native pixels")
    image_size_px: int = Field(224, ge=32, description="side of the slices the networks see")
    min_tumour_px: int = Field(
        10, ge=0, description="tumour pixels, at the networks' size, below which a slice counts as free of tumour"
    )
    workers: int = Field(2, ge=1, description="processes")


class FoldsConfig(Section):
    """Patient-level cross-validation."""

    n_folds: int = Field(5, ge=2)
    stratify_by: tuple[str, ...] | None = Field(
        None, description="label columns kept balanced over the folds where known; none: the markers' columns"
    )


class LatencyConfig(Section):
    """How inference time is measured."""

    backend: str = Field("onnxruntime", description="registered latency backend")
    threads: int = Field(2, ge=1)
    warmup_runs: int = Field(3, ge=0)
    runs: int = Field(20, ge=1, description="timed runs of a table entry; the median counts")
    network_runs: int = Field(50, ge=1, description="timed runs of a whole network")


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
    latency_weight: float = Field(0.01, ge=0, description="λ of eq. 4-11, per millisecond; acts on the student only")
    tumour_slice_fraction: float = Field(0.7, ge=0, le=1, description="share of drawn slices that show tumour")


class TrainConfig(Section):
    """Train teacher, student and baselines from scratch, once for every fold."""

    epochs: int = Field(100, ge=1)
    steps_per_epoch: int | None = Field(None, ge=1)
    batch_size: int = Field(8, ge=1)
    learning_rate: float = Field(0.01, gt=0)
    weight_decay: float = Field(5e-4, ge=0)
    loss: str = Field("dice_ce", description="focal, dice_ce or ohem")
    tumour_slice_fraction: float = Field(0.7, ge=0, le=1)
    augment: bool = True
    kd_weight: float = Field(
        1.0, ge=0, description="weight of KL(teacher || student) per pixel; 0 switches distillation off"
    )
    kd_temperature: float = Field(1.0, gt=0)
    kd_direction: Literal["teacher_student", "student_teacher"] = "teacher_student"
    baselines: tuple[str, ...] = Field((), description="registered networks trained with the student's budget")
    baseline_options: dict[str, dict[str, Any]] = Field(default_factory=dict)


class ExportConfig(Section):
    """Write the student as an ONNX file and prove that it computes the same."""

    opset: int = Field(17, ge=13, le=20, description="ONNX operator set; what the exporter can write")
    max_abs_logit_difference: float = Field(1e-3, gt=0)
    min_mask_dice: float = Field(0.999, gt=0, le=1)
    parity_slices: int = Field(16, ge=1, description="real slices the engines are compared on")


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


class ReportConfig(Section):
    """The HTML report."""

    title: str = "glioma_nas run"
    overlay_cases: int = Field(6, ge=1, description="cases shown with mask overlays, from best to worst Dice")


class RunConfig(Section):
    """Everything one run needs."""

    seed: int = Field(0, ge=0, lt=2**31)
    plugins: tuple[Path, ...] = Field((), description="local plugin files")
    device: str = Field("cpu", description="cpu, cuda, cuda:1 …; never chosen silently")
    cohort: CohortConfig
    preprocess: PreprocessConfig = PreprocessConfig()
    folds: FoldsConfig = FoldsConfig()
    latency: LatencyConfig = LatencyConfig()
    search: SearchConfig = SearchConfig()
    train: TrainConfig = TrainConfig()
    export: ExportConfig = ExportConfig()
    classify: ClassifyConfig = ClassifyConfig()
    report: ReportConfig = ReportConfig()

    def to_yaml(self) -> str:
        """Render every key, defaults included, as YAML that `load_config` reads back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file and apply ``a.b=value`` overrides, whose values are YAML too.

    Raises:
        ConfigError: The file is missing or not YAML, or a key or value is not allowed; one line that says what is.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as err:
        raise ConfigError(f"{path}: {err.strerror or err}; give the path of a YAML configuration") from err
    except UnicodeDecodeError as err:
        raise ConfigError(f"{path}: not UTF-8 text (byte {err.start}); save it as UTF-8") from err
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as err:
        raise ConfigError(f"{path}: not valid YAML ({' '.join(str(err).split())})") from err
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping of keys at the top, got {type(data).__name__}")
    for override in overrides:
        _apply_override(data, override)
    return parse_config(data, source=str(path), folder=path.resolve().parent)


def parse_config(data: Mapping[str, Any], *, source: str, folder: Path) -> RunConfig:
    """Check plain data; relative paths are taken from ``folder``, and ``source`` names the data in messages.

    Raises:
        ConfigError: See `load_config`.
    """
    try:
        config = RunConfig.model_validate(data)
    except ValidationError as err:
        raise ConfigError(f"{source}: {_first_problem(err)}") from err
    sheet = (folder / config.cohort.sheet.expanduser()).resolve()
    plugins = tuple((folder / plugin.expanduser()).resolve() for plugin in config.plugins)
    return config.model_copy(update={"cohort": config.cohort.model_copy(update={"sheet": sheet}), "plugins": plugins})


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"--set {override}: expected key=value, for example train.epochs=20")
    *parents, last = key.strip().split(".")
    target = data
    for parent in parents:
        child = target.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set {override}: '{parent}' is a value, not a section")
        target = child
    try:
        target[last] = yaml.safe_load(value)
    except yaml.YAMLError as err:
        raise ConfigError(f"--set {override}: the value is not valid YAML") from err


def _first_problem(error: ValidationError) -> str:
    problems = error.errors(include_url=False)
    # A misspelt key is the likelier cause of a missing one, so it is told first.
    problem = next((item for item in problems if item["type"] == "extra_forbidden"), problems[0])
    location = ".".join(str(part) for part in problem["loc"]) or "configuration"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if problem["type"] == "extra_forbidden":
        *parents, key = problem["loc"]
        return f"unknown key '{location}': {did_you_mean(str(key), _allowed_keys(tuple(parents)))}{more}"
    if problem["type"] == "missing":
        return f"missing key '{location}'{more}"
    return f"'{location}' is {problem.get('input')!r}: {problem['msg']}{more}"


def _allowed_keys(location: tuple[int | str, ...]) -> list[str]:
    model: type[BaseModel] = RunConfig
    for part in location:
        found = model.model_fields.get(str(part))
        annotation: Any = found.annotation if found else MarkerConfig
        model = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else MarkerConfig
    return list(model.model_fields)
