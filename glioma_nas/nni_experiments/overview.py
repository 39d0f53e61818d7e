"""What experiments are doing: the table of `nni status`, and waiting for one to end."""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from glioma_nas.errors import ExperimentError
from glioma_nas.nni_experiments.manager import RunningExperiment, is_alive, records, running
from glioma_nas.progress import Progress

_Answer = TypeVar("_Answer")

POLL_S = 2.0
STDERR_FILE = "trial.stderr"
_FULL_BYTES = 1_000_000
_OVER = ("DONE", "STOPPED")
_ENDED = ("SUCCEEDED", "FAILED", "USER_CANCELED", "SYS_CANCELED", "EARLY_STOPPED")


def overview() -> list[dict[str, Any]]:
    """Describe every experiment of this user, newest first; of one that does not run, only that."""
    rows = []
    for record in records():
        row: dict[str, Any] = {
            "id": record["id"],
            "name": record["experimentName"],
            "state": "STOPPED" if record["status"] == "STOPPED" else "DEAD, resume it",
            **dict.fromkeys(("trials", "succeeded", "failed", "running", "best"), None),
            "url": None,
        }
        if is_alive(record):
            try:
                experiment = running(record)
            except ExperimentError:
                row["state"] = "RUNS, port unknown"
                rows.append(row)
                continue
            row["url"] = experiment.url
            try:
                row |= {"state": experiment.status(), **_counts(experiment.trials())}
            except ExperimentError:
                row["state"] = "BUSY, does not answer"
        rows.append(row)
    return rows


def wait_for(experiment: RunningExperiment, *, progress: Progress) -> str:
    """Wait until an experiment ends.

    Returns:
        One line that says how many trials ended how, and the best result.

    Raises:
        ExperimentError: The manager died, NNI met an error, or no trial succeeded; the first failing trial's reason is
            part of the message.
    """
    trials: Sequence[Mapping[str, Any]] = ()
    planned = _answer(lambda: _planned(experiment), experiment, trials)
    with progress.task(f"experiment {experiment.id}", planned) as task:
        while True:
            state, latest = _answer(lambda: (experiment.status(), experiment.trials()), experiment, trials)
            task.advance(_ended(latest) - _ended(trials))
            trials = latest
            if state in _OVER or state == "ERROR":
                break
            time.sleep(POLL_S)
    return summary(experiment, state, trials)


def _answer(ask: Callable[[], _Answer], experiment: RunningExperiment, trials: Sequence[Mapping[str, Any]]) -> _Answer:
    """Ask the manager until it answers: a busy one may take longer than a request waits."""
    while True:
        try:
            return ask()
        except (ExperimentError, OSError) as err:
            if not experiment.is_alive():
                raise ExperimentError(_why_gone(experiment, trials)) from err
            time.sleep(POLL_S)


def _ended(trials: Sequence[Mapping[str, Any]]) -> int:
    return sum(trial["status"] in _ENDED for trial in trials)


def _why_gone(experiment: RunningExperiment, trials: Sequence[Mapping[str, Any]]) -> str:
    full = _full_disk(experiment.folder)
    known = {record["id"]: record["status"] for record in records()}
    if known.get(experiment.id) in ("STOPPING", "STOPPED"):
        # By the user or, if it could still write that, by the manager itself over the full disk.
        remedy = full or f"continue with `glioma-nas nni resume {experiment.id}`"
        return f"experiment {experiment.id} was stopped before its end ({_told(trials)}); {remedy}"
    if full is not None:
        return f"experiment {experiment.id} ended ({_told(trials)}): {full}"
    return f"experiment {experiment.id}: the NNI manager died; continue with `glioma-nas nni resume {experiment.id}`"


def summary(experiment: RunningExperiment, state: str, trials: Sequence[Mapping[str, Any]]) -> str:
    """Put an ended experiment into one line.

    Raises:
        ExperimentError: See `wait_for`.
    """
    counts = Counter(str(trial["status"]) for trial in trials)
    failure = _first_failure(trials)
    told = _told(trials)
    if state == "ERROR" or not counts["SUCCEEDED"]:
        reason = failure or _full_disk(experiment.folder)
        reason = reason or "see log/nnimanager.log and log/dispatcher.log of the experiment"
        raise ExperimentError(f"experiment {experiment.id} failed ({told}); {reason}")
    best = _counts(trials)["best"]
    note = f"; {failure}" if failure else ""
    return f"experiment {experiment.id}: {told}; best default {best}{note}"


def _told(trials: Sequence[Mapping[str, Any]]) -> str:
    counts = Counter(str(trial["status"]) for trial in trials)
    return ", ".join(f"{number} {status}" for status, number in sorted(counts.items())) or "no trial"


def _planned(experiment: RunningExperiment) -> int:
    from nni.experiment import rest

    profile = rest.get(experiment.port, "/experiment")
    return int(profile["params"].get("maxTrialNumber") or 1)


def _counts(trials: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    results = [value for trial in trials if (value := _default(trial)) is not None]
    return {
        "trials": len(trials),
        "succeeded": sum(trial["status"] == "SUCCEEDED" for trial in trials),
        "failed": sum(trial["status"] == "FAILED" for trial in trials),
        "running": sum(trial["status"] == "RUNNING" for trial in trials),
        "best": round(max(results), 4) if results else None,
    }


def _default(trial: Mapping[str, Any]) -> float | None:
    for metric in trial.get("finalMetricData") or []:
        value = json.loads(json.loads(metric["data"]))
        return float(value["default"] if isinstance(value, dict) else value)
    return None


def _first_failure(trials: Sequence[Mapping[str, Any]]) -> str | None:
    failed = [trial for trial in trials if trial["status"] == "FAILED"]
    if not failed:
        return None
    first = min(failed, key=lambda trial: int(trial["sequenceId"]))
    # NNI gives a path here, though it calls it a URL; of a remote trial it is HOST:PATH, which is not at hand.
    path = Path(str(first.get("logPath") or "")) / STDERR_FILE
    reason = "its stderr is on the worker"
    if path.is_file():
        lines = _tail(path).strip().splitlines()
        reason = lines[-1] if lines else "it left no message"
        full = _full_disk(path.parent)
        reason += f"; {full}" if full else ""
    return f"first failing trial {first['trialJobId']}: {reason}"


def _full_disk(folder: Path | None) -> str | None:
    if folder is None or not folder.is_dir() or shutil.disk_usage(folder).free >= _FULL_BYTES:
        return None
    return f"the disk of {folder} is full; free space, then `glioma-nas nni stop` and `nni resume` continue"


def _tail(path: Path, n_bytes: int = 4096) -> str:
    with path.open("rb") as handle:
        handle.seek(max(path.stat().st_size - n_bytes, 0))
        return handle.read().decode("utf-8", errors="replace")
