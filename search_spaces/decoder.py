"""From the weights of a relaxed search to one architecture.

Operators and widths are the most probable ones; the branches' paths are those of `path_decoder`. `rank` gives the next
best architectures as well.

Reference: METHOD §4; Chen et al., FasterSeg, ICLR 2020.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from glioma_nas.errors import ArchitectureError, did_you_mean
from glioma_nas.search_spaces.layout import (
    BRANCHES_LABEL,
    DOWN_OPERATORS,
    KEPT_SKIPS,
    Cell,
    Layout,
)
from glioma_nas.search_spaces.path_decoder import ChoiceProbabilities, k_best_paths
from glioma_nas.search_spaces.plan import NetworkPlan, choose_kept, make_plan, removable_skips, stride_at

DOWN_SKIPS = ("keep", "next_best")


def decode(
    layout: Layout,
    weights: Mapping[str, Any],
    *,
    skips: Collection[str],
    architecture: str = "student",
    branches: str | None = None,
    method: str = "joint",
    down_skips: str = "keep",
) -> dict[str, Any]:
    """Decode one architecture.

    Args:
        layout: The space.
        weights: Label → probabilities in the order of the choice's values, shape (n,), in [0, 1]. The teacher needs no
            widths. ``branches`` is needed only where the argument of that name is not given.
        skips: Operators that are skip connections.
        architecture: ``student``, or ``teacher``: widest, and no skips.
        branches: Name of the set of branches, for example ``2_4``.
        method: ``joint`` takes the downsampling positions with the largest product of β⁰ among the nodes that have a β
            (two inputs); ``viterbi`` takes the likelihood of the whole path, with (1-β⁰) where the scale is kept;
            ``fasterseg`` is ``joint`` within that project's ranges (three cells before the first downsampling and
            between two, two after the last), and puts the next best operator in the place of strided skips and, with
            the skip policy ``remove``, of skips that have to stay; with ``conv`` a skip at stride 1 remains.
        down_skips: What a branch does that goes down through a cell whose operator is a skip: ``keep`` the strided
            skip, or take the ``next_best`` operator.

    Returns:
        A complete sample, with the refinements of `plan` where they are needed.

    Raises:
        ArchitectureError: A label is missing, has the wrong length or is not a probability; unknown method or branches.
    """
    return rank(
        layout,
        weights,
        1,
        skips=skips,
        architecture=architecture,
        branches=branches,
        method=method,
        down_skips=down_skips,
    )[0].sample


@dataclass(frozen=True)
class Ranked:
    """One of the best architectures.

    Attributes:
        sample: A complete sample.
        log_score: Natural logarithm of its score relative to that of independent best choices; see `rank`.
    """

    sample: dict[str, Any]
    log_score: float


def rank(
    layout: Layout,
    weights: Mapping[str, Any],
    n: int,
    *,
    skips: Collection[str],
    architecture: str = "student",
    branches: str | None = None,
    method: str = "joint",
    down_skips: str = "keep",
) -> list[Ranked]:
    """Decode the ``n`` best architectures, best first; the first is what `decode` gives.

    The score of a sample is the product of its operators' and widths' probabilities and of what ``method`` gives its
    paths (see `decode`). Samples that differ only in choices their network does not depend on are one architecture,
    with the best of their scores. The ranking is exact.

    Args:
        layout: The space.
        weights: As in `decode`.
        n: How many; fewer are returned where the space has fewer.
        skips: As in `decode`, like all that follow.
        architecture: The teacher keeps its widths.
        branches: Every architecture has this set of branches.
        method: As in `decode`.
        down_skips: As in `decode`.

    Raises:
        ArchitectureError: As `decode` does, or ``n`` is less than 1.
    """
    probabilities = ChoiceProbabilities(layout, weights)
    if n < 1:
        raise ArchitectureError(f"n={n}: ask for at least one architecture")
    if down_skips not in DOWN_SKIPS:
        raise ArchitectureError(f"down_skips {down_skips!r}: {did_you_mean(down_skips, DOWN_SKIPS)}")
    if architecture not in layout.fixed_choices:
        raise ArchitectureError(f"architecture {architecture!r}: {did_you_mean(architecture, layout.fixed_choices)}")
    if branches is None:
        branches = str(probabilities.best(BRANCHES_LABEL))
    if branches not in layout.branch_sets:
        raise ArchitectureError(f"branches {branches!r}: {did_you_mean(branches, layout.branch_sets)}")
    routes = k_best_paths(layout, weights, layout.branch_sets[branches], n, method=method)
    decoding = _Decoding(layout, probabilities, frozenset(skips), architecture, branches, method, down_skips)
    # An architecture on the (n+1)-th best paths scores no more than the best one on each of the n before.
    queue = [_Candidate(score, number, paths, {}, {}) for number, (score, paths) in enumerate(routes)]
    heapq.heapify(queue)
    number, found, known = len(queue), list[Ranked](), set[tuple[Any, ...]]()
    while queue and len(found) < n:
        candidate = heapq.heappop(queue)
        sample = decoding.sample(candidate)
        plan = make_plan(layout, sample, skips)
        if _identity(plan) not in known:
            known.add(_identity(plan))
            found.append(Ranked(sample, candidate.log_score))
        for following in decoding.next_candidates(candidate, plan):
            heapq.heappush(queue, replace(following, number=number))
            number += 1
    return found


@dataclass(frozen=True)
class _Candidate:
    # Operators and widths say how many places below the best a label's value ranks; the best ones are not listed.
    log_score: float
    number: int
    paths: Mapping[int, list[Cell]]
    operators: Mapping[str, int]
    widths: Mapping[str, int]

    def __lt__(self, other: _Candidate) -> bool:
        return (-self.log_score, self.number) < (-other.log_score, other.number)


@dataclass(frozen=True)
class _Decoding:
    layout: Layout
    probabilities: ChoiceProbabilities
    skips: frozenset[str]
    architecture: str
    branches: str
    method: str
    down_skips: str

    @property
    def teacher(self) -> bool:
        return self.architecture == "teacher"

    def sample(self, candidate: _Candidate) -> dict[str, Any]:
        layout, probabilities, paths = self.layout, self.probabilities, candidate.paths
        sample: dict[str, Any] = {}
        for label, values in layout.choices.items():
            if label.startswith("op_"):
                sample[label] = self.ranked(label)[candidate.operators.get(label, 0)][0]
            elif label.startswith("in_"):
                sample[label] = [int(probabilities.best(label))]
            elif label.startswith("width_s"):
                place = candidate.widths.get(label, 0)
                sample[label] = values[-1] if self.teacher else self.ranked(label)[place][0]
        sample[BRANCHES_LABEL] = self.branches
        sample.update(layout.fixed_choices[self.architecture])
        for path in paths.values():
            for source, cell in pairwise(path):
                if layout.has_input_choice(cell):
                    sample[f"in_{cell.name}"] = [0 if source.scale < cell.scale else 1]
        if self.down_skips == "next_best" or self.method == "fasterseg":
            _replace_down_skips(layout, sample, paths, probabilities, self.skips)
        if layout.skip_policy == "remove":
            kept = _kept_skips(layout, sample, paths, probabilities, self.skips)
            if self.method == "fasterseg":
                for cell in kept:
                    sample[f"op_{cell.name}"] = probabilities.best(f"op_{cell.name}", without=self.skips)
            else:
                _note_kept_skips(layout, sample, kept, self.skips)
        return sample

    def ranked(self, label: str) -> list[tuple[Any, float]]:
        # Values with their log probabilities relative to the best, best first.
        without = self.skips if self.teacher and label.startswith("op_") else frozenset[str]()
        return self.probabilities.ranked(label, without)

    def next_candidates(self, candidate: _Candidate, plan: NetworkPlan) -> Iterator[_Candidate]:
        # Each combination of places is reached in one way only: by raising labels in their order, operators first.
        if not candidate.widths:
            passed = {f"op_{cell.name}" for path in candidate.paths.values() for cell in path}
            yield from self._raised(candidate, "operators", sorted(passed))
        if not self.teacher:
            nodes = [self.layout.successor(step.cell, step.stride) for step in plan.steps]
            labels = {self.layout.width_label(node) for node in nodes if node is not None}
            yield from self._raised(candidate, "widths", sorted(label for label in labels if label))

    def _raised(self, candidate: _Candidate, kind: str, labels: list[str]) -> Iterator[_Candidate]:
        places: Mapping[str, int] = getattr(candidate, kind)
        last = max(places, default="")
        for label in labels:
            ranked, place = self.ranked(label), places.get(label, 0)
            if label >= last and place + 1 < len(ranked):
                score = candidate.log_score - ranked[place][1] + ranked[place + 1][1]
                changed: Any = {kind: {**places, label: place + 1}}
                yield replace(candidate, log_score=score, **changed)


def _identity(plan: NetworkPlan) -> tuple[Any, ...]:
    return plan.end_width, plan.branch_set, plan.steps, tuple(plan.outputs.items())


def _replace_down_skips(
    layout: Layout,
    sample: dict[str, Any],
    paths: Mapping[int, list[Cell]],
    probabilities: ChoiceProbabilities,
    skips: Collection[str],
) -> None:
    used: dict[Cell, set[int]] = {}
    for path in paths.values():
        for position, cell in enumerate(path):
            used.setdefault(cell, set()).add(stride_at(path, position))
    down: dict[str, str] = {}
    for cell, strides in used.items():
        if 2 not in strides or sample[f"op_{cell.name}"] not in skips:
            continue
        operator = str(probabilities.best(f"op_{cell.name}", without=skips))
        if 1 in strides:
            down[cell.name] = operator
        else:
            sample[f"op_{cell.name}"] = operator
    if down:
        sample[DOWN_OPERATORS] = down


def _kept_skips(
    layout: Layout,
    sample: Mapping[str, Any],
    paths: Mapping[int, list[Cell]],
    probabilities: ChoiceProbabilities,
    skips: Collection[str],
) -> set[Cell]:
    kept: set[Cell] = set()
    for path in paths.values():
        removable = removable_skips(path, [sample[f"op_{cell.name}"] for cell in path], skips)
        confidence = {i: probabilities.share(f"op_{path[i].name}", sample[f"op_{path[i].name}"]) for i in removable}
        kept |= {path[i] for i in choose_kept(layout, path, removable, confidence)}
    return kept


def _note_kept_skips(layout: Layout, sample: dict[str, Any], kept: set[Cell], skips: Collection[str]) -> None:
    def left() -> set[Cell]:
        return {
            step.cell for step in make_plan(layout, sample, skips).steps if step.operator in skips and step.stride == 1
        }

    if left() != kept:
        sample[KEPT_SKIPS] = sorted(cell.name for cell in kept)
