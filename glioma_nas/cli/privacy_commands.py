"""Commands that keep identifiers in the house: ``phi-scan`` and ``cohort scrub``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from glioma_nas.cli.application import JsonOption, app, complain, load_run_config, shown_progress
from glioma_nas.cli.cohort_commands import cohort_app


@app.command("phi-scan")
def phi_scan(
    folder: Annotated[Path, typer.Argument(help="output folder to look through", show_default=False)],
    cohort: Annotated[
        Path | None,
        typer.Option(
            "--cohort", help="sheet, folder or YAML whose patient ids must not appear anywhere", show_default=False
        ),
    ] = None,
    identifiers: Annotated[
        Path | None,
        typer.Option("--identifiers", help="text file of names and numbers, one a line", show_default=False),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Look for what may identify a patient before a folder is shared; exit status 2 when an identifier is found."""
    from glioma_nas.console import print_table
    from glioma_nas.errors import StorageError
    from glioma_nas.privacy.phi_scan import scan_folder
    from glioma_nas.privacy.text_patterns import KnownIdentifiers

    if not folder.is_dir():
        raise StorageError(f"{folder}: no such folder; give the output folder of a run, an experiment or an import")
    names = _identifiers(cohort, identifiers)
    known = KnownIdentifiers(names)
    with shown_progress() as progress:
        scan = scan_folder(folder, known, progress=progress)
    rows = [[leak.severity, leak.kind, leak.file, leak.where, leak.shown, leak.times] for leak in scan.leaks]
    title = f"{scan.n_files} files, {len(known.kinds)} known identifiers: {scan.n_errors} findings that identify"
    print_table(title, ["severity", "looks like", "file", "in", "masked", "times"], rows, as_json=as_json)
    if known.n_too_short:
        complain(f"look: {known.n_too_short} identifiers are too short to be looked for")
    raise typer.Exit(2 if scan.n_errors else 0)


def _identifiers(cohort: Path | None, file: Path | None) -> dict[str, str]:
    from glioma_nas.cohort import examine_cohort
    from glioma_nas.config import CohortConfig
    from glioma_nas.errors import StorageError

    names: dict[str, str] = {}
    if cohort is not None:
        if cohort.suffix.lower() in (".yaml", ".yml"):
            config = load_run_config(cohort, None, None).cohort
        else:
            config = CohortConfig(sheet=cohort.expanduser().resolve())
        hides_cases = config.hash_ids
        # The ids as they stand in the sheet, which are the ones that must not get out.
        found = examine_cohort(config.model_copy(update={"hash_ids": False}), strict=False).cohort
        names = {case.patient_id: "patient id of the cohort" for case in found.cases}
        if hides_cases:
            names |= {case.case_id: "case id of the cohort" for case in found.cases}
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as err:
            raise StorageError(f"{file}: not readable as text ({type(err).__name__}); give one name a line") from err
        names |= {line.strip(): "listed identifier" for line in lines if line.strip()}
    return names


@cohort_app.command("scrub")
def cohort_scrub(
    source: Annotated[Path, typer.Argument(help="NIfTI or DICOM, file or folder", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="folder for the copies")],
    salt: Annotated[
        Path | None, typer.Option("--salt", help="secret of the project, made if absent [default: OUT.salt]")
    ] = None,
) -> None:
    """Copy scans without free text, private elements, dates and identifiers in their headers; voxels stay."""
    from glioma_nas.files import require_writable
    from glioma_nas.privacy.pseudonyms import Pseudonyms, load_salt
    from glioma_nas.privacy.scrubbing import scrub

    require_writable(out)
    salt_file = salt if salt is not None else out.resolve().with_name(f"{out.resolve().name}.salt")
    with shown_progress() as progress:
        done = scrub(source, out, Pseudonyms(load_salt(salt_file, create=True)), progress=progress)
    for line in done.left_out:
        complain(f"left out: {line}")
    typer.echo(f"{done.n_nifti} NIfTI and {done.n_dicom} DICOM files in {out}, {len(done.left_out)} left out")
