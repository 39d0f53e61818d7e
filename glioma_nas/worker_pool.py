"""Do one thing to many items in several processes, in whatever order they finish.

Workers are fresh interpreters, because a fork would copy the locks of whatever threads the caller runs. They ignore
Ctrl-C, which goes to the whole terminal while the parent alone decides what stops, and end with their parent.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TypeVar

from glioma_nas.errors import ResourceError
from glioma_nas.registry import load_file

Item = TypeVar("Item")
Result = TypeVar("Result")


def outcomes(
    function: Callable[[Item], Result], items: Sequence[Item], *, workers: int, plugins: Sequence[Path] = ()
) -> Iterator[tuple[int, Result]]:
    """Yield (index of the item, result) as the results come.

    Args:
        function: Importable by name, so that a fresh interpreter finds it.
        items: Each is sent to a worker, so keep them small.
        workers: Processes; with one everything happens in this process.
        plugins: Local plugin files whose components the function needs.

    Raises:
        ResourceError: A worker was killed.
    """
    workers = min(workers, len(items))
    if workers <= 1:
        for index, item in enumerate(items):
            yield index, function(item)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(tuple(plugins),))
    try:
        futures = {pool.submit(function, item): index for index, item in enumerate(items)}
        for future in as_completed(futures):
            yield futures.pop(future), future.result()
    except BrokenProcessPool as err:
        raise ResourceError(
            "a worker process was killed, probably for want of memory; use one worker and run again"
        ) from err
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(plugins: tuple[Path, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    for path in plugins:
        load_file(path)


def _exit_with_parent() -> None:
    # A parent that was killed cannot stop its workers, which would wait for work for ever.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
