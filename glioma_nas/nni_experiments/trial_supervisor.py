"""The trial command: a light parent that starts the trial proper and makes NNI see how it really ended.

NNI 3.0 shows a trial that a signal killed (out of memory) as canceled by the user, and stops a trial by a signal to its
first process alone. The parent, which uses little memory, survives what kills its child and turns it into a failure
with the reason on the last line of stderr; and it passes on what NNI wants stopped, to whatever the trial has started.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from glioma_nas.errors import GliomaNasError
from glioma_nas.local import ENVIRONMENT_VARIABLE as PLUGINS_VARIABLE
from glioma_nas.nni_experiments.loopback import refuse_open_door

REASON_FILE = "failure.txt"
GRACE_S = 2.0  # NNI itself waits five seconds before it kills this process
_POLL_S = 0.1
_PR_SET_PDEATHSIG = 1
# Loaded before any fork: between fork and exec a process must not wait for a lock that another thread held.
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def supervise(command: Sequence[str]) -> int:
    """Run ``command`` and return the exit status NNI shall see: 0 done, otherwise failed.

    When NNI stops the trial, this process ends by NNI's own signal, because only then NNI shows the trial as stopped
    rather than failed. When the NNI manager dies, so does the trial: its experiment is resumed with `nni resume`. Of an
    NNI that listens on the network, unless asked to, no trial runs.
    """
    die_with_parent(signal.SIGTERM, parent=os.getppid())
    try:
        refuse_open_door()
    except GliomaNasError as err:
        return _failed(str(err))
    reason_file = Path(os.environ.get("NNI_OUTPUT_DIR") or ".") / REASON_FILE
    reason_file.unlink(missing_ok=True)
    # Plugins come with the trial's code folder; those of whoever started NNI would clash with them.
    environment = {name: value for name, value in os.environ.items() if name != PLUGINS_VARIABLE}
    own = os.getpid()
    # A process group of its own, so that data loaders and whatever else the trial starts end with it.
    child = subprocess.Popen(
        command,
        env=environment,
        process_group=0,
        preexec_fn=lambda: die_with_parent(signal.SIGKILL, parent=own),
    )
    stopped_by: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        stopped_by.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    status = _wait(child, stopped_by)
    if stopped_by:
        signal.signal(stopped_by[0], signal.SIG_DFL)
        os.kill(os.getpid(), stopped_by[0])
    if status == 0:
        return 0
    return _failed(_reason(status, reason_file))


def _failed(reason: str) -> int:
    sys.stderr.write(f"trial failed: {reason}\n")
    sys.stderr.flush()
    return 1


def die_with_parent(number: int, *, parent: int) -> None:
    """Ask the kernel (Linux) for a signal when the parent process dies, however it dies.

    Args:
        number: The signal.
        parent: Process id of the parent. When it has died before the kernel was asked, the signal comes at once.
    """
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
        if os.getppid() != parent:
            os.kill(os.getpid(), number)


def _wait(child: subprocess.Popen[bytes], stopped_by: list[int]) -> int:
    """Wait for the trial, stop its group when asked to, and end what it leaves behind."""
    kill_at: float | None = None
    # The trial is only looked at until its group is gone: as long as it is not reaped, nobody else gets its number.
    while os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if stopped_by and kill_at is None:
            os.killpg(child.pid, signal.SIGTERM)
            kill_at = time.monotonic() + GRACE_S
        elif kill_at is not None and time.monotonic() > kill_at:
            os.killpg(child.pid, signal.SIGKILL)
        time.sleep(_POLL_S)
    os.killpg(child.pid, signal.SIGKILL)
    return child.wait()


def _reason(status: int, reason_file: Path) -> str:
    if status < 0:
        name = signal.Signals(-status).name
        hint = "; the system may have run out of memory" if -status == signal.SIGKILL else ""
        return f"killed by {name}{hint}"
    try:
        text = reason_file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        text = ""
    return text or f"the trial process ended with status {status} and gave no reason"
