"""The commands that reproduce published tables of segmentation networks: ``study table-4-5`` and ``table-4-6``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from glioma_nas.cli.application import (
    ConfigArgument,
    JsonOption,
    OutOption,
    PluginOption,
    SetOption,
    load_plugins,
    load_run_config,
    run_folder,
    shown_progress,
)
from glioma_nas.cli.study_app import study_app
from glioma_nas.errors import ConfigError

_METHODS = "unet_thesis,icnet,bisenet,nas_unet,monai_basic_unet,monai_unet"

SeedsOption = Annotated[int, typer.Option("--seeds", min=1, help="searches and trainings, each with folds of its own")]
FoldsOption = Annotated[
    str | None,
    typer.Option("--folds", help="use these only, commas between: 0 [default: all]", show_default=False),
]
ThreadsOption = Annotated[
    int | None, typer.Option("--threads", min=1, help="threads that train [default: PyTorch's]", show_default=False)
]


@study_app.command("table-4-5")
def table_4_5(
    config: ConfigArgument,
    methods: Annotated[str, typer.Option("--methods", help="registered networks, commas between")] = _METHODS,
    student: Annotated[
        list[str] | None,
        typer.Option(
            "--student",
            help="one more student, by what its search changes: fast:search.latency_weight=0.1,train.kd_weight=2",
            show_default=False,
        ),
    ] = None,
    run: Annotated[
        Path | None, typer.Option("--run", help="run folder whose search is taken over", show_default=False)
    ] = None,
    seeds: SeedsOption = 1,
    trainings: Annotated[
        int, typer.Option("--trainings", min=1, help="trainings of each network, of one search and its folds")
    ] = 1,
    folds: FoldsOption = None,
    threads: ThreadsOption = None,
    out: OutOption = None,
    override: SetOption = None,
    plugin: PluginOption = None,
    as_json: JsonOption = False,
) -> None:
    """Segmentation networks by Dice, HD95, speed, MACs and parameters, the source's figures beside.

    Every network gets the student's folds and budget, and all are timed in turns. Interrupted, it continues when run
    again: nothing that was trained is trained twice.
    """
    from glioma_nas.console import print_table
    from glioma_nas.report.study_page import rows_of
    from glioma_nas.segmentation_studies.methods_study import PAGE_FILE, MethodsPlan, study_methods

    loaded = load_run_config(config, override, plugin)
    load_plugins(loaded.plugins)
    students = {
        name: load_run_config(config, [*(override or []), *changes], plugin)
        for name, changes in map(further_student, student or [])
    }
    folder = study_folder(config, out, "table-4-5")
    names = tuple(name.strip() for name in methods.split(",") if name.strip())
    use_threads(threads)
    plan = MethodsPlan(names, students, seeds, parse_folds(folds), trainings, run.resolve() if run else None)
    with shown_progress() as progress:
        table = study_methods(loaded, folder, plan, progress=progress)
    shown = ["network", "n_patients", "dice", "dice_low", "dice_high", "difference", "p_holm", "hd95_mm", "latency_ms"]
    shown += ["times_reference", *(["speedup"] if "speedup" in table else []), "macs_g", "params_m", "front"]
    shown += ["source_dice", "source_speed_hz"]
    rows = [[row[name] for name in shown] for row in rows_of(table[shown].round(4))]
    print_table("Table 4-5", shown, rows, as_json=as_json)
    if not as_json:
        typer.echo(folder / PAGE_FILE)


@study_app.command("table-4-6")
def table_4_6(
    config: ConfigArgument,
    seeds: SeedsOption = 1,
    folds: FoldsOption = None,
    threads: ThreadsOption = None,
    out: OutOption = None,
    override: SetOption = None,
    plugin: PluginOption = None,
    as_json: JsonOption = False,
) -> None:
    """Ablation: fixed or searched width, one branch or two, pruned teacher or searched student, with distillation.

    Three searches a seed, then six networks a fold. Interrupted, it continues when run again.
    """
    from glioma_nas.console import print_table
    from glioma_nas.report.study_page import rows_of
    from glioma_nas.segmentation_studies.ablation_study import PAGE_FILE, study_ablation

    loaded = load_run_config(config, override, plugin)
    load_plugins(loaded.plugins)
    folder = study_folder(config, out, "table-4-6")
    use_threads(threads)
    with shown_progress() as progress:
        table = study_ablation(loaded, folder, n_seeds=seeds, folds=parse_folds(folds), progress=progress)
    shown = ["network", "setting", "n_patients", "dice", "dice_low", "dice_high", "difference", "p_holm", "hd95_mm"]
    shown += ["speed_hz", "times_reference", "macs_g", "params_m", "source_dice", "source_speed_hz"]
    rows = [[row[name] for name in shown] for row in rows_of(table[shown].round(4))]
    print_table("Table 4-6", shown, rows, as_json=as_json)
    if not as_json:
        typer.echo(folder / PAGE_FILE)


def study_folder(config: Path, out: Path | None, name: str) -> Path:
    """Return where a study works: ``--out``, or beside the configuration's run."""
    return (out if out is not None else run_folder(config, None).with_name(f"{name}-{config.stem}")).resolve()


def further_student(text: str) -> tuple[str, list[str]]:
    """Read ``NAME:key=value,key=value``; a comma inside brackets belongs to a value.

    >>> further_student("wide:search.space_options.widths=[4, 8],search.latency_weight=0")
    ('wide', ['search.space_options.widths=[4, 8]', 'search.latency_weight=0'])

    Raises:
        ConfigError: There is no name or no change.
    """
    name, separator, changes = text.partition(":")
    parts, depth = [""], 0
    for letter in changes:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    if not separator or not name.strip() or not all("=" in part for part in parts):
        raise ConfigError(f"--student {text}: expected NAME:key=value, for example fast:search.latency_weight=0.1")
    return name.strip(), [part.strip() for part in parts]


def parse_folds(text: str | None) -> list[int] | None:
    """Read numbers with commas between.

    Raises:
        ConfigError: It is something else.
    """
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as err:
        raise ConfigError(f"--folds {text}: give numbers with commas between, for example 0,1") from err


def use_threads(threads: int | None) -> None:
    """Let PyTorch compute with so many threads; the engines' own number is ``latency.threads``."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
