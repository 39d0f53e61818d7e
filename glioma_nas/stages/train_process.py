"""One of several processes that train a network together: ``python -m glioma_nas.stages.train_process JOB.json``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from glioma_nas.config import RunConfig
from glioma_nas.distributed_training import join
from glioma_nas.files import read_json, write_json
from glioma_nas.pipeline import StageContext
from glioma_nas.progress import Silent
from glioma_nas.registry import load_entry_points, load_file

JOB_FILE = "job.json"


def write_job(context: StageContext, fold: int, name: str, folder: Path) -> Path:
    """Write what a process must know to train ``name`` for ``fold``; returns the file."""
    job = {
        "config": context.config.model_dump(mode="json"),
        "stage_folder": str(context.folder),
        "inputs": {stage: str(path) for stage, path in context.inputs.items()},
        "fold": fold,
        "network": name,
        "folder": str(folder),
    }
    write_json(folder / JOB_FILE, job)
    return folder / JOB_FILE


def main(path: Path) -> None:
    """Join the other processes and train."""
    from glioma_nas.stages.train import train_network

    job: dict[str, Any] = read_json(path)
    config = RunConfig.model_validate(job["config"])
    load_entry_points()
    for plugin in config.plugins:
        load_file(plugin)
    folder = Path(job["folder"])
    join(folder, config.device)
    inputs = {stage: Path(text) for stage, text in job["inputs"].items()}
    context = StageContext(config, Path(job["stage_folder"]), inputs, Silent())
    train_network(context, job["fold"], job["network"], folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
