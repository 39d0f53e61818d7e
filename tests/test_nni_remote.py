"""NNI over SSH against real OpenSSH servers on the loopback address, and Kubernetes by NNI's own schema."""

from __future__ import annotations

import getpass
import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from glioma_nas.errors import ConfigError
from glioma_nas.nni_experiments.loopback import guarded_environment
from glioma_nas.nni_experiments.manager import load_nni_config
from tests.nni_runs import ROOT, Nni, nni_in, require_program, until
from tests.test_nni_trials import write_run


def start_ssh_server(folder: Path, worker_home: Path, **environment: str) -> tuple[subprocess.Popen[bytes], int]:
    """Start an OpenSSH server that lets this user in with ``folder/key``; it sets ``environment`` in its sessions."""
    # sshd insists on being called by its absolute path.
    sshd = require_program("sshd", "openssh-server")
    folder.mkdir()
    worker_home.mkdir(parents=True)
    for name in ("host_key", "key"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "rsa", "-b", "2048", "-m", "PEM", "-N", "", "-f", str(folder / name)], check=True
        )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    variables = {"HOME": str(worker_home), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PIP_NO_INDEX": "1"}
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
    return server, port


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


@pytest.fixture
def servers() -> Iterator[list[subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for server in started:
        server.terminate()
        server.wait(timeout=20)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="NNI's launcher is tested on Linux")
def test_two_workers_share_the_trials_over_ssh(tmp_path: Path, servers: list[subprocess.Popen[bytes]]) -> None:
    if getpass.getuser() != "root":
        pytest.skip("an SSH server for this test needs root")
    experiment, staged = tmp_path / "experiment", tmp_path / "staged"
    machines: list[dict[str, Any]] = []
    # The first worker reads the shared folder; the second one a copy of its own.
    for name, environment in (("shared", {}), ("own", {"GLIOMA_NAS_NNI_RUN": str(staged)})):
        server, port = start_ssh_server(tmp_path / name, tmp_path / "home" / name, **environment)
        servers.append(server)
        machines.append(
            {
                "host": "127.0.0.1",
                "port": port,
                "user": getpass.getuser(),
                "sshKeyFile": str(tmp_path / name / "key"),
                "pythonPath": str(Path(sys.executable).parent),
            }
        )
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
