"""Workers that are really killed: only what kills its worker when alone is lost, all else is as if nothing had been."""

from __future__ import annotations

import os
import signal
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

from glioma_nas.errors import ResourceError
from glioma_nas.worker_pool import outcomes


def square(folder: Path, item: int) -> int:
    """Square a number and note it down; 3 always kills its process, 5 only the first time."""
    with (folder / f"{item}.log").open("a") as log:
        log.write(f"{os.getpid()}\n")
    if item == 3 or (item == 5 and len((folder / "5.log").read_text().split()) == 1):
        os.kill(os.getpid(), signal.SIGKILL)
    return item * item


def given_up(item: int) -> int:
    return -item


@pytest.mark.slow
def test_item_that_always_kills_its_worker_is_given_up_and_every_other_is_done(tmp_path: Path) -> None:
    items = [1, 2, 3, 4, 6, 7, 8, 9]
    found = list(outcomes(partial(square, tmp_path), items, workers=2, killed=given_up))
    assert Counter(index for index, _ in found) == Counter(range(8))
    assert {items[index]: result for index, result in found} == {n: -3 if n == 3 else n * n for n in items}
    tries = {item: (tmp_path / f"{item}.log").read_text().split() for item in items}
    assert len(tries[3]) == 2
    # Whoever was in work beside 3 may have been done twice, nobody more often, and nobody in this process.
    assert max(map(len, tries.values())) == 2
    assert str(os.getpid()) not in {process for one in tries.values() for process in one}


@pytest.mark.slow
def test_item_that_kills_its_worker_only_once_is_done_when_tried_again(tmp_path: Path) -> None:
    found = dict(outcomes(partial(square, tmp_path), [5, 1], workers=2, killed=given_up))
    assert found == {0: 25, 1: 1}
    assert len((tmp_path / "5.log").read_text().split()) == 2
    assert len((tmp_path / "1.log").read_text().split()) <= 2


@pytest.mark.slow
def test_single_item_that_kills_its_worker_leaves_this_process_alive(tmp_path: Path) -> None:
    assert list(outcomes(partial(square, tmp_path), [3], workers=2, killed=given_up)) == [(0, -3)]


@pytest.mark.slow
def test_kill_is_an_error_where_an_item_has_no_stand_in(tmp_path: Path) -> None:
    with pytest.raises(
        ResourceError, match=r"item 2 of 2: the system killed the process that worked on it, with no other"
    ):
        list(outcomes(partial(square, tmp_path), [1, 3], workers=2))


def test_one_worker_is_this_process(tmp_path: Path) -> None:
    assert list(outcomes(partial(square, tmp_path), [1, 2], workers=1)) == [(0, 1), (1, 4)]
    assert (tmp_path / "1.log").read_text().split() == [str(os.getpid())]
