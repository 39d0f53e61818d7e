"""NNI over SSH against real OpenSSH servers on the loopback address, and Kubernetes by NNI's own schema."""

from __future__ import annotations

import getpass
import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from glioma_nas.errors import ConfigError
from glioma_nas.nni_experiments.loopback import guarded_environment
from glioma_nas.nni_experiments.manager import load_nni_config
from glioma_nas.nni_experiments.remote_workers import unguarded_workers
from tests.nni_runs import (
    ROOT,
    Nni,
    light_trials,
    nni_in,
    require_program,
    until,
    unused_port,
    wait_for_waiting_trial,
    write_light_experiment,
)
from tests.tiny_run import write_run


def start_ssh_server(
    folder: Path, worker_home: Path, *, guarded: bool = True, **environment: str
) -> tuple[subprocess.Popen[bytes], dict[str, Any]]:
    """Start an OpenSSH server that lets this user in with ``folder/key``; it sets ``environment`` in its sessions.

    Returns:
        The server, and the worker's entry in NNI's ``machineList``.
    """
    # sshd insists on being called by its absolute path.
    sshd = require_program("sshd", "openssh-server")
    folder.mkdir()
    worker_home.mkdir(parents=True)
    for name in ("host_key", "key"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "rsa", "-b", "2048", "-m", "PEM", "-N", "", "-f", str(folder / name)], check=True
        )
    port = unused_port()
    variables = {"HOME": str(worker_home), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PIP_NO_INDEX": "1"}
    if guarded:
        variables["NODE_OPTIONS"] = guarded_environment({})["NODE_OPTIONS"]  # what `nni guard` does on a worker
    settings = " ".join(f'"{name}={value}"' for name, value in {**variables, **environment}.items())
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host_key\nPidFile {folder}/pid\nUsePAM no\n"
        f"AuthorizedKeysFile {folder}/key.pub\nStrictModes no\nPermitRootLogin prohibit-password\n"
        f"PasswordAuthentication no\nSubsystem sftp internal-sftp\nPubkeyAcceptedAlgorithms +ssh-rsa\n"
        f"SetEnv {settings}\n"
    )
    Path("/run/sshd").mkdir(exist_ok=True)
    server = subprocess.Popen([sshd, "-D", "-e", "-f", str(folder / "sshd_config")], stderr=subprocess.DEVNULL)

    def answers() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    until(answers, 20, "the SSH server")
    return server, {
        "host": "127.0.0.1",
        "port": port,
        "user": getpass.getuser(),
        "sshKeyFile": str(folder / "key"),
        "pythonPath": str(Path(sys.executable).parent),
    }


def listening(home: Path) -> set[str]:
    """Return the addresses at which anything started below ``home`` listens: the manager, and the workers' keepers."""
    found = set()
    for process in psutil.process_iter():
        try:
            if process.environ().get("HOME", "").startswith(str(home)):
                sockets = process.net_connections(kind="inet")
                found |= {item.laddr.ip for item in sockets if item.status == psutil.CONN_LISTEN}
        except (psutil.Error, OSError):
            continue
    return found


def needs_ssh_server(test: Callable[..., None]) -> Callable[..., None]:
    root = getpass.getuser() == "root" and sys.platform == "linux"
    skip = pytest.mark.skipif(not root, reason="an SSH server for this test needs Linux and root")
    return pytest.mark.slow(skip(test))


@pytest.fixture
def servers() -> Iterator[list[subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for server in started:
        server.terminate()
        server.wait(timeout=20)


@needs_ssh_server
def test_two_workers_share_the_trials_over_ssh(tmp_path: Path, servers: list[subprocess.Popen[bytes]]) -> None:
    experiment, staged = tmp_path / "experiment", tmp_path / "staged"
    machines: list[dict[str, Any]] = []
    # The first worker reads the shared folder; the second one a copy of its own.
    for name, environment in (("shared", {}), ("own", {"GLIOMA_NAS_NNI_RUN": str(staged)})):
        server, machine = start_ssh_server(tmp_path / name, tmp_path / "home" / name, **environment)
        servers.append(server)
        machines.append(machine)
    service = {"platform": "remote", "nniManagerIp": "127.0.0.1", "machineList": machines}
    (tmp_path / "service.yml").write_text(yaml.safe_dump(service))
    with nni_in(tmp_path) as nni:
        try:
            nni.call(
                *(
                    "nni",
                    "config",
                    write_run(tmp_path),
                    "--out",
                    experiment,
                    "--kind",
                    "architecture",
                    "--tuner",
                    "Random",
                ),
                *("--trials", 2, "--concurrency", 2, "--training-service", tmp_path / "service.yml"),
            )
            shutil.copytree(experiment / "run", staged)
            record = nni.start(experiment)
            until(lambda: len(nni.trials(record)) == 2, 120, "two trials")
            assert listening(tmp_path / "home") == {"127.0.0.1"}
            nni.wait(record, timeout_s=240)
            trials = nni.trials(record)
            assert {trial["status"] for trial in trials} == {"SUCCEEDED"}
            assert len({trial["envId"] for trial in trials}) == 2
            for trial in trials:
                metrics = json.loads(json.loads(trial["finalMetricData"][0]["data"]))
                assert metrics["latency_ms"] > 0
            assert len(list((tmp_path / "home").glob("*/nni-experiments/*/environments/*/trials/*/report.html"))) == 2
            nni.call("nni", "stop")
        finally:
            for name in ("shared", "own"):
                Nni(tmp_path / "home" / name).end()


@needs_ssh_server
def test_stop_ends_the_trials_on_the_worker(tmp_path: Path, servers: list[subprocess.Popen[bytes]]) -> None:
    server, machine = start_ssh_server(tmp_path / "server", tmp_path / "home" / "worker")
    servers.append(server)
    service = {"platform": "remote", "machineList": [machine]}
    folder = write_light_experiment(
        tmp_path / "stopped", ["waits"], trainingService=service, nniManagerIp="127.0.0.1", trialConcurrency=1
    )
    with nni_in(tmp_path) as nni:
        try:
            wait_for_waiting_trial(nni, nni.start(folder))
            assert light_trials(tmp_path / "home" / "worker")
            nni.call("nni", "stop", folder)
            until(lambda: not light_trials(tmp_path / "home"), 20, "the trial on the worker is gone")
            until(lambda: not listening(tmp_path / "home"), 20, "NNI's server on the worker is gone")
        finally:
            Nni(tmp_path / "home" / "worker").end()


@needs_ssh_server
def test_worker_that_is_not_guarded_is_told_of(tmp_path: Path, servers: list[subprocess.Popen[bytes]]) -> None:
    machines = []
    for name, guarded in (("open", False), ("guarded", True)):
        server, machine = start_ssh_server(tmp_path / name, tmp_path / "home" / name, guarded=guarded)
        servers.append(server)
        machines.append(machine)
    machines.append({**machines[1], "sshKeyFile": str(tmp_path / "open" / "key")})  # which that server does not know
    machines.append({"host": "worker.example", "user": "me", "password": "secret"})
    service = {"platform": "remote", "machineList": machines}
    config = load_nni_config(write_light_experiment(tmp_path / "light", ["fine"], trainingService=service))
    found = unguarded_workers(config.training_service.machine_list)
    expected = [
        "worker 127.0.0.1: its Python environment is not guarded; NNI starts a server there",
        f"worker 127.0.0.1: not looked at ({getpass.getuser()}@127.0.0.1: Permission denied",
        "worker worker.example: not looked at, because it needs a password",
    ]
    assert len(found) == 3
    for line, beginning in zip(found, expected, strict=True):
        assert line.startswith(beginning)


def test_kubernetes_example_passes_nnis_own_schema(tmp_path: Path) -> None:
    example = (ROOT / "examples" / "nni" / "frameworkcontroller.yml").read_text()
    (tmp_path / "code").mkdir()
    (tmp_path / "search_space.json").write_text('{"seed": {"_type": "choice", "_value": [1, 2]}}')
    (tmp_path / "config.yml").write_text(example)
    config = load_nni_config(tmp_path)
    assert config.training_service.platform == "frameworkcontroller"
    assert "glioma_nas nni trial" in config.training_service.task_roles[0].command
    (tmp_path / "config.yml").write_text(example.replace("taskNumber: 1", "taskNumbre: 1"))
    with pytest.raises(ConfigError, match="NNI cannot use it"):
        load_nni_config(tmp_path)


def test_remote_example_is_what_nni_config_takes(tmp_path: Path) -> None:
    from nni.experiment.config.training_services import RemoteConfig

    section = yaml.safe_load((ROOT / "examples" / "nni" / "remote.yml").read_text())
    assert section.pop("nniManagerIp") == "127.0.0.1"
    config = RemoteConfig(**section)
    assert [machine.host for machine in config.machine_list] == ["worker1.example", "worker2.example"]
