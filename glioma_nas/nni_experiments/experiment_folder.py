"""Write an NNI experiment that ``nnictl create --config`` and ``glioma-nas nni create`` start as it is.

The folder holds ``config.yml``, ``search_space.json`` and ``code/`` (``trial.yaml`` and copies of local plugin files:
no data, no identifiers, because NNI copies it to every worker), and beside them what stays here: ``run/`` with the
prepared cohort and the latency table, ``trials/`` with checkpoints and results, ``experiments/`` with NNI's records.
"""

from __future__ import annotations

import math
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from glioma_nas.config import RunConfig
from glioma_nas.errors import ConfigError, did_you_mean
from glioma_nas.files import require_writable, sha256_file, write_json, write_text
from glioma_nas.nni_experiments.trial_settings import (
    ARCHITECTURE,
    CO_SEARCH,
    KINDS,
    MARKERS,
    OPERATOR_SEPARATOR,
    SETTINGS_FILE,
    WITHHELD_SALT,
    WITHHELD_SHEET,
    TrialSettings,
)
from glioma_nas.pipeline import MANIFEST, MIN_FREE_BYTES, Pipeline
from glioma_nas.progress import Progress
from glioma_nas.space_building import build_space

CONFIG_FILE = "config.yml"
SPACE_FILE = "search_space.json"
CODE_FOLDER = "code"
RUN_FOLDER = "run"
TRIALS_FOLDER = "trials"
EXPERIMENTS_FOLDER = "experiments"

TUNERS: dict[str, dict[str, Any]] = {
    "TPE": {"optimize_mode": "maximize"},
    "Evolution": {"optimize_mode": "maximize", "population_size": 16},
    "Random": {},
    "GridSearch": {},
}
"""NNI tuners that can sample choices, with the options they need; TPE and Evolution minimise unless told otherwise."""

CURVE_FITTING = "Curvefitting"
ASSESSORS: dict[str, dict[str, Any]] = {
    "Medianstop": {"optimize_mode": "maximize", "start_step": 5},
    CURVE_FITTING: {"epoch_num": 0, "start_step": 6, "threshold": 0.95},
}
"""NNI assessors that take a rising figure, with the options they need; ``epoch_num`` depends on the configuration."""

_HEADER = """\
# An NNI experiment ({kind}). Start it on the loopback address, and check that it stays there:
#   glioma-nas nni create {folder}
# This starts it as well, once `glioma-nas nni guard` was run in this Python environment. Before, NNI would listen on
# EVERY network interface without a password, and the trials refuse to run:
#   nnictl create --config {config}
# What is searched: search_space.json. What every trial is told: code/trial.yaml.
"""


@dataclass(frozen=True)
class ExperimentOptions:
    """What the user decides about an experiment.

    Attributes:
        kind: ``co-search`` (every trial runs a whole search with its hyper-parameters) or ``architecture`` (NNI's tuner
            samples the search space itself, every trial trains one network).
        trials: Trials in total.
        concurrency: Trials at a time.
        tuner: One of `TUNERS`.
        assessor: One of `ASSESSORS`, or none.
        seeds: Seeds that co-search trials choose from.
        strategies: Strategies that co-search trials choose from; empty for the configuration's own.
        operator_sets: Operator sets that co-search trials choose from; empty for the configuration's own.
        searched: Hyper-parameters that co-search trials vary, out of seed, latency_weight, target_latency_ms, strategy
            and operators; empty for all that have more than one value.
        target_latency_ms: T of Target(m), the figure that ranks trials.
        target_exponents: (a, b) of Target(m).
        markers: Markers whose AUC every trial measures.
        distil: Whether co-search trials train their teacher too, and their student with distillation.
        training_service: NNI's ``trainingService`` section; none for this machine.
        trial_python: Interpreter of the trial command; none for this one.
    """

    kind: str = CO_SEARCH
    trials: int = 20
    concurrency: int = 1
    tuner: str = "TPE"
    assessor: str | None = None
    seeds: int = 3
    strategies: tuple[str, ...] = ()
    operator_sets: tuple[tuple[str, ...], ...] = ()
    searched: tuple[str, ...] = ()
    target_latency_ms: float = 8.3
    target_exponents: tuple[float, float] = (-0.07, -0.07)
    markers: tuple[str, ...] = ()
    distil: bool = False
    training_service: Mapping[str, Any] | None = None
    trial_python: str | None = None
    strategy_options: Mapping[str, dict[str, Any]] = field(default_factory=dict)

    def check(self, config: RunConfig) -> None:
        """Find what cannot work before anything is written.

        Raises:
            ConfigError: A name is unknown or a number out of range.
        """
        for what, given, allowed in (
            ("kind", self.kind, KINDS),
            ("tuner", self.tuner, TUNERS),
            ("assessor", self.assessor, ASSESSORS),
        ):
            if given is not None and given not in allowed:
                raise ConfigError(f"unknown {what} '{given}': {did_you_mean(given, allowed)}")
        for name, number in (("trials", self.trials), ("concurrency", self.concurrency), ("seeds", self.seeds)):
            if number < 1:
                raise ConfigError(f"{name} is {number}; give at least 1")
        if not 0 < self.target_latency_ms < math.inf:
            raise ConfigError(f"target_latency_ms is {self.target_latency_ms:g}; give a time above 0 ms")
        for marker in self.markers:
            if marker not in config.classify.markers or marker not in MARKERS:
                raise ConfigError(
                    f"marker '{marker}': trials measure idh and ki67, and classify.markers of the configuration must "
                    f"hold it; it holds: {', '.join(config.classify.markers) or 'none'}"
                )
        if config.search.marker_weight > 0 and not self.markers:
            raise ConfigError(
                f"search.marker_weight is {config.search.marker_weight:g}: trials are ranked by markers too; name them "
                "(--marker idh), or set it to 0"
            )
        if self.kind == ARCHITECTURE and (self.strategies or self.operator_sets):
            raise ConfigError("strategies and operator sets are searched by co-search trials; leave them out here")
        if self.assessor == CURVE_FITTING and self.kind == CO_SEARCH:
            raise ConfigError(
                "assessor 'Curvefitting' forecasts one curve, and a co-search trial has one for each of its stages, so "
                "it would stop good trials in their search; take Medianstop, or kind architecture"
            )
        if self.distil and (self.kind == ARCHITECTURE or config.train.kd_weight == 0):
            raise ConfigError("only co-search trials with train.kd_weight above 0 can be distilled; leave --distil out")


def write_experiment(config: RunConfig, options: ExperimentOptions, folder: Path, *, progress: Progress) -> Path:
    """Prepare the data, measure the latency table, and write the experiment.

    Args:
        config: The run's configuration.
        options: See `ExperimentOptions`.
        folder: Where to write; a run folder inside it that is up to date is used again.
        progress: Where to report.

    Returns:
        The ``config.yml``.

    Raises:
        GliomaNasError: The configuration or the cohort is at fault.
    """
    from glioma_nas import registry

    options.check(config)
    for strategy in options.strategies:
        registry.strategies.get(strategy)
    folder = folder.resolve()
    require_writable(folder, free_bytes=MIN_FREE_BYTES)
    config = _with_all_operators(config, options)
    architectures = options.kind == ARCHITECTURE
    search_space = architecture_space(build_space(config)) if architectures else hyper_parameters(config, options)
    Pipeline(config, folder / RUN_FOLDER, progress).run(["preprocess", "latency"])

    code = folder / CODE_FOLDER
    plugins = _copy_plugins(config, code)
    settings = TrialSettings(
        kind=options.kind,
        run_folder=folder / RUN_FOLDER,
        trials_folder=folder / TRIALS_FOLDER,
        inputs={stage: sha256_file(folder / RUN_FOLDER / stage / MANIFEST) for stage in ("preprocess", "latency")},
        target_latency_ms=options.target_latency_ms,
        target_exponents=options.target_exponents,
        markers=options.markers,
        distil=options.distil,
        strategy_options=dict(options.strategy_options),
        config=shareable(config, plugins),
    )
    write_text(code / SETTINGS_FILE, yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False))
    write_json(folder / SPACE_FILE, search_space)
    header = _HEADER.format(kind=options.kind, folder=folder, config=folder / CONFIG_FILE)
    content = yaml.safe_dump(_nni_config(config, options, folder), sort_keys=False, width=120)
    write_text(folder / CONFIG_FILE, header + content)
    return folder / CONFIG_FILE


def architecture_space(space: Any) -> dict[str, Any]:
    """Render a model space as NNI's search space for tuners: one choice for each label.

    Raises:
        ConfigError: A choice is not of one value out of several, or its label holds a slash, which NNI's tuners read
            as nesting.
    """
    from nni.mutable import Categorical, CategoricalMultiple

    rendered = {}
    for label, mutable in space.simplify().items():
        single = isinstance(mutable, CategoricalMultiple) and mutable.n_chosen == 1
        if not single and not isinstance(mutable, Categorical):
            raise ConfigError(f"'{label}' is a {type(mutable).__name__}; NNI's tuners sample choices of one value")
        if "/" in label:
            raise ConfigError(f"label '{label}' holds a slash; rename it")
        rendered[label] = {"_type": "choice", "_value": list(mutable.values)}
    return rendered


def hyper_parameters(config: RunConfig, options: ExperimentOptions) -> dict[str, Any]:
    """Return NNI's search space of co-search trials.

    Raises:
        ConfigError: ``options.searched`` names something else.
    """
    weight = config.search.latency_weight
    space: dict[str, Any] = {"seed": _choice(range(config.seed, config.seed + options.seeds))}
    # λ over two orders of magnitude round the configured one; a configured 0 stays 0.
    space["latency_weight"] = (
        {"_type": "loguniform", "_value": [weight / 10, weight * 10]} if weight > 0 else _choice([weight])
    )
    target = options.target_latency_ms
    space["target_latency_ms"] = _choice([round(target * factor, 4) for factor in (0.5, 1.0, 2.0)])
    space["strategy"] = _choice(options.strategies or (config.search.strategy,))
    if options.operator_sets:
        space["operators"] = _choice([OPERATOR_SEPARATOR.join(names) for names in options.operator_sets])
    for name in options.searched:
        if name not in space:
            raise ConfigError(f"hyper-parameter '{name}': {did_you_mean(name, space)}")
    return {name: item for name, item in space.items() if name in (options.searched or space)}


def _choice(values: Sequence[Any]) -> dict[str, Any]:
    return {"_type": "choice", "_value": list(values)}


def _with_all_operators(config: RunConfig, options: ExperimentOptions) -> RunConfig:
    """Return the configuration whose latency table covers every operator that a trial may use."""
    if not options.operator_sets:
        return config
    names = list(dict.fromkeys(name for names in options.operator_sets for name in names))
    search = config.search.model_copy(update={"space_options": {**config.search.space_options, "operators": names}})
    return config.model_copy(update={"search": search})


def shareable(config: RunConfig, plugins: Sequence[str]) -> dict[str, Any]:
    """Return the configuration as the trials get it, on whatever worker.

    Name and place of the files that tell who the patients are, are nobody else's business, and no trial reads them.

    Args:
        config: The run's configuration.
        plugins: Plugin files, relative to the code folder.
    """
    data = config.model_dump(mode="json")
    data["cohort"] |= {"sheet": WITHHELD_SHEET, "clinical": None, "salt_file": WITHHELD_SALT}
    data["folds"]["file"] = None
    data["classify"]["mask_provenance"] = None
    data["plugins"] = list(plugins)
    return data


def _copy_plugins(config: RunConfig, code: Path) -> list[str]:
    target = code / "plugins"
    if target.is_dir():
        shutil.rmtree(target)
    copies: dict[Path, Path] = {}
    for number, plugin in enumerate(dict.fromkeys(config.plugins)):
        # A second file of the same name gets a folder of its own.
        taken = target / plugin.name in copies.values()
        copies[plugin] = target / (f"{number}/{plugin.name}" if taken else plugin.name)
        copies[plugin].parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(plugin, copies[plugin])
    return [copy.relative_to(code).as_posix() for copy in copies.values()]


def _nni_config(config: RunConfig, options: ExperimentOptions, folder: Path) -> dict[str, Any]:
    remote = options.training_service is not None
    python = options.trial_python or ("python3" if remote else sys.executable)
    content: dict[str, Any] = {
        "experimentName": f"{config.report.title} ({options.kind})",
        "searchSpaceFile": SPACE_FILE,
        "trialCommand": f"{shlex.quote(python)} -m glioma_nas nni trial {SETTINGS_FILE}",
        "trialCodeDirectory": CODE_FOLDER,
        "trialConcurrency": options.concurrency,
        "maxTrialNumber": options.trials,
        "experimentWorkingDirectory": EXPERIMENTS_FOLDER,
        # No seed: with one, TPE draws the same samples again after a resume.
        "tuner": {"name": options.tuner, "classArgs": TUNERS[options.tuner]},
    }
    if options.assessor is not None:
        arguments = dict(ASSESSORS[options.assessor])
        if options.assessor == CURVE_FITTING:
            arguments["epoch_num"] = config.train.epochs
        content["assessor"] = {"name": options.assessor, "classArgs": arguments}
    content["trainingService"] = dict(options.training_service or {"platform": "local"})
    if remote:
        content["nniManagerIp"] = content["trainingService"].pop("nniManagerIp", "127.0.0.1")
    return content
