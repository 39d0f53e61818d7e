"""Train any Lightning module so that it can be killed at any moment and gives the same result when run again.

Every epoch ends with an atomic checkpoint, and every epoch begins by seeding PyTorch from the run's seed and the
epoch's number. What a run computes after a restart therefore depends on the last checkpoint only: an epoch that was cut
off is done again, with the same data order, augmentation, dropout and sampled widths.
"""

from __future__ import annotations

import math
import signal
import time
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pytorch_lightning as pl
import torch
from nni.nas.evaluator.pytorch import Trainer
from pytorch_lightning.callbacks import Callback, Checkpoint
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor, nn

from glioma_nas.distributed_training import rank, world_size
from glioma_nas.epoch_metrics import publish
from glioma_nas.errors import ConfigError, DivergedError, StorageError
from glioma_nas.files import atomic_path, write_text
from glioma_nas.progress import Progress, Silent
from glioma_nas.search_records import ArchitectureHistory, TensorBoardRecord
from glioma_nas.seeding import derive_seed, isolated_torch_rng

LAST_CHECKPOINT = "last.ckpt"
HISTORY_FILE = "history.csv"


class EpochSeed(Callback):
    """Seed PyTorch from (seed, epoch) at the start of every epoch."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """See Lightning; acts on the first batch, because ``on_train_epoch_start`` is left out after a restart."""
        if batch_idx == 0:
            torch.manual_seed(derive_seed(self._seed, "epoch", trainer.current_epoch))


class EpochCheckpoint(Checkpoint):
    """Save ``last.ckpt`` atomically at the end of every epoch.

    A `Checkpoint` runs after every other callback and after the module's own end of epoch, so it sees their effects.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / LAST_CHECKPOINT
        self.last_model_path = ""  # where NNI's one-shot strategies look for what to resume from

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """See Lightning."""
        if trainer.world_size == 1:
            with atomic_path(self._path) as temporary:
                trainer.save_checkpoint(temporary)
        else:
            # Every process must take part in saving, and only the first one writes.
            partial = self._path.with_suffix(".partial")
            trainer.save_checkpoint(partial)
            if trainer.is_global_zero:
                partial.replace(self._path)
            trainer.strategy.barrier()
        self.last_model_path = str(self._path)


class History(Callback):
    """Keep one row of figures for every epoch, in ``history.csv`` and in the checkpoint, and publish it.

    The module provides the figures through a method ``epoch_figures() -> dict[str, float | str]``. The rows travel
    inside the checkpoint, so that after a restart the file holds no epoch twice and none of an abandoned attempt.
    """

    def __init__(self, folder: Path, stage: str) -> None:
        self._path = folder / HISTORY_FILE
        self._stage = stage
        self.rows: list[dict[str, Any]] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """See Lightning; runs before `EpochCheckpoint`, so that the checkpoint holds this epoch's row."""
        figures = pl_module.epoch_figures()
        self.rows.append({"epoch": trainer.current_epoch, **figures})
        if not trainer.is_global_zero:
            return
        write_text(self._path, pd.DataFrame(self.rows).to_csv(index=False))
        publish(self._stage, trainer.current_epoch, figures)

    def state_dict(self) -> dict[str, Any]:
        """See Lightning."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See Lightning."""
        self.rows = list(state_dict["rows"])


class EpochProgress(Callback):
    """Report batches to a `Progress`: one bar over all batches of all epochs, with the epoch and its latest figures."""

    def __init__(self, progress: Progress, label: str, history: History) -> None:
        self._progress = progress
        self._label = label
        self._history = history
        self._context: Any = None
        self._task: Any = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """See Lightning."""
        batches = int(trainer.num_training_batches)
        done = trainer.current_epoch * batches
        self._context = self._progress.task(self._label, int(trainer.max_epochs or 0) * batches)
        self._task = self._context.__enter__()
        if done:
            self._task.advance(done, epoch=trainer.current_epoch)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """See Lightning."""
        loss = getattr(pl_module, "latest_loss", math.nan)
        self._task.advance(1, epoch=trainer.current_epoch + 1, loss=float(loss))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """See Lightning; a module with ``table_row(figures)`` chooses what a table of epochs shows."""
        if hasattr(pl_module, "table_row"):
            self._task.row(epoch=trainer.current_epoch + 1, **pl_module.table_row(self._history.rows[-1]))

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """See Lightning; also called when training raises."""
        if self._context is not None:
            self._context.__exit__(None, None, None)
            self._context = None


class EpochClock:
    """Count optimiser steps, and end each epoch when its time is over rather than after so many steps.

    Args:
        epoch_s: Wall time of an epoch in seconds; none to leave its end to the loader.
    """

    def __init__(self, epoch_s: float | None = None) -> None:
        self._epoch_s = epoch_s
        self._started = 0.0
        self.steps = 0
        self.cut = False

    def allows(self, batch_idx: int) -> bool:
        """Tell whether there is time for another step; the first of an epoch is always taken."""
        now = time.monotonic()
        if batch_idx == 0:
            self._started = now
        self.cut = self._epoch_s is not None and batch_idx > 0 and now - self._started >= self._epoch_s
        self.steps += not self.cut
        return not self.cut


class FiniteGuard:
    """Let a few non-finite steps pass unused and counted, then stop with a reason rather than give a silent result.

    Args:
        what: What is trained, for the message.
        patience: Consecutive non-finite steps that are skipped before `DivergedError`.
    """

    def __init__(self, what: str, patience: int = 10) -> None:
        self._what = what
        self._patience = patience
        # By name, since a good loss says nothing about gradients. Part of checkpoints: a restart is no new patience.
        self.in_a_row: dict[str, int] = {}
        self._skipped = 0

    def accepts(self, value: Tensor | float | None, name: str = "loss") -> bool:
        """Tell whether a step may be taken.

        Args:
            value: The loss, or the norm of the gradient; none when the step itself refused to give one.
            name: What ``value`` is, for the message.

        Raises:
            DivergedError: More values in a row than ``patience`` were NaN or infinite.
        """
        number = value.detach() if isinstance(value, Tensor) else value
        if number is not None and math.isfinite(float(number)):
            self.in_a_row[name] = 0
            return True
        self._skipped += 1
        times = self.in_a_row[name] = self.in_a_row.get(name, 0) + 1
        if times > self._patience:
            raise DivergedError(
                f"{self._what}: the {name} was not a finite number {times} times in a row; lower the learning rate, "
                "and check the images for extreme values"
            )
        return False

    def take_skipped(self) -> int:
        """Return the steps skipped since the last call."""
        skipped, self._skipped = self._skipped, 0
        return skipped


def require_finite_weights(network: nn.Module, what: str, *, statistics: bool = True) -> None:
    """Refuse a network that holds NaN or infinity before anything is made of it.

    Args:
        network: The network.
        what: What was trained, for the message.
        statistics: Whether batch norm statistics count; not where they are taken anew before anything is scored.

    Raises:
        DivergedError: It does.
    """
    arrays = network.state_dict() if statistics else dict(network.named_parameters())
    bad = [
        name for name, value in arrays.items() if value.is_floating_point() and not torch.isfinite(value.detach()).all()
    ]
    if bad:
        raise DivergedError(f"{what}: {len(bad)} arrays of the network are not finite, the first is {bad[0]}")


def make_trainer(
    folder: Path,
    *,
    epochs: int,
    seed: int,
    progress: Progress | None = None,
    label: str = "training",
    device: str = "cpu",
    gradient_clip: float | None = None,
    stage: str = "train",
    tensorboard: bool = False,
    precision: str = "32-true",
) -> pl.Trainer:
    """Build a Lightning trainer with seeding, history, atomic checkpoints and progress.

    Args:
        folder: Where ``last.ckpt`` and ``history.csv`` go; created if need be.
        epochs: Epochs in total, those of an interrupted attempt included.
        seed: Seed of this training, already derived for it.
        progress: Where to report.
        label: Name of the bar.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        gradient_clip: Largest gradient norm; none for modules that clip by themselves.
        stage: Name under which the figures of each epoch are published (`glioma_nas.epoch_metrics`).
        tensorboard: Whether to write the figures of each epoch for TensorBoard too.
        precision: Lightning's word for it: ``32-true``, ``bf16-mixed`` or ``16-mixed`` (GPU only).

    Raises:
        ConfigError: The device does not exist here, or cannot compute in that precision.
    """
    folder.mkdir(parents=True, exist_ok=True)
    progress = progress or Silent()
    accelerator, devices = resolve_device(device)
    if precision == "16-mixed" and accelerator == "cpu":
        raise ConfigError("precision '16-mixed' needs a GPU; set precision: bf16-mixed or 32-true")
    history = History(folder, stage)
    together: dict[str, Any] = {}
    if world_size() > 1:
        # The sampler shares out the draws itself, so that they are those of one process.
        together = {"strategy": DDPStrategy(), "use_distributed_sampler": False, "sync_batchnorm": accelerator == "gpu"}
        devices = world_size() if accelerator == "cpu" else list(range(world_size()))
    return Trainer(
        max_epochs=epochs,
        accelerator=accelerator,
        devices=devices,
        **together,
        logger=False,
        enable_checkpointing=True,  # by EpochCheckpoint; without it Lightning refuses a Checkpoint callback
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,  # a loader called validation trains architectures or scores at the end, never in between
        gradient_clip_val=gradient_clip,
        default_root_dir=str(folder),
        precision=precision,
        callbacks=[
            EpochSeed(seed),
            history,
            ArchitectureHistory(folder),
            *([TensorBoardRecord(folder, lambda: history.rows[-1])] if tensorboard and rank() == 0 else []),
            EpochCheckpoint(folder),
            EpochProgress(progress, label, history),
        ],
    )


def resume_arguments(folder: Path) -> dict[str, Any]:
    """Return the keyword arguments of ``Trainer.fit`` that continue from ``folder``, if it holds a checkpoint.

    Raises:
        StorageError: The checkpoint is damaged.
    """
    checkpoint = folder / LAST_CHECKPOINT
    if not checkpoint.is_file():
        return {}
    # A checkpoint is a zip archive, whose directory stands at its end: one that was cut short is not a zip file.
    if not zipfile.is_zipfile(checkpoint):
        raise StorageError(f"{checkpoint}: damaged checkpoint; delete it to start this training again")
    return {"ckpt_path": str(checkpoint), "weights_only": True}


def fit(
    module: pl.LightningModule,
    train_loader: Iterable[Any],
    *,
    folder: Path,
    epochs: int,
    seed: int,
    progress: Progress | None = None,
    label: str = "training",
    device: str = "cpu",
    gradient_clip: float | None = None,
    stage: str = "train",
) -> pd.DataFrame:
    """Train ``module`` to the end, continuing from ``folder`` if an earlier attempt was cut off.

    Args:
        module: Has ``training_step``, ``configure_optimizers`` and ``epoch_figures``; optionally ``latest_loss``.
        train_loader: Yields batches; its order must depend on (seed, epoch) only.
        folder: See `make_trainer`.
        epochs: See `make_trainer`.
        seed: See `make_trainer`.
        progress: See `make_trainer`.
        label: See `make_trainer`.
        device: See `make_trainer`.
        gradient_clip: See `make_trainer`.
        stage: See `make_trainer`.

    Returns:
        The history, one row for each epoch.

    Raises:
        DivergedError: The loss stopped being finite.
        KeyboardInterrupt: The user interrupted; running again continues.
    """
    trainer = make_trainer(
        folder,
        epochs=epochs,
        seed=seed,
        progress=progress,
        label=label,
        device=device,
        gradient_clip=gradient_clip,
        stage=stage,
    )
    with interruptible(), isolated_torch_rng(seed, "fit"):
        trainer.fit(module, train_loader, **resume_arguments(folder))
    return history_of(trainer)


def history_of(trainer: pl.Trainer) -> pd.DataFrame:
    """Return the rows a trainer made by `make_trainer` has collected."""
    for callback in trainer.callbacks:
        if isinstance(callback, History):
            return pd.DataFrame(callback.rows)
    raise ValueError("the trainer was not made by make_trainer: it keeps no history")


@contextmanager
def interruptible() -> Iterator[None]:
    """Turn Lightning's answer to Ctrl-C (ignore the signal from then on, exit with 1) back into KeyboardInterrupt."""
    on_main_thread = signal.getsignal(signal.SIGINT) is not None
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as err:
        if isinstance(err.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from err
        raise
    finally:
        if on_main_thread and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            signal.signal(signal.SIGINT, handler)


def resolve_device(device: str) -> tuple[str, Any]:
    """Return Lightning's (accelerator, devices) for ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        ConfigError: Another word, or a device that is not there.
    """
    kind, _, index = device.partition(":")
    if kind == "cpu":
        return "cpu", 1
    if kind != "cuda" or (index and not index.isdigit()):
        raise ConfigError(f"device '{device}': allowed are cpu, cuda and cuda:N")
    if int(index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device '{device}': this machine has {torch.cuda.device_count()} CUDA devices; set device: cpu"
        )
    return "gpu", [int(index or 0)]
