"""Train a network on slices and predict patients: what deep classifiers of a marker share.

A subclass of `SliceClassifierEvaluator` builds a `SliceNetwork`; drawing balanced batches, augmentation, training with
resumable checkpoints, correction for the balanced draws, aggregation from slices to cases and the files of a fold are
here.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from glioma_nas.errors import ConfigError, StorageError, did_you_mean
from glioma_nas.files import read_json, write_bytes, write_json
from glioma_nas.marker_evaluator import ClassifierSettings, MarkerEvaluator, MarkerStudy
from glioma_nas.markers import MarkerCase, MetadataEncoder
from glioma_nas.progress import Progress
from glioma_nas.seeding import derive_seed, isolated_torch_rng
from glioma_nas.training import LAST_CHECKPOINT, FiniteGuard, fit

WEIGHTS_FILE = "weights.safetensors"
METADATA_FILE = "metadata.json"
AGGREGATIONS = ("mean", "max")

MAX_ROTATION_DEGREES = 15.0
MAX_SHIFT = 0.05
MAX_GAIN = 0.1


class SliceNetwork(nn.Module):
    """A network over slices, their masks and the patient's metadata.

    ``forward(image, mask, metadata)`` takes float32 tensors (N, C, H, W), (N, 1, H, W) with values 0 or 1, and (N, 2),
    and returns named logits (N,), of which ``final`` is the prediction. Others may be there for the loss.
    """

    def loss(self, outputs: Mapping[str, Tensor], target: Tensor) -> Tensor:
        """Return the scalar training loss; by default the binary cross-entropy of ``final``.

        Args:
            outputs: What ``forward`` returned.
            target: (N,), float32, 0 or 1.
        """
        return F.binary_cross_entropy_with_logits(outputs["final"], target)


class MarkerSlices(Dataset[dict[str, Tensor]]):
    """Augmented slices; an item is asked for as (case index, slice index, seed of the augmentation)."""

    def __init__(self, cases: Sequence[MarkerCase], metadata: NDArray[np.float32]) -> None:
        self.cases = cases
        self._metadata = metadata

    def __getitem__(self, draw: tuple[int, int, int]) -> dict[str, Tensor]:
        """Return image float32 (C, H, W), mask float32 (1, H, W), metadata float32 (2,) and target float32 ()."""
        index, slice_index, seed = draw
        case = self.cases[index]
        image = torch.from_numpy(np.array(case.images[slice_index], dtype=np.float32))
        mask = torch.from_numpy(np.array(case.mask[slice_index], dtype=np.float32))[None]
        image, mask = augment(image, mask, torch.Generator().manual_seed(seed))
        return {
            "image": image,
            "mask": mask,
            "metadata": torch.from_numpy(self._metadata[index]),
            "target": torch.tensor(float(case.label or 0)),
        }


def augment(image: Tensor, mask: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mirror, rotate and shift image and mask alike, and change the gain of each channel.

    Args:
        image: (C, H, W), float32.
        mask: (1, H, W), float32, 0 or 1.
        generator: Source of all parameters, which are drawn first.

    Returns:
        Image and mask of the same shapes; the mask holds 0 and 1 only.
    """
    mirrored, angle, shift_x, shift_y = torch.rand(4, generator=generator).tolist()
    gain = 1.0 + MAX_GAIN * (2 * torch.rand(image.shape[0], 1, 1, generator=generator) - 1)
    angle = math.radians(MAX_ROTATION_DEGREES) * (2 * angle - 1)
    sign = -1.0 if mirrored < 0.5 else 1.0
    cosine, sine = math.cos(angle), math.sin(angle)
    matrix = torch.tensor(
        [
            [sign * cosine, -sine, 2 * MAX_SHIFT * (2 * shift_x - 1)],
            [sign * sine, cosine, 2 * MAX_SHIFT * (2 * shift_y - 1)],
        ]
    )
    stack = torch.cat([image * gain, mask])[None]
    grid = F.affine_grid(matrix[None], list(stack.shape), align_corners=False)
    moved = F.grid_sample(stack, grid, mode="bilinear", padding_mode="border", align_corners=False)[0]
    return moved[:-1], (moved[-1:] >= 0.5).float()


class BalancedSampler(Sampler[tuple[int, int, int]]):
    """Draw positives and negatives in turn: a class's patient, one of its cases, one of its slices, all uniformly.

    What is drawn depends on (seed, epoch) only, so an epoch that is done again after an interruption is the same.

    Args:
        cases: Labelled cases of both classes.
        length: Draws of an epoch.
        seed: Seed of the draws.
    """

    def __init__(self, cases: Sequence[MarkerCase], *, length: int, seed: int) -> None:
        self._length = length
        self._seed = seed
        self._epoch = 0
        self._patients: dict[int, dict[str, list[int]]] = {0: {}, 1: {}}
        for index, case in enumerate(cases):
            self._patients[int(case.label or 0)].setdefault(case.patient_id, []).append(index)
        self._n_slices = [len(case.images) for case in cases]

    def set_epoch(self, epoch: int) -> None:
        """Choose the draws of ``epoch``; Lightning calls this before each epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        generator = np.random.default_rng(derive_seed(self._seed, "draws", self._epoch))
        patients = {label: list(groups.values()) for label, groups in self._patients.items()}
        for position in range(self._length):
            groups = patients[position % 2]
            group = groups[int(generator.integers(len(groups)))]
            index = group[int(generator.integers(len(group)))]
            yield index, int(generator.integers(self._n_slices[index])), int(generator.integers(2**62))


class SliceModule(pl.LightningModule):
    """Train a `SliceNetwork` with AdamW and a cosine schedule.

    Args:
        network: The network.
        learning_rate: Peak learning rate.
        weight_decay: Decoupled weight decay.
        total_steps: Optimiser steps of the whole training.
        what: What is trained, for messages.
    """

    def __init__(
        self, network: SliceNetwork, *, learning_rate: float, weight_decay: float, total_steps: int, what: str
    ) -> None:
        super().__init__()
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
        loss = self.network.loss(outputs, batch["target"])
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
        aggregate: From slices to a case: ``mean`` or ``max`` of the slices' probabilities.
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
        batch = self.settings.batch_size
        steps = math.ceil(sum(len(case.images) for case in cases) / batch)
        sampler = BalancedSampler(cases, length=steps * batch, seed=derive_seed(seed, "sampler"))
        loader = DataLoader(MarkerSlices(cases, encoder(cases)), batch_size=batch, sampler=sampler)
        with isolated_torch_rng(seed, "weights"):
            network = self.build_network(pretrained=True)
        module = SliceModule(
            network,
            learning_rate=self.settings.learning_rate,
            weight_decay=self.weight_decay,
            total_steps=steps * self.settings.epochs,
            what=label,
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
        """See `MarkerEvaluator.predict`."""
        if not (folder / WEIGHTS_FILE).is_file():
            raise StorageError(f"{folder / WEIGHTS_FILE}: no such file; run the classify stage first")
        record = read_json(folder / METADATA_FILE)
        with isolated_torch_rng(0, "replaced by the stored weights"):
            network = self.build_network(pretrained=False)
        network.load_state_dict(load_file(folder / WEIGHTS_FILE))
        network.to(device).eval()
        metadata = MetadataEncoder(**record["metadata"])(cases)
        reduce = np.mean if self.aggregate == "mean" else np.max
        probabilities = []
        with torch.no_grad():
            for case, row in zip(cases, metadata, strict=True):
                outputs = network(
                    torch.from_numpy(np.ascontiguousarray(case.images)).to(device),
                    torch.from_numpy(case.mask.astype(np.float32))[:, None].to(device),
                    torch.from_numpy(row).to(device).expand(len(case.images), -1),
                )
                slices = torch.sigmoid(outputs["final"].double() + record["log_odds"]).cpu().numpy()
                probabilities.append(float(reduce(slices)))
        return np.asarray(probabilities, dtype=np.float64)


def _is_trained(folder: Path, labels: Mapping[str, int], seed: int) -> bool:
    # The record is written after the weights, so where it is they are complete.
    if not (folder / METADATA_FILE).is_file():
        return False
    record = read_json(folder / METADATA_FILE)
    return bool(record["seed"] == seed and record["train_patients"] == sorted(labels))
