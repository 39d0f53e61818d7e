"""Train one network on several devices of this machine: one process for each, joined by Lightning's DDP.

The processes are started here and not by Lightning, which would run the whole command again in each of them. They find
each other through a file, so nothing listens for strangers, and talk over the loopback interface.

Reference: Li et al., PyTorch Distributed: Experiences on Accelerating Data Parallel Training, VLDB 2020.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch.distributed as dist

from glioma_nas.errors import ConfigError, ResourceError
from glioma_nas.nni_experiments.trial_supervisor import die_with_parent

STORE_FILE = "processes.store"

_LAUNCHER_VARIABLE = "GLIOMA_NAS_LAUNCHER"
_POLL_S = 0.5
_STOP_S = 10.0


def world_size() -> int:
    """Return how many processes train together; 1 outside `join`."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, from 0; process 0 writes the files."""
    return dist.get_rank() if dist.is_initialized() else 0


def share_of_batch(batch_size: int) -> int:
    """Return the slices that one process takes of a batch.

    Raises:
        ConfigError: The batch cannot be divided evenly.
    """
    if batch_size % world_size():
        raise ConfigError(
            f"train.batch_size {batch_size} cannot be shared by {world_size()} devices; choose a multiple of it"
        )
    return batch_size // world_size()


def join(folder: Path, device: str) -> None:
    """Join the other processes that `launch` started; called once at the start of each.

    Args:
        folder: The folder given to `launch`.
        device: ``cpu`` or ``cuda``.
    """
    # A process that was killed cannot end its children; they would wait for each other, or train on unseen.
    die_with_parent(signal.SIGTERM, parent=int(os.environ.get(_LAUNCHER_VARIABLE, os.getppid())))
    # Both libraries open listening sockets of their own, on the network unless told otherwise.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "=lo")
    dist.init_process_group(
        "nccl" if device.startswith("cuda") else "gloo",
        init_method=f"file://{(folder / STORE_FILE).resolve()}",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )


def launch(
    arguments: Sequence[str], *, n_processes: int, folder: Path, waiting: Callable[[], None] | None = None
) -> None:
    """Run ``python ARGUMENTS`` in ``n_processes`` processes at once and wait for all of them.

    When one fails or this process is interrupted, the others are ended. What they print goes to ``process<k>.log``.

    Args:
        arguments: Arguments of Python; the program calls `join`.
        n_processes: How many.
        folder: Where logs and the meeting point lie; exists.
        waiting: Called twice a second while they run.

    Raises:
        ResourceError: One of them failed; the message holds the last line it printed.
    """
    (folder / STORE_FILE).unlink(missing_ok=True)
    processes: list[subprocess.Popen[bytes]] = []
    failed: list[int] = []
    logs = [folder / f"process{number}.log" for number in range(n_processes)]
    try:
        for number, log in enumerate(logs):
            environment = {
                **os.environ,
                _LAUNCHER_VARIABLE: str(os.getpid()),
                # Lightning takes these for torchrun's, and then starts no process itself.
                "TORCHELASTIC_RUN_ID": "glioma_nas",
                "RANK": str(number),
                "LOCAL_RANK": str(number),
                "GROUP_RANK": "0",
                "WORLD_SIZE": str(n_processes),
                "LOCAL_WORLD_SIZE": str(n_processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": "0",
            }
            with log.open("w") as stream:
                command = [sys.executable, *arguments]
                processes.append(subprocess.Popen(command, env=environment, stdout=stream, stderr=subprocess.STDOUT))
        while any(process.poll() is None for process in processes):
            failed = [number for number, process in enumerate(processes) if process.poll()]
            if failed:
                break
            if waiting is not None:
                waiting()
            time.sleep(_POLL_S)
    finally:
        _end(processes)
        (folder / STORE_FILE).unlink(missing_ok=True)
    # Those that were ended because of another one are not to blame.
    failed = failed or [number for number, process in enumerate(processes) if process.returncode]
    if failed:
        lines = [line for line in logs[failed[0]].read_text(errors="replace").splitlines() if line.strip()]
        raise ResourceError(
            f"training on {n_processes} devices failed in process {failed[0]}: "
            f"{lines[-1] if lines else 'it printed nothing'} (see {logs[failed[0]]})"
        )
    for log in logs:
        log.unlink()


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.terminate()
    for process in processes:
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
