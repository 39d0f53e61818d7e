"""The command that compares search strategies: ``compare``."""

from __future__ import annotations

import sys
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

_SHOWN = (
    "strategy",
    "seeds",
    "dice",
    "dice_low",
    "dice_high",
    "latency_ms",
    "macs_g",
    "params_m",
    "search_s",
    "search_peak_mb",
    "hypervolume",
)
"""What fits on a terminal; JSON and comparison.csv have every column and interval."""


@app.command()
def compare(
    config: ConfigArgument,
    strategies: Annotated[
        str, typer.Option("--strategies", help="names, commas between: co_search,nni.darts,nni.evolution")
    ] = "co_search,latency_darts,random_with_shared_weights,nni.darts,nni.random,nni.evolution",
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="searches of each strategy")] = 3,
    trials: Annotated[int, typer.Option("--trials", min=1, help="trials that share a multi-trial budget")] = 8,
    trainings: Annotated[int, typer.Option("--trainings", min=1, help="trainings of each network found")] = 1,
    rank_networks: Annotated[
        int,
        typer.Option("--rank-networks", min=0, help="networks trained for the supernets' rank correlation"),
    ] = 0,
    minutes: Annotated[
        float | None,
        typer.Option("--minutes", help="wall time each search trains for, instead of steps", show_default=False),
    ] = None,
    out: OutOption = None,
    override: SetOption = None,
    plugin: PluginOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare strategies on one space, cohort, split and budget: Dice, measured latency, cost, Pareto front.

    Interrupted, it continues when run again. A search that fails does not end the others; it is named at the end, and
    the exit status is 1. Writes comparison.csv, runs.csv, pareto.csv and report.html.
    """
    from glioma_nas.comparison.cells import plan
    from glioma_nas.comparison.contest import PAGE_FILE, compare_strategies
    from glioma_nas.comparison.ranking import FEWEST
    from glioma_nas.console import print_table, say
    from glioma_nas.errors import ConfigError
    from glioma_nas.missing_sequences import without_incomplete_sequences

    if 0 < rank_networks < FEWEST:
        raise ConfigError(f"--rank-networks is {rank_networks}; give at least {FEWEST}, or 0 for none")
    loaded = load_run_config(config, override, plugin)
    load_plugins(loaded.plugins)
    loaded = without_incomplete_sequences(loaded)
    folder = (out if out is not None else run_folder(config, None).with_name(f"compare-{config.stem}")).resolve()
    names = [name.strip() for name in strategies.split(",") if name.strip()]
    cells = plan(loaded, names, n_seeds=seeds, trials=trials, out=folder, ranked=rank_networks, minutes=minutes)
    with shown_progress() as progress:
        found = compare_strategies(loaded, cells, folder, progress, n_trainings=trainings)
    summary = found.summary
    shown = list(summary.columns) if as_json else [*_SHOWN, *(["search_peak_gpu_mb"] if loaded.device != "cpu" else [])]
    clean = summary[shown].round(4).astype(object).where(summary[shown].notna(), None)
    print_table("Comparison", shown, clean.to_numpy().tolist(), as_json=as_json)
    if not as_json:
        typer.echo(folder / PAGE_FILE)
    for failure in found.failures:
        say(f"failed: {failure.strategy}, seed {failure.seed}: {failure.reason}", stream=sys.stderr)
    if found.failures:
        raise typer.Exit(1)
