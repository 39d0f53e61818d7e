"""The Node process behind NNI's web UI: its port, its start, its sockets, and what it leaves behind when it dies."""

from __future__ import annotations

import fcntl
import ipaddress
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from glioma_nas.errors import ExperimentError
from glioma_nas.nni_experiments.loopback import LOOPBACK, exposed_addresses, guarded_environment

_logger = logging.getLogger(__name__)

START_TIMEOUT_S = 90.0
LEFTOVERS_TIMEOUT_S = 5.0

_FIRST_PORT = 8080


@contextmanager
def one_start_at_a_time(folder: Path) -> Iterator[None]:
    """Keep two launchers from taking the same free port.

    Args:
        folder: NNI's home folder, the same for all experiments of a user.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".glioma_nas_start.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def spawn(arguments: Any, log: Path, host: str) -> subprocess.Popen[bytes]:
    """Start NNI's manager with the loopback script; its output goes to ``log``."""
    import nni_node

    folder = Path(next(iter(nni_node.__path__)))
    command = [str(folder / "node"), "--max-old-space-size=4096", str(folder / "main.js")]
    command += arguments.to_command_line_args()
    # NNI starts TensorBoard by its bare name; it is in this environment, activated or not.
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    log.mkdir(parents=True, exist_ok=True)
    with (log / "nnictl_stdout.log").open("a") as out, (log / "nnictl_stderr.log").open("a") as err:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            cwd=folder,
            env=guarded_environment({**os.environ, "PATH": programs}, host=host),
            start_new_session=True,  # Ctrl-C in the terminal stops the command that waits, not the experiment
        )


def wait_until_up(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Wait until this very process answers at ``port``.

    Raises:
        ExperimentError: It ended, or does not answer in time.
    """
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ExperimentError(f"the NNI manager ended at once: {last_line(log, 'no message')}")
        if _listens_itself(process.pid, port) and _answers(port):
            return
        time.sleep(0.2)
    raise ExperimentError(f"the NNI manager did not answer at port {port} within {START_TIMEOUT_S:.0f} s; see {log}")


def _listens_itself(pid: int, port: int) -> bool:
    """Tell whether it is this process that listens at ``port``: another experiment would answer just as well."""
    try:
        sockets = psutil.Process(pid).net_connections(kind="inet")
    except psutil.Error:
        return False
    return any(item.status == psutil.CONN_LISTEN and item.laddr.port == port for item in sockets)


def _answers(port: int) -> bool:
    """Tell whether NNI's interface is up: until then another server at the same port answers with plain text."""
    import requests
    from nni.experiment import rest

    try:
        return "status" in rest.get(port, "/check-status")
    except requests.RequestException:
        return False


def refuse_exposure(pid: int, host: str) -> None:
    """Check that a manager listens on the loopback address only, unless ``host`` says that the user wants more.

    Raises:
        ExperimentError: It listens elsewhere.
    """
    if not ipaddress.ip_address(host).is_loopback:
        return  # the user asked for it, and said yes
    exposed = exposed_addresses(pid)
    if exposed:
        raise ExperimentError(
            f"refused: NNI listens on {', '.join(exposed)}, where anyone who reaches it can run commands as you; "
            "it was stopped"
        )


def free_port(count: int) -> int:
    """Return the first of ``count`` consecutive free ports from 8080 on."""
    for port in range(_FIRST_PORT, 65536 - count):
        if all(is_free(port + offset) for offset in range(count)):
            return port
    raise ExperimentError("no free port between 8080 and 65535")


def checked_port(port: int, count: int) -> int:
    """Return ``port``.

    Raises:
        ExperimentError: It, or one of the ``count - 1`` after it, is taken.
    """
    for number in range(port, port + count):
        if not is_free(number):
            raise ExperimentError(f"port {number} is taken; choose another with --port, or leave it out")
    return port


def is_free(port: int) -> bool:
    """Tell whether nobody listens at ``port`` of the loopback address and it can be taken."""
    with socket.socket() as probe:
        # A server that has just ended leaves the port in TIME_WAIT, which does not keep NNI from listening.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except (OSError, OverflowError):
            return False
    return not _listens(port)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(2)
        return probe.connect_ex((LOOPBACK, port)) == 0


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """Kill a manager that was just started, with everything it has started."""
    try:
        children = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        children = []
    for child in children:
        _quietly(child.kill)
    process.kill()
    process.wait()


def end_leftovers(experiment_id: str) -> None:
    """End the trials, the dispatcher and the TensorBoards of an experiment whose manager is gone."""
    found = [process for process in psutil.process_iter() if _belongs_to(process, experiment_id)]
    for process in found:
        _quietly(process.terminate)
    alive = still_running(found, LEFTOVERS_TIMEOUT_S)
    for process in alive:
        _quietly(process.kill)
    still_running(alive, LEFTOVERS_TIMEOUT_S)


def end_process(process: psutil.Process, timeout_s: float) -> bool:
    """Ask a process to end, wait for it, and tell whether it has; one that has ended by itself meanwhile has."""
    _quietly(process.terminate)
    return not still_running([process], timeout_s)


def kill_process(process: psutil.Process, timeout_s: float) -> None:
    """Kill a process and wait for its end."""
    _quietly(process.kill)
    still_running([process], timeout_s)


def still_running(processes: Sequence[psutil.Process], timeout_s: float) -> list[psutil.Process]:
    """Wait until processes have ended and return those that have not."""
    deadline = time.monotonic() + timeout_s
    while True:
        alive = [process for process in processes if runs(process)]
        if not alive or time.monotonic() > deadline:
            return alive
        time.sleep(0.1)


def runs(process: psutil.Process) -> bool:
    """Tell whether a process runs: it, not another that got its number since, and not a zombie.

    A zombie is one that has ended and that nobody has reaped, as in a container without an init process.
    """
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _belongs_to(process: psutil.Process, experiment_id: str) -> bool:
    try:
        environment = process.environ()
        # Trials carry the id itself, the dispatcher the folder of its log.
        logs = Path(environment.get("NNI_LOG_DIRECTORY", "/")).parts
        own = process.pid == os.getpid() or process.pid == os.getppid()
        command = process.cmdline()
        shows = any("tensorboard" in part for part in command) and any(f"/{experiment_id}/" in part for part in command)
        return not own and (environment.get("NNI_EXP_ID") == experiment_id or experiment_id in logs or shows)
    except (psutil.Error, OSError):
        return False


def _quietly(action: Any) -> None:
    try:
        action()
    except psutil.NoSuchProcess:
        _logger.debug("a leftover process ended by itself")


def last_line(log: Path, otherwise: object) -> str:
    """Return the last line a manager left in its log folder, or ``otherwise``."""
    for name in ("nnictl_stderr.log", "nnimanager.log"):
        path = log / name
        lines = path.read_text(errors="replace").strip().splitlines() if path.is_file() else []
        if lines:
            return lines[-1]
    return str(otherwise)
