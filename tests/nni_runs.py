"""What the tests of NNI experiments share: an isolated home, the command line, light trials, and cleaning up."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
NNICTL = Path(sys.executable).with_name("nnictl")

# A trial without heavy imports: it speaks NNI's channel itself. The hyper-parameter says what shall become of it.
LIGHT_TRIAL = """
import json, os, signal, sys, time, urllib.request

url = os.environ["NNI_TRIAL_COMMAND_CHANNEL"]

def send(command):
    data = json.dumps(command).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method="PUT")
    urllib.request.urlopen(request).read()

def metric(kind, sequence, value):
    record = {"parameter_id": number, "trial_job_id": os.environ["NNI_TRIAL_JOB_ID"], "type": kind,
              "sequence": sequence, "value": json.dumps(value)}
    send({"type": "metric", "metric": json.dumps(record)})

send({"type": "request_parameter"})
record = json.loads(json.loads(urllib.request.urlopen(url).read())["parameter"])
number, mode = record["parameter_id"], record["parameters"]["mode"]
rising = [1 - 0.5 ** (1 + epoch) for epoch in range(8)]
values = [0.5] if not str(mode).startswith("curve") else [float(str(mode)[5:]) * share for share in rising]
for sequence, value in enumerate(values):
    metric("PERIODICAL", sequence, {"default": value, "loss": 1 - value})
    if len(values) > 1:
        time.sleep(0.3)
hold = os.path.join(os.environ.get("LIGHT_TRIALS_HELD", "/nowhere"), str(mode))
while os.path.exists(hold):
    time.sleep(0.1)
if mode == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if mode == "raises":
    open(os.path.join(os.environ["NNI_OUTPUT_DIR"], "failure.txt"), "w").write("ValueError: the moon is full")
    raise ValueError("the moon is full")
if mode == "loud":
    for _ in range(10 * 1024):
        sys.stdout.write("x" * 1023 + "\\n")
if mode == "waits" and not os.path.exists(os.path.join(os.environ["NNI_CODE_DIR"], "go")):
    time.sleep(600)
if str(mode).startswith("curve0.1"):
    time.sleep(600)
metric("FINAL", 0, {"default": values[-1], "mode_number": number})
"""
SUPERVISED = """
import os, sys
from glioma_nas.nni_experiments.trial_supervisor import supervise
sys.exit(supervise([sys.executable, os.path.join(os.path.dirname(__file__), "light.py")]))
"""

# NNI's manager looks at its trials every five seconds, which is most of what a light trial takes.
_LOOK_EVERY_SECOND = """
const Module = require('module');
const load = Module._load;
const hurried = new Set();
Module._load = function (request, ...rest) {
    const loaded = load.call(this, request, ...rest);
    const manager = /(^|\\/)nnimanager$/.test(request) && loaded.NNIManager;
    if (manager && !hurried.has(manager)) {
        hurried.add(manager);
        const run = manager.prototype.run;
        manager.prototype.run = function () {
            this.pollInterval = 1;
            return run.call(this);
        };
    }
    return loaded;
};
"""
# nnictl kills a manager that does not start within 3 seconds, which a busy machine does not manage.
_PATIENCE = """
import site
import sys

if any(word.endswith("/nnictl") for word in sys.orig_argv):
    from nni.experiment import launcher

    launcher._check_rest_server.__defaults__ = (90, None)
"""


class Nni:
    """One user's NNI: a home folder of its own, and every process in it ended at the end."""

    def __init__(self, home: Path) -> None:
        self.home = home
        home.mkdir(parents=True, exist_ok=True)
        (home / "hurry.js").write_text(_LOOK_EVERY_SECOND)
        self.environment = {
            **os.environ,
            "HOME": str(home),
            "NODE_OPTIONS": f"--require {home / 'hurry.js'}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "NO_COLOR": "1",
        }

    def call(self, *arguments: object, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run ``glioma-nas`` as a user does."""
        return self._run([sys.executable, "-m", "glioma_nas", *map(str, arguments)], check, environment)

    def nnictl(self, *arguments: object, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
        return self._run([str(NNICTL), *map(str, arguments)], check, environment)

    def _run(self, command: list[str], check: bool, extra: dict[str, str]) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command, env={**self.environment, **extra}, capture_output=True, text=True, timeout=600, check=False
        )
        if check and done.returncode:
            raise AssertionError(f"{command} gave {done.returncode}:\n{done.stdout}\n{done.stderr}")
        return done

    def start(self, folder: Path, **environment: str) -> dict[str, Any]:
        """Create an experiment, leave it running, return its line of NNI's list."""
        self.call("nni", "create", folder, "--detach", **environment)
        return self.newest()

    def start_plainly(self, folder: Path, *, guard: Path | None = None, before: Sequence[str] = ()) -> dict[str, Any]:
        """Create an experiment with the program ``nnictl``, return its line of NNI's list.

        Args:
            folder: Folder of the experiment.
            guard: Folder with the file that `nni guard` writes, read as Python reads its site-packages at its start.
            before: Words before the command, such as ``unshare --net``.
        """
        start_up = self.home / "start_up"
        start_up.mkdir(exist_ok=True)
        (start_up / "sitecustomize.py").write_text(_PATIENCE + (f"site.addsitedir({str(guard)!r})\n" if guard else ""))
        path = f"{start_up}{os.pathsep}{self.environment['PYTHONPATH']}"
        words = ["create", "--config", str(folder / "config.yml"), "--port", str(unused_port())]
        self._run([*before, str(NNICTL), *words], check=True, extra={"PYTHONPATH": path})
        return self.newest()

    def records(self) -> list[dict[str, Any]]:
        """Return NNI's list of experiments, oldest first."""
        path = self.home / "nni-experiments" / ".experiment"
        records: dict[str, Any] = {}

        def read() -> bool:
            try:
                records.update(json.loads(path.read_text()))
            except json.JSONDecodeError:  # NNI is writing it
                return False
            return True

        if path.is_file():
            until(read, 10, "NNI's list of experiments")
        return sorted(records.values(), key=lambda item: int(item["startTime"]))

    def newest(self) -> dict[str, Any]:
        return self.records()[-1]

    def get(self, port: int, path: str) -> Any:
        import requests

        answer = requests.get(f"http://127.0.0.1:{port}/api/v1/nni{path}", timeout=120)
        try:
            return answer.json()
        except requests.JSONDecodeError:  # plain text, while the manager starts or ends
            return {}

    def trials(self, record: dict[str, Any]) -> list[dict[str, Any]]:
        found = self.get(record["port"], "/trial-jobs")
        return found if isinstance(found, list) else []  # an error while the manager has no experiment yet

    def wait(self, record: dict[str, Any], state: str = "DONE", timeout_s: float = 120) -> None:
        def reached() -> bool:
            found = self.get(record["port"], "/check-status").get("status", "INITIALIZED")
            assert found in (state, "INITIALIZED", "RUNNING", "NO_MORE_TRIAL", "TUNER_NO_MORE_TRIAL"), found
            return bool(found == state)

        until(reached, timeout_s, f"state {state}")

    def end(self) -> None:
        """End whatever was started in this home."""
        mine = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("HOME") == str(self.home) and process.pid != os.getpid():
                    mine.append(process)
            except (psutil.Error, OSError):
                continue
        for process in mine:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(mine, timeout=10)


@contextmanager
def nni_in(folder: Path) -> Iterator[Nni]:
    nni = Nni(folder / "home")
    try:
        yield nni
    finally:
        nni.end()


def until(condition: Callable[[], Any], timeout_s: float, what: str) -> Any:
    deadline = time.monotonic() + 3 * timeout_s  # the figures are for an idle machine
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.25)
    raise AssertionError(f"not within {timeout_s:.0f} s: {what}")


def write_light_experiment(folder: Path, modes: list[Any], **changes: Any) -> Path:
    """Write an experiment of trials that cost next to nothing, one for each mode."""
    code = folder / "code"
    code.mkdir(parents=True)
    (code / "light.py").write_text(LIGHT_TRIAL)
    (code / "supervised.py").write_text(SUPERVISED)
    (folder / "search_space.json").write_text(json.dumps({"mode": {"_type": "choice", "_value": modes}}))
    config = {
        "experimentName": "light",
        "searchSpaceFile": "search_space.json",
        "trialCommand": f"{sys.executable} supervised.py",
        "trialCodeDirectory": "code",
        "trialConcurrency": 2,
        "maxTrialNumber": len(modes),
        "experimentWorkingDirectory": "experiments",
        "tuner": {"name": "GridSearch"},
        "trainingService": {"platform": "local"},
        **changes,
    }
    (folder / "config.yml").write_text(yaml.safe_dump(config))
    return folder


def unused_port() -> int:
    """Return a port of the system's choice, which nobody who looks for the first free one from 8080 on comes across."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_waiting_trial(nni: Nni, record: dict[str, Any]) -> dict[str, Any]:
    """Wait until the light trial that waits runs and has said so, and return it."""

    def found() -> list[dict[str, Any]]:
        trials = [trial for trial in nni.trials(record) if trial["status"] == "RUNNING"]
        return [trial for trial in trials if "waits" in str(trial.get("hyperParameters"))]

    trial: dict[str, Any] = until(found, 60, "the waiting trial runs")[0]
    until(lambda: nni.get(record["port"], f"/metric-data/{trial['trialJobId']}"), 60, "its first figure")
    return trial


def light_trials(home: Path) -> list[int]:
    """Return the process ids of light trials, their parents included, of users whose home lies in ``home``."""
    found = []
    for process in psutil.process_iter():
        try:
            own = Path(process.environ().get("HOME", "/")).is_relative_to(home)
            if own and any(part.endswith(("light.py", "supervised.py")) for part in process.cmdline()):
                found.append(process.pid)
        except (psutil.Error, OSError):
            continue
    return found


def output_of(trial: dict[str, Any]) -> Path:
    return Path(trial["logPath"])


def tensorboard_tags(folder: Path) -> set[str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    tags = events.Tags()
    return {*tags["scalars"], *tags["images"]}


def require_program(name: str, package: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed (apt install {package})")
    return found
