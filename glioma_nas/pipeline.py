"""Run the stages in order, skip what is done, resume what is half done.

A stage reads finished folders of earlier stages and writes only its own. It works under ``RUN/.STAGE.partial`` and the
folder is renamed to ``RUN/STAGE`` once its ``manifest.json`` is in it, so a folder under its real name is complete.

What a stage depends on is folded into a key: its configuration, the seed, and the manifests of the stages it reads. The
same key means done (or, for a partial folder, resumable); another key means the folder is out of date and is made anew.
"""

from __future__ import annotations

import fcntl
import importlib
import logging
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from glioma_nas import __version__
from glioma_nas.cohort import cohort_fingerprint
from glioma_nas.component_checks import check_components
from glioma_nas.config import RunConfig
from glioma_nas.errors import GliomaNasError, StorageError
from glioma_nas.files import (
    canonical_json,
    read_json,
    require_writable,
    sha256_file,
    sha256_text,
    write_json,
    write_text,
)
from glioma_nas.missing_sequences import without_incomplete_sequences
from glioma_nas.progress import Progress

_logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
CONFIG_FILE = "config.yaml"
_KEY_FILE = "key.json"
MIN_FREE_BYTES = 200_000_000
_FOLDERS = ("search_spaces", "strategies", "evaluators", "plugins")


@dataclass(frozen=True)
class StageContext:
    """What a stage gets.

    Attributes:
        config: The whole configuration; a stage reads only the sections it names.
        folder: Where the stage writes; it exists, and after an interruption still holds what was written before.
        inputs: Stage name → finished folder, for each stage named in `Stage.needs`.
        progress: Where to report.
        forced: Whether it is run again on purpose; what an earlier run left elsewhere is not to be taken then.
    """

    config: RunConfig
    folder: Path
    inputs: Mapping[str, Path]
    progress: Progress
    forced: bool = False


@dataclass(frozen=True)
class Stage:
    """One step of the pipeline.

    Attributes:
        name: Name of its folder and of its command.
        summary: One line for help texts.
        needs: Stages it reads.
        sections: Configuration sections it depends on; a change in one makes the stage out of date.
        module: Module that holds ``run(context) -> dict``, imported when the stage runs; the dict (plain JSON) goes
            into the manifest as ``results``.
        fingerprint: What else it depends on, as plain JSON: files outside the run folder, parts of other sections.
    """

    name: str
    summary: str
    needs: tuple[str, ...]
    sections: tuple[str, ...]
    module: str
    fingerprint: Callable[[RunConfig], Any] = field(default=lambda config: None)


def _cohort_fingerprint(config: RunConfig) -> dict[str, Any]:
    """Return what the preprocess stage depends on beside its sections: the cohort's table, its scans, the markers.

    Of the markers only the columns and sequences matter here, so that another classifier does not make the search out
    of date.
    """
    markers = {
        name: marker.model_dump(mode="json", include={"column", "positive", "threshold", "sequences"})
        for name, marker in config.classify.markers.items()
    }
    # Landmarks and weights count by content, and so does a file of folds.
    step_files = {str(path): sha256_file(path) for path in config.preprocess.option_files()}
    file = config.folds.file
    folds_file = sha256_file(file) if file is not None and file.is_file() else None
    return {
        **cohort_fingerprint(config.cohort),
        "markers": markers,
        "step_files": step_files,
        "folds_file": folds_file,
    }


def _search_fingerprint(config: RunConfig) -> dict[str, Any] | None:
    """Return the content of the calibration, and how markers are predicted where networks are ranked by that too."""
    found: dict[str, Any] = {}
    path = config.search.latency_calibration
    if path is not None:
        found["calibration"] = sha256_file(path) if path.is_file() else None
    if config.search.marker_weight > 0:
        used = {"markers", "epochs", "batch_size", "learning_rate", "slices_per_case", "image_size_px"}
        found["classify"] = config.classify.model_dump(mode="json", include=used)
    return found or None


def _classify_fingerprint(config: RunConfig) -> dict[str, Any] | None:
    """Return the contents of the files the classify stage is told of: provenance of given masks, pretrained weights."""
    options = [value for marker in config.classify.markers.values() for value in marker.options.values()]
    files = [Path(value) for value in options if isinstance(value, str)]
    if config.classify.mask_provenance is not None:
        files.append(config.cohort.sheet.parent / config.classify.mask_provenance)
    hashes = {str(path): sha256_file(path) for path in files if path.is_file()}
    return {"files": hashes} if hashes else None


def _report_fingerprint(config: RunConfig) -> dict[str, Any] | None:
    """Return the contents of what other commands found out about the run."""
    files = [folder / "validation.json" for folder in config.report.evaluations]
    files += [folder / "comparison.csv" for folder in config.report.comparisons]
    hashes = {str(path): sha256_file(path) for path in files if path.is_file()}
    return {"files": hashes} if hashes else None


STAGES: tuple[Stage, ...] = (
    Stage(
        "preprocess",
        "read the cohort, check every file, normalise, cut slices, draw folds",
        (),
        ("cohort", "preprocess", "folds"),
        "glioma_nas.stages.preprocess",
        _cohort_fingerprint,
    ),
    Stage(
        "latency",
        "measure every operator of the search space",
        (),
        (
            "latency",
            "search.space",
            "search.space_options",
            "preprocess.image_size_px",
            "cohort.sequences",
            "cohort.missing_sequence",
        ),
        "glioma_nas.stages.latency",
    ),
    Stage(
        "search",
        "search teacher and student together",
        ("preprocess", "latency"),
        ("search", "augmentation", "device"),
        "glioma_nas.stages.search",
        _search_fingerprint,
    ),
    Stage(
        "train",
        "train teacher, student and baselines from scratch, fold by fold",
        ("preprocess", "search"),
        ("train", "augmentation", "device"),
        "glioma_nas.stages.train",
    ),
    Stage(
        "export",
        "write ONNX files, prove parity, measure latency",
        ("preprocess", "search", "train"),
        ("export", "latency"),
        "glioma_nas.stages.export",
    ),
    Stage(
        "segment",
        "write out-of-fold masks in each scan's own grid",
        ("preprocess", "search", "train"),
        ("device",),
        "glioma_nas.stages.segment",
    ),
    Stage(
        "classify",
        "predict molecular markers from images and out-of-fold masks",
        ("preprocess", "segment"),
        ("classify", "device"),
        "glioma_nas.stages.classify",
        _classify_fingerprint,
    ),
    Stage(
        "report",
        "write report.html",
        ("preprocess", "latency", "search", "train", "export", "segment", "classify"),
        ("report",),
        "glioma_nas.stages.report",
        _report_fingerprint,
    ),
)

STAGE_NAMES: tuple[str, ...] = tuple(stage.name for stage in STAGES)


class Pipeline:
    """The stages of one run folder.

    Args:
        config: The run's configuration.
        folder: The run folder; created if need be.
        progress: Where stages report.
    """

    def __init__(self, config: RunConfig, folder: Path, progress: Progress) -> None:
        self.config = without_incomplete_sequences(config)
        self.folder = folder.resolve()
        self.progress = progress
        if self.config.cohort.dropped_sequences:
            progress.note(
                f"dropped from the run: {', '.join(self.config.cohort.dropped_sequences)}, missing in some case"
            )

    def run(self, names: Iterable[str] = STAGE_NAMES, *, force: bool = False) -> None:
        """Run the named stages in pipeline order; those already done with the same inputs are skipped.

        Args:
            names: Stage names.
            force: Run them even when they are done.

        Raises:
            GliomaNasError: A stage met a mistake of the user's; folders of finished stages are left as they were.
        """
        require_writable(self.folder, free_bytes=MIN_FREE_BYTES)
        wanted = [stage for stage in STAGES if stage.name in set(names)]
        check_components(self.config, [stage.name for stage in wanted])
        with self._locked(), self.progress.task("stages", len(wanted)) as task:
            for stage in wanted:
                self._run_stage(stage, force=force)
                # After the stage, so that a run that fails leaves the configuration of the results that are there.
                write_text(self.folder / CONFIG_FILE, self.config.to_yaml())
                task.advance(1)

    def done(self, name: str) -> bool:
        """Tell the same as `is_done` of the stage called ``name``."""
        return self.is_done(_stage(name))

    def is_done(self, stage: Stage) -> bool:
        """Tell whether the stage's folder is complete and made from the present inputs."""
        manifest = self.folder / stage.name / MANIFEST
        if not all(self.is_done(_stage(name)) for name in stage.needs):
            return False
        return manifest.is_file() and read_json(manifest).get("key") == self.key(stage)

    def key(self, stage: Stage, *, resuming: bool = False) -> str:
        """Return the hash of everything the stage depends on; 64 hexadecimal digits.

        For ``resuming`` a half-done folder the scans are left out: the stage checks each case by itself, and a repaired
        file must not throw away the cases that were done.

        Its inputs count by their manifests, so a stage that was run again, even with the same configuration, makes the
        later ones out of date: measured latencies, for example, are never the same twice.

        Raises:
            StorageError: A stage it reads is not there.
        """
        dump = self.config.model_dump(mode="json")
        # The salt counts by content, and only where it hides something; its default lies beside the configuration.
        del dump["cohort"]["salt_file"]
        fingerprint = stage.fingerprint(self.config)
        if resuming and fingerprint is not None:
            fingerprint = {name: value for name, value in fingerprint.items() if name != "scans"}
        content = {
            "stage": stage.name,
            "seed": self.config.seed,
            "plugins": {str(path): sha256_file(path) for path in self.config.plugins if path.is_file()},
            "config": {section: _lookup(dump, section) for section in stage.sections},
            "fingerprint": fingerprint,
            "needs": self._input_hashes(stage),
        }
        return sha256_text(canonical_json(content))

    def _input_hashes(self, stage: Stage) -> dict[str, str]:
        manifests = {name: self.folder / name / MANIFEST for name in stage.needs}
        for name, path in manifests.items():
            if not path.is_file():
                raise StorageError(f"{path}: no such file; run the stage '{name}' first")
        return {name: sha256_file(path) for name, path in manifests.items()}

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep a second run out of the folder; the system lifts the lock when the process ends, however it ends."""
        with (self.folder / ".lock").open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as err:
                raise StorageError(
                    f"{self.folder}: another run is at work in this folder; wait or choose --out"
                ) from err
            yield

    def _run_stage(self, stage: Stage, *, force: bool) -> None:
        if not force and self.is_done(stage):
            self.progress.note(f"{stage.name}: done before, skipped")
            return
        for name in stage.needs:
            if not self.is_done(_stage(name)):
                raise StorageError(
                    f"stage '{stage.name}' needs '{name}', which is not done (or out of date) in {self.folder}; "
                    f"run `glioma-nas {command_of(name)} CONFIG --out {self.folder}` first, or `glioma-nas run`"
                )
        require_writable(self.folder, free_bytes=MIN_FREE_BYTES)
        partial = self.folder / f".{stage.name}.partial"
        self._open_partial(partial, self.key(stage, resuming=True), force=force)
        if (partial / MANIFEST).is_file() and read_json(partial / MANIFEST)["key"] == self.key(stage):
            # Cut off between the last write and the rename.
            self._publish(stage, partial)
            return
        self.progress.note(f"{stage.name}: {stage.summary}")
        started = time.monotonic()
        module = importlib.import_module(stage.module)
        inputs = {name: self.folder / name for name in stage.needs}
        context = StageContext(self.config, partial, inputs, self.progress, force)
        key = self.key(stage)
        results = module.run(context)
        self._finish(stage, partial, results, key=key, wall_s=time.monotonic() - started)

    def _open_partial(self, partial: Path, key: str, *, force: bool) -> None:
        key_file = partial / _KEY_FILE
        if partial.is_dir() and (force or not key_file.is_file() or read_json(key_file) != {"key": key}):
            shutil.rmtree(partial)
        partial.mkdir(exist_ok=True)
        write_json(key_file, {"key": key})

    def _finish(self, stage: Stage, partial: Path, results: dict[str, Any], *, key: str, wall_s: float) -> None:
        write_text(partial / CONFIG_FILE, self.config.to_yaml())
        write_json(
            partial / MANIFEST,
            {
                "stage": stage.name,
                "key": key,
                "seed": self.config.seed,
                "inputs": self._input_hashes(stage),
                "versions": versions(),
                "wall_s": round(wall_s, 3),
                "results": results,
            },
        )
        self._publish(stage, partial)
        _logger.info("%s done in %.1f s", stage.name, wall_s)

    def _publish(self, stage: Stage, partial: Path) -> None:
        final = self.folder / stage.name
        outdated = self.folder / f".{stage.name}.outdated"
        if outdated.exists():
            shutil.rmtree(outdated)
        if final.exists():
            final.rename(outdated)
        partial.rename(final)
        if outdated.exists():
            shutil.rmtree(outdated)
        (final / _KEY_FILE).unlink()


def command_of(stage: str) -> str:
    """Return the command that runs a stage alone."""
    return "latency build" if stage == "latency" else stage


def results_of(folder: Path) -> dict[str, Any]:
    """Return the ``results`` of a finished stage's manifest.

    Raises:
        StorageError: The folder holds no manifest.
    """
    results = read_json(folder / MANIFEST)["results"]
    assert isinstance(results, dict)
    return results


def versions() -> dict[str, str]:
    """Return the versions that can change a result: Python, this package and the libraries that compute."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version(), "glioma_nas": __version__, "source": source_hash()}
    for name in (
        "torch",
        "nni",
        "monai",
        "numpy",
        "scipy",
        "scikit-learn",
        "onnx",
        "onnxruntime",
        "nibabel",
        "pytorch_lightning",
    ):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


@cache
def source_hash() -> str:
    """Return a hash of this package's own code, 12 hexadecimal digits: between releases the version says too little."""
    import glioma_nas

    digest = ""
    for root in glioma_nas.__path__:
        folders = [Path(root)] if (Path(root) / "pipeline.py").is_file() else [Path(root) / name for name in _FOLDERS]
        for path in sorted(path for folder in folders for path in folder.rglob("*.py")):
            digest = sha256_text(f"{digest}{path.name}{sha256_file(path)}")
    return digest[:12]


def _stage(name: str) -> Stage:
    for stage in STAGES:
        if stage.name == name:
            return stage
    raise GliomaNasError(f"unknown stage '{name}'; allowed: {', '.join(STAGE_NAMES)}")


def _lookup(dump: Mapping[str, Any], dotted: str) -> Any:
    value: Any = dump
    for part in dotted.split("."):
        value = value[part]
    return value
