"""Several processes that train one network: they must do what one alone would."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
import torch
from safetensors.torch import load_file
from supernets import random_sample
from test_one_shot import make_evaluator
from test_search_stage import make_config
from torch import nn

from glioma_nas.distributed_training import launch, share_of_batch, world_size
from glioma_nas.errors import ConfigError, ResourceError
from glioma_nas.files import read_json
from glioma_nas.pipeline import StageContext
from glioma_nas.progress import Silent
from glioma_nas.slices import EpochSampler, SliceDataset
from glioma_nas.space_building import build_space
from glioma_nas.stages.train import train_together
from glioma_nas.testing.prepared_phantoms import prepare_phantom_cohort
from glioma_nas.trained_networks import load_network
from tests.nni_runs import until

PROGRAM = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_distributed_training import train
from glioma_nas.distributed_training import join, rank
from safetensors.torch import save_file
folder = Path({folder!r})
join(folder, "cpu")
network = train(Path({prepared!r}), folder)
save_file(network.state_dict(), folder / f"rank{{rank()}}.safetensors")
"""


def train(prepared: Path, folder: Path) -> nn.Module:
    """Train a network without batch norm, whose statistics would be each process's own."""
    torch.manual_seed(4)
    network = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    evaluator = make_evaluator(prepared, folder, split="train", schedule="poly", learning_rate=0.1, epochs=2)
    evaluator.evaluate(network)
    return network


@pytest.mark.slow
def test_two_processes_train_the_network_that_one_trains(tmp_path: Path) -> None:
    prepared = prepare_phantom_cohort(tmp_path / "phantom", n_patients=4, image_size_px=32)
    alone = train(prepared, tmp_path / "alone")
    folder = tmp_path / "together"
    folder.mkdir()
    program = PROGRAM.format(tests=str(Path(__file__).parent), folder=str(folder), prepared=str(prepared))
    launch(["-W", "ignore", "-c", program], n_processes=2, folder=folder)
    first, second = (load_file(folder / f"rank{number}.safetensors") for number in (0, 1))
    for name, value in alone.state_dict().items():
        assert torch.equal(first[name], second[name])
        assert torch.allclose(first[name], value, atol=1e-5), name
    assert len(pd.read_csv(folder / "history.csv")) == 2
    assert (folder / "last.ckpt").is_file()
    assert not list(folder.glob("*.log")) and not list(folder.glob("*.partial")) and not list(folder.glob("*.store"))


def test_a_process_that_fails_ends_the_others_and_is_named(tmp_path: Path) -> None:
    program = "import os, sys, time; time.sleep(60 if os.environ['RANK'] == '0' else 0); sys.exit('no such thing')"
    with pytest.raises(ResourceError, match=r"failed in process 1: no such thing \(see .*process1\.log\)"):
        launch(["-c", program], n_processes=2, folder=tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent is gone")
def test_processes_listen_on_loopback_and_end_when_the_one_that_started_them_is_killed(tmp_path: Path) -> None:
    child = (
        "import os, sys, time; from pathlib import Path; from glioma_nas.distributed_training import join; "
        f"folder = Path({str(tmp_path)!r}); join(folder, 'cpu'); "
        "(folder / os.environ['RANK']).write_text(f'{os.getpid()} ' + os.environ['NCCL_SOCKET_IFNAME']); "
        "time.sleep(120)"
    )
    parent = (
        "from pathlib import Path; from glioma_nas.distributed_training import launch; "
        f"launch(['-c', {child!r}], n_processes=2, folder=Path({str(tmp_path)!r}))"
    )
    launcher = subprocess.Popen([sys.executable, "-c", parent])
    marks = [tmp_path / "0", tmp_path / "1"]
    try:
        until(lambda: all(mark.is_file() and mark.read_text() for mark in marks), 60, "both processes have joined")
        words = [mark.read_text().split() for mark in marks]
        assert [interface for _, interface in words] == ["=lo", "=lo"]
        assert set().union(*(listening(int(pid)) for pid, _ in words)) <= {"127.0.0.1", "::1"}
    finally:
        launcher.kill()
        launcher.wait()
    pids = [int(pid) for pid, _ in words]
    until(lambda: not any(is_running(pid) for pid in pids), 10, "both are gone")


def listening(pid: int) -> set[str]:
    sockets = psutil.Process(pid).net_connections(kind="inet")
    return {item.laddr.ip for item in sockets if item.status == psutil.CONN_LISTEN}


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def make_context(tmp_path: Path, **train_options: Any) -> StageContext:
    prepared = prepare_phantom_cohort(tmp_path / "phantom", n_patients=4, image_size_px=32)
    config = make_config(tmp_path, "co_search")
    train_config = config.train.model_copy(
        update={"epochs": 1, "steps_per_epoch": 2, "batch_size": 4, "devices": 2, **train_options}
    )
    config = config.model_copy(update={"train": train_config})
    space = build_space(config)
    search = tmp_path / "search"
    search.mkdir()
    fixed = space.fixed_choices["teacher"]
    space.architecture({**random_sample(space, 0), **fixed}).save(search / "teacher.json")
    return StageContext(config, tmp_path / "train", {"preprocess": prepared, "search": search}, Silent())


@pytest.mark.slow
def test_stage_trains_a_searched_network_on_two_devices(tmp_path: Path) -> None:
    context = make_context(tmp_path)
    folder = context.folder / "fold0" / "teacher"
    train_together(context, 0, "teacher", folder)
    trained_on = read_json(folder / "trained_on.json")
    assert trained_on["kept"]["epoch"] == 0 and trained_on["patients"]
    network = load_network(context.config, context.inputs["search"], context.folder, 0, "teacher")
    assert network(torch.zeros(1, 2, 32, 32)).shape == (1, 2, 32, 32)
    assert sorted(path.name for path in folder.iterdir()) == ["history.csv", "trained_on.json", "weights.safetensors"]


def test_batch_that_devices_cannot_share_is_refused(tmp_path: Path) -> None:
    context = make_context(tmp_path, batch_size=5)
    with pytest.raises(ConfigError, match=r"train\.batch_size 5 cannot be shared by 2 devices"):
        train_together(context, 0, "teacher", context.folder)


def test_shares_of_the_sampler_are_the_draws_of_one_process(tmp_path: Path) -> None:
    from glioma_nas.prepared import PreparedCohort

    cohort = PreparedCohort.load(prepare_phantom_cohort(tmp_path, n_patients=4, image_size_px=32))
    dataset = SliceDataset(list(cohort.cases.values()), ("t1ce", "flair"), augment=False, seed=0)

    def draws(share: tuple[int, int], length: int | None = 9) -> list[tuple[int, int]]:
        sampler = EpochSampler(dataset, length=length, tumour_fraction=0.5, seed=3, share=share)
        found = [(draw.index, draw.position) for draw in sampler]
        assert len(found) == len(sampler)
        return found

    whole = draws((0, 1))
    shares = [draws((number, 2)) for number in (0, 1)]
    assert [len(share) for share in shares] == [4, 4]
    assert sorted(shares[0] + shares[1]) == sorted(whole[:8])
    assert len(draws((0, 2), None)) == len(draws((1, 2), None))


def test_outside_a_group_there_is_one_process_with_the_whole_batch() -> None:
    assert world_size() == 1
    assert share_of_batch(7) == 7
