"""Start, find, resume and stop the NNI manager, the Node process behind the web UI of one experiment.

The order is what makes it safe: the process starts with the loopback script, its sockets are looked at, and only then
does it get the experiment and may run anything.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import sqlite3
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from glioma_nas.errors import ConfigError, ExperimentError, StorageError
from glioma_nas.nni_experiments.experiment_folder import CONFIG_FILE, EXPERIMENTS_FOLDER
from glioma_nas.nni_experiments.loopback import LOOPBACK, checked_host
from glioma_nas.nni_experiments.manager_process import (
    checked_port,
    end_leftovers,
    end_process,
    free_port,
    is_free,
    kill_process,
    kill_tree,
    last_line,
    one_start_at_a_time,
    refuse_exposure,
    runs,
    spawn,
    wait_until_up,
)
from glioma_nas.nni_experiments.remote_workers import unguarded_workers

_logger = logging.getLogger(__name__)

STOP_TIMEOUT_S = 60.0
ERROR_STOP_TIMEOUT_S = 10.0
"""After an error, such as a full disk, NNI's manager often does not end by itself any more."""

MIN_FREE_BYTES = 500_000_000
"""NNI's records, every trial's output and one checkpoint for each running trial."""

_PORT_ATTEMPTS = 5
_UNKNOWN_PORT = (
    "at a port that is not known, because NNI's list has lost it; `glioma-nas nni stop` ends it, then `nni resume` "
    "continues it"
)
_CONTROL_CHANNEL_PLATFORMS = ("remote", "hybrid", "kubeflow", "frameworkcontroller", "openpai", "adl")


@dataclass(frozen=True)
class RunningExperiment:
    """A manager that was started.

    Attributes:
        id: NNI's id of the experiment.
        port: Port of the web UI.
        pid: Process id of the manager.
        host: Address it listens on.
        folder: Where NNI keeps its records of this and other experiments; none when that is not known.
    """

    id: str
    port: int
    pid: int
    host: str = LOOPBACK
    folder: Path | None = None

    @property
    def url(self) -> str:
        """Address of the web UI."""
        address = ipaddress.ip_address(self.host)
        host = LOOPBACK if address.is_unspecified else f"[{address}]" if address.version == 6 else str(address)
        return f"http://{host}:{self.port}"

    def is_alive(self) -> bool:
        """Tell whether the manager's process exists, although it may be too busy to answer."""
        return is_alive({"id": self.id, "pid": self.pid})

    def status(self) -> str:
        """Return NNI's word: RUNNING, NO_MORE_TRIAL, DONE, ERROR, STOPPING …; ``DEAD`` when nobody answers."""
        from nni.experiment import rest

        try:
            return str(rest.get(self.port, "/check-status")["status"])
        except OSError:
            return "DEAD"

    def trials(self) -> list[dict[str, Any]]:
        """Return the trials as NNI's REST interface describes them.

        Raises:
            ExperimentError: The manager does not answer.
        """
        from nni.experiment import rest

        try:
            return list(rest.get(self.port, "/trial-jobs"))
        except OSError as err:
            raise ExperimentError(
                f"experiment {self.id}: the NNI manager does not answer; `glioma-nas nni resume {self.id}` continues it"
            ) from err


def create(config_file: Path, *, port: int | None = None, host: str = LOOPBACK) -> RunningExperiment:
    """Start a new experiment.

    Args:
        config_file: ``config.yml``, or the folder that holds it.
        port: Port of the web UI; none for the first free one from 8080.
        host: Address to listen on.

    Raises:
        ConfigError: The configuration or the search space is at fault.
        StorageError: The disk is nearly full.
        ExperimentError: The port is taken, the manager does not start, or it listens where it must not.
    """
    from nni.experiment.management import generate_experiment_id

    host = checked_host(host)
    config = load_nni_config(config_file)
    return _start("create", generate_experiment_id(), config, port=port, host=host)


def resume(experiment: str, *, port: int | None = None, host: str = LOOPBACK) -> RunningExperiment:
    """Continue an experiment that was stopped or whose manager died, on a fresh port.

    What a dead manager left running is ended first; interrupted trials continue from their checkpoints.

    Args:
        experiment: See `find`.
        port: As in `create`.
        host: As in `create`.

    Raises:
        ExperimentError: No such experiment, it is running, or see `create`.
        StorageError: Its records are damaged or the disk is nearly full.
    """
    from nni.experiment.config import ExperimentConfig

    host = checked_host(host)
    record = find(experiment)
    experiment_id = str(record["id"])
    if is_alive(record):
        where = _UNKNOWN_PORT if record.get("port") is None else f"at port {record['port']}; nothing to resume"
        raise ExperimentError(f"experiment {experiment_id} is running {where}")
    end_leftovers(experiment_id)
    config = ExperimentConfig(**_stored_config(experiment_id, Path(record["logDir"])))
    return _start("resume", experiment_id, config, port=port, host=host)


def stop(experiment: str) -> str:
    """Stop an experiment with its trials; finished trials and checkpoints stay.

    Args:
        experiment: See `find`.

    Returns:
        Its id.

    Raises:
        ExperimentError: No such experiment.
    """
    record = find(experiment)
    experiment_id = str(record["id"])
    _mark_stopped(experiment_id)  # first, so that whoever waits for the experiment knows why its manager goes
    manager = _process_of(record)
    patience_s = ERROR_STOP_TIMEOUT_S if record["status"] == "ERROR" else STOP_TIMEOUT_S
    if manager is not None and not end_process(manager, patience_s):
        _logger.warning("experiment %s does not stop by itself and is killed", experiment_id)
        kill_process(manager, STOP_TIMEOUT_S)
    end_leftovers(experiment_id)
    _mark_stopped(experiment_id)
    return experiment_id


def records() -> list[dict[str, Any]]:
    """Return NNI's list of this user's experiments, newest first."""
    from nni.tools.nnictl.config_utils import Experiments

    known = Experiments().get_all_experiments().values()
    return sorted((dict(item) for item in known), key=lambda item: item["startTime"], reverse=True)


def find(experiment: str) -> dict[str, Any]:
    """Return one experiment of `records`.

    Args:
        experiment: Its id, ``latest`` for the newest, or the folder that it was created from.

    Raises:
        ExperimentError: There is none.
    """
    known = records()
    if experiment == "latest" and known:
        return known[0]
    folder = Path(experiment).resolve() / EXPERIMENTS_FOLDER
    for item in known:
        if item["id"] == experiment or Path(item["logDir"]) == folder:
            return item
    forgotten = _forgotten(folder)
    if forgotten is not None:
        return forgotten
    listed = ", ".join(item["id"] for item in known[:5]) or "none"
    raise ExperimentError(f"no NNI experiment '{experiment}'; the latest are: {listed}")


def _forgotten(folder: Path) -> dict[str, Any] | None:
    """Describe the newest experiment with records in a folder, though NNI's list, lost on a full disk, lacks it."""
    # Resolved, because nnictl makes a link to the latest experiment.
    databases = sorted({path.resolve() for path in folder.glob("*/db/nni.sqlite")}, key=lambda p: p.stat().st_mtime_ns)
    if not databases:
        return None
    experiment_id = databases[-1].parent.parent.name
    managers = (item for item in psutil.process_iter(["cmdline"]) if experiment_id in (item.info["cmdline"] or ()))
    pid = next((item.pid for item in managers if item.pid != os.getpid()), None)
    return {"id": experiment_id, "logDir": str(folder), "pid": pid, "port": None, "status": "UNKNOWN"}


def is_alive(record: dict[str, Any]) -> bool:
    """Tell whether the manager of an experiment runs."""
    return _process_of(record) is not None


def _process_of(record: dict[str, Any]) -> psutil.Process | None:
    """Return the manager of an experiment, if it runs: it, not another process that got its number since."""
    try:
        process = psutil.Process(int(record["pid"]))
        return process if runs(process) and record["id"] in process.cmdline() else None
    except (psutil.NoSuchProcess, psutil.AccessDenied, KeyError, TypeError, ValueError):
        return None


def running(record: dict[str, Any]) -> RunningExperiment:
    """Return the handle of an experiment of `records`.

    Raises:
        ExperimentError: Its port is not known.
    """
    if record.get("port") is None:
        raise ExperimentError(f"experiment {record['id']} is running {_UNKNOWN_PORT}")
    return RunningExperiment(str(record["id"]), int(record["port"]), int(record["pid"]), folder=Path(record["logDir"]))


def load_nni_config(config_file: Path) -> Any:  # NNI's ExperimentConfig, which is untyped
    """Read and check ``config.yml`` and the search space it names.

    Raises:
        ConfigError: A file is missing or no YAML or JSON, or NNI refuses what is in it.
    """
    import yaml
    from nni.common.hpo_utils import validate_search_space
    from nni.experiment.config import ExperimentConfig

    path = config_file / CONFIG_FILE if config_file.is_dir() else config_file
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; write one with `glioma-nas nni config`")
    try:
        config = ExperimentConfig.load(path).canonical_copy()
    except (ValueError, TypeError, AttributeError, AssertionError, KeyError, OSError, yaml.YAMLError) as err:
        raise ConfigError(f"{path}: NNI cannot use it: {' '.join(str(err).split()) or type(err).__name__}") from err
    try:
        validate_search_space(config.search_space, raise_exception=True)
        _refuse_empty_choices(config.search_space)
    except (ValueError, TypeError, AttributeError, KeyError) as err:
        raise ConfigError(f"{path}: the search space is malformed: {' '.join(str(err).split())}") from err
    return config


def _refuse_empty_choices(search_space: dict[str, Any]) -> None:
    if not search_space:
        raise ValueError("it holds no hyper-parameter")
    for name, item in search_space.items():
        if item["_type"] == "choice" and not item["_value"]:
            raise ValueError(f"'{name}' has nothing to choose from")


def _start(action: Any, experiment_id: str, config: Any, *, port: int | None, host: str) -> RunningExperiment:
    from nni.experiment import rest
    from nni.experiment.launcher import NniManagerArgs
    from nni.tools.nnictl.config_utils import Experiments
    from nni.tools.nnictl.constants import NNI_HOME_DIR

    working = Path(config.experiment_working_directory)
    working.mkdir(parents=True, exist_ok=True)
    _require_disk(working)
    if config.training_service.platform == "remote":
        for line in unguarded_workers(config.training_service.machine_list):
            _logger.warning("%s", line)
    arguments = NniManagerArgs(action, experiment_id, config, 0, False, False, None, None)
    log = working / experiment_id / "log"
    with one_start_at_a_time(Path(NNI_HOME_DIR)):
        process = _spawn_at_a_port(arguments, log, host, port)
    try:
        refuse_exposure(process.pid, host)
        Experiments().add_experiment(
            experiment_id,
            arguments.port,
            _start_time_ms(),
            arguments.mode,
            config.experiment_name,
            pid=process.pid,
            logDir=str(working),
        )
        rest.post(arguments.port, "/experiment", config.json())
        refuse_exposure(process.pid, host)
    except BaseException as err:
        kill_tree(process)
        end_leftovers(experiment_id)
        if action == "create":
            Experiments().remove_experiment(experiment_id)
        if isinstance(err, OSError):
            reason = last_line(log, err)
            raise ExperimentError(f"experiment {experiment_id}: NNI refused to start it: {reason}") from err
        raise
    return RunningExperiment(experiment_id, arguments.port, process.pid, host, working)


def _spawn_at_a_port(arguments: Any, log: Path, host: str, port: int | None) -> subprocess.Popen[bytes]:
    needs = 2 if arguments.mode in _CONTROL_CHANNEL_PLATFORMS else 1
    for attempt in range(_PORT_ATTEMPTS):
        arguments.port = free_port(needs) if port is None else checked_port(port, needs)
        process = spawn(arguments, log, host)
        try:
            wait_until_up(process, arguments.port, log)
        except BaseException as err:
            kill_tree(process)
            # Another user's experiment may have taken the port between the look and the start.
            taken = isinstance(err, ExperimentError) and not is_free(arguments.port)
            if port is None and taken and attempt + 1 < _PORT_ATTEMPTS:
                continue
            raise
        return process
    raise AssertionError("the loop returns or raises")


def _require_disk(folder: Path) -> None:
    import shutil

    free = shutil.disk_usage(folder).free
    if free < MIN_FREE_BYTES:
        raise StorageError(
            f"{folder}: disk nearly full, {free / 1e6:.0f} MB free of {MIN_FREE_BYTES / 1e6:.0f} MB that an experiment "
            "needs at least; free space or write the experiment to another disk"
        )


def _start_time_ms() -> int:
    """Return the time, or one later than any in NNI's list: a clock set back must not make the newest look old."""
    return max([int(time.time() * 1000), *(int(record["startTime"]) + 1 for record in records())])


def _mark_stopped(experiment_id: str) -> None:
    from nni.tools.nnictl.config_utils import Experiments

    experiments = Experiments()
    experiments.update_experiment(experiment_id, "status", "STOPPED")
    experiments.update_experiment(experiment_id, "endTime", int(time.time() * 1000))


def _stored_config(experiment_id: str, folder: Path) -> dict[str, Any]:
    from nni.tools.nnictl.config_utils import Config

    try:
        return dict(Config(experiment_id, str(folder)).get_config())
    except (sqlite3.Error, TypeError, ValueError) as err:
        raise StorageError(
            f"experiment {experiment_id}: its records in {folder / experiment_id / 'db'} cannot be read ({err}); "
            "create the experiment again: its trials find their results by hyper-parameters"
        ) from err
