"""The command that compares search strategies: ``compare``."""

from __future__ import annotations

from typing import Annotated

import typer

from glioma_nas.cli.application import (
    ConfigArgument,
    JsonOption,
    OutOption,
    PluginOption,
    SetOption,
    app,
    load_plugins,
    load_run_config,
    run_folder,
    shown_progress,
)


@app.command()
def compare(
    config: ConfigArgument,
    strategies: Annotated[
        str, typer.Option("--strategies", help="names, commas between: co_search,nni.darts,nni.evolution")
    ] = "co_search,latency_darts,random_with_shared_weights,nni.darts,nni.random,nni.evolution",
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="searches of each strategy")] = 3,
    trials: Annotated[int, typer.Option("--trials", min=1, help="trials that share a multi-trial budget")] = 8,
    out: OutOption = None,
    override: SetOption = None,
    plugin: PluginOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare strategies on one space, cohort, split and budget of steps: Dice, measured latency, cost, Pareto front.

    Interrupted, it continues when run again. Writes comparison.csv, runs.csv and report.html.
    """
    from glioma_nas.comparison.contest import PAGE_FILE, compare_strategies, plan
    from glioma_nas.console import print_table
    from glioma_nas.missing_sequences import without_incomplete_sequences

    loaded = load_run_config(config, override, plugin)
    load_plugins(loaded.plugins)
    loaded = without_incomplete_sequences(loaded)
    folder = (out if out is not None else run_folder(config, None).with_name(f"compare-{config.stem}")).resolve()
    names = [name.strip() for name in strategies.split(",") if name.strip()]
    cells = plan(loaded, names, n_seeds=seeds, trials=trials, out=folder)
    with shown_progress() as progress:
        summary = compare_strategies(loaded, cells, folder, progress)
    shown = ["strategy", "seeds", "dice", "dice_low", "dice_high", "latency_ms", "macs_g", "search_s", "hypervolume"]
    clean = summary[shown].round(4).astype(object).where(summary[shown].notna(), None)
    print_table("Comparison", shown, clean.to_numpy().tolist(), as_json=as_json)
    if not as_json:
        typer.echo(folder / PAGE_FILE)
