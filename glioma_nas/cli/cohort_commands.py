"""Commands on cohorts: ``cohort synth``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from glioma_nas.cli.application import app, shown_progress

cohort_app = typer.Typer(help="Check or make cohorts.", no_args_is_help=True)
app.add_typer(cohort_app, name="cohort")


@cohort_app.command("synth")
def cohort_synth(
    out: Annotated[Path, typer.Option("--out", help="folder to fill")],
    patients: Annotated[int, typer.Option("--patients", min=1)] = 40,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
) -> None:
    """Write a synthetic glioma cohort: NIfTI files and a sheet."""
    from glioma_nas.files import require_writable
    from glioma_nas.synthetic_cohort import write_synthetic_cohort

    require_writable(out)
    with shown_progress() as progress:
        sheet = write_synthetic_cohort(out, patients, seed, progress=progress)
    typer.echo(sheet)
