"""Do one thing to many items in several processes, in whatever order they finish.

Workers are fresh interpreters, because a fork would copy the locks of whatever threads the caller runs. They ignore
Ctrl-C, which goes to the whole terminal while the parent alone decides what stops, and end with their parent.

The system may kill a worker, above all for want of memory, and one that is killed takes the pool with it. What was in
work then is done again, one item at a time in a process of its own, and the rest goes on: so a kill costs at most the
item whose process is killed although it has no other beside it.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from pathlib import Path
from typing import TypeVar

from glioma_nas.errors import ResourceError
from glioma_nas.registry import load_file

Item = TypeVar("Item")
Result = TypeVar("Result")

KILLED = (
    "the system killed the process that worked on it, with no other beside it, probably for want of memory; use a "
    "machine with more, or leave it out"
)
"""What is told of an item that is given up."""

NO_START = (
    "a worker process ended before it had any work; its own message, if it left one, stands above. Workers import the "
    "script that starts them: put what it does under `if __name__ == '__main__':`, or set workers to 1"
)
"""What is told where workers cannot even start."""

_logger = logging.getLogger(__name__)


def outcomes(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    workers: int,
    plugins: Sequence[Path] = (),
    killed: Callable[[Item], Result] | None = None,
) -> Iterator[tuple[int, Result]]:
    """Yield (index of the item, result) as the results come.

    Args:
        function: Importable by name, so that a fresh interpreter finds it.
        items: Each is sent to a worker, so keep them small.
        workers: Processes; with one everything happens in this process, which a kill then ends. After a kill that
            nobody's own fault explains there is one fewer.
        plugins: Local plugin files whose components the function needs.
        killed: Gives the result of an item whose worker was killed with no other beside it; none makes that an error.

    Raises:
        ResourceError: A worker was killed over one item, with no other beside it, and ``killed`` is None; or workers
            do not start.
        PluginError: A plugin cannot be loaded in a worker.
    """
    if workers <= 1 or not items:
        for index, item in enumerate(items):
            yield index, function(item)
        return
    waiting = deque(range(len(items)))
    while waiting:
        suspects = yield from _until_a_kill(function, items, waiting, workers, plugins)
        if suspects:
            _logger.warning("a worker process was killed; %d items are tried again one by one", len(suspects))
        guilty = 0
        for index in sorted(suspects):
            if not (yield from _until_a_kill(function, items, deque([index]), 1, plugins)):
                continue
            if killed is None:
                raise ResourceError(f"item {index + 1} of {len(items)}: {KILLED}")
            guilty += 1
            yield index, killed(items[index])
        if suspects and not guilty:
            workers = max(1, workers - 1)  # together they need more memory than there is


def _until_a_kill(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    waiting: deque[int],
    workers: int,
    plugins: Sequence[Path],
) -> Generator[tuple[int, Result], None, list[int]]:
    """Take items from ``waiting`` until there are none or a worker is killed; return those that were in work then."""
    context = multiprocessing.get_context("spawn")
    workers = min(workers, len(waiting))
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    in_work: dict[Future[Result], int] = {}
    lost: list[int] = []
    try:
        if workers == 1:  # with several it would delay the others, and what they lose is tried again with one
            _require_start(pool, tuple(plugins))
        while in_work or (waiting and not lost):
            # No more than there are workers, so that little is lost: what was begun, and what a killed worker, whose
            # end is not known yet, was to begin. The pool does not tell these apart.
            while waiting and not lost and len(in_work) < workers:
                index = waiting.popleft()
                try:
                    in_work[pool.submit(_call, function, tuple(plugins), items[index])] = index
                except BrokenProcessPool:
                    waiting.appendleft(index)  # nobody began it
                    break
            if not in_work:
                return lost  # the pool broke while nobody worked; another one, at its first item, is whole
            done, _ = wait(in_work, return_when=FIRST_COMPLETED)
            for future in done:
                index = in_work.pop(future)
                try:
                    result = future.result()
                except BrokenProcessPool:
                    lost.append(index)
                else:
                    yield index, result
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return lost


def _require_start(pool: ProcessPoolExecutor, plugins: tuple[Path, ...]) -> None:
    try:
        pool.submit(_load, plugins).result()
    except BrokenProcessPool as err:
        raise ResourceError(NO_START) from err


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _call(function: Callable[[Item], Result], plugins: tuple[Path, ...], item: Item) -> Result:
    # The plugins here rather than when the worker starts, where an error would break the pool like a kill.
    _load(plugins)
    return function(item)


@cache
def _load(plugins: tuple[Path, ...]) -> None:
    for path in plugins:
        load_file(path)


def _exit_with_parent() -> None:
    # A parent that was killed cannot stop its workers, which would wait for work for ever.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
