"""Run one search in a process of its own, so that its time and memory are its own and NNI's leftovers go with it."""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glioma_nas.config import RunConfig, parse_config
from glioma_nas.errors import ResourceError
from glioma_nas.files import read_json, write_json

COST_FILE = "cost.json"
ERROR_FILE = "error.txt"


def search_apart(
    config: RunConfig, inputs: Mapping[str, Path], folder: Path, *, epoch_s: float | None = None
) -> dict[str, Any]:
    """Search in a child process and return what it cost; a search that is done is not repeated.

    A search that was cut off begins anew: the time and memory of its last part would be taken for those of the whole.

    Args:
        config: See `glioma_nas.comparison.budget.with_budget`.
        inputs: Finished folders of the preprocess and latency stages.
        folder: Gets what the search stage writes, and ``cost.json``: ``wall_s``, without what was scored for the rank
            correlation alone, ``peak_mb`` of the process and ``peak_gpu_mb`` of its tensors on a GPU (none on a CPU).
        epoch_s: Wall time of an epoch in seconds; none for the steps of the configuration.

    Raises:
        ResourceError: The search failed; its last line says why, ``error.txt`` has the rest.
    """
    if (folder / COST_FILE).is_file():
        return dict(read_json(folder / COST_FILE))
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    # Spawned, not forked: a fork would inherit this process' memory and threads, and its peak with them.
    child = multiprocessing.get_context("spawn").Process(
        target=_search,
        args=(config.model_dump(mode="json"), {name: str(path) for name, path in inputs.items()}, str(folder), epoch_s),
    )
    child.start()
    try:
        child.join()
    except KeyboardInterrupt:
        child.terminate()
        child.join()
        raise
    if child.exitcode != 0:
        error = folder / ERROR_FILE
        told = error.read_text(encoding="utf-8").strip().splitlines()[-1] if error.is_file() else ""
        raise ResourceError(
            f"{config.search.strategy}, seed {config.seed}: the search ended with status {child.exitcode}: "
            f"{told or 'killed, perhaps for want of memory'}; see {error}"
        )
    return dict(read_json(folder / COST_FILE))


def _search(data: Mapping[str, Any], inputs: Mapping[str, str], folder: str, epoch_s: float | None) -> None:
    from glioma_nas.pipeline import StageContext
    from glioma_nas.progress import Silent
    from glioma_nas.registry import load_file
    from glioma_nas.stages.search import run

    os.dup2(2, 1)  # NNI logs to standard output, where the command's table or JSON belongs
    try:
        config = parse_config(data, source="comparison", folder=Path())
        for plugin in config.plugins:
            load_file(plugin)
        started = time.monotonic()
        context = StageContext(config, Path(folder), {name: Path(path) for name, path in inputs.items()}, Silent())
        results = run(context, epoch_s=epoch_s)
        wall_s = time.monotonic() - started - float(results.get("sampled_s", 0.0))
        peak_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        write_json(Path(folder) / "search.json", results)
        # Last: it says that the search is complete.
        write_json(
            Path(folder) / COST_FILE,
            {
                "wall_s": round(wall_s, 2),
                "peak_mb": round(peak_kb / 1024, 1),
                "peak_gpu_mb": _peak_gpu_mb(config.device),
            },
        )
    except BaseException:
        (Path(folder) / ERROR_FILE).write_text(traceback.format_exc(), encoding="utf-8")
        raise


def _peak_gpu_mb(device: str) -> float | None:
    if not device.startswith("cuda"):
        return None
    import torch

    return round(torch.cuda.max_memory_allocated(torch.device(device)) / 2**20, 1)
