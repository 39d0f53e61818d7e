"""The trial command: a light parent that starts the trial proper and makes NNI see how it really ended.

NNI 3.0 shows a trial that a signal killed (out of memory) as canceled by the user, and stops a trial by a signal to its
first process alone. The parent, which uses little memory, survives what kills its child and turns it into a failure
with the reason on the last line of stderr; and it passes on what NNI wants stopped.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from glioma_nas.local import ENVIRONMENT_VARIABLE as PLUGINS_VARIABLE

REASON_FILE = "failure.txt"
GRACE_S = 3.0
_PR_SET_PDEATHSIG = 1


def supervise(command: Sequence[str]) -> int:
    """Run ``command`` and return the exit status NNI shall see: 0 done, otherwise failed.

    When NNI stops the trial, this process ends by NNI's own signal, because only then NNI shows the trial as stopped
    rather than failed. When the NNI manager dies, so does the trial: its experiment is resumed with `nni resume`.
    """
    die_with_parent(signal.SIGTERM)
    reason_file = Path(os.environ.get("NNI_OUTPUT_DIR") or ".") / REASON_FILE
    reason_file.unlink(missing_ok=True)
    # Plugins come with the trial's code folder; those of whoever started NNI would clash with them.
    environment = {name: value for name, value in os.environ.items() if name != PLUGINS_VARIABLE}
    child = subprocess.Popen(command, env=environment, preexec_fn=lambda: die_with_parent(signal.SIGKILL))
    stopped_by: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        stopped_by.append(number)
        child.terminate()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    status = _wait(child, stopped_by)
    if stopped_by:
        signal.signal(stopped_by[0], signal.SIG_DFL)
        os.kill(os.getpid(), stopped_by[0])
    if status == 0:
        return 0
    reason = _reason(status, reason_file)
    sys.stderr.write(f"trial failed: {reason}\n")
    sys.stderr.flush()
    return 1


def die_with_parent(number: int) -> None:
    """Ask the kernel (Linux) for a signal when the parent process dies, however it dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)


def _wait(child: subprocess.Popen[bytes], stopped_by: list[int]) -> int:
    while True:
        try:
            return child.wait(timeout=GRACE_S)
        except subprocess.TimeoutExpired:
            if stopped_by:
                child.kill()


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
