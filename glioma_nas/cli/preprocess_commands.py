"""Commands that serve preprocessing: ``cohort landmarks``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from glioma_nas.cli.application import (
    ConfigArgument,
    PluginOption,
    SetOption,
    complain,
    load_plugins,
    load_run_config,
    shown_progress,
)
from glioma_nas.cli.cohort_commands import cohort_app


@cohort_app.command("landmarks")
def cohort_landmarks(
    config: ConfigArgument,
    out: Annotated[Path, typer.Option("--out", help="JSON file to write")],
    override: SetOption = None,
    plugin: PluginOption = None,
) -> None:
    """Learn the landmarks of the 'nyul' step from a cohort that no network will be tested on."""
    from glioma_nas.cohort import read_cohort
    from glioma_nas.files import write_json
    from glioma_nas.intensity_landmarks import learn_landmarks
    from glioma_nas.stages.preprocess import recipe_of

    loaded = load_run_config(config, override, plugin)
    load_plugins(loaded.plugins)
    recipe = recipe_of(loaded)
    with shown_progress() as progress:
        landmarks = learn_landmarks(read_cohort(loaded.cohort).cases, recipe, progress)
    for message in landmarks["failed"]:
        complain(f"left out: {message}")
    write_json(out, landmarks)
    typer.echo(out)
