"""Commands round NNI experiments: ``nni config|create|resume|stop|status|compare|guard`` and ``nni trial``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glioma_nas.cli.application import (
    ConfigArgument,
    JsonOption,
    PluginOption,
    SetOption,
    app,
    complain,
    load_plugins,
    load_run_config,
    shown_progress,
)

if TYPE_CHECKING:
    from glioma_nas.nni_experiments.manager import RunningExperiment

nni_app = typer.Typer(help="Search in NNI's web UI: write, start, watch and resume experiments.", no_args_is_help=True)
app.add_typer(nni_app, name="nni")

PortOption = Annotated[int | None, typer.Option("--port", help="port of the web UI [default: first free from 8080]")]
ExposeOption = Annotated[str | None, typer.Option("--expose", help="listen on this address instead of loopback")]
YesOption = Annotated[bool, typer.Option("--yes", help="do not ask")]
DetachOption = Annotated[bool, typer.Option("--detach", help="return at once and leave it running")]
ExperimentArgument = Annotated[str, typer.Argument(help="id of the experiment, its folder, or 'latest'")]


@nni_app.command("config")
def write_config(
    config: ConfigArgument,
    out: Annotated[Path, typer.Option("--out", help="folder of the experiment")],
    kind: Annotated[str, typer.Option("--kind", help="co-search or architecture")] = "co-search",
    trials: Annotated[int, typer.Option("--trials", help="trials in total")] = 20,
    concurrency: Annotated[int, typer.Option("--concurrency", help="trials at a time")] = 1,
    tuner: Annotated[str, typer.Option("--tuner", help="TPE, Evolution, Random or GridSearch")] = "TPE",
    assessor: Annotated[str | None, typer.Option("--assessor", help="Medianstop, Curvefitting")] = None,
    seeds: Annotated[int, typer.Option("--seeds", help="co-search: seeds to choose from")] = 3,
    strategy: Annotated[
        list[str] | None, typer.Option("--strategy", help="co-search: strategies to choose from")
    ] = None,
    operators: Annotated[
        list[str] | None, typer.Option("--operators", help="co-search: operator sets to choose from, skip+conv3x3+…")
    ] = None,
    search: Annotated[
        list[str] | None, typer.Option("--search", help="co-search: vary only this, e.g. operators and seed")
    ] = None,
    target_latency_ms: Annotated[float, typer.Option("--target-latency-ms", help="T of Target(m)")] = 8.3,
    marker: Annotated[list[str] | None, typer.Option("--marker", help="measure this marker's AUC: idh, ki67")] = None,
    distil: Annotated[
        bool, typer.Option("--distil", help="co-search: train each teacher too, and the student from it; takes longer")
    ] = False,
    training_service: Annotated[
        Path | None, typer.Option("--training-service", help="YAML of NNI's trainingService section, e.g. remote")
    ] = None,
    override: SetOption = None,
    plugin: PluginOption = None,
) -> None:
    """Write an NNI experiment: prepared data, latency table, config.yml, search_space.json, code folder."""
    from glioma_nas.nni_experiments.experiment_folder import ExperimentOptions, write_experiment

    loaded = load_run_config(config, override, plugin)
    load_plugins(loaded.plugins)
    options = ExperimentOptions(
        kind=kind,
        trials=trials,
        concurrency=concurrency,
        tuner=tuner,
        assessor=assessor,
        seeds=seeds,
        strategies=tuple(strategy or ()),
        operator_sets=tuple(tuple(names.split("+")) for names in operators or ()),
        searched=tuple(search or ()),
        target_latency_ms=target_latency_ms,
        markers=tuple(marker or ()),
        distil=distil,
        training_service=_read_mapping(training_service),
    )
    with shown_progress() as progress:
        written = write_experiment(loaded, options, out, progress=progress)
    typer.echo(written)


@nni_app.command("create")
def create(
    folder: Annotated[Path, typer.Argument(help="folder of the experiment, or its config.yml", show_default=False)],
    port: PortOption = None,
    expose: ExposeOption = None,
    yes: YesOption = False,
    detach: DetachOption = False,
) -> None:
    """Start an experiment on the loopback address and wait for it; Ctrl-C leaves it running."""
    from glioma_nas.nni_experiments import manager

    experiment = manager.create(folder, port=port, host=_host(expose, yes))
    _started(experiment, detach)


@nni_app.command("resume")
def resume(
    experiment: ExperimentArgument = "latest",
    port: PortOption = None,
    expose: ExposeOption = None,
    yes: YesOption = False,
    detach: DetachOption = False,
) -> None:
    """Continue an experiment that was stopped or whose manager died; interrupted trials continue from checkpoints."""
    from glioma_nas.nni_experiments import manager

    _started(manager.resume(experiment, port=port, host=_host(expose, yes)), detach)


@nni_app.command("stop")
def stop(experiment: ExperimentArgument = "latest") -> None:
    """Stop an experiment and its trials; what is finished stays."""
    from glioma_nas.nni_experiments import manager

    typer.echo(f"stopped {manager.stop(experiment)}")


@nni_app.command("status")
def status(as_json: JsonOption = False) -> None:
    """Show this user's experiments: state, trials, best result, address."""
    from glioma_nas.console import print_table
    from glioma_nas.nni_experiments.overview import overview

    columns = ["id", "name", "state", "trials", "succeeded", "failed", "running", "best", "url"]
    rows = [[item[column] for column in columns] for item in overview()]
    print_table("NNI experiments", columns, rows, as_json=as_json)


@nni_app.command("compare")
def compare(
    experiment: ExperimentArgument = "latest",
    by: Annotated[str, typer.Option("--by", help="hyper-parameter whose values are compared")] = "operators",
    as_json: JsonOption = False,
) -> None:
    """Put finished trials side by side: median and range of every figure for each value of a hyper-parameter."""
    from glioma_nas.console import print_table
    from glioma_nas.nni_experiments import trial_results
    from glioma_nas.nni_experiments.manager import find

    compared = trial_results.compare(trial_results.finished_trials(find(experiment)), by)
    rows = compared if as_json else trial_results.for_people(compared)
    title = f"median (lowest to highest) of the trials by {by}"
    print_table(title, list(rows[0]), [list(row.values()) for row in rows], as_json=as_json)


@nni_app.command("guard")
def guard(
    remove: Annotated[bool, typer.Option("--remove", help="undo it")] = False,
) -> None:
    """Make plain nnictl in this Python environment listen on the loopback address only, too."""
    from glioma_nas.nni_experiments.loopback import install_guard, remove_guard

    if remove:
        typer.echo("removed" if remove_guard() else "was not installed")
    else:
        typer.echo(install_guard())


@nni_app.command("trial", hidden=True)
def trial(settings: Annotated[Path, typer.Argument(help="trial.yaml")] = Path("trial.yaml")) -> None:
    """The command NNI runs for every trial."""
    from glioma_nas.nni_experiments.trial_supervisor import supervise

    status = supervise([sys.executable, "-m", "glioma_nas.nni_experiments.trial_process", str(settings)])
    raise typer.Exit(status)


def _started(experiment: RunningExperiment, detach: bool) -> None:
    typer.echo(f"experiment {experiment.id}: {experiment.url}")
    if detach:
        typer.echo(f"glioma-nas nni stop {experiment.id}  ends it")
        return
    from glioma_nas.nni_experiments.overview import wait_for

    try:
        with shown_progress() as progress:
            summary = wait_for(experiment, progress=progress)
    except KeyboardInterrupt:
        complain(f"experiment {experiment.id} goes on; glioma-nas nni stop {experiment.id}  ends it")
        raise typer.Exit(130) from None
    typer.echo(summary)
    typer.echo(f"results stay visible at {experiment.url} until glioma-nas nni stop {experiment.id}")


def _host(expose: str | None, yes: bool) -> str:
    from glioma_nas.nni_experiments.loopback import LOOPBACK, checked_host

    if expose is None or checked_host(expose) == LOOPBACK:
        return LOOPBACK
    warning = (
        f"NNI asks for no password: whoever can reach {expose} can read your files and run commands as you. "
        "An SSH tunnel (docs/nni.md) shows the web UI elsewhere without that. Expose it?"
    )
    if not yes:
        typer.confirm(warning, abort=True)
    return expose


def _read_mapping(path: Path | None) -> dict[str, Any] | None:
    if path is None:
        return None
    import yaml

    from glioma_nas.errors import ConfigError

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as err:
        raise ConfigError(f"{path}: not readable as YAML ({' '.join(str(err).split())})") from err
    if not isinstance(data, dict) or "platform" not in data:
        raise ConfigError(f"{path}: expected NNI's trainingService section with a key 'platform'")
    return data
