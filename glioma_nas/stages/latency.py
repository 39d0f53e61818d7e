"""Measure every operator of the search space on the configured engine: RUN/latency/latency_table.json and .csv.

A table that several runs share (``latency.shared_table``) gives what it knows and gets what is new; a run that is
forced takes nothing from it.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from glioma_nas.latency_backend import open_backend
from glioma_nas.latency_building import build_table, take_known
from glioma_nas.latency_records import LatencyTable
from glioma_nas.pipeline import StageContext
from glioma_nas.space_building import build_space

TABLE_FILE = "latency_table.json"
_SHOWN = 5


def run(context: StageContext) -> dict[str, Any]:
    """Write the table; an interrupted run continues with the operators that are still missing.

    Returns:
        Number of entries, the environment, the fastest and slowest entries, and how long the measuring took.

    Raises:
        BackendError: The engine is missing or refuses an operator; the half-made or shared table is of another device.
    """
    options = context.config.latency
    backend = open_backend(options.backend, options.precision)
    space = build_space(context.config)
    specs = [*space.operator_specs(), *(space.fixed_part_specs() if hasattr(space, "fixed_part_specs") else [])]
    path, shared = context.folder / TABLE_FILE, options.shared_table
    started = time.monotonic()
    if shared is not None and shared.exists() and not context.forced:
        take_known(specs, LatencyTable.load(shared), path, backend.environment(threads=options.threads), space)
    table = build_table(
        specs,
        backend,
        path=path,
        warmup_runs=options.warmup_runs,
        runs=options.runs,
        max_runs=options.max_runs,
        threads=options.threads,
        space=space,
        progress=context.progress,
    )
    elapsed_s = time.monotonic() - started
    table.save_csv(path.with_suffix(".csv"))
    if shared is not None:
        common = LatencyTable.load(shared).updated(table) if shared.exists() else table
        common.save(shared)
        kept = sum(common.record(spec) != table.record(spec) for spec in table)
        if kept:
            context.progress.note(
                f"latency: {shared.name} keeps {kept} earlier times, which were taken while less else was running"
            )
    disturbed = sum(table.record(spec).much_disturbed for spec in table)
    if disturbed:
        context.progress.note(
            f"latency: {disturbed} of {len(table)} operators were timed while other processes used the processors; "
            "run it again with --force on an idle machine before trusting small differences"
        )
    rows = sorted(table.rows(), key=lambda row: row["median_ms"])
    rounded = [{**row, "median_ms": round(row["median_ms"], 4), "p95_ms": round(row["p95_ms"], 4)} for row in rows]
    context.progress.note(f"latency: {len(table)} operators on {table.environment.describe()}, {elapsed_s:.0f} s")
    return {
        "entries": len(table),
        "environment": dataclasses.asdict(table.environment),
        "warmup_runs": options.warmup_runs,
        "runs": options.runs,
        "fastest": rounded[:_SHOWN],
        "slowest": rounded[::-1][:_SHOWN],
        "disturbed_entries": disturbed,
        "measuring_s": round(elapsed_s, 2),
    }
