"""The command ``cohort folds``: draw, export and check folds without running anything."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from glioma_nas.cli.application import ConfigArgument, JsonOption, SetOption, load_run_config, shown_progress
from glioma_nas.cli.cohort_commands import cohort_app

if TYPE_CHECKING:
    from glioma_nas.cohort import Case
    from glioma_nas.folds import Folds

_MAX_VALUES = 6  # a column with more distinct values is a measurement, not a class


@cohort_app.command("folds")
def cohort_folds(
    config: ConfigArgument,
    out: Annotated[Path | None, typer.Option("--out", help="write the plan as folds.json", show_default=False)] = None,
    nnunet: Annotated[
        Path | None, typer.Option("--nnunet", help="write nnU-Net's splits_final.json", show_default=False)
    ] = None,
    check: Annotated[
        Path | None,
        typer.Option(
            "--check", help="check this folds.json or splits_final.json instead of drawing", show_default=False
        ),
    ] = None,
    skip_voxels: Annotated[
        bool, typer.Option("--skip-voxels", help="do not read the scans to look for copies under two patients")
    ] = False,
    workers: Annotated[int, typer.Option("--workers", min=1, help="processes")] = 2,
    override: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Draw the folds a run would use, or check others; exit status 2 when a patient or scan stands on both sides."""
    from glioma_nas.cohort import read_cohort, select_complete
    from glioma_nas.console import print_table
    from glioma_nas.fold_files import write_nnunet_splits
    from glioma_nas.fold_planning import plan_folds, stratification
    from glioma_nas.folds import check_folds
    from glioma_nas.validation.voxel_hashes import hash_cohort

    loaded = load_run_config(config, override, None)
    if check is not None:
        folds = loaded.folds.model_copy(update={"file": check.expanduser().resolve()})
        loaded = loaded.model_copy(update={"folds": folds})
    cohort, _ = select_complete(read_cohort(loaded.cohort), loaded.cohort)
    plan = plan_folds(loaded, cohort.cases, cohort.label_columns)
    if not skip_voxels:
        with shown_progress() as progress:
            hashed = hash_cohort(cohort.cases, workers=workers, progress=progress)
        for repeat in plan.repeats:
            check_folds(repeat, hashed)
    if out is not None:
        plan.write(out)
    if nnunet is not None:
        write_nnunet_splits(plan, nnunet)
    columns = stratification(loaded, cohort.label_columns)
    rows = [
        [index, fold, *_counts(repeat, fold, cohort.cases, columns)]
        for index, repeat in enumerate(plan.repeats)
        for fold in range(repeat.n)
    ]
    title = f"{len(cohort.cases)} cases, hash {plan.hash[:16]}" + ("" if skip_voxels else ", no copies across folds")
    print_table(title, ["repeat", "fold", "train", "held out", "patients held out", *columns], rows, as_json=as_json)


def _counts(folds: Folds, fold: int, cases: Sequence[Case], columns: Sequence[str]) -> list[int | str]:
    held = set(folds.test(fold))
    members = [case for case in cases if case.case_id in held]
    tallies = [Counter(_known(case.labels, column) for case in members) for column in columns]
    return [len(folds.train(fold)), len(members), len({case.patient_id for case in members}), *map(_shown, tallies)]


def _shown(tally: Counter[str]) -> str:
    if len(tally) > _MAX_VALUES:
        return f"{tally.total() - tally['unknown']} known"
    return ", ".join(f"{value} {count}" for value, count in sorted(tally.items()))


def _known(labels: Mapping[str, str], column: str) -> str:
    return labels.get(column, "unknown")
