"""Table 4-6 on any cohort: what the searched width, the second branch, co-search and distillation each bring.

Three searches on the same cohort and folds: operators and scales with the width fixed, with one branch and
with two, and all of operators, scales and widths with two branches. Of the last: the student alone, the teacher
cut to its narrowest widths and taught by itself uncut (T → T pruned), and the student taught by the teacher (T → S).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import pandas as pd

from glioma_nas import registry
from glioma_nas.architecture import Architecture
from glioma_nas.component_checks import check_components
from glioma_nas.config import RunConfig
from glioma_nas.errors import ConfigError
from glioma_nas.files import write_text
from glioma_nas.missing_sequences import without_incomplete_sequences
from glioma_nas.progress import Progress
from glioma_nas.seeding import isolated_torch_rng
from glioma_nas.segmentation_studies.ablation_page import render_ablation
from glioma_nas.segmentation_studies.contenders import (
    Contender,
    chosen_folds,
    of_seed,
    require_masks,
    search,
    searched,
    time_in_turns,
    train_and_score,
)
from glioma_nas.segmentation_studies.paired_scores import networks_table, per_patient
from glioma_nas.space_building import build_space, options_of

REFERENCE = "student"
TABLE_FILE = "table_4_6.csv"
PATIENTS_FILE = "patients.csv"
SCORES_FILE = "scores.csv"
PAGE_FILE = "report.html"
_SPACE_OPTIONS = ("widths", "end_widths", "n_branches")


@dataclass(frozen=True)
class Published:
    """A row of the thesis' table 4-6.

    Attributes:
        dice: Dice similarity coefficient, in [0, 1].
        speed_hz: Slices per second.
        flops_g: As printed, 10⁹; not reachable at 224×224 under any reading, so shown and never compared.
        params_m: Parameters, 10⁶.
    """

    dice: float
    speed_hz: float
    flops_g: float
    params_m: float


PUBLISHED: Mapping[str, Published] = {
    "fixed_width_1_branch": Published(0.822, 193.6, 13.5, 3.1),
    "fixed_width_2_branches": Published(0.864, 132.4, 21.4, 5.4),
    "searched_width_2_branches": Published(0.867, 178.3, 14.0, 2.2),
    "teacher_pruned": Published(0.816, 158.9, 14.7, 2.3),
    REFERENCE: Published(0.894, 178.3, 14.0, 2.3),
}


def study_ablation(
    config: RunConfig, out: Path, *, n_seeds: int, folds: Sequence[int] | None, progress: Progress
) -> pd.DataFrame:
    """Run the study; what is done is not repeated, so an interrupted one continues.

    Args:
        config: The configuration; its baselines are left out.
        out: Gets a folder for each seed, ``table_4_6.csv``, ``scores.csv``, ``patients.csv`` and ``report.html``.
        n_seeds: Seeds, from the configuration's own on; every seed draws its own folds and searches anew.
        folds: Folds that are used; none: all.
        progress: Where to report.

    Returns:
        One row a setting, in the source's order, the teacher last.

    Raises:
        ConfigError: The space has no widths or branches to leave out, or distillation is switched off.
        CohortError: No case has an expert mask.
    """
    config = without_incomplete_sequences(config)
    used = chosen_folds(folds, config.folds.n_folds)
    if config.train.kd_weight == 0:
        raise ConfigError("table-4-6 compares with and without distillation; set train.kd_weight above 0")
    config = config.model_copy(
        update={"train": config.train.model_copy(update={"baselines": (), "baseline_options": {}})}
    )
    settings = ablated(config)
    for own in (config, *settings.values()):
        check_components(own, ("preprocess", "latency", "search", "train", "export"))
    frames, latencies = [], []
    with progress.task("seeds", n_seeds) as task:
        for number in range(n_seeds):
            seed = config.seed + number
            folder = out / f"seed{seed}"
            contenders = _contenders(config, settings, seed, out, progress)
            require_masks(contenders[0])
            frames.append(train_and_score(contenders, used, folder, progress).assign(seed=seed, training=0))
            latencies.append(time_in_turns(contenders, used[0], folder, reference=REFERENCE, progress=progress))
            task.advance()
    scores = pd.concat(frames, ignore_index=True)
    table = networks_table(scores, latencies, names=(*PUBLISHED, "teacher"), reference=REFERENCE, seed=config.seed)
    table = with_settings(table, student_width(config))
    write_text(out / SCORES_FILE, scores.to_csv(index=False))
    write_text(out / PATIENTS_FILE, per_patient(scores).reset_index().to_csv(index=False))
    write_text(out / TABLE_FILE, table.to_csv(index=False))
    write_text(out / PAGE_FILE, render_ablation(table, latencies, config, folds=used, n_seeds=n_seeds))
    return table


def student_width(config: RunConfig) -> int:
    """Return χ at which widths are fixed: the student's own first and last width (32 in the thesis' space).

    Raises:
        ConfigError: The space has no widths or branches to fix, or teacher and student have the same end width.
    """
    factory = registry.search_spaces.get(config.search.space)
    ends: list[int] = []
    if options_of(factory).issuperset(_SPACE_OPTIONS):
        with isolated_torch_rng(config.seed, "ablation"):
            space = build_space(config)
        ends = list(space.fixed_choices["student"].values()) if space.variable_groups()["width"] else []
    if not ends:
        raise ConfigError(
            f"table-4-6 fixes widths and branches, which search space '{config.search.space}' with these options does "
            "not let it; use nasbranet with several widths and two end_widths, the student's and the teacher's"
        )
    return ends[0]


def ablated(config: RunConfig) -> dict[str, RunConfig]:
    """Return the configurations of the searches with the width fixed, by the row they give."""
    width = student_width(config)
    found = {}
    for name, n_branches in (("fixed_width_1_branch", 1), ("fixed_width_2_branches", 2)):
        # Names of pairs say nothing of single branches.
        options = {key: value for key, value in config.search.space_options.items() if key != "pairs" or n_branches > 1}
        options |= {"widths": [width], "end_widths": [width], "n_branches": n_branches}
        found[name] = config.model_copy(update={"search": config.search.model_copy(update={"space_options": options})})
    return found


def prune(config: RunConfig, search_folder: Path, folder: Path) -> Path:
    """Write the teacher's architecture, every width the narrowest, as a student's record; returns its folder."""
    with isolated_torch_rng(config.seed, "ablation"):
        space = build_space(config)
    values = {label: mutable.values for label, mutable in space.simplify().items() if hasattr(mutable, "values")}
    sample = Architecture.load(search_folder / "teacher.json").sample()
    narrow = {label: min(values[label]) for label in space.variable_groups()["width"]}
    pruned = space.architecture({**sample, **narrow, **space.fixed_choices["student"]})
    if not (folder / "student.json").is_file() or Architecture.load(folder / "student.json") != pruned:
        pruned.save(folder / "student.json")
    return folder


def _contenders(
    config: RunConfig, settings: Mapping[str, RunConfig], seed: int, out: Path, progress: Progress
) -> list[Contender]:
    folder = out / f"seed{seed}"
    own = of_seed(config, seed, out)
    inputs = search(own, folder, progress)
    teacher = searched("teacher", "teacher", own, inputs)
    found = [teacher]
    for name, setting in settings.items():
        fixed = of_seed(setting, seed, out)
        place = search(fixed, folder / "settings" / name, progress, prepared=inputs["preprocess"])
        found.append(searched(name, "student", fixed, place))
    pruned = {**inputs, "search": prune(own, inputs["search"], folder / "settings" / "teacher_pruned")}
    return [
        *found,
        searched("searched_width_2_branches", "student", own, inputs),
        searched("teacher_pruned", "student", own, pruned, teacher),
        searched(REFERENCE, "student", own, inputs, teacher),
    ]


def with_settings(table: pd.DataFrame, width: int) -> pd.DataFrame:
    """Add the source's name of each row, ``setting``, and its printed figures, ``source_…``."""
    names = {
        "fixed_width_1_branch": f"{{O, s | χ = {width}, b = 1}}",
        "fixed_width_2_branches": f"{{O, s | χ = {width}, b = 2}}",
        "searched_width_2_branches": "{O, s, χ | b = 2}",
        "teacher_pruned": "T → T pruned",
        REFERENCE: "T → S",
        "teacher": "T",
    }
    columns = [field.name for field in fields(Published)]
    rows = [[getattr(PUBLISHED.get(str(name)), column, None) for column in columns] for name in table.network]
    source = pd.DataFrame(rows, columns=[f"source_{column}" for column in columns], index=table.index, dtype=float)
    return table.assign(setting=table.network.map(names)).join(source)
