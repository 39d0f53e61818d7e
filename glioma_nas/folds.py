"""Patient-level cross-validation folds: drawn once, written once, only read afterwards.

Slices and scans of one patient always stand on one side. The same scan filed under two patients is found by the hash of
its voxels, because a copy on both sides of a split flatters every figure.

A plan may hold several repeats, each a complete cross-validation drawn anew, of which a run uses one; and in each fold
inner folds of the training patients, for choices that must not see the patients held out (nested cross-validation).
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from glioma_nas.cohort import Labelled
from glioma_nas.errors import CohortError, LabelError, LeakageError, StorageError, did_you_mean
from glioma_nas.files import canonical_json, read_json, sha256_text, write_json
from glioma_nas.seeding import numpy_generator

Pair = tuple[tuple[str, ...], tuple[str, ...]]

_MAX_CATEGORIES = 3
_REMEDY = "delete the run's preprocess folder and run that stage again"


class Member(Labelled, Protocol):
    """What drawing folds needs of a case."""

    @property
    def patient_id(self) -> str: ...  # noqa: D102 - see cohort.Case


class HashedMember(Member, Protocol):
    """What checking folds needs of a case: also sequence → hash of its voxels."""

    @property
    def voxel_hashes(self) -> Mapping[str, str]: ...  # noqa: D102 - see prepared.PreparedCase


class HashedCohort(Protocol):
    """What `check_folds` reads: cases by id, such as `glioma_nas.prepared.PreparedCohort`."""

    @property
    def cases(self) -> Mapping[str, HashedMember]: ...  # noqa: D102 - see prepared.PreparedCohort


@dataclass(frozen=True)
class Folds:
    """Which cases are trained on and which are held out, fold by fold.

    Attributes:
        seed: Seed they were drawn with.
        pairs: For each fold the case ids of (train, test), each in the cohort's order.
        inner: For each fold its inner folds as (train, validation), both parts of the fold's train; empty when none
            were drawn.
    """

    seed: int
    pairs: tuple[Pair, ...]
    inner: tuple[tuple[Pair, ...], ...] = ()

    @property
    def n(self) -> int:
        """Number of folds."""
        return len(self.pairs)

    @property
    def hash(self) -> str:
        """Hash of seed and assignment; 64 hexadecimal digits."""
        return sha256_text(canonical_json(self._content()))

    def train(self, fold: int) -> tuple[str, ...]:
        """Return the case ids trained on in ``fold`` (from 0)."""
        return self.pairs[fold][0]

    def test(self, fold: int) -> tuple[str, ...]:
        """Return the case ids held out in ``fold`` (from 0)."""
        return self.pairs[fold][1]

    def fold_of(self, case_id: str) -> int:
        """Return the fold that holds ``case_id`` out.

        Raises:
            CohortError: No fold does.
        """
        for fold in range(self.n):
            if case_id in self.test(fold):
                return fold
        raise CohortError(f"case {case_id} is in none of the {self.n} folds; run the preprocess stage again")

    def inner_folds(self, fold: int) -> tuple[Pair, ...]:
        """Return the inner folds of ``fold`` as (train, validation) case ids.

        Raises:
            CohortError: None were drawn.
        """
        if not self.inner:
            raise CohortError("no inner folds were drawn; set folds.inner_folds and run the preprocess stage again")
        return self.inner[fold]

    def write(self, path: Path) -> None:
        """Write these folds alone, as a plan of one repeat."""
        FoldPlan(self.seed, (self,)).write(path)

    def _content(self) -> dict[str, Any]:
        return {"seed": self.seed, "n_folds": self.n, "folds": self._as_lists()}

    def _as_lists(self) -> list[dict[str, Any]]:
        folds: list[dict[str, Any]] = [{"train": list(train), "test": list(test)} for train, test in self.pairs]
        for fold, inner in zip(folds, self.inner, strict=False):
            fold["inner"] = [{"train": list(train), "validation": list(held)} for train, held in inner]
        return folds


@dataclass(frozen=True)
class FoldPlan:
    """All repeats of a cross-validation, and which of them a run uses.

    Attributes:
        seed: Seed they were drawn with.
        repeats: Complete cross-validations of the same cases.
        used: Index of the one the run uses.
    """

    seed: int
    repeats: tuple[Folds, ...]
    used: int = 0

    @property
    def folds(self) -> Folds:
        """The repeat that is used."""
        return self.repeats[self.used]

    @property
    def hash(self) -> str:
        """Hash of all assignments; 64 hexadecimal digits."""
        return sha256_text(canonical_json(self._content()))

    def write(self, path: Path) -> None:
        """Write the plan with its hash as JSON."""
        write_json(path, {"hash": self.hash, **self._content()})

    def _content(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "n_folds": self.folds.n,
            "used_repeat": self.used,
            "repeats": [repeat._as_lists() for repeat in self.repeats],
        }


def load_folds(path: Path) -> Folds:
    """Read the folds a run uses; see `load_fold_plan`."""
    return load_fold_plan(path).folds


def load_fold_plan(path: Path) -> FoldPlan:
    """Read a plan and make sure that nobody changed it since the folds were drawn.

    Raises:
        StorageError: The file is missing, not of this form, or its content does not match its hash.
    """
    data = read_json(path)
    try:
        seed = int(data["seed"])
        repeats = tuple(_folds_from_lists(seed, folds) for folds in data["repeats"])
        plan = FoldPlan(seed, repeats, int(data["used_repeat"]))
        written, computed = data["hash"], plan.hash
    except (KeyError, TypeError, ValueError, IndexError) as err:
        raise StorageError(f"{path}: not a folds file ({type(err).__name__}: {err}); {_REMEDY}") from err
    if computed != written:
        raise StorageError(f"{path}: was changed after the folds were drawn (its hash does not match); {_REMEDY}")
    return plan


def _folds_from_lists(seed: int, folds: Sequence[Mapping[str, Any]]) -> Folds:
    pairs = tuple((tuple(map(str, fold["train"])), tuple(map(str, fold["test"]))) for fold in folds)
    inner = tuple(
        tuple((tuple(map(str, pair["train"])), tuple(map(str, pair["validation"]))) for pair in fold["inner"])
        for fold in folds
        if "inner" in fold
    )
    if inner and len(inner) != len(pairs):
        raise ValueError("some folds have inner folds and some have not")
    return Folds(seed, pairs, inner)


def make_fold_plan(
    cases: Sequence[Member],
    *,
    n_folds: int,
    seed: int,
    repeats: int = 1,
    inner_folds: int | None = None,
    used: int = 0,
    stratify_by: Sequence[str] = (),
    columns: Collection[str] = (),
    site_column: str | None = None,
) -> FoldPlan:
    """Draw a whole plan; see `make_folds` for how one repeat is drawn.

    Args:
        cases: All cases, in the cohort's order.
        n_folds: At least 2.
        seed: The run's seed; the first repeat does not depend on how many there are.
        repeats: Complete cross-validations.
        inner_folds: Folds of each fold's training patients; none when None.
        used: Index of the repeat the run uses.
        stratify_by: Label columns.
        columns: Label columns the sheet has.
        site_column: One of ``stratify_by``: each of its values is balanced together with each value of the others too.

    Raises:
        CohortError: Fewer patients than folds, or no such repeat.
        LabelError: A column of ``stratify_by`` is not in the sheet.
    """
    if not 0 <= used < repeats:
        raise CohortError(
            f"folds.use_repeat is {used}, but repeats are counted from 0 to {repeats - 1}; raise folds.repeats"
        )
    drawn = []
    for repeat in range(repeats):
        names = ("folds", repeat) if repeat else ("folds",)
        tags = _patient_tags(cases, stratify_by, columns, site_column)
        pairs = _draw(cases, tags, n_folds, numpy_generator(seed, *names))
        inner: list[tuple[Pair, ...]] = []
        for fold, (train, _) in enumerate(pairs if inner_folds else ()):
            members = [case for case in cases if case.case_id in set(train)]
            inner.append(_draw(members, tags, inner_folds or 2, numpy_generator(seed, *names, "inner", fold)))
        drawn.append(Folds(seed, pairs, tuple(inner)))
    return FoldPlan(seed, tuple(drawn), used)


def make_folds(
    cases: Sequence[Member], *, n_folds: int, seed: int, stratify_by: Sequence[str] = (), columns: Collection[str] = ()
) -> Folds:
    """Draw folds by patient, keeping the values of some columns balanced over them where known.

    Patients with the rarest value are dealt first, each to the fold that holds the smallest share of that value, then
    to the smallest fold (Sechidis et al. 2011, https://doi.org/10.1007/978-3-642-23808-6_10, with patients as units).
    Columns of numbers count by tertile.

    Args:
        cases: All cases, in the cohort's order.
        n_folds: At least 2.
        seed: The run's seed.
        stratify_by: Label columns.
        columns: Label columns the sheet has, known for a case or not; by default those any case knows.

    Raises:
        CohortError: Fewer patients than folds.
        LabelError: A column of ``stratify_by`` is not in the sheet.
    """
    tags = _patient_tags(cases, stratify_by, columns, None)
    return Folds(seed, _draw(cases, tags, n_folds, numpy_generator(seed, "folds")))


def _draw(
    cases: Sequence[Member],
    tags: Mapping[str, tuple[tuple[str, str], ...]],
    n_folds: int,
    generator: np.random.Generator,
) -> tuple[Pair, ...]:
    patients = list(dict.fromkeys(case.patient_id for case in cases))
    if len(patients) < n_folds:
        raise CohortError(
            f"{len(patients)} patients cannot be split into {n_folds} folds; "
            f"set folds.n_folds to at most {len(patients)} or add patients"
        )
    frequency = Counter(tag for patient in patients for tag in tags[patient])
    shuffled = [patients[int(index)] for index in generator.permutation(len(patients))]
    rarest_first = sorted(
        shuffled, key=lambda patient: min((frequency[tag] for tag in tags[patient]), default=len(patients) + 1)
    )
    capacity = math.ceil(len(patients) / n_folds)
    held: dict[str, int] = {}
    count: list[Counter[tuple[str, str]]] = [Counter() for _ in range(n_folds)]
    size = [0] * n_folds
    for patient in rarest_first:
        rank = generator.permutation(n_folds)
        fold = min(
            (fold for fold in range(n_folds) if size[fold] < capacity),
            key=lambda fold: (
                sum(count[fold][tag] / frequency[tag] for tag in tags[patient]),
                size[fold],
                int(rank[fold]),
            ),
        )
        held[patient] = fold
        size[fold] += 1
        count[fold].update(tags[patient])
    return tuple(
        (
            tuple(case.case_id for case in cases if held[case.patient_id] != fold),
            tuple(case.case_id for case in cases if held[case.patient_id] == fold),
        )
        for fold in range(n_folds)
    )


def check_folds(folds: Folds, cohort: HashedCohort) -> None:
    """Make sure that nothing stands on both sides and that every case is held out exactly once.

    Raises:
        LeakageError: A case, another case of the same patient, or a scan with identical voxels is trained on and held
            out in one fold.
        CohortError: A case is unknown or is not held out exactly once, or a side is empty.
    """
    held = Counter(case_id for fold in range(folds.n) for case_id in folds.test(fold))
    for case_id in {*held, *(case_id for fold in range(folds.n) for case_id in folds.train(fold))} - set(cohort.cases):
        raise CohortError(f"folds name case {case_id}, which was not prepared; run the preprocess stage again")
    for case_id in cohort.cases:
        if held[case_id] != 1:
            raise CohortError(
                f"case {case_id} is held out by {held[case_id]} folds instead of one; run the preprocess stage again"
            )
    check_not_empty(folds)
    for fold in range(folds.n):
        _check_sides(f"fold {fold}", folds.pairs[fold], "test", cohort)
        for index, pair in enumerate(folds.inner[fold] if folds.inner else ()):
            name = f"fold {fold}, inner fold {index}"
            if outside := {*pair[0], *pair[1]} - set(folds.train(fold)):
                raise LeakageError(
                    f"{name}: case {min(outside)} is not trained on in the outer fold; draw the folds again with the "
                    "preprocess stage"
                )
            _check_sides(name, pair, "validation", cohort)


def check_not_empty(folds: Folds) -> None:
    """Make sure that both sides of every fold, and of every inner fold, hold a case.

    Raises:
        CohortError: One does not, which folds from a file can bring about, or cases of them that could not be prepared.
    """
    for fold in range(folds.n):
        for pair in (folds.pairs[fold], *(folds.inner[fold] if folds.inner else ())):
            if not all(pair):
                raise CohortError(
                    f"fold {fold} trains on {len(pair[0])} cases and holds out {len(pair[1])}; both sides need one: "
                    "mend the cases that failed, or draw other folds"
                )


def _check_sides(name: str, pair: Pair, held: str, cohort: HashedCohort) -> None:
    patients: dict[str, str] = {}
    volumes: dict[str, tuple[str, str]] = {}
    for case in (cohort.cases[case_id] for case_id in pair[0]):
        patients.setdefault(case.patient_id, case.case_id)
        for sequence, digest in case.voxel_hashes.items():
            volumes.setdefault(digest, (case.case_id, sequence))
    for case in (cohort.cases[case_id] for case_id in pair[1]):
        if case.patient_id in patients:
            raise LeakageError(
                f"{name}: cases {patients[case.patient_id]} (train) and {case.case_id} ({held}) are of the "
                "same patient; draw the folds again with the preprocess stage"
            )
        for sequence, digest in case.voxel_hashes.items():
            if digest in volumes:
                twin, twin_sequence = volumes[digest]
                raise LeakageError(
                    f"{name}: {twin_sequence} of case {twin} (train) and {sequence} of case {case.case_id} ({held}) "
                    "hold identical voxels under two patients; give both one patient_id in the sheet, or drop one"
                )


def _patient_tags(
    cases: Sequence[Member], stratify_by: Sequence[str], columns: Collection[str], site_column: str | None
) -> dict[str, tuple[tuple[str, str], ...]]:
    known_columns = {*columns, *(name for case in cases for name in case.labels)}
    tags: defaultdict[str, list[tuple[str, str]]] = defaultdict(list)
    for column in stratify_by:
        if column not in known_columns:
            raise LabelError(
                f"folds.stratify_by names column '{column}', which the sheet does not have; "
                f"{did_you_mean(column, known_columns)}"
            )
        values: dict[str, str] = {}
        for case in cases:
            if column in case.labels:
                values.setdefault(case.patient_id, case.labels[column])
        for patient, category in _categories(values).items():
            tags[patient].append((column, category))
    for members in tags.values():
        # Balanced sites and balanced labels do not make the labels balanced at every site.
        site = next((value for column, value in members if column == site_column), None)
        if site is not None:
            members += [(f"{column} at {site}", value) for column, value in members if column != site_column]
    return {case.patient_id: tuple(tags[case.patient_id]) for case in cases}


def _categories(values: Mapping[str, str]) -> dict[str, str]:
    try:
        numbers = {patient: float(value) for patient, value in values.items()}
    except ValueError:
        return dict(values)
    if len(set(numbers.values())) <= _MAX_CATEGORIES or not all(map(math.isfinite, numbers.values())):
        return dict(values)
    borders = np.quantile(list(numbers.values()), [1 / 3, 2 / 3])
    return {
        patient: f"tertile {int(np.searchsorted(borders, number, side='left')) + 1}"
        for patient, number in numbers.items()
    }
