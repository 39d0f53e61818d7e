"""The trial's parent: what NNI sees of a trial's end, and that nothing outlives it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from glioma_nas.nni_experiments.loopback import HOST_VARIABLE

_SUPERVISE = "import sys; from glioma_nas.nni_experiments.trial_supervisor import supervise; sys.exit(supervise({!r}))"


def supervised(code: str, folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _SUPERVISE.format([sys.executable, "-c", code])]
    environment = {**os.environ, "NNI_OUTPUT_DIR": str(folder)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("code", "status", "last"),
    [
        ("pass", 0, None),
        ("raise SystemExit(3)", 1, "trial failed: the trial process ended with status 3 and gave no reason"),
        ("import os; os.kill(os.getpid(), 11)", 1, "trial failed: killed by SIGSEGV"),
        (
            "import os; os.kill(os.getpid(), 9)",
            1,
            "trial failed: killed by SIGKILL; the system may have run out of memory",
        ),
    ],
)
def test_end_of_a_trial_becomes_a_status_and_a_last_line(
    tmp_path: Path, code: str, status: int, last: str | None
) -> None:
    process = supervised(code, tmp_path)
    _, err = process.communicate(timeout=120)
    assert process.returncode == status
    assert err.strip().splitlines()[-1:] == ([last] if last else [])


# A trial with a worker of its own that minds no SIGTERM; both print their numbers.
_WITH_WORKER = """
import os, subprocess, sys, time
worker = "import os, signal, time; signal.signal(15, signal.SIG_IGN); print(os.getpid(), flush=True); time.sleep(60)"
started = subprocess.Popen([sys.executable, "-c", worker], stdout=subprocess.PIPE, text=True)
print(os.getpid(), started.stdout.readline(), end="", flush=True)
{then}
"""


def numbers_of(process: subprocess.Popen[str]) -> list[int]:
    assert process.stdout is not None
    return [int(number) for number in process.stdout.readline().split()]


def wait_until_gone(pid: int) -> None:
    """Wait until a process is gone, or a zombie that nobody has reaped."""
    for _ in range(400):
        stat = Path(f"/proc/{pid}/stat")
        try:
            if ") Z " in stat.read_text():
                return
        except FileNotFoundError:
            return
        time.sleep(0.05)
    pytest.fail(f"process {pid} outlived its trial")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_trial_ends_by_that_signal_with_all_it_started(tmp_path: Path, number: signal.Signals) -> None:
    process = supervised(_WITH_WORKER.format(then="time.sleep(60)"), tmp_path)
    numbers = numbers_of(process)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == -number
    for pid in numbers:
        wait_until_gone(pid)


@pytest.mark.slow
def test_trial_that_ends_leaves_nothing_behind(tmp_path: Path) -> None:
    process = supervised(_WITH_WORKER.format(then=""), tmp_path)
    numbers = numbers_of(process)
    process.communicate(timeout=60)
    assert process.returncode == 0
    for pid in numbers:
        wait_until_gone(pid)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent has died")
def test_trial_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    process = supervised("import os, time; print(os.getpid(), flush=True); time.sleep(60)", tmp_path)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    process.kill()
    process.wait(timeout=30)
    wait_until_gone(child)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent has died")
def test_parent_that_died_before_the_kernel_was_asked_is_noticed() -> None:
    module = "glioma_nas.nni_experiments.trial_supervisor"
    code = f"import os; from {module} import die_with_parent; die_with_parent(15, parent=os.getppid() + 1)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -15


# Stands for NNI's manager or its keeper on a worker: listens, and starts a trial.
_MANAGER = """
const {spawn} = require('child_process');
const server = require('http').createServer((request, answer) => answer.end());
server.listen(0, process.argv[2], () => {
    const trial = spawn(process.argv[3], process.argv.slice(4), {stdio: 'inherit'});
    trial.on('exit', status => process.exit(status));
});
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("listens", "allowed", "status"), [("127.0.0.1", None, 0), ("0.0.0.0", None, 1), ("0.0.0.0", "192.0.2.1", 0)]
)
def test_trial_refuses_an_nni_that_listens_on_the_network_unless_asked_for(
    tmp_path: Path, listens: str, allowed: str | None, status: int
) -> None:
    import nni_node

    program = tmp_path / "nni_node" / "main.js"
    program.parent.mkdir()
    program.write_text(_MANAGER)
    trial = [sys.executable, "-c", _SUPERVISE.format([sys.executable, "-c", "print('ran')"])]
    plain = {name: value for name, value in os.environ.items() if name not in ("NODE_OPTIONS", HOST_VARIABLE)}
    environment = {**plain, "NNI_OUTPUT_DIR": str(tmp_path), **({HOST_VARIABLE: allowed} if allowed else {})}
    command = [str(Path(next(iter(nni_node.__path__))) / "node"), str(program), listens, *trial]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stdout) == (status, "" if status else "ran\n")
    refusal = r"trial failed: refused: NNI listens on 0\.0\.0\.0:\d+, .* run `glioma-nas nni guard` once"
    assert bool(re.match(refusal, done.stderr)) == bool(status)
