"""Commands on latency: ``latency build``, ``show``, ``merge``, ``profile``, ``calibrate`` and ``nni``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from glioma_nas.cli.application import (
    ConfigArgument,
    ForceOption,
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
from glioma_nas.cli.pipeline_commands import run_stages
from glioma_nas.errors import ConfigError, StorageError, did_you_mean

if TYPE_CHECKING:
    from glioma_nas.config import RunConfig
    from glioma_nas.latency_records import LatencyRecord, LatencyTable

latency_app = typer.Typer(help="Measure, show and predict inference times.", no_args_is_help=True)
app.add_typer(latency_app, name="latency")

_TABLE = Path("latency") / "latency_table.json"
_CALIBRATION_FOLDER = "calibration"
_SHOWN = [
    *("operator", "in_channels", "out_channels", "stride", "height", "width"),
    *("median_ms", "p95_ms", "n", "disturbed"),
]

BackendOption = Annotated[str | None, typer.Option("--backend", help="instead of latency.backend", show_default=False)]


@latency_app.command("build")
def build(
    config: ConfigArgument,
    out: OutOption = None,
    override: SetOption = None,
    plugin: PluginOption = None,
    force: ForceOption = False,
) -> None:
    """Stage alone: measure every operator of the search space; an interrupted one continues."""
    run_stages(load_run_config(config, override, plugin), run_folder(config, out), ("latency",), force=force)


@latency_app.command("show")
def show(
    path: Annotated[Path, typer.Argument(help="run folder or latency table (JSON)", show_default=False)],
    operator: Annotated[str | None, typer.Option("--operator", help="one operator only", show_default=False)] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="rows, slowest first")] = 20,
    csv: Annotated[Path | None, typer.Option("--csv", help="write the whole table here", show_default=False)] = None,
    as_json: JsonOption = False,
) -> None:
    """Show a latency table: its conditions and its slowest entries."""
    from glioma_nas.console import print_table, say

    table = load_table(path)
    rows = sorted(table.rows(), key=lambda row: row["median_ms"], reverse=True)
    names = sorted({row["operator"] for row in rows})
    if operator is not None and operator not in names:
        raise ConfigError(f"no operator '{operator}' in {path}: {did_you_mean(operator, names)}")
    chosen = [row for row in rows if operator in (None, row["operator"])]
    if csv is not None:
        table.save_csv(csv)
    columns = list(rows[0]) if as_json and rows else _SHOWN
    shown = chosen if as_json else chosen[:limit]
    title = f"{len(chosen)} entries, slowest {len(shown)} first; {table.environment.describe()}"
    print_table(title, columns, [[_rounded(row[column]) for column in columns] for row in shown], as_json=as_json)
    if csv is not None and not as_json:
        say(str(csv))


@latency_app.command("merge")
def merge(
    tables: Annotated[list[Path], typer.Argument(help="run folders or latency tables (JSON)", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="JSON file to write")],
) -> None:
    """Join tables of the same device and engine into one; the entry whose median is known better wins."""
    from glioma_nas.console import say

    merged = load_table(tables[0])
    for path in tables[1:]:
        merged = merged.merge(load_table(path))
    merged.save(out)
    say(f"{out}: {len(merged)} entries")


@latency_app.command("profile")
def profile(
    config: ConfigArgument,
    out: OutOption = None,
    architecture: Annotated[
        Path | None,
        typer.Option("--architecture", help="architecture record [default: RUN/search/student.json]"),
    ] = None,
    backend: BackendOption = None,
    runs: Annotated[int, typer.Option("--runs", min=1, help="timed calls at least; latency.max_runs at most")] = 30,
    inspect: Annotated[
        Path | None, typer.Option("--inspect", help="write here (JSON) what the engine made of the layers")
    ] = None,
    override: SetOption = None,
    plugin: PluginOption = None,
    as_json: JsonOption = False,
) -> None:
    """Time one network, then each of its cells inside it, beside what the table says of them."""
    from glioma_nas.architecture import Architecture
    from glioma_nas.console import print_table
    from glioma_nas.files import write_json
    from glioma_nas.latency_backend import open_backend
    from glioma_nas.latency_records import LatencyTable
    from glioma_nas.network_profile import profile_network
    from glioma_nas.space_building import build_space

    loaded = _load(config, override, plugin)
    folder = run_folder(config, out)
    record = Architecture.load(architecture or folder / "search" / "student.json")
    options = loaded.latency
    engine = open_backend(backend or options.backend, options.precision)
    table = LatencyTable.load(folder / _TABLE) if (folder / _TABLE).is_file() else None
    found = profile_network(
        build_space(loaded),
        record,
        engine,
        table=table,
        warmup_runs=max(options.warmup_runs, 1),
        runs=runs,
        max_runs=options.max_runs,
        threads=options.threads,
    )
    print_table(
        f"{record.id}: {_described(found.latency)}; {found.environment.describe()}",
        ["part", "operator", "in network ms", "share", "table ms"],
        [
            [row.part, row.operator, _rounded(row.latency_ms), round(row.share, 3), _rounded(row.table_ms)]
            for row in found.rows
        ],
        as_json=as_json,
    )
    if inspect is not None:
        write_json(inspect, found.engine.inspect())


@latency_app.command("calibrate")
def calibrate(
    config: ConfigArgument,
    out: OutOption = None,
    networks: Annotated[int, typer.Option("--networks", min=10, help="random networks to measure")] = 100,
    held_out: Annotated[int, typer.Option("--held-out", min=2, help="of these, not used to fit")] = 50,
    runs: Annotated[
        int, typer.Option("--runs", min=1, help="timed calls of each network at least; latency.max_runs at most")
    ] = 15,
    minutes: Annotated[
        float | None, typer.Option("--minutes", help="stop measuring after this time; run again to go on")
    ] = None,
    override: SetOption = None,
    plugin: PluginOption = None,
    as_json: JsonOption = False,
) -> None:
    """Fit the latency of whole networks to the table, on random networks, and judge it on others."""
    from glioma_nas.console import print_table, say
    from glioma_nas.latency_backend import open_backend
    from glioma_nas.latency_calibration import calibrate as fit
    from glioma_nas.latency_networks import measure_random_networks, measured_networks
    from glioma_nas.report.calibration_chart import write_calibration
    from glioma_nas.space_building import build_space

    loaded = _load(config, override, plugin)
    folder, options = run_folder(config, out), loaded.latency
    table = load_table(folder)
    backend = open_backend(options.backend, options.precision)
    table.require_same_environment(backend.environment(threads=options.threads))
    space = build_space(loaded)
    side = loaded.preprocess.image_size_px
    path = folder / _CALIBRATION_FOLDER / "networks.json"
    with shown_progress() as progress:
        measured = measure_random_networks(
            space,
            backend,
            path=path,
            n=networks,
            seed=loaded.seed,
            input_shape=(1, len(loaded.cohort.channels), side, side),
            warmup_runs=max(options.warmup_runs, 1),
            runs=runs,
            max_runs=options.max_runs,
            threads=options.threads,
            time_limit_s=None if minutes is None else 60 * minutes,
            progress=progress,
        )
    if measured < networks:
        say(f"{measured} of {networks} networks are measured; run the same command again to go on")
        return
    known = measured_networks(space, path, networks)
    calibration, predicted = fit(
        known.networks,
        table,
        environment=known.environment,
        n_held_out=held_out,
        space=loaded.search.space,
        options=space.layout.options(),
    )
    calibration.save(path.parent / "calibration.json")
    write_calibration(path.parent, calibration, predicted, known.records)
    disturbed = sum(record.much_disturbed for record in known.records)
    if disturbed and not as_json:
        say(f"{disturbed} of {networks} networks were timed while other processes used the processors")
    rows = [
        [name, item.n, round(100 * item.mape, 2), item.kendall_tau]
        for name, item in (
            ("fitted on", calibration.fitted),
            ("held out", calibration.held_out),
            ("held out, a·Σ + b alone", calibration.plain_held_out),
        )
    ]
    terms = "".join(f" {value:+.4g}·Σ {name}" for name, value in calibration.terms_ms.items())
    title = f"latency = {calibration.table_factor:.4g}·Σ table{terms} {calibration.intercept_ms:+.4g} ms"
    print_table(title, ["networks", "n", "MAPE %", "Kendall tau"], rows, as_json=as_json)
    if not as_json:
        say(str(path.parent / "calibration.png"))


@latency_app.command("nni")
def nni_filter(
    config: ConfigArgument,
    out: OutOption = None,
    max_ms: Annotated[float | None, typer.Option("--max-ms", help="slowest network to accept")] = None,
    min_ms: Annotated[float | None, typer.Option("--min-ms", help="fastest network to accept")] = None,
    networks: Annotated[int, typer.Option("--networks", min=1, help="networks to find")] = 10,
    draws: Annotated[int, typer.Option("--draws", min=1, help="random networks to try at most")] = 10_000,
    override: SetOption = None,
    plugin: PluginOption = None,
    as_json: JsonOption = False,
) -> None:
    """Draw networks through NNI's RangeProfilerFilter on the table: does a latency bound leave anything to search?"""
    import nni.nas.strategy  # noqa: F401  # first: nni.nas.oneshot before it leaves NNI's one-shot strategies unusable
    from nni.nas.oneshot.pytorch.profiler import RangeProfilerFilter

    from glioma_nas.console import print_table, say
    from glioma_nas.latency_conditions import require_table_of_this_machine
    from glioma_nas.latency_networks import random_sample
    from glioma_nas.registry import evaluators
    from glioma_nas.space_building import build_space

    loaded = _load(config, override, plugin)
    if max_ms is None and min_ms is None:
        raise ConfigError("no bound is given; give --max-ms, --min-ms or both")
    folder, space = run_folder(config, out), build_space(loaded)
    table = load_table(folder)
    require_table_of_this_machine(table, loaded)
    profiler = evaluators.get("latency_table")(space, table, loaded.search.latency_calibration)
    accepts = RangeProfilerFilter(profiler, min=min_ms, max=max_ms)
    rows: list[list[object]] = []
    tried = 0
    while tried < draws and len(rows) < networks:
        sample = random_sample(space, loaded.seed, tried)
        tried += 1
        if accepts(sample):
            record = space.architecture(sample)
            record.save(folder / "latency_nni" / f"{record.id}.json")
            rows.append([record.id, record.choices.get("branches"), round(profiler.profile(sample), 3)])
    print_table(f"{len(rows)} of {tried} random networks accepted", ["id", "branches", "ms"], rows, as_json=as_json)
    if as_json:
        return
    if rows:
        bounds = ", ".join(f"{name}: {value:g}" for name, value in (("min", min_ms), ("max", max_ms)) if value)
        say(f"in a search: strategy: nni.random_one_shot, strategy_options: {{filter: {{{bounds}}}}}")
    else:
        say("no network is accepted; choose a wider bound or a space of smaller widths")


def _load(config: Path, override: list[str] | None, plugin: list[Path] | None) -> RunConfig:
    loaded = load_run_config(config, override, plugin)
    load_plugins(loaded.plugins)
    return loaded


def load_table(path: Path) -> LatencyTable:
    """Read the latency table of a run folder, or a table by itself.

    Raises:
        StorageError: There is none, or it is damaged.
    """
    from glioma_nas.latency_records import LatencyTable

    if path.is_file():
        return LatencyTable.load(path)
    if not (path / _TABLE).is_file():
        raise StorageError(f"{path / _TABLE}: no such file; run `glioma-nas latency build CONFIG --out {path}` first")
    return LatencyTable.load(path / _TABLE)


def _described(record: LatencyRecord) -> str:
    """Render a record in words, as far as it is known."""
    told = [f"p95 {record.p95_ms:.2f}", f"n {record.n} after {record.warmup_runs} warm-up"]
    if record.median_low_ms is not None and record.median_high_ms is not None:
        told.append(f"median in {record.median_low_ms:.2f}-{record.median_high_ms:.2f}")
    if record.disturbed:
        told.append(f"{100 * record.disturbed:.0f} % of the calls disturbed")
    if record.clock_mhz is not None:
        told.append(f"{record.clock_mhz:.0f} MHz")
    return f"{record.median_ms:.2f} ms ({', '.join(told)})"


def _rounded(value: object) -> object:
    return float(f"{value:.4g}") if isinstance(value, float) else value
