"""Train every method on the same folds with one budget, time them in turns, and compare patient by patient."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from glioma_nas.comparison.networks import TRAINING_SEED_STEP
from glioma_nas.component_checks import check_components
from glioma_nas.config import RunConfig
from glioma_nas.errors import ConfigError
from glioma_nas.files import write_bytes, write_text
from glioma_nas.missing_sequences import without_incomplete_sequences
from glioma_nas.progress import Progress
from glioma_nas.segmentation_studies.contenders import (
    Contender,
    baseline,
    chosen_folds,
    finished_search,
    of_seed,
    require_masks,
    search,
    searched,
    time_in_turns,
    train_and_score,
    with_training_seed,
)
from glioma_nas.segmentation_studies.methods_page import render_methods
from glioma_nas.segmentation_studies.paired_scores import networks_table, per_patient

METHODS = ("unet_thesis", "icnet", "bisenet", "nas_unet", "monai_basic_unet", "monai_unet")
REFERENCE = "student"
SLOWEST = "unet_thesis"
TABLE_FILE = "table_4_5.csv"
PATIENTS_FILE = "patients.csv"
SCORES_FILE = "scores.csv"
PAGE_FILE = "report.html"
FRONT_FILE = "front.png"


@dataclass(frozen=True)
class Published:
    """A row of the thesis' table 4-5: 263 patients of its own, its own GPU, 224×224.

    Attributes:
        dice: Dice similarity coefficient, in [0, 1].
        speed_hz: Slices per second.
    """

    dice: float
    speed_hz: float


PUBLISHED: Mapping[str, Published] = {
    "unet_thesis": Published(0.756, 91.7),
    "icnet": Published(0.888, 56.4),
    "nas_unet": Published(0.865, 82.9),
    REFERENCE: Published(0.894, 178.3),
}


@dataclass(frozen=True)
class MethodsPlan:
    """What a study compares.

    Attributes:
        methods: Registered networks.
        students: Name → configuration of further students: another λ, width or space on the same cohort and folds.
        n_seeds: Seeds, from the configuration's own on; every seed draws its own folds and searches anew.
        folds: Folds that are used; none: all.
        n_trainings: Trainings of every network and seed; they differ in their own seed, not in search or folds.
        run: Finished run whose search is taken over; none: the study searches.
    """

    methods: Sequence[str] = METHODS
    students: Mapping[str, RunConfig] | None = None
    n_seeds: int = 1
    folds: Sequence[int] | None = None
    n_trainings: int = 1
    run: Path | None = None


def study_methods(config: RunConfig, out: Path, plan: MethodsPlan, *, progress: Progress) -> pd.DataFrame:
    """Run the study; what is done is not repeated, so an interrupted one continues.

    Args:
        config: The configuration; its own baselines are replaced by the plan's methods.
        out: Gets a folder for each seed, ``table_4_5.csv``, ``scores.csv``, ``patients.csv``, ``front.png`` and
            ``report.html``.
        plan: What is compared.
        progress: Where to report.

    Returns:
        One row a method, as in ``table_4_5.csv``; the student first.

    Raises:
        ConfigError: The plan does not fit the configuration.
        CohortError: No case has an expert mask.
    """
    config = without_incomplete_sequences(config)
    students = {name: without_incomplete_sequences(own) for name, own in (plan.students or {}).items()}
    folds = chosen_folds(plan.folds, config.folds.n_folds)
    config = _checked(config, students, plan)
    frames, latencies = [], []
    with progress.task("seeds", plan.n_seeds) as task:
        for number in range(plan.n_seeds):
            folder = out / f"seed{config.seed + number}"
            contenders = _contenders(config, students, plan, config.seed + number, out, progress)
            require_masks(contenders[0])
            for training in range(plan.n_trainings):
                seed = config.seed + number + TRAINING_SEED_STEP * training
                trained = [with_training_seed(item, seed) for item in contenders]
                frames.append(
                    train_and_score(trained, folds, folder, progress).assign(
                        seed=config.seed + number, training=training
                    )
                )
            latencies.append(time_in_turns(contenders, folds[0], folder, reference=REFERENCE, progress=progress))
            task.advance()
    scores = pd.concat(frames, ignore_index=True)
    names = [REFERENCE, *(name for name in dict.fromkeys(scores.network) if name != REFERENCE)]
    slowest = SLOWEST if SLOWEST in names else None
    table = networks_table(scores, latencies, names=names, reference=REFERENCE, slowest=slowest, seed=config.seed)
    table = with_published(table)
    write_text(out / SCORES_FILE, scores.to_csv(index=False))
    write_text(out / PATIENTS_FILE, per_patient(scores).reset_index().to_csv(index=False))
    write_text(out / TABLE_FILE, table.to_csv(index=False))
    page, front = render_methods(
        table, latencies, config, folds=folds, n_seeds=plan.n_seeds, n_trainings=plan.n_trainings
    )
    write_bytes(out / FRONT_FILE, front)
    write_text(out / PAGE_FILE, page)
    return table


def with_published(table: pd.DataFrame) -> pd.DataFrame:
    """Add the source's figures: ``source_dice``, ``source_speed_hz``, ``source_times_student``."""
    rows = []
    for name in table.network:
        known = PUBLISHED.get(str(name))
        times = PUBLISHED[REFERENCE].speed_hz / known.speed_hz if known else None
        rows.append((known.dice if known else None, known.speed_hz if known else None, times))
    columns = ["source_dice", "source_speed_hz", "source_times_student"]
    return table.join(pd.DataFrame(rows, columns=columns, index=table.index, dtype=float))


def _checked(config: RunConfig, students: Mapping[str, RunConfig], plan: MethodsPlan) -> RunConfig:
    """Return the configuration with the plan's methods, once everything that would fail later has been tried."""
    names = ["teacher", REFERENCE, *students, *plan.methods]
    doubles = sorted({name for name in names if names.count(name) > 1})
    if doubles:
        raise ConfigError(f"'{doubles[0]}' names two networks of the study: give each network once, under its own name")
    options = {name: value for name, value in config.train.baseline_options.items() if name in plan.methods}
    update = {"baselines": tuple(plan.methods), "baseline_options": options}
    config = config.model_copy(update={"train": config.train.model_copy(update=update)})
    check_components(config, ("preprocess", "latency", "search", "train", "export"))
    for name, own in students.items():
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
            raise ConfigError(f"--student {name}: a name is made of letters, digits, '.', '_' and '-'")
        for section in ("seed", "cohort", "preprocess", "folds"):
            if getattr(own, section) != getattr(config, section):
                raise ConfigError(f"--student {name} changes {section}, but all networks of a study share it")
        check_components(own, ("latency", "search"))
    if plan.run is not None and plan.n_seeds > 1:
        raise ConfigError("--run holds the search of one seed; leave it out, or give --seeds 1")
    return config


def _contenders(
    config: RunConfig, students: Mapping[str, RunConfig], plan: MethodsPlan, seed: int, out: Path, progress: Progress
) -> list[Contender]:
    """Search, then list the networks: teacher and student, the other students (taught by the same), the methods."""
    folder = out / f"seed{seed}"
    # One table for all searches: only operators that no earlier one has are measured.
    own = of_seed(config, seed, out)
    inputs = search(own, folder, progress) if plan.run is None else finished_search(config, plan.run, progress)
    teacher = searched("teacher", "teacher", own, inputs)
    found = [teacher, searched(REFERENCE, "student", own, inputs, teacher)]
    for name, student in students.items():
        student = of_seed(student, seed, out)
        place = search(student, folder / "students" / name, progress, prepared=inputs["preprocess"])
        found.append(searched(name, "student", student, place, teacher))
    return [*found, *(baseline(name, own, inputs) for name in plan.methods)]
