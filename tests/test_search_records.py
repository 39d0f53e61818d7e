"""What a search leaves of its course: CSV, TensorBoard and the live table."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console
from test_one_shot import SizeProfiler, make_evaluator, make_space

from glioma_nas.console import PlainProgress, RichProgress
from glioma_nas.epoch_metrics import listening
from glioma_nas.evaluators.segmentation_module import SegmentationModule
from glioma_nas.live_table import SHOWN_ROWS, row_table
from glioma_nas.nni_bridge import explore
from glioma_nas.strategies.one_shot import CoSearch
from glioma_nas.testing.prepared_phantoms import prepare_phantom_cohort


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_phantom_cohort(tmp_path_factory.mktemp("phantom"), n_patients=8, image_size_px=32)


def run(prepared: Path, folder: Path, **options: Any) -> CoSearch:
    space = make_space()
    strategy = CoSearch(
        profiler=SizeProfiler(space),
        pretrain_epochs=1,
        pretrain_widths=("min",),
        search_widths=("sampled",),
        finetune_steps=0,
        recalibration_batches=1,
        seed=2,
    )
    found: CoSearch = explore(space, make_evaluator(prepared, folder, tensorboard=True, **options), strategy)
    return found


class _PowerCut(Exception):
    pass


@pytest.mark.slow
def test_course_of_a_search_holds_every_epoch_once_also_after_an_interruption(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    step = SegmentationModule.training_step

    def fail_in_epoch_2(self: Any, batch: Any, batch_idx: int) -> Any:
        if self.trainer.current_epoch == 2:
            raise _PowerCut
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patched:
        patched.setattr(SegmentationModule, "training_step", fail_in_epoch_2)
        with pytest.raises(_PowerCut):
            run(prepared, tmp_path)
    heard: list[int] = []
    with listening(lambda stage, epoch, metrics: heard.append(epoch)):
        strategy = run(prepared, tmp_path)
    assert heard == [2]

    course = pd.read_csv(tmp_path / "architecture_history.csv", dtype={"value": str})
    assert list(course.epoch.unique()) == [0, 1, 2]
    last = course[course.epoch == 2]
    for name, parameters in strategy.oneshot_module.architectures.items():
        own = last[last.architecture == name]
        assert set(own.kind) == ({"operator", "scale", "width"} if name == "student" else {"operator", "scale"})
        for label, probabilities in parameters.probabilities().items():
            assert list(own[own.label == label].probability) == pytest.approx(probabilities.tolist(), abs=1e-6)
    assert not course.duplicated(["epoch", "architecture", "label", "value"]).any()

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    history = pd.read_csv(tmp_path / "history.csv")
    losses = events.Scalars("epoch/loss_weights")
    assert [event.step for event in losses] == [0, 1, 2]
    assert [event.value for event in losses] == pytest.approx(list(history.loss_weights), rel=1e-5)
    row = last.iloc[0]
    tag = f"{row.architecture}_{row.kind}/{row.label}={row.value}"
    assert events.Scalars(tag)[-1].value == pytest.approx(row.probability, rel=1e-5)


@pytest.mark.slow
def test_tensorboard_goes_where_nni_looks_inside_a_trial(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NNI_OUTPUT_DIR", str(tmp_path / "nni"))
    run(prepared, tmp_path / "run", epochs=1)
    assert list((tmp_path / "nni" / "tensorboard").glob("events.*"))
    assert not (tmp_path / "run" / "tensorboard").exists()


@pytest.mark.slow
def test_search_shows_loss_dice_latency_and_entropy_of_every_epoch(prepared: Path, tmp_path: Path) -> None:
    stream = io.StringIO()
    run(prepared, tmp_path, progress=PlainProgress(stream), label="search")
    lines = [line for line in stream.getvalue().splitlines() if "entropy" in line]
    assert len(lines) == 3
    for words in ("phase search", "loss ", "dice ", "expected ms ", "decoded ms ", "lambda 0.010", "epoch 3"):
        assert words in lines[-1], words
    assert "phase pretrain" in lines[0]


def test_live_table_stands_below_the_bar_and_holds_the_latest_rows() -> None:
    rows = [{"epoch": epoch, "loss": 1 / epoch} for epoch in range(1, SHOWN_ROWS + 4)]
    stream = io.StringIO()
    Console(file=stream, width=60).print(row_table(rows, lambda value: f"{value:.2f}"))
    text = stream.getvalue()
    assert "epoch" in text and "0.09" in text and "0.50" not in text
    progress = RichProgress(io.StringIO())
    with progress, progress.task("search", 2) as task:
        task.advance(1, loss=0.5)
        task.row(epoch=1, loss=0.5, phase="search")
        assert progress._bars is not None
        rendered = io.StringIO()
        Console(file=rendered, width=100).print(*progress._bars.get_renderables())
        assert "search" in rendered.getvalue() and "0.500" in rendered.getvalue() and "phase" in rendered.getvalue()
