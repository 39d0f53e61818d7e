"""Stage: read the cohort, check every file, normalise, cut slices, draw folds.

Cases are prepared in parallel and independently of one another, so the result does not depend on the number of workers.
A case that cannot be prepared is left out, and the stage says so at the end; it fails only when too few remain. A run
that was interrupted goes on with the cases that are missing, and a later run takes over the cases whose files and
recipe are unchanged.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from glioma_nas.case_preparation import Recipe, build_steps, is_prepared, prepare_case
from glioma_nas.cohort import Case, Cohort, Exclusion, first_of, read_cohort, select_complete
from glioma_nas.config import RunConfig, indicated_by
from glioma_nas.errors import CohortError, ConfigError, GliomaNasError, StorageError, did_you_mean
from glioma_nas.files import write_json
from glioma_nas.fold_files import SPLITS_FILE, write_nnunet_splits
from glioma_nas.fold_planning import plan_folds
from glioma_nas.folds import FoldPlan, check_folds
from glioma_nas.pipeline import StageContext
from glioma_nas.prepared import CASE_FILE, CASES_FOLDER, FOLDS_FILE, INDEX_FILE, PreparedCohort
from glioma_nas.privacy.hidden_paths import one_line, without_paths
from glioma_nas.quality_page import QUALITY_PAGE, write_quality_report
from glioma_nas.worker_pool import KILLED, outcomes

PROBLEMS_FILE = "problems.json"

_CASE_ERRORS = (RuntimeError, ValueError, TypeError, AssertionError, ArithmeticError, LookupError, MemoryError, OSError)
# The run's own disk is full or cannot be written; any other trouble of the system with a file is that file's.
_DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})

_logger = logging.getLogger(__name__)


def run(context: StageContext) -> dict[str, Any]:
    """Prepare every case and draw the folds; see `glioma_nas.pipeline.Stage`.

    Raises:
        CohortError: The sheet cannot be used, or too few cases can be prepared; their faults are in ``problems.json``.
        LabelError: A marker's column is absent or of one class, or a column to stratify by is absent.
        LeakageError: One scan stands under two patients that fell into different folds.
    """
    # Imported here because worker processes import this module, and markers import torch.
    from glioma_nas.markers import encode_labels

    config = context.config
    steps = build_steps(config.preprocess)
    for step in steps.values():
        step.check()
    cohort = read_cohort(config.cohort)
    sequences = sequences_of(config)
    _check_columns(cohort, sequences)
    complete, excluded = select_complete(cohort, config.cohort)

    def draw_folds(failed: Collection[str]) -> FoldPlan:
        cases = [case for case in complete.cases if case.case_id not in failed]
        given = config.folds.file is not None
        plan = plan_folds(config, complete.cases, cohort.label_columns, failed=failed) if given else None
        n_folds = config.folds.n_folds if plan is None else plan.folds.n
        for name, marker in config.classify.markers.items():
            encode_labels(cases, name, marker, sheet=cohort.sheet, n_folds=n_folds)
        return plan or plan_folds(config, complete.cases, cohort.label_columns, failed=failed)

    draw_folds(())  # before hours of work, to find out whether there will be folds at all
    recipe = recipe_of(config)
    problems = _prepare_all(context, complete.cases, recipe)
    failed = {problem["case_id"]: problem for problem in problems}
    remaining = tuple(case for case in complete.cases if case.case_id not in failed)
    _check_remaining(config, complete.cases, problems)
    try:
        plan = draw_folds(failed)
    except GliomaNasError as err:
        if problems:
            raise type(err)(f"{err} ({_count(problems)})") from err
        raise
    left_out = [*excluded, *(Exclusion(case_id, f"failed: {item['message']}") for case_id, item in failed.items())]
    write_json(
        context.folder / INDEX_FILE,
        {
            "sequences": list(recipe.channels),
            "image_size_px": config.preprocess.image_size_px,
            "cases": [case.case_id for case in remaining],
            "excluded": [{"case_id": item.case_id, "reason": item.reason} for item in left_out],
        },
    )
    plan.write(context.folder / FOLDS_FILE)
    write_nnunet_splits(plan, context.folder / SPLITS_FILE)
    prepared = PreparedCohort.load(context.folder)
    for repeat in plan.repeats:
        check_folds(repeat, prepared)
    hashes = [digest for case in prepared.cases.values() for digest in case.voxel_hashes.values()]
    learned = [note for step in steps.values() if (note := step.check_cohort(hashes)) is not None]
    flagged = write_quality_report(context.folder, prepared)
    results = _summary(prepared, complete)
    context.progress.note(
        f"preprocess: {results['n_cases']} cases of {results['n_patients']} patients, {results['n_slices']} slices, "
        f"{results['n_tumour_slices']} with tumour, {len(excluded)} cases left out"
    )
    if flagged:
        context.progress.note(
            f"preprocess: look at {len(flagged)} flagged cases in {QUALITY_PAGE}: {', '.join(flagged)}"
        )
    for note in learned:
        context.progress.note(f"preprocess: {note}")
    if problems:
        context.progress.note(f"preprocess: {_count(problems)}; all listed in {PROBLEMS_FILE}")
    return {**results, "failed": problems, "flagged": flagged, "notes": learned, "folds_hash": plan.folds.hash}


def _check_remaining(config: RunConfig, cases: Sequence[Case], problems: Sequence[dict[str, str]]) -> None:
    allowed = config.preprocess.max_failed_share
    if len(problems) > allowed * len(cases):
        raise CohortError(
            f"{_count(problems)}; of {len(cases)} cases that is more than preprocess.max_failed_share ({allowed:g}) "
            "allows: mend the files or the steps and run again"
        )


def _count(problems: Sequence[dict[str, str]]) -> str:
    first = first_of([problem["message"] for problem in problems])
    many = len(problems) > 1
    return (
        f"{len(problems)} case{'s' if many else ''} cannot be prepared and {'are' if many else 'is'} left out: {first}"
    )


def sequences_of(config: RunConfig) -> tuple[str, ...]:
    """Return the sequences of a run: the segmentation's, then what the markers need besides."""
    names = dict.fromkeys(config.cohort.sequences)
    for marker in config.classify.markers.values():
        names.update(dict.fromkeys(marker.sequences))
    return tuple(names)


def recipe_of(config: RunConfig) -> Recipe:
    """Return what preparing a case of this run depends on, besides the case."""
    indicated = config.cohort.sequences if config.cohort.has_indicators else ()
    return Recipe(sequences_of(config), config.preprocess, config.cohort.mask_labels, indicated)


def _check_columns(cohort: Cohort, sequences: Sequence[str]) -> None:
    for name in sequences:
        if name not in cohort.sequences:
            raise CohortError(
                f"{cohort.sheet}: no column for sequence '{name}', which a marker needs: "
                f"{did_you_mean(name, cohort.sequences)}"
            )


def _prepare_all(context: StageContext, cases: Sequence[Case], recipe: Recipe) -> list[dict[str, str]]:
    """Prepare the cases that are not there yet; return what went wrong, in the order of the sheet."""
    root = context.folder / CASES_FOLDER
    earlier = context.folder.parent / "preprocess" / CASES_FOLDER
    for case in cases:
        if not is_prepared(case, root / case.case_id, recipe):
            # What a killed worker left half written would otherwise stay beside the good files for ever.
            shutil.rmtree(root / case.case_id, ignore_errors=True)
            if is_prepared(case, earlier / case.case_id, recipe):
                shutil.copytree(earlier / case.case_id, root / case.case_id, copy_function=_link_or_copy)
    waiting = [case for case in cases if not (root / case.case_id / CASE_FILE).is_file()]
    problems: list[dict[str, str]] = []
    hidden = context.config.cohort.hash_ids
    tasks = [(case, root / case.case_id, recipe, hidden) for case in waiting]
    settings = context.config.preprocess
    with context.progress.task("preprocess", len(cases)) as task:
        if done := len(cases) - len(waiting):
            task.advance(done)
        found = outcomes(_outcome, tasks, workers=settings.workers, plugins=context.config.plugins, killed=_killed)
        for _, problem in found:
            if problem is not None:
                _logger.info("case %s cannot be prepared", problem["case_id"])
                problems.append(problem)
            task.advance(1, **({"failed": len(problems)} if problems else {}))
    for name in {path.name for path in root.iterdir()} - {case.case_id for case in cases} if root.is_dir() else ():
        shutil.rmtree(root / name)  # of a sheet as it was before an interruption
    for problem in problems:
        shutil.rmtree(root / problem["case_id"], ignore_errors=True)  # what it left half written
    order = {case.case_id: index for index, case in enumerate(cases)}
    problems.sort(key=lambda problem: order[problem["case_id"]])
    path = context.folder / PROBLEMS_FILE
    path.unlink(missing_ok=True)
    if problems:
        write_json(path, problems)
    return problems


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # not every file system has hard links
        shutil.copy2(source, target)


def _outcome(task: tuple[Case, Path, Recipe, bool]) -> dict[str, str] | None:
    # Returned rather than raised, so that one bad case does not stop the others. Libraries raise what they like over a
    # strange scan, so an error that is not one of ours is a case's too; its kind stands in the list.
    case, folder, recipe, hidden = task
    try:
        prepare_case(case, folder, recipe)
    except (StorageError, ConfigError):
        raise  # a full disk, or steps that do not fit together: no other case would fare better
    except GliomaNasError as err:
        message = without_paths(str(err), case) if hidden else str(err)
        return {"case_id": case.case_id, "error": type(err).__name__, "message": message}
    except _CASE_ERRORS as err:
        if isinstance(err, OSError) and err.errno in _DISK_ERRORS:
            raise
        # A traceback quotes paths, in which patients are apt to stand.
        _logger.info("case %s: %s", case.case_id, type(err).__name__ if hidden else err, exc_info=not hidden)
        text = one_line(err, case, hidden=hidden)
        message = f"case {case.case_id}: {type(err).__name__} in a preprocess step: {text}"
        return {"case_id": case.case_id, "error": type(err).__name__, "message": message}
    return None


def _killed(task: tuple[Case, Path, Recipe, bool]) -> dict[str, str]:
    case = task[0]
    return {"case_id": case.case_id, "error": "ResourceError", "message": f"case {case.case_id}: {KILLED}"}


def _summary(prepared: PreparedCohort, cohort: Cohort) -> dict[str, Any]:
    cases = list(prepared.cases.values())
    ages = [case.age for case in cases if case.age is not None]
    counts: dict[str, dict[str, int]] = {}
    for column in cohort.label_columns:
        values = Counter(case.labels[column] for case in cases if column in case.labels)
        if 0 < len(values) <= 10:
            counts[column] = {**dict(sorted(values.items())), "unknown": len(cases) - values.total()}
    return {
        "n_cases": len(cases),
        "n_patients": len({case.patient_id for case in cases}),
        "n_slices": sum(case.n_slices for case in cases),
        "n_tumour_slices": sum(len(case.tumour_slices) for case in cases),
        "n_without_mask": sum(not case.has_mask for case in cases),
        "cases_with_empty_mask": [case.case_id for case in cases if case.has_mask and not any(case.tumour_px)],
        "cases_with_cut_tumour": _cut_tumours(prepared),
        "sequences": [name for name in prepared.sequences if indicated_by(name) is None],
        "missing": {
            name: sum(name not in case.present for case in cases)
            for name in prepared.sequences
            if indicated_by(name) is None
        },
        "excluded": [{"case_id": item.case_id, "reason": item.reason} for item in prepared.excluded],
        "labels": counts,
        "age_mean_years": round(float(np.mean(ages)), 1) if ages else None,
        "n_with_age": len(ages),
        "sex": dict(sorted(Counter(case.sex or "unknown" for case in cases).items())),
    }


def _cut_tumours(prepared: PreparedCohort) -> dict[str, int]:
    cut = {
        case.case_id: sum(int(record.get("tumour_voxels_cut", 0)) for _, record in case.steps)
        for case in prepared.cases.values()
    }
    return {case_id: voxels for case_id, voxels in cut.items() if voxels}
