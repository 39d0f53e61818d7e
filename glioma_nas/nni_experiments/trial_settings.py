"""What a trial is told beside its hyper-parameters: ``trial.yaml`` in the experiment's code folder.

It holds no data and no identifiers: the configuration of the run without its cohort sheet, and where the prepared
cohort and the latency table lie. On a worker with other paths the two environment variables named here replace them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError

from glioma_nas import registry
from glioma_nas.config import RunConfig, Section, parse_config
from glioma_nas.errors import ConfigError, StorageError, did_you_mean
from glioma_nas.files import canonical_json, sha256_file, sha256_text
from glioma_nas.pipeline import MANIFEST
from glioma_nas.registry import load_file
from glioma_nas.space_building import options_of

SETTINGS_FILE = "trial.yaml"
RUN_VARIABLE = "GLIOMA_NAS_NNI_RUN"
TRIALS_VARIABLE = "GLIOMA_NAS_NNI_TRIALS"
WITHHELD_SHEET = "withheld.csv"
WITHHELD_SALT = "withheld.salt"

CO_SEARCH = "co-search"
ARCHITECTURE = "architecture"
KINDS = (CO_SEARCH, ARCHITECTURE)
MARKERS = ("idh", "ki67")
"""Markers whose AUC a trial may measure."""

_SHORT_NAMES = {
    "seed": "seed",
    "latency_weight": "search.latency_weight",
    "strategy": "search.strategy",
    "operators": "search.space_options.operators",
    "target_latency_ms": "search.strategy_options.target_latency_ms",
}
OPERATOR_SEPARATOR = "+"


class TrialSettings(Section):
    """The content of ``trial.yaml``."""

    kind: Literal["co-search", "architecture"]
    run_folder: Path = Field(description="holds the finished folders preprocess/ and latency/")
    trials_folder: Path = Field(description="where trials keep checkpoints and results, one folder each")
    inputs: dict[str, str] = Field(description="stage → hash of its manifest when the experiment was written")
    target_latency_ms: float = Field(gt=0, description="T of Target(m), the figure that trials are ranked by")
    target_exponents: tuple[float, float]
    markers: tuple[str, ...] = Field((), description="markers whose AUC each trial measures; costs a classifier each")
    distil: bool = Field(False, description="train each trial's teacher too, and its student with distillation")
    strategy_options: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="options of strategies other than the configuration's own, by name"
    )
    config: dict[str, Any] = Field(description="configuration of the run, without its cohort sheet")

    @property
    def stages(self) -> tuple[str, ...]:
        """What a trial trains, in order; their numbers are part of every intermediate result."""
        return ("search", "teacher", "train") if self.distil else ("search", "train")

    @property
    def marker_weight(self) -> float:
        """Share of the markers' AUC in what ranks trials; `run_config` lets no hyper-parameter change it."""
        return float(self.config["search"].get("marker_weight", 0.0))

    def stage_folder(self, stage: str) -> Path:
        """Return the folder of a finished stage.

        Raises:
            StorageError: It is missing, or is not the one that the experiment was written for.
        """
        folder = Path(os.environ.get(RUN_VARIABLE) or self.run_folder) / stage
        manifest = folder / MANIFEST
        if not manifest.is_file():
            raise StorageError(
                f"{folder}: no finished '{stage}' stage; mount the shared folder there, or set {RUN_VARIABLE}"
            )
        if sha256_file(manifest) != self.inputs[stage]:
            raise StorageError(
                f"{folder}: not the '{stage}' stage that this experiment was written for; run `glioma-nas nni config` "
                "again"
            )
        return folder

    def work_folder(self, parameters: Mapping[str, Any]) -> Path:
        """Return the folder of the trial with these hyper-parameters: the same ones find the same folder again."""
        content = self.model_dump(mode="json", exclude={"run_folder", "trials_folder"})
        key = sha256_text(canonical_json({"settings": content, "parameters": dict(parameters)}))[:16]
        return Path(os.environ.get(TRIALS_VARIABLE) or self.trials_folder) / key

    def run_config(self, parameters: Mapping[str, Any], *, folder: Path) -> RunConfig:
        """Return the configuration of one trial.

        Args:
            parameters: Of a co-search trial: ``seed``, ``latency_weight``, ``target_latency_ms`` (of strategies that
                have such an option), ``strategy``, ``operators`` (names joined by +), or any key of the configuration,
                dotted. An architecture trial's choices are no configuration: give an empty mapping.
            folder: Folder that relative plugin paths are taken from.

        Raises:
            ConfigError: A hyper-parameter is no key, or its value is not allowed.
        """
        data = _deep_copy(self.config)
        for plugin in data.get("plugins", []):  # first, because hyper-parameters may name what they register
            load_file(folder / plugin)
        own_strategy = data["search"]["strategy"]
        for name, value in parameters.items():
            if name.startswith("search.marker_"):
                raise ConfigError(f"hyper-parameter '{name}': trials are ranked by it, so it is the same for all")
            if name not in _SHORT_NAMES and "." not in name:
                raise ConfigError(
                    f"hyper-parameter '{name}': {did_you_mean(name, _SHORT_NAMES)} Or a dotted key, search.batch_size."
                )
            if name == "operators":
                value = str(value).split(OPERATOR_SEPARATOR)
            if name != "target_latency_ms":
                _set(data, _SHORT_NAMES.get(name, name), value)
        strategy = data["search"]["strategy"]
        if strategy != own_strategy:
            data["search"]["strategy_options"] = dict(self.strategy_options.get(strategy, {}))
        if "target_latency_ms" in parameters and "target_latency_ms" in options_of(registry.strategies.get(strategy)):
            _set(data, _SHORT_NAMES["target_latency_ms"], parameters["target_latency_ms"])
        return parse_config(data, source="hyper-parameters", folder=folder)


def load_trial_settings(path: Path) -> TrialSettings:
    """Read ``trial.yaml``.

    Raises:
        ConfigError: It is missing, no YAML, or holds other keys.
    """
    try:
        return TrialSettings.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as err:
        raise ConfigError(f"{path}: {err.strerror or err}; write it with `glioma-nas nni config`") from err
    except yaml.YAMLError as err:
        raise ConfigError(f"{path}: not valid YAML ({' '.join(str(err).split())})") from err
    except ValidationError as err:
        problem = err.errors(include_url=False)[0]
        where = ".".join(str(part) for part in problem["loc"]) or "content"
        raise ConfigError(f"{path}: '{where}': {problem['msg']}; write it with `glioma-nas nni config`") from err


def _deep_copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _deep_copy(item) for key, item in value.items()}
    return [_deep_copy(item) for item in value] if isinstance(value, list | tuple) else value


def _set(data: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        data = data.setdefault(parent, {})
    data[last] = value
