"""Tables 4-1 and 4-2 on this machine: ``study table-4-1`` and ``study table-4-2``."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

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
from glioma_nas.cli.latency_commands import load_table
from glioma_nas.cli.study_app import study_app

_THESIS_SENSITIVITY_MS = {"operator": 10.42, "scale": 0.01, "width": 5.54}
_THESIS_WEIGHTS = {"operator": 0.001, "scale": 0.997, "width": 0.002}


@study_app.command("table-4-1")
def table_4_1(
    config: ConfigArgument,
    out: OutOption = None,
    override: SetOption = None,
    plugin: PluginOption = None,
    as_json: JsonOption = False,
) -> None:
    """What a plain, grouped, dilated and zoomed convolution cost on the configured engine, at 1×256×32×64."""
    from glioma_nas.latency_backend import open_backend
    from glioma_nas.operator_study import operator_costs

    loaded = load_run_config(config, override, plugin)
    load_plugins(loaded.plugins)
    options = loaded.latency
    backend = open_backend(options.backend, options.precision)
    with shown_progress() as progress:
        rows = operator_costs(
            backend,
            warmup_runs=options.warmup_runs,
            runs=options.network_runs,
            max_runs=max(options.max_runs, options.network_runs),
            threads=options.threads,
            progress=progress,
        )
    timed = ["operator", "median ms", "p95 ms", "n", "warm-up", "disturbed", "clock MHz"]
    columns = [*timed, "× conv", "× conv p5", "× conv p95", "GMAC", "params M", "× field", "thesis × conv"]
    cells = [
        [
            row.operator,
            round(row.latency.median_ms, 4),
            round(row.latency.p95_ms, 4),
            row.latency.n,
            row.latency.warmup_runs,
            None if row.latency.disturbed is None else round(row.latency.disturbed, 3),
            row.latency.clock_mhz,
            *(round(value, 3) for value in (row.relative.median, row.relative.p5, row.relative.p95)),
            round(row.macs_g, 4),
            round(row.params_m, 4),
            round(row.relative_receptive_field, 2),
            round(row.thesis_relative, 2),
        ]
        for row in rows
    ]
    title = f"Table 4-1: {backend.environment(threads=options.threads).describe()}"
    _report(run_folder(config, out) / "studies" / "table-4-1.csv", title, columns, cells, as_json)


@study_app.command("table-4-2")
def table_4_2(
    config: ConfigArgument,
    out: OutOption = None,
    override: SetOption = None,
    plugin: PluginOption = None,
    as_json: JsonOption = False,
) -> None:
    """How far each kind of choice can change the expected latency of the space, and the weights that follow."""
    import torch

    from glioma_nas.latency_conditions import require_table_of_this_machine
    from glioma_nas.latency_sensitivity import inverse_weights, latency_sensitivities
    from glioma_nas.registry import evaluators
    from glioma_nas.space_building import build_space

    loaded = load_run_config(config, override, plugin)
    load_plugins(loaded.plugins)
    folder, space = run_folder(config, out), build_space(loaded)
    table = load_table(folder)
    require_table_of_this_machine(table, loaded)
    profiler = evaluators.get("latency_table")(space, table, loaded.search.latency_calibration)
    groups = space.variable_groups()
    values = {label: list(mutable.values) for label, mutable in space.simplify().items()}
    searched = {label for labels in groups.values() for label in labels}
    fixed = space.fixed_choices.get("student", {})
    constants = {
        label: torch.tensor([1.0 if value == fixed[label] else 0.0 for value in values[label]])
        if label in fixed
        else torch.full((len(values[label]),), 1 / len(values[label]))
        for label in values
        if label not in searched
    }
    found = latency_sensitivities(
        profiler.expectation, groups=groups, constants=constants, sizes={label: len(v) for label, v in values.items()}
    )
    weights = inverse_weights(found, groups)
    columns = ["variable", "Δ latency ms", "w", "thesis Δ ms", "thesis w"]
    cells = [
        [kind, round(found[kind], 4), round(weights[kind], 4), _THESIS_SENSITIVITY_MS[kind], _THESIS_WEIGHTS[kind]]
        for kind in groups
    ]
    title = f"Table 4-2: {table.environment.describe()}"
    _report(folder / "studies" / "table-4-2.csv", title, columns, cells, as_json)


def _report(path: Path, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], as_json: bool) -> None:
    from glioma_nas.console import print_table, say
    from glioma_nas.files import write_text

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([columns, *rows])
    write_text(path, text.getvalue())
    print_table(title, columns, rows, as_json=as_json)
    if not as_json:
        say(str(path))
