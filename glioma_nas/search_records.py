"""Keep the course of a search beside its history: every α, β and γ as CSV, and all of it for TensorBoard."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from glioma_nas.files import write_text

ARCHITECTURE_HISTORY_FILE = "architecture_history.csv"
TENSORBOARD_FOLDER = "tensorboard"


class ArchitectureHistory(Callback):
    """Write ``architecture_history.csv``: epoch, architecture, kind, label, value, logit and probability.

    It acts on modules with a method ``architecture_rows() -> list[dict]``. The file holds every finished epoch once,
    also when an epoch is done again after an interruption.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / ARCHITECTURE_HISTORY_FILE

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """See Lightning."""
        rows = architecture_rows(pl_module)
        if not rows:
            return
        new = pd.DataFrame([{"epoch": trainer.current_epoch, **row} for row in rows])
        if trainer.current_epoch > 0 and self._path.is_file():
            old = self._read()
            new = pd.concat([old[old.epoch < trainer.current_epoch], new])
        write_text(self._path, new.to_csv(index=False))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """See Lightning; a search that stopped early may have gone back to the parameters of the epoch before."""
        rows = architecture_rows(pl_module)
        if not rows or not self._path.is_file():
            return
        old = self._read()
        last = int(old.epoch.max())
        new = pd.concat([old[old.epoch < last], pd.DataFrame([{"epoch": last, **row} for row in rows])])
        text = new.to_csv(index=False)
        if text != self._path.read_text(encoding="utf-8"):
            write_text(self._path, text)

    def _read(self) -> pd.DataFrame:
        return pd.read_csv(self._path, dtype={"value": str}, keep_default_na=False, float_precision="round_trip")


class TensorBoardRecord(Callback):
    """Write every epoch's figures, and the probability of every choice, as TensorBoard scalars.

    Inside an NNI trial they go to ``$NNI_OUTPUT_DIR/tensorboard``, where NNI's web page looks for them.

    Args:
        folder: Folder of the training; a folder ``tensorboard`` is made in it.
        figures: Returns the figures of the epoch that has just ended.
    """

    def __init__(self, folder: Path, figures: Any) -> None:
        self._folder = Path(os.environ.get("NNI_OUTPUT_DIR") or folder) / TENSORBOARD_FOLDER
        self._figures = figures
        self._writer: Any = None  # torch's SummaryWriter has no types

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """See Lightning."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            # What an interrupted attempt wrote for this epoch and later ones is not shown.
            self._writer = SummaryWriter(str(self._folder), purge_step=trainer.current_epoch)
        figures: Mapping[str, Any] = self._figures()
        for name, value in figures.items():
            if isinstance(value, int | float) and name != "epoch":
                self._writer.add_scalar(f"epoch/{name}", value, trainer.current_epoch)
        for row in architecture_rows(pl_module):
            tag = f"{row['architecture']}_{row['kind']}/{row['label']}={row['value']}"
            self._writer.add_scalar(tag, row["probability"], trainer.current_epoch)
        self._writer.flush()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """See Lightning; also called when training raises."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def architecture_rows(module: Any) -> list[dict[str, Any]]:
    """Return the architecture parameters a module searches, one row for each value; none for other modules."""
    rows: list[dict[str, Any]] = module.architecture_rows() if hasattr(module, "architecture_rows") else []
    return rows
