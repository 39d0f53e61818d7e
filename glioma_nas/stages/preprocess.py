"""Stage: read the cohort, check every file, normalise, cut slices, draw folds.

Cases are prepared in parallel and independently of one another, so the result does not depend on the number of workers.
A run that was interrupted, or stopped by a bad file, goes on with the cases that are missing or whose files changed.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np

from glioma_nas import registry
from glioma_nas.case_preparation import Recipe, is_prepared, prepare_case
from glioma_nas.cohort import Case, Cohort, first_of, read_cohort, select_complete
from glioma_nas.config import RunConfig
from glioma_nas.errors import CohortError, GliomaNasError, did_you_mean
from glioma_nas.files import write_json
from glioma_nas.folds import check_folds, make_folds
from glioma_nas.pipeline import StageContext
from glioma_nas.prepared import CASES_FOLDER, FOLDS_FILE, INDEX_FILE, PreparedCohort

PROBLEMS_FILE = "problems.json"

_logger = logging.getLogger(__name__)


def run(context: StageContext) -> dict[str, Any]:
    """Prepare every case and draw the folds; see `glioma_nas.pipeline.Stage`.

    Raises:
        CohortError: The sheet cannot be used, or some case cannot be prepared; all findings are in ``problems.json``.
        LabelError: A marker's column is absent or of one class, or a column to stratify by is absent.
        LeakageError: One scan stands under two patients that fell into different folds.
    """
    # Imported here because worker processes import this module, and markers import torch.
    from glioma_nas.markers import encode_labels

    config = context.config
    for step in config.preprocess.steps:
        registry.preprocess_steps.get(step)
    cohort = read_cohort(config.cohort)
    sequences = sequences_of(config)
    _check_columns(cohort, sequences)
    complete, excluded = select_complete(cohort, config.cohort)
    for name, marker in config.classify.markers.items():
        encode_labels(complete.cases, name, marker, sheet=cohort.sheet, n_folds=config.folds.n_folds)
    folds = make_folds(
        complete.cases,
        n_folds=config.folds.n_folds,
        seed=config.seed,
        stratify_by=_stratification(config),
        columns=cohort.label_columns,
    )
    _prepare_all(context, complete.cases, Recipe(sequences, config.preprocess, config.cohort.mask_labels))
    write_json(
        context.folder / INDEX_FILE,
        {
            "sequences": list(sequences),
            "image_size_px": config.preprocess.image_size_px,
            "cases": [case.case_id for case in complete.cases],
            "excluded": [{"case_id": item.case_id, "reason": item.reason} for item in excluded],
        },
    )
    folds.write(context.folder / FOLDS_FILE)
    prepared = PreparedCohort.load(context.folder)
    check_folds(folds, prepared)
    results = _summary(prepared, complete)
    context.progress.note(
        f"preprocess: {results['n_cases']} cases of {results['n_patients']} patients, {results['n_slices']} slices, "
        f"{results['n_tumour_slices']} with tumour, {len(excluded)} cases left out"
    )
    return {**results, "folds_hash": folds.hash}


def _stratification(config: RunConfig) -> tuple[str, ...]:
    if config.folds.stratify_by is not None:
        return config.folds.stratify_by
    return tuple(dict.fromkeys(marker.column for marker in config.classify.markers.values()))


def sequences_of(config: RunConfig) -> tuple[str, ...]:
    """Return the channel order of a run: the segmentation's sequences, then what the markers need besides."""
    names = dict.fromkeys(config.cohort.sequences)
    for marker in config.classify.markers.values():
        names.update(dict.fromkeys(marker.sequences))
    return tuple(names)


def _check_columns(cohort: Cohort, sequences: Sequence[str]) -> None:
    for name in sequences:
        if name not in cohort.sequences:
            raise CohortError(
                f"{cohort.sheet}: no column for sequence '{name}', which a marker needs: "
                f"{did_you_mean(name, cohort.sequences)}"
            )


def _prepare_all(context: StageContext, cases: Sequence[Case], recipe: Recipe) -> None:
    root = context.folder / CASES_FOLDER
    waiting = [case for case in cases if not is_prepared(case, root / case.case_id)]
    for case in waiting:
        # What a killed worker left half written would otherwise stay beside the good files for ever.
        shutil.rmtree(root / case.case_id, ignore_errors=True)
    problems: list[dict[str, str]] = []
    with context.progress.task("preprocess", len(cases)) as task:
        if done := len(cases) - len(waiting):
            task.advance(done)
        for problem in _outcomes(waiting, root, recipe, context.config):
            task.advance()
            if problem is not None:
                _logger.info("case %s cannot be prepared", problem["case_id"])
                problems.append(problem)
    path = context.folder / PROBLEMS_FILE
    path.unlink(missing_ok=True)
    if problems:
        order = {case.case_id: index for index, case in enumerate(cases)}
        problems.sort(key=lambda problem: order[problem["case_id"]])
        write_json(path, problems)
        first = first_of([problem["message"] for problem in problems])
        raise CohortError(f"{first}; {len(problems)} of {len(cases)} cases cannot be prepared, all listed in {path}")


def _outcomes(cases: Sequence[Case], root: Path, recipe: Recipe, config: RunConfig) -> Iterator[dict[str, str] | None]:
    workers = min(config.preprocess.workers, len(cases))
    if workers <= 1:
        for case in cases:
            yield _outcome(case, root / case.case_id, recipe)
        return
    # Fresh interpreters: a fork would copy the locks of whatever threads the caller runs.
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(tuple(str(path) for path in config.plugins),),
    )
    try:
        futures = [pool.submit(_outcome, case, root / case.case_id, recipe) for case in cases]
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool as err:
        raise GliomaNasError(
            "a preprocess worker was killed, probably for want of memory; set preprocess.workers to 1 and run again"
        ) from err
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _outcome(case: Case, folder: Path, recipe: Recipe) -> dict[str, str] | None:
    # Returned rather than raised, so that every bad case is found in one go.
    try:
        prepare_case(case, folder, recipe)
    except GliomaNasError as err:
        return {"case_id": case.case_id, "error": type(err).__name__, "message": str(err)}
    return None


def _start_worker(plugins: tuple[str, ...]) -> None:
    # Ctrl-C goes to the whole terminal; the parent alone decides what stops.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    for path in plugins:
        registry.load_file(Path(path))


def _exit_with_parent() -> None:
    # A parent that was killed cannot stop its workers, which would wait for work for ever.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


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
        "sequences": list(prepared.sequences),
        "missing": {name: sum(name not in case.present for case in cases) for name in prepared.sequences},
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
