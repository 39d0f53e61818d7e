"""The command that validates a run on another cohort: ``evaluate``."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer

from glioma_nas.cli.application import JsonOption, app, complain, shown_progress


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="finished run folder", show_default=False)],
    cohort: Annotated[
        Path, typer.Argument(help="sheet or data set folder of patients from elsewhere", show_default=False)
    ],
    out: Annotated[Path | None, typer.Option("--out", help="folder [default: runs/evaluate-COHORT]")] = None,
    network: Annotated[str, typer.Option("--network", help="student, teacher or a baseline")] = "student",
    recalibrate_on: Annotated[
        str | None,
        typer.Option("--recalibrate-on", help="part to re-calibrate on, COLUMN=VALUE: site=B", show_default=False),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Validate a run on another cohort: networks, classifiers and thresholds frozen, drift beside the figures.

    Patients of ``--recalibrate-on`` are used to re-calibrate probabilities; their markers are not scored. A scan the
    run was made with is an error. Interrupted, it continues when run again.
    """
    from glioma_nas.console import print_table
    from glioma_nas.external_validation.validation import PAGE_FILE, Part, measured, validate_run
    from glioma_nas.files import require_writable
    from glioma_nas.new_patients.frozen_run import FrozenRun
    from glioma_nas.pipeline import CONFIG_FILE

    folder = out if out is not None else Path("runs") / f"evaluate-{cohort.resolve().stem}"
    part = Part.parse(recalibrate_on) if recalibrate_on is not None else None
    require_writable(folder)
    opened = FrozenRun.open(run, network=network)
    with shown_progress() as progress:
        results = validate_run(cohort, opened, folder, recalibrate_on=part, progress=progress)
    title = f"{results['n_patients']} patients of {results['cohort']}"
    print_table(title, ["figure", "value", "95 % interval", "n", "in the run"], measured(results), as_json=as_json)
    if results["other_code"]:
        complain(results["other_code"])
    if results["same_patient_ids"]:
        complain(
            f"{len(results['same_patient_ids'])} patient ids stand in the run too; if they are the same people, these "
            f"figures say nothing about new ones: {', '.join(results['same_patient_ids'][:5])}"
        )
    if not as_json:
        typer.echo((folder / PAGE_FILE).resolve())
        shown = f"report.evaluations={json.dumps([str(folder.resolve())], ensure_ascii=False)}"
        words = ["report", str(opened.folder / CONFIG_FILE), "--out", str(opened.folder), "--set", shown]
        complain(f"to show this in the run's report: glioma-nas {shlex.join(words)}")
