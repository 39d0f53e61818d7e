"""Decide which folds a run uses: drawn by its configuration, or taken over from a file."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from glioma_nas.config import RunConfig
from glioma_nas.fold_files import read_foreign_plan
from glioma_nas.folds import FoldPlan, Folds, Member, Pair, make_fold_plan


def plan_folds(
    config: RunConfig, cases: Sequence[Member], columns: Collection[str], *, failed: Collection[str] = ()
) -> FoldPlan:
    """Return the plan of a run.

    Args:
        config: Its sections ``folds`` and ``classify``, and the seed.
        cases: The cases of the cohort that the run asks for.
        columns: Label columns the cohort has.
        failed: Case ids among them that could not be prepared. Folds are drawn without them; a plan from a file loses
            them and is otherwise kept as it is.

    Raises:
        CohortError: Too few patients, or a file that does not fit.
        LabelError: A column to stratify by is absent.
        LeakageError: A file with a patient on both sides of a fold.
    """
    wanted = config.folds
    gone = set(failed)
    if wanted.file is not None:
        plan = read_foreign_plan(wanted.file, cases, seed=config.seed, hide_names=config.cohort.hash_ids)
        return replace(plan, repeats=tuple(_without(repeat, gone) for repeat in plan.repeats))
    return make_fold_plan(
        [case for case in cases if case.case_id not in gone],
        n_folds=wanted.n_folds,
        seed=config.seed,
        repeats=wanted.repeats,
        inner_folds=wanted.inner_folds,
        used=wanted.use_repeat,
        stratify_by=stratification(config, columns),
        columns=columns,
        site_column=wanted.site_column if wanted.site_column in columns else None,
    )


def stratification(config: RunConfig, columns: Collection[str]) -> tuple[str, ...]:
    """Return the columns kept balanced: those named, else the markers' and the site where there is one."""
    if config.folds.stratify_by is not None:
        return config.folds.stratify_by
    names = [marker.column for marker in config.classify.markers.values()]
    names += [config.folds.site_column] if config.folds.site_column in columns else []
    return tuple(dict.fromkeys(names))


def _without(folds: Folds, gone: set[str]) -> Folds:
    def kept(pair: Pair) -> Pair:
        return (
            tuple(name for name in pair[0] if name not in gone),
            tuple(name for name in pair[1] if name not in gone),
        )

    return Folds(folds.seed, tuple(map(kept, folds.pairs)), tuple(tuple(map(kept, inner)) for inner in folds.inner))
