"""Folds of other programs: nnU-Net's ``splits_final.json``, read and written; and folds taken over from another run.

``splits_final.json`` is a list of ``{"train": [...], "val": [...]}`` with case ids. Of a plan with repeats, fold k of
repeat r is entry r · n_folds + k, the repeat in use first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from glioma_nas.errors import CohortError, LeakageError
from glioma_nas.files import read_json, write_json
from glioma_nas.folds import FoldPlan, Folds, Member, Pair, check_not_empty, load_fold_plan

SPLITS_FILE = "splits_final.json"


def write_nnunet_splits(plan: FoldPlan, path: Path) -> None:
    """Write the folds as nnU-Net reads them."""
    repeats = [plan.folds, *(repeat for index, repeat in enumerate(plan.repeats) if index != plan.used)]
    splits = [{"train": sorted(train), "val": sorted(test)} for repeat in repeats for train, test in repeat.pairs]
    write_json(path, splits)


def read_foreign_plan(path: Path, cases: Sequence[Member], *, seed: int, hide_names: bool = False) -> FoldPlan:
    """Read a plan that was drawn elsewhere, and make sure that it fits these cases.

    Args:
        path: Our ``folds.json`` or nnU-Net's ``splits_final.json``.
        cases: The cohort's cases.
        seed: The run's seed, kept with the folds.
        hide_names: Do not repeat names of the file that the cohort does not have: with hashed ids they are real ones.

    Raises:
        CohortError: It is neither, names a case the cohort lacks, or does not hold every case out exactly once,
            or a side of a fold is empty.
        LeakageError: A patient stands on both sides of a fold.
        StorageError: The file is missing or no JSON, or our file was changed.
    """
    data = read_json(path)
    if isinstance(data, dict):
        plan = load_fold_plan(path)
    else:
        plan = FoldPlan(seed, _from_nnunet(path, data, cases, seed, hide_names))
    patients = {case.case_id: case.patient_id for case in cases}
    for repeat in plan.repeats:
        _check(path, repeat, patients, hide_names)
    return plan


def _from_nnunet(path: Path, data: Any, cases: Sequence[Member], seed: int, hide_names: bool) -> tuple[Folds, ...]:
    try:
        splits = [({*map(str, fold["train"])}, {*map(str, fold["val"])}) for fold in data]
    except (KeyError, TypeError) as err:
        raise CohortError(f"{path}: neither folds.json nor splits_final.json ({type(err).__name__}: {err})") from err
    if len(splits) < 2:
        raise CohortError(f"{path}: holds {len(splits)} folds; at least 2 are needed")
    unknown = {name for train, val in splits for name in train | val} - {case.case_id for case in cases}
    if unknown:
        raise CohortError(
            f"{path}: names {len(unknown)} cases that the cohort does not have{_such_as(unknown, hide_names)}; draw "
            "the folds from this cohort"
        )
    order = [case.case_id for case in cases]
    repeats: list[list[Pair]] = [[]]
    held: set[str] = set()
    for train, val in splits:
        if val and held >= set(order):  # everybody was held out once, so the next repeat begins
            repeats.append([])
            held = set()
        held |= val
        repeats[-1].append(
            (tuple(name for name in order if name in train), tuple(name for name in order if name in val))
        )
    return tuple(Folds(seed, tuple(pairs)) for pairs in repeats)


def _such_as(names: Collection[str], hide_names: bool) -> str:
    return "" if hide_names else f", such as '{min(names)}'"


def _check(path: Path, folds: Folds, patients: Mapping[str, str], hide_names: bool) -> None:
    held = Counter(name for fold in range(folds.n) for name in folds.test(fold))
    for case_id in patients:
        if held[case_id] != 1:
            raise CohortError(
                f"{path}: case {case_id} is held out by {held[case_id]} folds instead of one; draw the folds from this "
                "cohort"
            )
    try:
        check_not_empty(folds)
    except CohortError as err:
        raise CohortError(f"{path}: {err}") from err
    for fold in range(folds.n):
        names = {*folds.train(fold), *folds.test(fold)}
        if unknown := names - set(patients):
            raise CohortError(
                f"{path}: fold {fold} names a case that the cohort does not have{_such_as(unknown, hide_names)}"
            )
        for pair in (folds.pairs[fold], *(folds.inner[fold] if folds.inner else ())):
            trained = {patients[name]: name for name in pair[0]}
            for name in pair[1]:
                if patients[name] in trained:
                    raise LeakageError(
                        f"{path}: fold {fold}: cases {trained[patients[name]]} (train) and {name} (held out) are of "
                        "the same patient; draw the folds by patient, for example with `glioma-nas cohort folds`"
                    )
