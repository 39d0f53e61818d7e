"""Real NNI managers with light trials: what listens, what fails and how, what survives."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from glioma_nas.errors import ExperimentError
from glioma_nas.nni_experiments.experiment_folder import ASSESSORS
from glioma_nas.nni_experiments.loopback import guard_state, install_guard
from glioma_nas.nni_experiments.manager import RunningExperiment, is_alive
from glioma_nas.nni_experiments.overview import summary
from tests.nni_runs import Nni, light_trials, nni_in, until, unused_port, wait_for_waiting_trial, write_light_experiment

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="NNI's launcher is tested on Linux"),
    pytest.mark.timeout(
        3600
    ),  # the waits within a test have limits of their own, which add up to more than the default
]


@pytest.fixture
def nni(tmp_path: Path) -> Iterator[Nni]:
    with nni_in(tmp_path) as found:
        yield found


def listening_addresses(pid: int) -> set[str]:
    return {address for address, _ in sockets_of([psutil.Process(pid), *psutil.Process(pid).children(recursive=True)])}


def sockets_of(processes: list[psutil.Process]) -> set[tuple[str, int]]:
    """Return address and port of every socket that one of the processes listens at; trials end while one looks."""
    found = set()
    for process in processes:
        try:
            sockets = process.net_connections(kind="inet")
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
        found |= {(item.laddr.ip, item.laddr.port) for item in sockets if item.status == psutil.CONN_LISTEN}
    return found


def test_trials_end_as_they_should_and_two_experiments_share_a_machine(nni: Nni, tmp_path: Path) -> None:
    modes = ["fine", "killed", "raises", "loud"]
    folders = [write_light_experiment(tmp_path / "first", modes), write_light_experiment(tmp_path / "second", ["fine"])]
    with ThreadPoolExecutor() as together:
        list(together.map(lambda folder: nni.call("nni", "create", folder, "--detach"), folders))
    known = {Path(record["logDir"]).parent.name: record for record in nni.records()}
    first, second = known["first"], known["second"]
    assert first["port"] != second["port"]
    assert listening_addresses(first["pid"]) == listening_addresses(second["pid"]) == {"127.0.0.1"}

    taken = nni.call("nni", "create", tmp_path / "first", "--port", first["port"], check=False)
    assert taken.returncode == 2
    assert f"port {first['port']} is taken" in taken.stderr

    refuse_strangers(first["port"])
    nni.wait(first)
    nni.wait(second)
    found = {}
    for trial in nni.trials(first):
        mode = json.loads(trial["hyperParameters"][0])["parameters"]["mode"]
        found[mode] = (trial["status"], (Path(trial["logPath"]) / "trial.stderr").read_text().strip().splitlines()[-1:])
        if mode == "loud":
            assert (Path(trial["logPath"]) / "trial.stdout").stat().st_size == 10 * 1024 * 1024
            answer = nni.get(first["port"], f"/trial-jobs/{trial['trialJobId']}")
            assert answer["status"] == "SUCCEEDED"
    assert found == {
        "fine": ("SUCCEEDED", []),
        "loud": ("SUCCEEDED", []),
        "killed": ("FAILED", ["trial failed: killed by SIGKILL; the system may have run out of memory"]),
        "raises": ("FAILED", ["trial failed: ValueError: the moon is full"]),
    }
    see_records_in_tensorboard(nni, first, next(t for t in nni.trials(first) if t["status"] == "SUCCEEDED"))
    rows = status_of(nni)
    assert rows[first["id"]]["state"] == "DONE"
    assert (rows[first["id"]]["succeeded"], rows[first["id"]]["failed"], rows[first["id"]]["best"]) == (2, 2, 0.5)
    nni.call("nni", "stop", first["id"])
    assert not is_alive(first)
    assert status_of(nni)[first["id"]]["state"] == "STOPPED"
    assert status_of(nni)[second["id"]]["state"] == "DONE"


def see_records_in_tensorboard(nni: Nni, record: dict[str, object], trial: dict[str, Any]) -> None:
    """Press the web UI's button: TensorBoard reads what the trial wrote, on the loopback address only."""
    records = Path(trial["logPath"]) / "tensorboard"
    records.mkdir()
    url = f"http://127.0.0.1:{record['port']}/api/v1/nni/tensorboard"
    answer = requests.post(url, json={"trials": trial["trialJobId"]}, timeout=120)
    assert answer.ok, answer.text
    task = answer.json()
    assert [Path(folder) for folder in task["trialLogDirectoryList"]] == [records]
    manager = int(str(record["pid"]))
    until(lambda: int(task["port"]) in listening_ports(manager), 60, "TensorBoard listens")
    assert listening_addresses(manager) == {"127.0.0.1"}


def listening_ports(pid: int) -> set[int]:
    return {port for _, port in sockets_of(psutil.Process(pid).children(recursive=True))}


def status_of(nni: Nni) -> dict[str, dict[str, object]]:
    rows = json.loads(nni.call("nni", "status", "--json").stdout)
    return {str(row["id"]): row for row in rows}


def refuse_strangers(port: int) -> None:
    """Check that other names, other origins and other users get nothing, and that other interfaces do not answer."""
    url = f"http://127.0.0.1:{port}/api/v1/nni/check-status"
    assert requests.get(url, timeout=10).status_code == 200
    assert requests.get(url, headers={"Host": "rebound.example"}, timeout=10).status_code == 403
    assert requests.get(url, headers={"Origin": "http://elsewhere.example"}, timeout=10).status_code == 403
    if os.getuid() == 0:
        code = f"import urllib.request; urllib.request.urlopen({url!r}, timeout=10)"
        stranger = subprocess.run(
            ["/usr/bin/env", "python3", "-c", code], user=65534, capture_output=True, text=True, check=False
        )
        assert stranger.returncode != 0
        assert "RemoteDisconnected" in stranger.stderr or "reset" in stranger.stderr
    for interface in psutil.net_if_addrs().values():
        for address in interface:
            if address.family == socket.AF_INET and not address.address.startswith("127."):
                with socket.socket() as probe:
                    probe.settimeout(2)
                    assert probe.connect_ex((address.address, port)) != 0


def test_fifty_trials_are_all_in_the_export(nni: Nni, tmp_path: Path) -> None:
    folder = write_light_experiment(
        tmp_path / "many", list(range(60)), trialConcurrency=8, trialCommand=f"{sys.executable} light.py"
    )
    record = nni.start(folder)
    nni.wait(record, timeout_s=240)
    assert Counter(trial["status"] for trial in nni.trials(record)) == {"SUCCEEDED": 60}
    rows = exported(nni, record, tmp_path)
    assert sorted(int(row["mode"]) for row in rows) == list(range(60))
    assert all(row["default"] == "0.5" and '"loss"' in row["intermediate"] and row["trialJobId"] for row in rows)


def test_experiment_survives_its_managers_death(nni: Nni, tmp_path: Path) -> None:
    folder = write_light_experiment(tmp_path / "dies", ["fine", "waits", "fine2"])
    record = nni.start(folder)
    trial = wait_for_waiting_trial(nni, record)
    until(lambda: any(t["status"] == "SUCCEEDED" for t in nni.trials(record)), 60, "a finished trial")
    os.kill(record["pid"], signal.SIGKILL)
    until(lambda: status_of(nni)[record["id"]]["state"].startswith("DEAD"), 20, "the manager is known to be dead")
    (folder / "code" / "go").touch()
    done = nni.call("nni", "resume", record["id"])
    assert "3 SUCCEEDED" in done.stdout
    after = nni.newest()
    assert (after["id"], after["pid"] == record["pid"]) == (record["id"], False)
    assert listening_addresses(after["pid"]) == {"127.0.0.1"}
    assert trial["trialJobId"] in {item["trialJobId"] for item in nni.trials(after)}
    assert nni.call("nni", "resume", record["id"], check=False).returncode == 2


def test_experiment_whose_dispatcher_dies_fails_and_can_be_resumed(nni: Nni, tmp_path: Path) -> None:
    folder = write_light_experiment(tmp_path / "dispatcher", ["waits", "fine"], trialConcurrency=1)
    record = nni.start(folder)
    until(lambda: any(t["status"] == "RUNNING" for t in nni.trials(record)), 60, "a running trial")
    manager = psutil.Process(record["pid"])
    for child in manager.children(recursive=True):  # a shell and the dispatcher itself, which may end with its shell
        with suppress(psutil.NoSuchProcess):
            if child.environ().get("SDK_PROCESS") == "dispatcher":
                child.kill()
    nni.wait(record, "ERROR")
    assert status_of(nni)[record["id"]]["state"] == "ERROR"
    nni.call("nni", "stop", record["id"])
    (folder / "code" / "go").touch()
    assert "2 SUCCEEDED" in nni.call("nni", "resume", record["id"]).stdout


def test_stopped_experiment_tells_whoever_waits_for_it(nni: Nni, tmp_path: Path) -> None:
    folder = write_light_experiment(tmp_path / "stopped", ["fine", "waits"])
    with ThreadPoolExecutor() as beside:
        waiting = beside.submit(nni.call, "nni", "create", folder, check=False)
        try:
            record = until(lambda: nni.records()[-1:], 60, "the experiment is listed")[0]
            wait_for_waiting_trial(nni, record)
            nni.call("nni", "stop", folder)
            done = waiting.result()
        except BaseException:
            nni.end()  # otherwise the one who waits would go on waiting
            raise
    assert done.returncode == 2
    assert f"experiment {record['id']} was stopped before its end" in done.stderr
    assert light_trials(nni.home) == []


def test_tuner_may_take_its_time_to_start(nni: Nni, tmp_path: Path) -> None:
    slow = tmp_path / "slow"
    slow.mkdir()
    wait = 'import os, time\nif os.environ.get("SDK_PROCESS") == "dispatcher":\n    time.sleep(12)\n'
    (slow / "sitecustomize.py").write_text(wait)
    path = f"{slow}{os.pathsep}{nni.environment['PYTHONPATH']}"
    done = nni.call("nni", "create", write_light_experiment(tmp_path / "patient", ["fine"]), PYTHONPATH=path)
    assert "1 SUCCEEDED" in done.stdout


def test_failing_experiment_gives_a_status_and_the_first_trials_reason(nni: Nni, tmp_path: Path) -> None:
    done = nni.call("nni", "create", write_light_experiment(tmp_path / "fails", ["raises", "killed"]), check=False)
    assert done.returncode == 2
    assert "2 FAILED" in done.stderr
    assert "ValueError: the moon is full" in done.stderr


def statuses_by_mode(nni: Nni, record: dict[str, Any]) -> dict[str, str]:
    return {json.loads(t["hyperParameters"][0])["parameters"]["mode"]: t["status"] for t in nni.trials(record)}


def test_curve_fitting_stops_a_trial_that_will_not_get_there(nni: Nni, tmp_path: Path) -> None:
    # As `nni config --kind architecture --assessor Curvefitting` writes it, for trials of eight epochs.
    arguments = {**ASSESSORS["Curvefitting"], "epoch_num": 8}
    folder = write_light_experiment(
        tmp_path / "fitted",
        ["curve0.8", "curve0.79", "curve0.1"],
        trialConcurrency=1,
        assessor={"name": "Curvefitting", "classArgs": arguments},
    )
    record = nni.start(folder)
    nni.wait(record)
    expected = {"curve0.8": "SUCCEEDED", "curve0.79": "SUCCEEDED", "curve0.1": "EARLY_STOPPED"}
    assert statuses_by_mode(nni, record) == expected
    (stopped,) = [trial for trial in nni.trials(record) if trial["status"] == "EARLY_STOPPED"]
    assert len(nni.get(record["port"], f"/metric-data/{stopped['trialJobId']}")) >= arguments["start_step"]


DAY_S = 86_400
# The wall clock of every process of an experiment, offset by what a file says.
NODE_CLOCK = """
const fs = require('fs');
const Real = Date;
const now = () => Real.now() + 1000 * Number(fs.readFileSync(FILE));
global.Date = new Proxy(Real, {
    construct: (target, given) => given.length ? new target(...given) : new target(now()),
    get: (target, key) => key === 'now' ? now : target[key],
});
"""
PYTHON_CLOCK = """
import time

real = time.time
time.time = lambda: real() + float(open(FILE).read())
"""


def test_clock_that_jumps_forward_and_back_harms_no_trial_and_no_record(nni: Nni, tmp_path: Path) -> None:
    offset = tmp_path / "offset"

    def set_offset(seconds: int) -> None:
        # In one step, because every process of the experiment reads the file whenever it asks for the time.
        beside = tmp_path / "offset.new"
        beside.write_text(str(seconds))
        beside.replace(offset)

    set_offset(0)
    (tmp_path / "clock.js").write_text(NODE_CLOCK.replace("FILE", json.dumps(str(offset))))
    (tmp_path / "sitecustomize.py").write_text(PYTHON_CLOCK.replace("FILE", repr(str(offset))))
    nni.environment["PYTHONPATH"] += f"{os.pathsep}{tmp_path}"
    nni.environment["NODE_OPTIONS"] += f" --require {tmp_path / 'clock.js'}"
    held = hold_trials(nni, tmp_path, "curve0.8", "curve0.9")
    folder = write_light_experiment(
        tmp_path / "early",
        ["curve0.8", "curve0.9", "curve0.1"],
        trialConcurrency=1,
        maxExperimentDuration="2h",
        assessor={"name": "Medianstop", "classArgs": {"optimize_mode": "maximize", "start_step": 3}},
    )
    began = time.monotonic()
    record = nni.start(folder)

    def epochs_of(number: int) -> list[dict[str, Any]]:
        trials = [trial for trial in nni.trials(record) if int(trial["sequenceId"]) == number]
        found = nni.get(record["port"], f"/metric-data/{trials[0]['trialJobId']}") if trials else []
        return [item for item in found if item["type"] == "PERIODICAL"]

    for number, jump_s in enumerate((DAY_S, -DAY_S)):
        until(lambda number=number: epochs_of(number), 60, f"an epoch of trial {number}")  # type: ignore[misc]
        set_offset(jump_s)
        held[number].unlink()
    nni.wait(record)
    elapsed_s = time.monotonic() - began

    trials = sorted(nni.trials(record), key=lambda trial: int(trial["sequenceId"]))
    assert [trial["status"] for trial in trials] == ["SUCCEEDED", "SUCCEEDED", "EARLY_STOPPED"]
    assert list(statuses_by_mode(nni, record)) == ["curve0.8", "curve0.9", "curve0.1"]
    # The clock did jump: a day onwards within the first trial, two back within the second.
    lasted_s = [(trial["endTime"] - trial["startTime"]) / 1000 for trial in trials]
    assert lasted_s == pytest.approx([DAY_S, -2 * DAY_S, 0], abs=elapsed_s)
    # The experiment's own time, which would end it after two hours, did not.
    profile = nni.get(record["port"], "/experiment")
    assert 0 < profile["execDuration"] <= elapsed_s + 1
    for number in (0, 1):
        assert [int(item["sequence"]) for item in epochs_of(number)] == list(range(8))
    rows = exported(nni, record, tmp_path)
    assert {row["mode"]: json.loads(row["intermediate"])[-1]["default"] for row in rows} == {
        "curve0.8": pytest.approx(0.8, rel=0.01),
        "curve0.9": pytest.approx(0.9, rel=0.01),
    }
    assert status_of(nni)[record["id"]]["succeeded"] == 2


def hold_trials(nni: Nni, folder: Path, *modes: str) -> list[Path]:
    """Keep light trials of these modes from going on after their epochs; removing the files returned lets them."""
    nni.environment["LIGHT_TRIALS_HELD"] = str(folder / "held")
    (folder / "held").mkdir()
    files = [folder / "held" / mode for mode in modes]
    for file in files:
        file.touch()
    return files


def exported(nni: Nni, record: dict[str, Any], folder: Path) -> list[dict[str, str]]:
    """Return the table of ``nnictl experiment export -t csv -i``."""
    nni.nnictl("experiment", "export", record["id"], "-t", "csv", "-i", "-f", folder / "all.csv")
    with (folder / "all.csv").open() as handle:
        return list(csv.DictReader(handle))


def test_plain_nnictl_starts_the_same_folder_and_the_guard_closes_its_door(nni: Nni, tmp_path: Path) -> None:
    folder = write_light_experiment(tmp_path / "plain", ["fine"])
    record = nni.start_plainly(folder, guard=install_guard(tmp_path / "site").parent)
    assert listening_addresses(record["pid"]) == {"127.0.0.1"}
    nni.wait(record)
    assert [trial["status"] for trial in nni.trials(record)] == ["SUCCEEDED"]
    nni.nnictl("stop", record["id"])


def test_trials_of_plain_nnictl_without_the_guard_refuse_to_run(nni: Nni, tmp_path: Path) -> None:
    if guard_state()[0] != "absent":
        pytest.skip("this Python environment has the guard")
    # In a network of its own, because NNI then listens on all interfaces: there is but the loopback one.
    alone = ["unshare", "--net", sys.executable, "-c", LOOPBACK_UP]
    done = subprocess.run([*alone, "true"], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a network for this test cannot be made: {done.stderr.strip()}")
    folder = write_light_experiment(tmp_path / "open", ["fine"], trialConcurrency=1)
    record = nni.start_plainly(folder, before=alone)
    assert listens_everywhere(record["pid"])

    def refusals() -> list[str]:
        found = folder.glob("experiments/*/environments/*/trials/*/trial.stderr")
        return [text for path in found if (text := path.read_text().strip())]

    refusal = until(refusals, 60, "a trial that refuses")[0]
    assert refusal.startswith("trial failed: refused: NNI listens on ")
    assert "run `glioma-nas nni guard` once" in refusal
    until(lambda: "FAILED" in events_of(folder), 60, "the trial counts as failed")
    assert "SUCCEEDED" not in events_of(folder)


# Brings up the loopback interface of a new network, then runs the words that follow.
LOOPBACK_UP = """
import fcntl, os, socket, struct, sys
with socket.socket() as any_socket:
    fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh14x", b"lo", 1))
os.execvp(sys.argv[1], sys.argv[1:])
"""


def listens_everywhere(pid: int) -> bool:
    """Tell whether somebody listens on all interfaces in the network of a process."""
    rows = [
        line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()
    ]
    return any(row[3] == "0A" and not row[1].split(":")[0].strip("0") for row in rows)


def events_of(folder: Path) -> set[str]:
    """Return what NNI's records say of trials, of an experiment that cannot be asked."""
    # nnictl makes a link to the latest experiment beside it.
    (database,) = {path.resolve() for path in folder.glob("experiments/*/db/nni.sqlite")}
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as records:
        return {str(row[0]) for row in records.execute("select event from TrialJobEvent")}


def test_manager_that_listens_elsewhere_is_refused_before_it_gets_the_experiment(nni: Nni, tmp_path: Path) -> None:
    listen = "import socket, time; s = socket.create_server(('0.0.0.0', 0)); time.sleep(300)"
    leak = tmp_path / "leak.js"
    start = f"require('child_process').spawn({sys.executable!r}, ['-c', {listen!r}])"
    leak.write_text(f"if (process.argv[1].endsWith('main.js')) {start};")
    folder = write_light_experiment(tmp_path / "leaking", ["fine"])
    done = nni.call("nni", "create", folder, check=False, NODE_OPTIONS=f"--require {leak}")
    assert done.returncode == 2
    assert "refused: NNI listens on 0.0.0.0:" in done.stderr
    assert not list(folder.glob("experiments/*/environments/*/trials/*"))
    assert nni.records() == []
    # Other programs of this machine come and go meanwhile.
    leaks = [item.info for item in psutil.process_iter(["cmdline"]) if listen in (item.info["cmdline"] or ())]
    assert leaks == []


def test_exposing_needs_a_yes_and_serves_that_address_alone(nni: Nni, tmp_path: Path) -> None:
    addresses = [
        item.address
        for interface in psutil.net_if_addrs().values()
        for item in interface
        if item.family == socket.AF_INET and not item.address.startswith("127.")
    ]
    if not addresses:
        pytest.skip("this machine has no address beside the loopback one")
    folder = write_light_experiment(tmp_path / "exposed", ["fine"])
    refused = nni.call("nni", "create", folder, "--expose", addresses[0], check=False)
    assert refused.returncode != 0 and not (folder / "experiments").exists()
    port = unused_port()
    done = nni.call("nni", "create", folder, "--expose", addresses[0], "--yes", "--port", port)
    assert "1 SUCCEEDED" in done.stdout
    assert requests.get(f"http://{addresses[0]}:{port}/api/v1/nni/check-status", timeout=10).status_code == 200
    for other in addresses[1:]:
        with pytest.raises(requests.ConnectionError):
            requests.get(f"http://{other}:{port}/api/v1/nni/check-status", timeout=10)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip(f"a small disk for this test cannot be mounted: {done.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def resize(disk: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


def test_full_disk_is_refused_then_told_of_and_resume_completes_the_experiment(
    tmp_path: Path, small_disk: Path
) -> None:
    # The home folder, with NNI's list of experiments, lies there too.
    with nni_in(small_disk) as nni:
        modes = ["fine", "loud", "fine2"]
        folder = write_light_experiment(small_disk / "full", modes, trialConcurrency=1)
        refused = nni.call("nni", "create", folder, check=False)
        assert refused.returncode == 2
        assert "disk nearly full, 8 MB free of 500 MB" in refused.stderr

        resize(small_disk, "600m")
        (held,) = hold_trials(nni, tmp_path, "loud")
        with ThreadPoolExecutor() as beside:
            waiting = beside.submit(nni.call, "nni", "create", folder, check=False)
            try:
                record = until(lambda: nni.records()[-1:], 60, "the experiment is listed")[0]
                until(
                    lambda: statuses_by_mode(nni, record).get("loud") == "RUNNING", 60, "the trial that fills the disk"
                )
                assert statuses_by_mode(nni, record)["fine"] == "SUCCEEDED"
                # Somebody else fills the disk but for less than the trial has to say.
                resize(small_disk, f"{shutil.disk_usage(small_disk).used // 1024 + 500}k")
                held.unlink()
                try:
                    until(waiting.done, 60, "NNI's manager ends")
                    told = r"the disk of \S+ is full; free space, then"
                except AssertionError:
                    # After an error it may neither end nor answer; then a stop ends the wait, once there is space.
                    resize(small_disk, "600m")
                    nni.call("nni", "stop", folder)
                    told = r"experiment \w+ (was stopped before its end|failed)"
                done = waiting.result()
            except BaseException:
                nni.end()  # otherwise the one who waits would go on waiting
                raise
        assert done.returncode == 2
        assert re.search(told, done.stderr), done.stderr

        resize(small_disk, "600m")
        nni.call("nni", "stop", folder)
        assert "3 SUCCEEDED" in nni.call("nni", "resume", folder).stdout


def test_trial_that_could_not_leave_a_message_on_a_full_disk_says_why(small_disk: Path) -> None:
    (small_disk / "trial.stderr").touch()
    failed = {"status": "FAILED", "sequenceId": 0, "trialJobId": "abcde", "logPath": str(small_disk)}
    experiment = RunningExperiment("abc", 8080, os.getpid())
    with pytest.raises(ExperimentError) as found:
        summary(experiment, "DONE", [failed])
    assert "is full" not in str(found.value)
    (small_disk / "filler").write_bytes(b"x" * (shutil.disk_usage(small_disk).free - 4096))
    with pytest.raises(ExperimentError, match=r"first failing trial abcde: it left no message; the disk of .* is full"):
        summary(experiment, "DONE", [failed])
