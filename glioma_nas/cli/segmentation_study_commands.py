"""The command that reproduces the published table of segmentation networks: ``study table-4-5``."""

from __future__ import annotations

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

_METHODS = "unet_thesis,icnet,bisenet,nas_unet,monai_basic_unet,monai_unet"


@study_app.command("table-4-5")
def table_4_5(
    config: ConfigArgument,
    methods: Annotated[str, typer.Option("--methods", help="registered networks, commas between")] = _METHODS,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="whole runs, each with folds of its own")] = 1,
    out: OutOption = None,
    override: SetOption = None,
    plugin: PluginOption = None,
    as_json: JsonOption = False,
) -> None:
    """Segmentation networks by Dice, HD95, speed, MACs and parameters, the source's figures beside.

    Every network gets the student's folds and budget. Interrupted, it continues when run again.
    """
    from glioma_nas.console import print_table
    from glioma_nas.segmentation_studies.methods_study import PAGE_FILE, study_methods

    loaded = load_run_config(config, override, plugin)
    load_plugins(loaded.plugins)
    folder = out if out is not None else run_folder(config, None).with_name(f"table-4-5-{config.stem}")
    names = [name.strip() for name in methods.split(",") if name.strip()]
    with shown_progress() as progress:
        table = study_methods(loaded, folder.resolve(), methods=names, n_seeds=seeds, progress=progress)
    shown = ["network", "dice", "dice_low", "dice_high", "p_holm", "hd95_mm", "speed_hz", "times_student", "macs_g"]
    shown += ["params_m", "source_dice", "source_speed_hz"]
    clean = table[shown].round(4).astype(object).where(table[shown].notna(), None)
    print_table("Table 4-5", shown, clean.to_numpy().tolist(), as_json=as_json)
    if not as_json:
        typer.echo(folder.resolve() / PAGE_FILE)
