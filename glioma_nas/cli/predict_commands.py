"""The command that serves new patients: ``predict``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from glioma_nas.cli.application import JsonOption, app, complain, shown_progress


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(help="finished run folder", show_default=False)],
    source: Annotated[
        Path,
        typer.Argument(
            help="folder with a patient's NIfTI files; or a sheet, data set folder or DICOM export of many",
            show_default=False,
        ),
    ],
    out: Annotated[Path | None, typer.Option("--out", help="folder [default: runs/predict-SOURCE]")] = None,
    network: Annotated[str, typer.Option("--network", help="student, teacher or a baseline")] = "student",
    age: Annotated[float | None, typer.Option("--age", help="years; for one patient", show_default=False)] = None,
    sex: Annotated[str | None, typer.Option("--sex", help="M or F; for one patient", show_default=False)] = None,
    case_id: Annotated[
        str | None, typer.Option("--case-id", help="name of the result's folder; for one patient", show_default=False)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="predict again even what is done")] = False,
    any_spacing: Annotated[
        bool, typer.Option("--any-spacing", help="serve slices far thinner or thicker than the run's too")
    ] = False,
    dicom_seg: Annotated[
        bool,
        typer.Option("--dicom-seg", help="of DICOM: write mask.dcm too; it names the patient as its series does"),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Outline the tumour of new patients and predict their markers; one bad case does not stop the rest.

    Writes CASE/mask.nii.gz in the scan's own grid, CASE/report.html and CASE/prediction.json; exit status 2 when a
    case could not be served. Cases that are done are skipped when the command is run again.
    """
    from glioma_nas.console import print_table
    from glioma_nas.errors import ConfigError
    from glioma_nas.files import require_writable
    from glioma_nas.new_patients.batch import predict_all
    from glioma_nas.new_patients.frozen_run import FrozenRun

    folder = out if out is not None else Path("runs") / f"predict-{source.resolve().name}"
    require_writable(folder)
    patient: dict[str, Any] = {"case_id": case_id, "age": age, "sex": _sex(sex)}
    opened = FrozenRun.open(run, network=network)
    with shown_progress() as progress:
        served = predict_all(
            source,
            opened,
            folder,
            patient=patient,
            force=force,
            progress=progress,
            any_spacing=any_spacing,
            dicom_seg=dicom_seg,
        )
    rows = [[item.case_id, item.state, *item.cells()] for item in served.outcomes]
    markers = list(opened.markers)
    print_table("Predictions", ["case", "state", "volume_ml", *markers, "detail"], rows, as_json=as_json)
    for problem in served.problems:
        complain(f"not read: {problem}")
    if not as_json:
        typer.echo(folder.resolve())
    if not served.outcomes and not served.problems:
        raise ConfigError(f"{source}: holds no case")
    raise typer.Exit(2 if served.n_failed or served.problems else 0)


def _sex(value: str | None) -> Literal["M", "F"] | None:
    from glioma_nas.errors import ConfigError

    if value is None:
        return None
    if value.upper() == "M":
        return "M"
    if value.upper() == "F":
        return "F"
    raise ConfigError(f"--sex {value}: expected M or F")
