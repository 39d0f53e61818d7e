"""The whole configuration: its sections, and how a file becomes one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from glioma_nas.config.augmentation import AugmentationConfig
from glioma_nas.config.cohort import CohortConfig, FoldsConfig, PreprocessConfig
from glioma_nas.config.latency import ExportConfig, LatencyConfig
from glioma_nas.config.markers import ClassifyConfig, MarkerConfig
from glioma_nas.config.search import SearchConfig, TrainConfig
from glioma_nas.config.section import Section
from glioma_nas.errors import ConfigError, did_you_mean

_SectionT = TypeVar("_SectionT", bound=Section)
_PATH_OPTIONS = ("weights", "landmarks")
"""Options of preprocess steps that are paths, taken from the folder of the file like every other."""


class ReportConfig(Section):
    """The HTML report."""

    title: str = "glioma_nas run"
    overlay_cases: int = Field(6, ge=1, description="cases shown with mask overlays, from best to worst Dice")
    evaluations: tuple[Path, ...] = Field((), description="folders of `evaluate`: this run on patients from elsewhere")
    comparisons: tuple[Path, ...] = Field((), description="folders of `compare`: other seeds, on this run's folds")


class RunConfig(Section):
    """Everything one run needs."""

    seed: int = Field(0, ge=0, lt=2**31)
    plugins: tuple[Path, ...] = Field((), description="local plugin files")
    device: str = Field("cpu", description="cpu, cuda, cuda:1 …; never chosen silently")
    search_for_another_device: bool = Field(
        False, description="take a latency table that was measured elsewhere: search here for that device"
    )
    cohort: CohortConfig
    preprocess: PreprocessConfig = PreprocessConfig()
    folds: FoldsConfig = FoldsConfig()
    latency: LatencyConfig = LatencyConfig()
    search: SearchConfig = SearchConfig()
    train: TrainConfig = TrainConfig()
    augmentation: AugmentationConfig = AugmentationConfig()
    export: ExportConfig = ExportConfig()
    classify: ClassifyConfig = ClassifyConfig()
    report: ReportConfig = ReportConfig()

    @model_validator(mode="after")
    def _markers_to_rank_by(self) -> RunConfig:
        if self.search.marker_weight > 0 and not self.classify.markers:
            raise ValueError("search.marker_weight needs classify.markers; add a marker, or set the weight to 0")
        return self

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
    paths = {name: getattr(config.cohort, name) for name in ("sheet", "clinical", "salt_file")}
    paths = {name: (folder / path.expanduser()).resolve() for name, path in paths.items() if path is not None}
    plugins = tuple((folder / plugin.expanduser()).resolve() for plugin in config.plugins)
    return config.model_copy(
        update={
            "cohort": config.cohort.model_copy(update=paths),
            "preprocess": config.preprocess.model_copy(update={"step_options": _resolved(config.preprocess, folder)}),
            "plugins": plugins,
            "latency": _with_path(config.latency, "shared_table", folder),
            "search": _with_path(config.search, "latency_calibration", folder),
            "report": config.report.model_copy(
                update={
                    key: tuple((folder / path.expanduser()).resolve() for path in getattr(config.report, key))
                    for key in ("evaluations", "comparisons")
                }
            ),
        }
    )


def _with_path(section: _SectionT, key: str, folder: Path) -> _SectionT:
    path = getattr(section, key)
    return section if path is None else section.model_copy(update={key: (folder / path.expanduser()).resolve()})


def _resolved(config: PreprocessConfig, folder: Path) -> dict[str, dict[str, Any]]:
    return {
        step: {
            key: str((folder / Path(value).expanduser()).resolve()) if key in _PATH_OPTIONS else value
            for key, value in options.items()
        }
        for step, options in config.step_options.items()
    }


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
