"""The group of commands that reproduce a published table on any cohort: ``glioma-nas study table-4-1`` and so on."""

from __future__ import annotations

import typer

from glioma_nas.cli.application import app

study_app = typer.Typer(
    help="Reproduce a table of the method's source on your own cohort, its figures beside yours.", no_args_is_help=True
)
app.add_typer(study_app, name="study")
