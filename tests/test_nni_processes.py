"""Ending managers and what they leave behind, with small processes that stand for them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from glioma_nas.errors import ExperimentError
from glioma_nas.nni_experiments import manager
from glioma_nas.nni_experiments.manager_process import end_leftovers, end_process, free_port, still_running
from glioma_nas.nni_experiments.overview import wait_for
from glioma_nas.progress import Silent

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="NNI's launcher is tested on Linux")

# Of eight characters like NNI's own, and of this process: another's leftovers are ended by the same name.
EXPERIMENT = f"t{os.getpid():07d}"
WAITS = "import time; time.sleep(60)"


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give this test a list of experiments of its own."""
    from nni.tools.nnictl.config_utils import Experiments

    monkeypatch.setattr(Experiments.__init__, "__defaults__", (str(tmp_path / "nni-experiments"),))
    return tmp_path


def list_experiment(experiment_id: str, pid: int, folder: Path, start_time_ms: int = 0) -> None:
    from nni.tools.nnictl.config_utils import Experiments

    Experiments().add_experiment(experiment_id, 8080, start_time_ms, "local", "light", pid=pid, logDir=str(folder))


def leftover(parent_code: str) -> subprocess.Popen[str]:
    """Start a process, with a trial of the experiment as its child whose number it prints."""
    child = f"subprocess.Popen([sys.executable, '-c', {WAITS!r}], env={{**os.environ, 'NNI_EXP_ID': {EXPERIMENT!r}}})"
    code = f"import os, subprocess, sys; print({child}.pid, flush=True); {parent_code}"
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def number_from(process: subprocess.Popen[str]) -> int:
    assert process.stdout is not None
    return int(process.stdout.readline())


def test_manager_that_nobody_reaps_counts_as_stopped(listed: Path, started: list[subprocess.Popen[str]]) -> None:
    started.append(subprocess.Popen([sys.executable, "-c", WAITS, EXPERIMENT], text=True))
    list_experiment(EXPERIMENT, started[0].pid, listed)
    assert manager.is_alive(manager.find(EXPERIMENT))
    manager.stop(EXPERIMENT)  # this process, its parent, does not reap it meanwhile
    record = manager.find(EXPERIMENT)
    assert record["status"] == "STOPPED" and not manager.is_alive(record)
    assert started[0].wait() == -signal.SIGTERM


def test_manager_that_ignores_the_signal_is_killed(
    listed: Path, started: list[subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    code = f"import signal; signal.signal(15, signal.SIG_IGN); print(0, flush=True); {WAITS}"
    started.append(subprocess.Popen([sys.executable, "-c", code, EXPERIMENT], stdout=subprocess.PIPE, text=True))
    number_from(started[0])
    list_experiment(EXPERIMENT, started[0].pid, listed)
    monkeypatch.setattr(manager, "STOP_TIMEOUT_S", 0.3)
    manager.stop(EXPERIMENT)
    assert started[0].wait() == -signal.SIGKILL


def test_process_that_ends_between_the_look_and_the_signal_has_ended(started: list[subprocess.Popen[str]]) -> None:
    started.append(subprocess.Popen([sys.executable, "-c", WAITS], text=True))
    seen = psutil.Process(started[0].pid)
    started[0].kill()
    started[0].wait()
    assert end_process(seen, timeout_s=0)


def test_experiment_whose_manager_has_ended_is_stopped_with_what_it_left(
    listed: Path, started: list[subprocess.Popen[str]]
) -> None:
    gone = subprocess.Popen([sys.executable, "-c", "", EXPERIMENT])
    gone.wait()
    started.append(leftover(WAITS))
    trial = psutil.Process(number_from(started[0]))
    list_experiment(EXPERIMENT, gone.pid, listed)
    manager.stop(EXPERIMENT)
    assert manager.find(EXPERIMENT)["status"] == "STOPPED"
    assert still_running([trial], timeout_s=0) == []


def test_trial_that_nobody_reaps_is_not_waited_for(started: list[subprocess.Popen[str]]) -> None:
    started.append(leftover(WAITS))
    trial = psutil.Process(number_from(started[0]))
    end_leftovers(EXPERIMENT)
    assert trial.status() == psutil.STATUS_ZOMBIE  # its parent sleeps
    assert still_running([trial], timeout_s=0) == []
    assert still_running([psutil.Process(os.getpid())], timeout_s=0) != []


def test_experiment_that_the_list_has_lost_is_found_by_its_folder(
    listed: Path, started: list[subprocess.Popen[str]]
) -> None:
    for name in ("older000", EXPERIMENT):
        database = listed / "mine" / "experiments" / name / "db" / "nni.sqlite"
        database.parent.mkdir(parents=True)
        database.touch()
        os.utime(database, (1, 1) if name != EXPERIMENT else (2, 2))
    record = manager.find(str(listed / "mine"))
    assert record["id"] == EXPERIMENT and not manager.is_alive(record)
    started.append(subprocess.Popen([sys.executable, "-c", WAITS, EXPERIMENT], text=True))
    found = manager.find(str(listed / "mine"))
    assert manager.is_alive(found)
    for attempt in (lambda: manager.resume(str(listed / "mine")), lambda: manager.running(found)):
        with pytest.raises(ExperimentError, match=f"experiment {EXPERIMENT} is running at a port that is not known"):
            attempt()
    manager.stop(str(listed / "mine"))
    assert started[0].wait() == -signal.SIGTERM


def test_stop_is_told_although_the_disk_is_full(listed: Path) -> None:
    folder = Path("/proc")  # has no free space
    experiment = manager.RunningExperiment(EXPERIMENT, free_port(1), 0, folder=folder)
    list_experiment(EXPERIMENT, 0, folder)
    with pytest.raises(ExperimentError, match=rf"{EXPERIMENT} ended \(no trial\): the disk of /proc is full"):
        wait_for(experiment, progress=Silent())
    manager.stop(EXPERIMENT)
    with pytest.raises(ExperimentError, match=r"was stopped before its end \(no trial\); the disk of /proc is full"):
        wait_for(experiment, progress=Silent())


def test_newest_experiment_is_the_latest_although_the_clock_was_set_back(listed: Path) -> None:
    year_10000_ms = 253_402_300_800_000
    list_experiment("before00", 1, listed, start_time_ms=year_10000_ms)
    list_experiment("after000", 1, listed, start_time_ms=manager._start_time_ms())
    assert [record["id"] for record in manager.records()] == ["after000", "before00"]
    assert manager.find("latest")["id"] == "after000"
