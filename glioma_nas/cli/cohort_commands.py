"""Commands on cohorts: ``cohort validate``, ``import-dicom`` and ``synth``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from glioma_nas.cli.application import (
    JsonOption,
    SetOption,
    app,
    complain,
    load_plugins,
    load_run_config,
    shown_progress,
)

if TYPE_CHECKING:
    from glioma_nas.config import CohortConfig
    from glioma_nas.validation.validating import Demands

cohort_app = typer.Typer(help="Check or make cohorts.", no_args_is_help=True)
app.add_typer(cohort_app, name="cohort")


class _Format(StrEnum):
    nifti = "nifti"
    dicom = "dicom"
    bids = "bids"


class _Difficulty(StrEnum):
    easy = "easy"
    standard = "standard"
    hard = "hard"


@cohort_app.command("synth")
def cohort_synth(
    out: Annotated[Path, typer.Option("--out", help="folder to fill")],
    patients: Annotated[int, typer.Option("--patients", min=1)] = 40,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
    form: Annotated[_Format, typer.Option("--format", help="which files to write")] = _Format.nifti,
    raw: Annotated[
        bool, typer.Option("--raw", help="whole heads, unregistered, each sequence on a grid of its own")
    ] = False,
    size_px: Annotated[int, typer.Option("--size-px", help="pixels along each side of a slice")] = 120,
    difficulty: Annotated[
        _Difficulty, typer.Option("--difficulty", help="how noisy the scans and how typical the tumours")
    ] = _Difficulty.standard,
    missing_t1ce: Annotated[float, typer.Option("--missing-t1ce", help="share of patients without contrast")] = 0.09,
    workers: Annotated[int, typer.Option("--workers", min=1, help="processes")] = 2,
) -> None:
    """Write a synthetic glioma cohort as NIfTI, DICOM or BIDS, with a sheet of its labels."""
    from glioma_nas.files import require_writable
    from glioma_nas.synthetic_cohort import write_synthetic_cohort

    require_writable(out)
    with shown_progress() as progress:
        sheet = write_synthetic_cohort(
            out,
            patients,
            seed,
            format=form.value,
            raw=raw,
            size_px=size_px,
            difficulty=difficulty.value,
            missing_t1ce_fraction=missing_t1ce,
            workers=workers,
            progress=progress,
        )
    typer.echo(sheet)


@cohort_app.command("validate")
def cohort_validate(
    cohort: Annotated[Path, typer.Argument(help="sheet, data set folder, or YAML configuration", show_default=False)],
    out: Annotated[
        Path | None, typer.Option("--out", help="folder for HTML and JSON [default: runs/validate-NAME]")
    ] = None,
    sequences: Annotated[
        str | None, typer.Option("--sequences", help="those every case should have: t1ce,flair", show_default=False)
    ] = None,
    workers: Annotated[int, typer.Option("--workers", min=1, help="processes")] = 2,
    override: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Read every byte of a cohort and tell what is wrong with it; exit status 2 when there are errors."""
    from glioma_nas.console import print_table
    from glioma_nas.files import require_writable
    from glioma_nas.validation import grouped, validate_cohort, write_validation
    from glioma_nas.validation.page import shown_cases

    config, demands = _what_to_validate(cohort, sequences, override)
    folder = out if out is not None else Path("runs") / f"validate-{cohort.resolve().stem}"
    require_writable(folder)
    with shown_progress() as progress:
        validation = validate_cohort(config, demands, workers=workers, progress=progress)
    page = write_validation(validation, folder)
    rows = [
        [group.severity, group.code, group.count, shown_cases(group.cases) or None, group.message, group.remedy]
        for group in grouped(validation.findings)
    ]
    title = (
        f"{len(validation.cohort.cases)} cases, {validation.n_files} files: {validation.n_errors} errors, "
        f"{validation.count('warning')} warnings"
    )
    print_table(title, ["severity", "finding", "times", "cases", "first of them", "what to do"], rows, as_json=as_json)
    if not as_json:
        typer.echo(page)
    raise typer.Exit(2 if validation.n_errors else 0)


def _what_to_validate(path: Path, sequences: str | None, override: list[str] | None) -> tuple[CohortConfig, Demands]:
    from glioma_nas.config import CohortConfig
    from glioma_nas.errors import ConfigError
    from glioma_nas.validation.validating import Demands

    named = tuple(name.strip() for name in (sequences or "").split(",") if name.strip())
    if path.suffix.lower() in (".yaml", ".yml"):
        from glioma_nas.case_preparation import build_steps
        from glioma_nas.stages.preprocess import sequences_of

        config = load_run_config(path, override, None)
        load_plugins(config.plugins)
        joined = any(step.joins_grids for step in build_steps(config.preprocess).values())
        n_folds = config.folds.n_folds if config.folds.file is None else 2  # the file is checked where it is read
        demands = Demands(named or sequences_of(config), config.classify.markers, n_folds, one_grid=not joined)
        return config.cohort, demands
    if override:
        raise ConfigError("--set changes keys of a configuration; give the YAML in place of the sheet")
    return CohortConfig(sheet=path.expanduser().resolve()), Demands(named)


@cohort_app.command("import-dicom")
def cohort_import_dicom(
    source: Annotated[Path, typer.Argument(help="folder, .zip or .tar of DICOM files", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="folder to fill: series.csv, cohort.csv, CASE/SEQUENCE.nii.gz")],
    salt: Annotated[
        Path | None, typer.Option("--salt", help="secret of the project, made if absent [default: OUT.salt]")
    ] = None,
    keep_ids: Annotated[bool, typer.Option("--keep-ids", help="use PatientID as it is: already pseudonyms")] = False,
    clinical: Annotated[
        Path | None, typer.Option("--clinical", help="sheet of labels by PatientID", show_default=False)
    ] = None,
    review_only: Annotated[bool, typer.Option("--review-only", help="write series.csv, convert nothing")] = False,
    workers: Annotated[int, typer.Option("--workers", min=1, help="processes")] = 2,
    as_json: JsonOption = False,
) -> None:
    """Turn DICOM into a cohort; correct the column 'use' of series.csv and run it again to have it followed."""
    from glioma_nas.console import print_table
    from glioma_nas.dicom import import_dicom
    from glioma_nas.files import require_writable
    from glioma_nas.privacy.pseudonyms import Pseudonyms, load_salt

    require_writable(out)
    salt_file = salt if salt is not None else out.resolve().with_name(f"{out.resolve().name}.salt")
    pseudonyms = None if keep_ids else Pseudonyms(load_salt(salt_file, create=True))
    with shown_progress() as progress:
        result = import_dicom(
            source,
            out,
            pseudonyms,
            clinical=clinical,
            review_only=review_only,
            workers=workers,
            progress=progress,
        )
    rows = [
        [
            entry.case_id,
            entry.series.number,
            entry.use or None,
            entry.guess.kind,
            entry.guess.confidence,
            entry.series.n_images,
            entry.series.description,
        ]
        for entry in result.entries
    ]
    title = f"{len(result.entries)} series, {result.n_cases} cases, {result.n_converted} series converted"
    columns = ["case", "number", "used as", "recognised as", "confidence", "images", "description"]
    print_table(title, columns, rows, as_json=as_json)
    for problem in result.problems:
        complain(f"look: {problem}")
    if not as_json:
        typer.echo(out / "series.csv" if review_only else out / "cohort.csv")
