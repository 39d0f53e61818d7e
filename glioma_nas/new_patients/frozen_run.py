"""A finished run as it is applied to new patients: nothing is trained, fitted or chosen any more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from glioma_nas import __version__, registry
from glioma_nas.case_preparation import PREPARATION, Recipe, build_steps
from glioma_nas.classifier_code import require_same_code
from glioma_nas.config import RunConfig, load_config
from glioma_nas.errors import ConfigError, StorageError, did_you_mean
from glioma_nas.files import read_json, sha256_file
from glioma_nas.marker_evaluator import CLASSIFIER_FILE, MarkerEvaluator, load_evaluator
from glioma_nas.pipeline import CONFIG_FILE, MANIFEST, results_of, source_hash
from glioma_nas.prepared import CASE_FILE, CASES_FOLDER, PreparedCohort
from glioma_nas.registry import load_file
from glioma_nas.stages.preprocess import recipe_of
from glioma_nas.trained_networks import load_network, network_names

_NEEDED = ("preprocess", "search", "train")


@dataclass(frozen=True)
class FrozenRun:
    """A run folder opened for prediction.

    Attributes:
        folder: The run folder.
        config: Its resolved configuration.
        network: Which of its networks segments.
    """

    folder: Path
    config: RunConfig
    network: str

    @classmethod
    def open(cls, folder: Path, *, network: str = "student") -> FrozenRun:
        """Open a run whose networks are trained.

        Args:
            folder: The run folder.
            network: ``student``, ``teacher`` or a baseline of the run.

        Raises:
            StorageError: It is no run folder, a stage it needs is not done or out of date, or its classifiers were
                trained by another version of their code.
            ConfigError: The run has no such network.
        """
        if not (folder / CONFIG_FILE).is_file():
            raise StorageError(f"{folder}: not a run folder (it holds no {CONFIG_FILE}); give what `run --out` wrote")
        for stage in _NEEDED:
            if not (folder / stage / MANIFEST).is_file():
                raise StorageError(f"{folder}: stage '{stage}' is not done; run `glioma-nas run` to the end first")
        config = load_config(folder / CONFIG_FILE)
        for plugin in config.plugins:
            load_file(plugin)
        _require_one_piece(folder, config)
        allowed = network_names(config)
        if network not in allowed:
            raise ConfigError(f"the run has no network '{network}': {did_you_mean(network, allowed)}")
        for step in build_steps(config.preprocess).values():
            step.check()
        opened = cls(folder.resolve(), config, network)
        opened.require_classifiers()
        return opened

    @cached_property
    def cohort(self) -> PreparedCohort:
        """The patients the run was made with."""
        return PreparedCohort.load(self.folder / "preprocess")

    @cached_property
    def recipe(self) -> Recipe:
        """How its cases were prepared, and how new ones are."""
        return recipe_of(self.config)

    @cached_property
    def networks(self) -> tuple[nn.Module, ...]:
        """The network of every fold, in evaluation mode on the run's device; together they are the ensemble."""
        return tuple(
            load_network(self.config, self.folder / "search", self.folder / "train", fold, self.network).to(
                self.config.device
            )
            for fold in range(self.cohort.folds.n)
        )

    @cached_property
    def markers(self) -> Mapping[str, MarkerEvaluator]:
        """The classifier of every marker, by the marker's name; empty when the classify stage is not done."""
        return {name: load_evaluator(self.marker_folder(name)) for name in self._classified}

    @property
    def _classified(self) -> list[str]:
        if not (self.folder / "classify" / MANIFEST).is_file():
            return []
        return [name for name in self.config.classify.markers if self.marker_folder(name).is_dir()]

    def require_classifiers(self) -> None:
        """Make sure that every classifier was trained by the code that is about to use it.

        Raises:
            StorageError: One was not.
        """
        remedy = (
            f"run `glioma-nas classify {self.folder / CONFIG_FILE} --out {self.folder} --force`, or use the version "
            "that trained it"
        )
        for name in self._classified:
            folder = self.marker_folder(name)
            record = read_json(folder / CLASSIFIER_FILE)
            # By its name and not as it was built: options and settings of another version may not fit either.
            require_same_code(record, registry.classifiers.get(record["classifier"]), folder=folder, remedy=remedy)

    @cached_property
    def other_code(self) -> str | None:
        """A sentence when the networks were trained by another version of this package; none when by this one."""
        made_with = read_json(self.folder / "train" / MANIFEST).get("versions", {})
        if made_with.get("source") == source_hash():
            return None
        version, source = (made_with.get(key, "unknown") for key in ("glioma_nas", "source"))
        return (
            f"the networks were trained by another version of glioma_nas ({version}, source {source}; here "
            f"{__version__}, source {source_hash()}): their figures were not measured with this one"
        )

    def marker_folder(self, marker: str) -> Path:
        """Return the folder that holds the folds of a marker's classifier."""
        return self.folder / "classify" / marker / self.config.classify.markers[marker].classifier

    def marker_summary(self, marker: str) -> Mapping[str, Any]:
        """Return what the classify stage found out about a marker: metrics, n, the comparison with baselines."""
        summary: dict[str, Any] = read_json(self.folder / "classify" / marker / "summary.json")
        return summary

    @cached_property
    def out_of_fold_dice(self) -> float | None:
        """Mean Dice of the network on patients it had not seen; none when the segment stage is not done."""
        if not (self.folder / "segment" / MANIFEST).is_file():
            return None
        value = results_of(self.folder / "segment")["mean_dice"].get(self.network)
        return None if value is None else float(value)

    @cached_property
    def known_voxels(self) -> Mapping[str, str]:
        """Hash of every scan the run was made with → its case: a new patient's scans must not be among them."""
        return {digest: case.case_id for case in self.cohort.cases.values() for digest in case.voxel_hashes.values()}


def _require_one_piece(folder: Path, config: RunConfig) -> None:
    """Make sure that new patients are prepared as those were whom the networks learnt from.

    A run that stopped half-way after a change, or a single stage run with another configuration, leaves stages that do
    not belong together. A new latency table changes no network and does not count.

    Raises:
        StorageError: A stage was made from an earlier one, or the configuration or this version of the code prepares
            cases in another way.
    """
    for stage in ("search", "train", "segment", "classify"):
        if not (folder / stage / MANIFEST).is_file():
            continue
        for name, digest in read_json(folder / stage / MANIFEST)["inputs"].items():
            manifest = folder / name / MANIFEST
            if name != "latency" and (not manifest.is_file() or sha256_file(manifest) != digest):
                raise StorageError(
                    f"{folder}: stage '{stage}' was made from an earlier '{name}'; run `glioma-nas run` to the end "
                    "first"
                )
    made_with = load_config(folder / "preprocess" / CONFIG_FILE)
    if recipe_of(made_with).hash != recipe_of(config).hash:
        raise StorageError(
            f"{folder}: {CONFIG_FILE} prepares cases in another way than the run's were; run `glioma-nas run` to the "
            "end first"
        )
    # The recipes above are both read with today's code, so what the code itself makes of a recipe is asked apart.
    for file in sorted((folder / "preprocess" / CASES_FOLDER).glob(f"*/{CASE_FILE}")):
        if (found := read_json(file).get("preparation", "not recorded")) != PREPARATION:
            raise StorageError(
                f"{folder}: its cases were prepared by another version of glioma_nas (preparation {found}; here "
                f"{PREPARATION}); run `glioma-nas preprocess {folder / CONFIG_FILE} --out {folder} --force` and then "
                "`glioma-nas run`, or use the version that made the run"
            )
