"""Real NNI managers with light trials: what listens, what fails and how, what survives."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from glioma_nas.errors import ExperimentError
from glioma_nas.nni_experiments.manager import RunningExperiment, is_alive
from glioma_nas.nni_experiments.overview import summary
from tests.nni_runs import Nni, light_trials, nni_in, until, unused_port, wait_for_waiting_trial, write_light_experiment

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="NNI's launcher is tested on Linux")]


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
    task = requests.post(url, json={"trials": trial["trialJobId"]}, timeout=20).json()
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
    nni.nnictl("experiment", "export", record["id"], "-t", "csv", "-i", "-f", tmp_path / "all.csv")
    with (tmp_path / "all.csv").open() as handle:
        rows = list(csv.DictReader(handle))
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


def test_assessor_stops_a_bad_trial_early_and_a_clock_jump_does_no_harm(nni: Nni, tmp_path: Path) -> None:
    clock = tmp_path / "clock.js"
    clock.write_text(
        "const now = Date.now; const start = now();"
        "Date.now = () => now() + (now() - start > 4000 ? (now() - start > 9000 ? -86400000 : 86400000) : 0);"
    )
    folder = write_light_experiment(
        tmp_path / "early",
        ["curve0.8", "curve0.9", "curve0.1"],
        trialConcurrency=1,
        assessor={"name": "Medianstop", "classArgs": {"optimize_mode": "maximize", "start_step": 3}},
    )
    record = nni.start(folder, NODE_OPTIONS=f"--require {clock}")
    nni.wait(record)
    found = {json.loads(t["hyperParameters"][0])["parameters"]["mode"]: t["status"] for t in nni.trials(record)}
    assert found == {"curve0.8": "SUCCEEDED", "curve0.9": "SUCCEEDED", "curve0.1": "EARLY_STOPPED"}


def test_plain_nnictl_starts_the_same_folder_and_the_guard_closes_its_door(nni: Nni, tmp_path: Path) -> None:
    folder = write_light_experiment(tmp_path / "plain", ["fine"])
    site = tmp_path / "site"
    install = (
        f"import pathlib, glioma_nas.nni_experiments.loopback as it; it.install_guard(pathlib.Path({str(site)!r}))"
    )
    subprocess.run([sys.executable, "-c", install], check=True, env=nni.environment)
    # What Python does at its start with a .pth file in site-packages.
    record = nni.start_plainly(folder, f"import site; site.addsitedir({str(site)!r})")
    assert listening_addresses(record["pid"]) == {"127.0.0.1"}
    nni.wait(record)
    nni.nnictl("stop", record["id"])


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


def test_full_disk_is_refused_before_the_start_and_a_reason_afterwards(
    nni: Nni, tmp_path: Path, small_disk: Path
) -> None:
    folder = write_light_experiment(tmp_path / "full", ["fine", "loud"], experimentWorkingDirectory=str(small_disk))
    refused = nni.call("nni", "create", folder, check=False)
    assert refused.returncode == 2
    assert "disk nearly full, 8 MB free of 500 MB" in refused.stderr

    # Started all the same, as plain nnictl does, on a disk that one trial's output fills.
    start = (
        "from pathlib import Path; from glioma_nas.nni_experiments import manager; manager.MIN_FREE_BYTES = 0; "
        f"manager.create(Path({str(folder)!r}))"
    )
    subprocess.run([sys.executable, "-c", start], env=nni.environment, check=True, timeout=120)
    record = nni.newest()
    until(lambda: shutil.disk_usage(small_disk).free < 1_000_000, 60, "a full disk")
    assert listening_addresses(record["pid"]) <= {"127.0.0.1"}
    nni.call("nni", "stop", record["id"])
    for output in small_disk.rglob("trial.stdout"):
        output.write_bytes(b"")
    (folder / "code" / "light.py").write_text(
        (folder / "code" / "light.py").read_text().replace('if mode == "loud"', "if False")
    )
    resume = start.replace(f"manager.create(Path({str(folder)!r}))", f"manager.resume({record['id']!r})")
    subprocess.run([sys.executable, "-c", resume], env=nni.environment, check=True, timeout=120)
    nni.wait(nni.newest())
    assert {trial["status"] for trial in nni.trials(nni.newest())} <= {"SUCCEEDED", "USER_CANCELED"}


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
