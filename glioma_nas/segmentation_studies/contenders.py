"""Train, score and time the networks of a study, one network and fold at a time: cut off anywhere, it continues.

What was made lies in a folder named by the network and a hash of everything its training depends on, so another network
in the list, another seed or another fold repeats nothing, and nothing out of date is read back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from glioma_nas.config import RunConfig
from glioma_nas.errors import CohortError, ConfigError
from glioma_nas.files import canonical_json, read_json, sha256_file, sha256_text, write_json, write_text
from glioma_nas.pipeline import MANIFEST, Pipeline, StageContext
from glioma_nas.prepared import PreparedCohort
from glioma_nas.progress import Progress
from glioma_nas.segmentation_inference import predict_probability
from glioma_nas.segmentation_scores import native_outline, native_scores
from glioma_nas.stages.export import export_engine, measure_networks, parity_slices
from glioma_nas.stages.train import train_network
from glioma_nas.trained_networks import SEARCHED, WEIGHTS_FILE, load_network

SEARCH_STAGES = ("preprocess", "latency", "search")
SCORES_FILE = "scores.csv"
LATENCY_FILE = "latency.json"
NETWORKS_FOLDER = "networks"


@dataclass(frozen=True)
class Contender:
    """One network of a study.

    Attributes:
        name: Its row in the table, and part of its folder's name.
        role: ``teacher``, ``student`` or a registered network.
        config: Its configuration.
        inputs: Finished folders of the stages ``preprocess`` and ``search``.
        teacher: Whose outputs it is distilled from; none: the labels alone.
    """

    name: str
    role: str
    config: RunConfig
    inputs: Mapping[str, Path]
    teacher: Contender | None = None

    @property
    def key(self) -> str:
        """Hash of all that its trained weights depend on, 12 hexadecimal digits."""
        train = self.config.train.model_dump(mode="json", exclude={"baselines", "baseline_options", "tensorboard"})
        if self.teacher is None:
            train = {name: value for name, value in train.items() if not name.startswith("kd_")}
        record = self.inputs["search"] / f"{self.role}.json"
        content = {
            "role": self.role,
            "options": self.config.train.baseline_options.get(self.role),
            "architecture": sha256_file(record) if self.role in SEARCHED else None,
            "teacher": self.teacher.key if self.teacher else None,
            "train": train,
            "augmentation": self.config.augmentation.model_dump(mode="json"),
            "seed": self.config.seed,
            "device": self.config.device,
            "plugins": [sha256_file(path) for path in self.config.plugins],
            "preprocess": sha256_file(self.inputs["preprocess"] / MANIFEST),
        }
        return sha256_text(canonical_json(content))[:12]

    def folder(self, out: Path) -> Path:
        """Return where it is trained."""
        return out / NETWORKS_FOLDER / f"{self.name}-{self.key}"

    def load(self, out: Path, fold: int) -> nn.Module:
        """Return the network trained for a fold, on the CPU in evaluation mode."""
        return load_network(self.config, self.inputs["search"], self.folder(out), fold, self.role)


def baseline(name: str, config: RunConfig, inputs: Mapping[str, Path]) -> Contender:
    """Return a registered network as a contender."""
    options = {key: value for key, value in config.train.baseline_options.items() if key == name}
    train = config.train.model_copy(update={"baselines": (name,), "baseline_options": options})
    return Contender(name, name, config.model_copy(update={"train": train}), inputs)


def searched(
    name: str, role: str, config: RunConfig, inputs: Mapping[str, Path], teacher: Contender | None = None
) -> Contender:
    """Return a network of a finished search as a contender; ``teacher``: see `Contender`."""
    update: dict[str, Any] = {"baselines": (), "baseline_options": {}}
    if teacher is None:
        update["kd_weight"] = 0.0
    return Contender(
        name, role, config.model_copy(update={"train": config.train.model_copy(update=update)}), inputs, teacher
    )


def with_training_seed(contender: Contender, seed: int) -> Contender:
    """Return the same network, trained with another seed: the search that it comes from stays."""
    teacher = with_training_seed(contender.teacher, seed) if contender.teacher else None
    return replace(contender, config=contender.config.model_copy(update={"seed": seed}), teacher=teacher)


def of_seed(config: RunConfig, seed: int, out: Path) -> RunConfig:
    """Return the configuration with another seed, and one latency table for all searches of the study.

    Only operators that no earlier search has are then measured.
    """
    table = config.latency.shared_table or out / "latency_table.json"
    latency = config.latency.model_copy(update={"shared_table": table})
    return config.model_copy(update={"seed": seed, "latency": latency})


def require_masks(contender: Contender) -> None:
    """Make sure that there is something to compare with before anything is trained.

    Raises:
        CohortError: No case has an expert mask.
    """
    cohort = PreparedCohort.load(contender.inputs["preprocess"])
    if not any(case.has_mask for case in cohort.cases.values()):
        sheet = contender.config.cohort.sheet
        raise CohortError(f"{sheet}: no case has an expert mask, so there is no Dice to compare")


def search(config: RunConfig, folder: Path, progress: Progress, *, prepared: Path | None = None) -> dict[str, Path]:
    """Run the stages up to the search; finished ones are skipped.

    Args:
        config: The configuration.
        folder: Run folder.
        progress: Where to report.
        prepared: Finished preprocess folder of the same cohort, steps, folds and seed, which is used as it is.

    Returns:
        Stage → finished folder.
    """
    if prepared is not None and not (folder / "preprocess").exists():
        folder.mkdir(parents=True, exist_ok=True)
        # A link: many searches need not hold the cohort many times. The pipeline checks its manifest as any other.
        (folder / "preprocess").symlink_to(prepared.resolve(), target_is_directory=True)
    Pipeline(config, folder, progress).run(SEARCH_STAGES)
    return {stage: folder / stage for stage in SEARCH_STAGES}


def finished_search(config: RunConfig, run: Path, progress: Progress) -> dict[str, Path]:
    """Return the stages of a run that has searched already; nothing in it is touched.

    Raises:
        ConfigError: A stage is missing there, or was made with another configuration than this one.
    """
    pipeline = Pipeline(config, run, progress)
    for name in SEARCH_STAGES:
        if not pipeline.done(name):
            raise ConfigError(
                f"--run {run}: its stage '{name}' is missing, or was not made with this cohort, seed and these "
                f"settings; give the configuration of that run ({run / 'config.yaml'}, training may differ), or leave "
                "--run out to search anew"
            )
    return {stage: run / stage for stage in SEARCH_STAGES}


def chosen_folds(folds: Sequence[int] | None, n_folds: int) -> list[int]:
    """Return the folds to use, all of them by default.

    Raises:
        ConfigError: One is not there, or stands twice.
    """
    if folds is None:
        return list(range(n_folds))
    if len(set(folds)) != len(folds) or not folds or not all(0 <= fold < n_folds for fold in folds):
        raise ConfigError(
            f"--folds {','.join(map(str, folds))}: give numbers from 0 to {n_folds - 1} (folds.n_folds is {n_folds}), "
            "each once"
        )
    return sorted(folds)


def train_and_score(
    contenders: Sequence[Contender], folds: Sequence[int], out: Path, progress: Progress
) -> pd.DataFrame:
    """Train every contender on every fold and score it on the fold's test patients, on each scan's own grid.

    Args:
        contenders: A teacher stands before the students it teaches.
        folds: Folds to use.
        out: Gets ``networks/<name>-<key>/fold<k>/<role>/`` with weights, history and ``scores.csv``.
        progress: Where to report.

    Returns:
        One row a case, network and fold: ``network``, ``case_id``, ``patient_id``, ``fold``, ``dice``, ``hd95_mm``, ….

    Raises:
        ConfigError: Several devices are asked for.
    """
    frames = []
    with progress.task("networks", len(contenders) * len(folds)) as task:
        for contender in contenders:
            if contender.config.train.devices != 1:
                raise ConfigError("a study trains one network after the other on one device; set train.devices: 1")
            for fold in folds:
                folder = contender.folder(out) / f"fold{fold}" / contender.role
                if not (folder / WEIGHTS_FILE).is_file():
                    _train(contender, fold, out, folder, progress)
                if not (folder / SCORES_FILE).is_file():
                    write_text(folder / SCORES_FILE, _score(contender, fold, out, progress).to_csv(index=False))
                frames.append(pd.read_csv(folder / SCORES_FILE, dtype={"case_id": str, "patient_id": str}))
                task.advance()
    return pd.concat(frames, ignore_index=True)


def _train(contender: Contender, fold: int, out: Path, folder: Path, progress: Progress) -> None:
    context = StageContext(contender.config, contender.folder(out), contender.inputs, progress)
    teacher = contender.teacher.load(out, fold) if contender.teacher else None
    train_network(context, fold, contender.role, folder, teacher=teacher)


def _score(contender: Contender, fold: int, out: Path, progress: Progress) -> pd.DataFrame:
    cohort = PreparedCohort.load(contender.inputs["preprocess"])
    network = contender.load(out, fold)
    config, rows = contender.config, []
    cases = [case for case in cohort.select(cohort.folds.test(fold)) if case.has_mask]
    with progress.task(f"score {contender.name}, fold {fold + 1}", len(cases)) as task:
        for case in cases:
            probability = predict_probability(
                network, case.images(), case.sequences, config.cohort.channels, device=config.device
            )
            known = {"network": contender.name, "case_id": case.case_id, "patient_id": case.patient_id, "fold": fold}
            rows.append({**known, **native_scores(case, native_outline(case, probability))})
            task.advance()
    return pd.DataFrame(
        rows, columns=["network", "case_id", "patient_id", "fold", "dice", "hd95_mm"] if not rows else None
    )


def time_in_turns(
    contenders: Sequence[Contender], fold: int, out: Path, *, reference: str, progress: Progress
) -> dict[str, Any]:
    """Prove that every engine computes what PyTorch does, then time all networks in one run, one call each a round.

    Args:
        contenders: Trained for ``fold``.
        fold: Whose weights are used.
        out: Gets ``latency.json`` and ``engines/<name>.onnx``.
        reference: Whose time is 1.
        progress: Where to report.

    Returns:
        See `glioma_nas.stages.export.measure_networks`, with ``parity`` beside.

    Raises:
        BackendError: The engine is missing, refuses a network, or computes something else than PyTorch.
    """
    config = contenders[0].config
    content = {
        "networks": {contender.name: contender.key for contender in contenders},
        "latency": config.latency.model_dump(mode="json", exclude={"shared_table"}),
        "reference": reference,
        "fold": fold,
    }
    key = sha256_text(canonical_json(content))
    path = out / LATENCY_FILE
    if path.is_file() and read_json(path).get("key") == key:
        return dict(read_json(path))
    cohort = PreparedCohort.load(contenders[0].inputs["preprocess"])
    images = parity_slices(cohort.select(cohort.folds.test(fold)), config.cohort.channels, config.export.parity_slices)
    networks, parity = {}, {}
    with progress.task("exporting engines", len(contenders)) as task:
        for contender in contenders:
            network = networks[contender.name] = contender.load(out, fold)
            found = export_engine(network, images, out / "engines" / f"{contender.name}.onnx", config)
            parity[contender.name] = {
                "max_abs_logit_difference": float(f"{found.max_abs_logit_difference:.6g}"),
                "mask_dice": round(found.mask_dice, 6),
            }
            task.advance()
    measured = {"key": key, "parity": parity, **measure_networks(networks, config, progress, reference=reference)}
    write_json(path, measured)
    return measured
