"""Look at the machines of NNI's remote training service before an experiment is sent there."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Sequence
from typing import Any

from glioma_nas.nni_experiments.loopback import PRELOAD

_TIMEOUT_S = 30
_PROBE = "import os; print(os.environ.get('NODE_OPTIONS', ''))"


def unguarded_workers(machines: Sequence[Any]) -> list[str]:
    """Say for each worker that is not known to be guarded what is amiss, in one line.

    NNI starts a server on every worker, on all its network interfaces unless `glioma-nas nni guard` was run there.

    Args:
        machines: NNI's ``machineList``.
    """
    found = []
    for machine in machines:
        problem = _problem(machine)
        if problem is not None:
            found.append(
                f"worker {machine.host}: {problem}; NNI starts a server there that listens on every network interface, "
                "and trials refuse to run, unless `glioma-nas nni guard` was run in pythonPath's Python environment"
            )
    return found


def _problem(machine: Any) -> str | None:
    if machine.ssh_key_file is None:
        return "not looked at, because it needs a password"
    python = f"{machine.python_path}/python3" if machine.python_path else "python3"
    # NNI checks no host keys either, and nothing secret is sent. The key is the one that NNI will use, and no other.
    options = ["BatchMode=yes", "IdentitiesOnly=yes", "LogLevel=ERROR"]
    options += ["StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null"]
    command = [
        *("ssh", "-i", str(machine.ssh_key_file), "-p", str(machine.port), "-l", str(machine.user)),
        *(part for option in options for part in ("-o", option)),
        *("--", str(machine.host), f"{shlex.quote(python)} -c {shlex.quote(_PROBE)}"),
    ]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except FileNotFoundError:
        return "not looked at, because ssh is not installed"
    except subprocess.TimeoutExpired:
        return f"not looked at, because it did not answer within {_TIMEOUT_S} s"
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        return f"not looked at ({reason})"
    return None if PRELOAD.name in done.stdout else "its Python environment is not guarded"
