"""Workers that are really killed: only what kills its worker when alone is lost, all else is as if nothing had been."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

from glioma_nas.errors import PluginError, ResourceError
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


@pytest.mark.slow
def test_plugin_that_fails_in_workers_alone_is_named(tmp_path: Path) -> None:
    plugin = tmp_path / "homesick.py"
    plugin.write_text(f"import os\nif os.getpid() != {os.getpid()}:\n    raise RuntimeError('not at home')\n")
    with pytest.raises(PluginError, match=r"homesick\.py: RuntimeError while importing it: not at home"):
        list(outcomes(partial(square, tmp_path), [1, 2], workers=2, plugins=[plugin], killed=given_up))
    assert not (tmp_path / "1.log").exists()


def note_loaded(item: int) -> list[str]:
    return sorted(name for name in sys.modules if name.startswith("glioma_nas.local."))


@pytest.mark.slow
def test_plugins_are_loaded_before_an_item_is_worked_on(tmp_path: Path) -> None:
    plugin = tmp_path / "at_home.py"
    plugin.write_text("")
    found = dict(outcomes(note_loaded, range(3), workers=2, plugins=[plugin]))
    assert all("glioma_nas.local.at_home" in names for names in found.values())


@pytest.mark.slow
def test_workers_of_a_script_that_lacks_its_guard_are_no_kills(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from glioma_nas.worker_pool import outcomes\nlist(outcomes(abs, [1, 2], workers=2, killed=abs))\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ResourceError: a worker process ended before it had any work" in done.stderr.splitlines()[-1]
    assert "put what it does under `if __name__ == '__main__':`" in done.stderr


def test_one_worker_is_this_process(tmp_path: Path) -> None:
    assert list(outcomes(partial(square, tmp_path), [1, 2], workers=1)) == [(0, 1), (1, 4)]
    assert (tmp_path / "1.log").read_text().split() == [str(os.getpid())]
