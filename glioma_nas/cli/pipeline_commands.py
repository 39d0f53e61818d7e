"""Commands that run the pipeline: ``demo``, ``run`` and each stage alone."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from glioma_nas.cli.application import (
    ConfigArgument,
    ForceOption,
    OutOption,
    PluginOption,
    SetOption,
    app,
    complain,
    load_plugins,
    load_run_config,
    run_folder,
    shown_progress,
)
from glioma_nas.pipeline import STAGE_NAMES, STAGES

if TYPE_CHECKING:
    from glioma_nas.config import RunConfig


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="run folder")] = Path("runs/demo"),
    patients: Annotated[int, typer.Option("--patients", min=12, help="synthetic patients")] = 36,
    seed: Annotated[int, typer.Option("--seed", min=0, help="seed of cohort and run")] = 0,
    override: SetOption = None,
) -> None:
    """Run the whole pipeline on a synthetic cohort: a few minutes on a CPU, ends in report.html."""
    import yaml

    from glioma_nas.config import load_config
    from glioma_nas.files import require_writable, write_text
    from glioma_nas.pipeline import MIN_FREE_BYTES
    from glioma_nas.synthetic_cohort import write_synthetic_cohort

    require_writable(out, free_bytes=MIN_FREE_BYTES)
    with shown_progress() as progress:
        sheet = write_synthetic_cohort(out / "cohort", patients, seed, workers=2, progress=progress)
    preset = yaml.safe_load(resources.files("glioma_nas").joinpath("demo.yaml").read_text(encoding="utf-8"))
    preset["seed"] = seed
    preset["cohort"]["sheet"] = str(sheet.resolve())
    path = out / "demo.yaml"
    write_text(path, yaml.safe_dump(preset, sort_keys=False))
    run_stages(load_config(path, override or []), out, STAGE_NAMES, force=False)


@app.command()
def run(
    config: ConfigArgument,
    out: OutOption = None,
    override: SetOption = None,
    plugin: PluginOption = None,
    force: ForceOption = False,
) -> None:
    """Run all stages; those done with the same inputs are skipped, a half-done one continues."""
    run_stages(load_run_config(config, override, plugin), run_folder(config, out), STAGE_NAMES, force=force)


def _stage_command(name: str, summary: str) -> None:
    def command(
        config: ConfigArgument,
        out: OutOption = None,
        override: SetOption = None,
        plugin: PluginOption = None,
        force: ForceOption = False,
    ) -> None:
        run_stages(load_run_config(config, override, plugin), run_folder(config, out), (name,), force=force)

    app.command(name, help=f"Stage alone: {summary}.")(command)


for _stage in STAGES:
    if _stage.name != "latency":  # `latency build`, one of a group of commands
        _stage_command(_stage.name, _stage.summary)


def run_stages(config: RunConfig, folder: Path, names: tuple[str, ...], *, force: bool) -> None:
    """Run stages with their progress shown, then print where the result is."""
    from glioma_nas.pipeline import Pipeline

    load_plugins(config.plugins)
    try:
        with shown_progress() as progress:
            Pipeline(config, folder, progress).run(names, force=force)
    except KeyboardInterrupt:
        # Here and not in `main`, because typer ends the process itself when an interrupt reaches it.
        complain("interrupted; run the same command again to continue")
        raise typer.Exit(130) from None
    last = folder.resolve() / names[-1]
    typer.echo(last / "report.html" if names[-1] == "report" else last)
