"""Train a network on slices and predict patients: what deep classifiers of a marker share.

A subclass of `SliceClassifierEvaluator` builds a `SliceNetwork`; training with resumable checkpoints, correction for
the balanced draws, aggregation from slices to cases and the files of a fold are here, the batches in
`glioma_nas.slice_batches`.

Reference:
    Ilse, Tomczak and Welling, Attention-based Deep Multiple Instance Learning, ICML 2018, eq. 9: gated attention.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.utils.data import DataLoader

from glioma_nas.errors import ConfigError, StorageError, did_you_mean
from glioma_nas.files import read_json, write_bytes, write_json
from glioma_nas.marker_evaluator import MarkerEvaluator
from glioma_nas.marker_study import ClassifierSettings, MarkerStudy
from glioma_nas.markers import MarkerCase, MetadataEncoder
from glioma_nas.progress import Progress
from glioma_nas.seeding import derive_seed, isolated_torch_rng
from glioma_nas.slice_batches import BalancedSampler, MarkerSlices
from glioma_nas.training import LAST_CHECKPOINT, FiniteGuard, fit

WEIGHTS_FILE = "weights.safetensors"
METADATA_FILE = "metadata.json"
AGGREGATIONS = ("mean", "max", "attention", "auto")
BAG_SLICES = 4
"""Slices of a case that attention sees together in training."""


class SliceNetwork(nn.Module):
    """A network over slices, their masks and the patient's metadata.

    ``forward(image, mask, metadata)`` takes float32 tensors (N, C, H, W), (N, 1, H, W) with values 0 or 1, and (N, 2),
    and returns named logits (N,), of which ``final`` is the prediction. Others may be there for the loss. A network
    built for attention returns ``attention`` (N,) as well, the unnormalised weight of each slice; see `pool_bags`.
    """

    def loss(self, outputs: Mapping[str, Tensor], target: Tensor) -> Tensor:
        """Return the scalar training loss; by default the binary cross-entropy of ``final``.

        Args:
            outputs: What ``forward`` returned.
            target: (N,), float32, 0 or 1.
        """
        return F.binary_cross_entropy_with_logits(outputs["final"], target)


class SliceAttention(nn.Module):
    """Gated attention: how much a slice counts, w·(tanh(V h) ⊙ σ(U h)), from its features h.

    Args:
        features: Length of h.
        hidden: Rows of V and U.
    """

    def __init__(self, features: int, hidden: int = 32) -> None:
        super().__init__()
        self.content = nn.Linear(features, hidden)
        self.gate = nn.Linear(features, hidden)
        self.weight = nn.Linear(hidden, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Return (N,) of (N, features); a softmax over the slices of a case makes weights of it."""
        scores: Tensor = self.weight(torch.tanh(self.content(features)) * torch.sigmoid(self.gate(features)))
        return scores[:, 0]


def pool_bags(outputs: Mapping[str, Tensor], bag: int) -> dict[str, Tensor]:
    """Reduce the logits of slices to those of bags, weighted by softmax(``attention``) within each bag.

    Args:
        outputs: Named logits (N,) and ``attention`` (N,); each ``bag`` rows are one case's.
        bag: Slices of a bag; divides N.

    Returns:
        The named logits, (N/bag,), without ``attention``.
    """
    weights = torch.softmax(outputs["attention"].reshape(-1, bag), dim=1)
    return {
        name: (weights * logits.reshape(-1, bag)).sum(dim=1) for name, logits in outputs.items() if name != "attention"
    }


class SliceModule(pl.LightningModule):
    """Train a `SliceNetwork` with AdamW and a cosine schedule.

    Args:
        network: The network.
        learning_rate: Peak learning rate.
        weight_decay: Decoupled weight decay.
        total_steps: Optimiser steps of the whole training.
        what: What is trained, for messages.
        bag: Slices of a case that are judged together; 1 to judge each slice.
    """

    def __init__(
        self,
        network: SliceNetwork,
        *,
        learning_rate: float,
        weight_decay: float,
        total_steps: int,
        what: str,
        bag: int = 1,
    ) -> None:
        super().__init__()
        self._bag = bag
        self.network = network
        self.latest_loss = math.nan
        self._learning_rate = learning_rate
        self._weight_decay = weight_decay
        self._total_steps = total_steps
        self._guard = FiniteGuard(what)
        self._losses: list[float] = []

    def on_train_epoch_start(self) -> None:
        """See Lightning."""
        self._losses = []

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor | None:
        """Return the loss of a batch, or none to skip a step whose loss is not finite."""
        outputs = self.network(batch["image"], batch["mask"], batch["metadata"])
        target = batch["target"]
        if self._bag > 1:
            outputs, target = pool_bags(outputs, self._bag), target[:: self._bag]
        loss = self.network.loss(outputs, target)
        if not self._guard.accepts(loss):
            return None
        self.latest_loss = float(loss.detach())
        self._losses.append(self.latest_loss)
        return loss

    def epoch_figures(self) -> dict[str, float | str]:
        """Return the epoch's mean loss."""
        return {"loss": float(np.mean(self._losses)) if self._losses else math.nan}

    def configure_optimizers(self) -> Any:
        """See Lightning."""
        # Small networks on a CPU spend a tenth of their time in an optimiser that is not fused.
        optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=self._learning_rate, weight_decay=self._weight_decay, fused=True
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(1, self._total_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class SliceClassifierEvaluator(MarkerEvaluator):
    """A marker classifier that is a network over slices.

    Batches are balanced over the classes; the logit of a prediction is shifted by the log-odds of the training
    patients' class frequency, so that probabilities refer to a cohort like the training one.

    Args:
        settings: What all classifiers are told.
        study: What `evaluate` works on.
        aggregate: From slices to a case: ``mean`` or ``max`` of the slices' probabilities, ``attention`` (weights
            learnt with the network), or ``auto``: whichever of mean and max is better on the training patients' inner
            folds.
        weight_decay: Of the optimiser.
    """

    def __init__(
        self,
        settings: ClassifierSettings,
        *,
        study: MarkerStudy | None = None,
        aggregate: str = "mean",
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(settings, study=study)
        if aggregate not in AGGREGATIONS:
            raise ConfigError(f"unknown aggregate '{aggregate}': {did_you_mean(aggregate, AGGREGATIONS)}")
        self.aggregate = aggregate
        self.weight_decay = weight_decay

    @abstractmethod
    def build_network(self, *, pretrained: bool) -> SliceNetwork:
        """Return a new network. Called once for each fold with ``pretrained`` on, and for predictions with it off.

        Args:
            pretrained: Load the weights file the options name, if any; off when trained weights are about to replace
                them, so that predictions do not need that file.
        """

    def options(self) -> dict[str, Any]:
        """See `MarkerEvaluator.options`; subclasses add theirs."""
        return {"aggregate": self.aggregate, "weight_decay": self.weight_decay}

    def fit(
        self, cases: Sequence[MarkerCase], *, folder: Path, label: str, progress: Progress, seed: int, device: str
    ) -> None:
        """See `MarkerEvaluator.fit`; leaves ``weights.safetensors``, ``metadata.json`` and ``training/history.csv``."""
        labels = {case.patient_id: int(case.label or 0) for case in cases}
        if _is_trained(folder, labels, seed):
            return
        encoder = MetadataEncoder.of(cases)
        bag = BAG_SLICES if self.aggregate == "attention" else 1
        batch = math.ceil(self.settings.batch_size / bag) * bag
        steps = math.ceil(sum(len(case.images) for case in cases) / batch)
        sampler = BalancedSampler(cases, length=steps * batch, seed=derive_seed(seed, "sampler"), bag=bag)
        loader = DataLoader(MarkerSlices(cases, encoder(cases)), batch_size=batch, sampler=sampler)
        with isolated_torch_rng(seed, "weights"):
            network = self.build_network(pretrained=True)
        module = SliceModule(
            network,
            learning_rate=self.settings.learning_rate,
            weight_decay=self.weight_decay,
            total_steps=steps * self.settings.epochs,
            what=label,
            bag=bag,
        )
        training = folder / "training"
        fit(
            module,
            loader,
            folder=training,
            epochs=self.settings.epochs,
            progress=progress,
            label=label,
            seed=derive_seed(seed, "training"),
            device=device,
            stage="classify",
        )
        weights = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
        write_bytes(folder / WEIGHTS_FILE, save(weights))
        positive = sum(labels.values())
        write_json(
            folder / METADATA_FILE,
            {
                "metadata": encoder.as_json(),
                "log_odds": math.log(positive / (len(labels) - positive)),
                "n_patients": len(labels),
                "n_positive": positive,
                "train_patients": sorted(labels),
                "seed": seed,
            },
        )
        # The optimiser's state is of no further use and twice as large as the weights.
        (training / LAST_CHECKPOINT).unlink(missing_ok=True)

    def predict(self, folder: Path, cases: Sequence[MarkerCase], *, device: str = "cpu") -> NDArray[np.float64]:
        """See `MarkerEvaluator.predict`; with ``auto`` that is the mean."""
        return next(iter(self.predict_variants(folder, cases, device=device).values()))

    def predict_variants(
        self, folder: Path, cases: Sequence[MarkerCase], *, device: str = "cpu"
    ) -> Mapping[str, NDArray[np.float64]]:
        """See `MarkerEvaluator.predict_variants`; ``mean`` and ``max`` with ``auto``, else the one asked for."""
        network, record = self.load_network(folder, device=device)
        metadata = MetadataEncoder(**record["metadata"])(cases)
        rows: dict[str, list[float]] = {
            variant: [] for variant in (("mean", "max") if self.aggregate == "auto" else (self.aggregate,))
        }
        with torch.no_grad():
            for case, row in zip(cases, metadata, strict=True):
                outputs = network(
                    torch.from_numpy(np.ascontiguousarray(case.images)).to(device),
                    torch.from_numpy(case.mask.astype(np.float32))[:, None].to(device),
                    torch.from_numpy(row).to(device).expand(len(case.images), -1),
                )
                for variant, values in rows.items():
                    values.append(_aggregate(outputs, variant, float(record["log_odds"])))
        return {variant: np.asarray(values, dtype=np.float64) for variant, values in rows.items()}

    def load_network(self, folder: Path, *, device: str = "cpu") -> tuple[SliceNetwork, dict[str, Any]]:
        """Return the network `fit` left in ``folder``, for predictions, and the record beside it.

        Raises:
            StorageError: ``folder`` holds no finished training, or weights of another network.
        """
        if not (folder / WEIGHTS_FILE).is_file():
            raise StorageError(f"{folder / WEIGHTS_FILE}: no such file; run the classify stage first")
        record = read_json(folder / METADATA_FILE)
        with isolated_torch_rng(0, "replaced by the stored weights"):
            network = self.build_network(pretrained=False)
        try:
            network.load_state_dict(load_file(folder / WEIGHTS_FILE))
        except RuntimeError as err:
            raise StorageError(
                f"{folder / WEIGHTS_FILE}: weights of another network ({' '.join(str(err).split())[:200]}); run the "
                "classify stage again with --force"
            ) from err
        return network.to(device).eval(), record


def _aggregate(outputs: Mapping[str, Tensor], variant: str, log_odds: float) -> float:
    logits = outputs["final"].double() + log_odds
    if variant == "attention":
        return float(torch.sigmoid((torch.softmax(outputs["attention"].double(), dim=0) * logits).sum()))
    probabilities = torch.sigmoid(logits)
    return float(probabilities.max() if variant == "max" else probabilities.mean())


def _is_trained(folder: Path, labels: Mapping[str, int], seed: int) -> bool:
    # The record is written after the weights, so where it is they are complete.
    if not (folder / METADATA_FILE).is_file():
        return False
    record = read_json(folder / METADATA_FILE)
    return bool(record["seed"] == seed and record["train_patients"] == sorted(labels))
