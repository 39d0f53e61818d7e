"""Integrated subtype (METHOD §10): from marker states, measured or predicted, to a diagnosis of WHO CNS5, or to none.

With predicted markers all joint states are gone through, their probabilities multiplied as if markers were independent
given the images, and those that lead to the same diagnosis are added up. Below ``tau`` nothing is called. The test that
would settle most is the marker with the largest mutual information with the final diagnosis.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from glioma_nas.errors import ConfigError, LabelError, did_you_mean
from glioma_nas.plugins.cns5_rules import ALTERED, MARKERS, PRIORS, RULES, UNKNOWN, WILDTYPE, Rule
from glioma_nas.registry import subtypes

DISCLAIMER = "Imaging-based prediction, research use only; not a WHO integrated diagnosis (tissue required)."
STATES = (ALTERED, WILDTYPE, UNKNOWN)
_CERTAIN = 1e-12


@dataclass(frozen=True)
class IntegratedDiagnosis:
    """What the markers of one patient add up to.

    Attributes:
        probabilities: Outcome → probability, largest first; sums to 1.
        call: The outcome that is called; none when abstained or withheld.
        grade: CNS WHO grade in words, of the likeliest rule behind the call; empty when none follows.
        rule: Name of that rule; of the likeliest one when nothing is called.
        reason: Why nothing is called; empty otherwise.
        next_test: The marker, neither measured nor certain, whose test would settle most; none when nothing is open.
        next_test_bits: Its mutual information with the final diagnosis, in bits.
        disclaimer: Always to be shown.
    """

    probabilities: Mapping[str, float]
    call: str | None
    grade: str
    rule: str
    reason: str
    next_test: str | None
    next_test_bits: float
    disclaimer: str = DISCLAIMER

    def as_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "call": self.call,
            "grade": self.grade,
            "rule": self.rule,
            "reason": self.reason,
            "probabilities": {name: round(value, 4) for name, value in self.probabilities.items()},
            "next_test": self.next_test,
            "next_test_bits": round(self.next_test_bits, 4),
            "disclaimer": self.disclaimer,
        }

    def text(self) -> str:
        """Say it in words, the disclaimer included."""
        if self.call is not None:
            grade = f", CNS WHO grade {self.grade}" if self.grade else ""
            said = f"{self.call}{grade} (probability {self.probabilities[self.call]:.2f})."
        else:
            said = f"No call: {self.reason}."
        if self.next_test is not None:
            said += f" Most informative next test: {MARKERS[self.next_test]} ({self.next_test_bits:.2f} bit)."
        return f"{said} {self.disclaimer}"


@subtypes.register("cns5_2021")
class Cns5Rules:
    """WHO CNS5 (2021) for adult-type diffuse glioma: oligodendroglioma, astrocytoma, glioblastoma, NOS, NEC.

    Args:
        tau: Nothing is called when the likeliest outcome has less than this probability, in (0, 1].
        priors: Marker → chance that it is altered, for markers nobody measured or predicted; see `PRIORS`. They choose
            the next test only.

    Raises:
        ConfigError: ``tau`` is out of range, or a prior is for an unknown marker.
    """

    markers = MARKERS

    def __init__(self, *, tau: float = 0.6, priors: Mapping[str, float] | None = None) -> None:
        if not 0 < tau <= 1:
            raise ConfigError(f"subtype: tau is {tau}; give a probability above 0, up to 1")
        self.tau = tau
        self.priors = {**PRIORS, **(priors or {})}
        for name in self.priors:
            _check_marker(name)

    def decide(self, states: Mapping[str, str]) -> Rule:
        """Return the rule that decides for certain states.

        Args:
            states: Marker → ``altered``, ``wildtype`` or ``unknown``; markers left out are unknown.

        Raises:
            ConfigError: A marker is unknown.
            LabelError: A state is.
        """
        for name, state in states.items():
            _check_marker(name)
            if state not in STATES:
                raise LabelError(f"subtype: state of '{name}' is '{state}': {did_you_mean(state, STATES)}")
        complete = {**dict.fromkeys(MARKERS, UNKNOWN), **states}
        return next(rule for rule in RULES if rule.holds(complete))

    def integrate(
        self, measured: Mapping[str, str], predicted: Mapping[str, float] | None = None
    ) -> IntegratedDiagnosis:
        """Add up what is known of one patient.

        Args:
            measured: Marker → state; what was measured outweighs a prediction of the same marker.
            predicted: Marker → probability that it is altered, in [0, 1].

        Raises:
            ConfigError: A marker is unknown.
            LabelError: A state is unknown, or a probability out of range.
        """
        self.decide(measured)
        known = {name: state for name, state in measured.items() if state != UNKNOWN}
        beliefs = {}
        for name, value in (predicted or {}).items():
            _check_marker(name)
            if not (0 <= value <= 1):
                raise LabelError(f"subtype: probability of '{name}' is {value}; give one in 0 … 1")
            if name not in known:
                beliefs[name] = float(value)
        by_outcome: dict[str, float] = {}
        by_rule: dict[str, float] = {}
        rules: dict[str, Rule] = {}
        for states, probability in _joint_states(beliefs):
            rule = self.decide({**known, **states})
            rules[rule.name] = rule
            by_rule[rule.name] = by_rule.get(rule.name, 0.0) + probability
            by_outcome[rule.diagnosis] = by_outcome.get(rule.diagnosis, 0.0) + probability
        ranked = dict(sorted(by_outcome.items(), key=lambda item: -item[1]))
        top = next(iter(ranked))
        likeliest = rules[
            max((name for name, rule in rules.items() if rule.diagnosis == top), key=lambda name: by_rule[name])
        ]
        reason = ""
        if likeliest.kind == "conflict":
            reason = f"the likeliest marker states contradict each other ({top})"
        elif ranked[top] < self.tau:
            reason = f"the likeliest outcome ({top}) has probability {ranked[top]:.2f}, below {self.tau:g}"
        test, bits = self._next_test(known, beliefs)
        return IntegratedDiagnosis(
            ranked, None if reason else top, "" if reason else likeliest.grade, likeliest.name, reason, test, bits
        )

    def _next_test(self, known: Mapping[str, str], beliefs: Mapping[str, float]) -> tuple[str | None, float]:
        """Return the open marker with the largest mutual information with the diagnosis under complete knowledge.

        Joint states that contradict themselves cannot be, so they are left out.
        """
        if self.decide(known).kind in ("conflict", "out_of_scope"):
            return None, 0.0
        open_markers = {name: beliefs.get(name, self.priors.get(name, 0.5)) for name in MARKERS if name not in known}
        table = []
        for states, probability in _joint_states(open_markers):
            rule = self.decide({**known, **states})
            if rule.kind != "conflict":
                table.append((states, f"{rule.diagnosis} {rule.grade}", probability))
        best: tuple[str | None, float] = (None, 0.0)
        total = sum(probability for _, _, probability in table)
        if total <= 0:
            return best
        before = _entropy(table)
        for name in open_markers:
            after = 0.0
            for state in (ALTERED, WILDTYPE):
                part = [row for row in table if row[0][name] == state]
                share = sum(row[2] for row in part) / total
                after += share * _entropy(part) if share > 0 else 0.0
            if before - after > best[1] + _CERTAIN:
                best = (name, before - after)
        return best


def _joint_states(beliefs: Mapping[str, float]) -> Iterator[tuple[dict[str, str], float]]:
    for combination in itertools.product((ALTERED, WILDTYPE), repeat=len(beliefs)):
        probability = math.prod(
            p if state == ALTERED else 1 - p for state, p in zip(combination, beliefs.values(), strict=True)
        )
        if probability > 0:
            yield dict(zip(beliefs, combination, strict=True)), probability


def _entropy(table: list[tuple[dict[str, str], str, float]]) -> float:
    total = sum(probability for _, _, probability in table)
    shares: dict[str, float] = {}
    for _, outcome, probability in table:
        shares[outcome] = shares.get(outcome, 0.0) + probability / total
    return -sum(share * math.log2(share) for share in shares.values() if share > 0)


def _check_marker(name: str) -> None:
    if name not in MARKERS:
        raise ConfigError(f"subtype: unknown marker '{name}': {did_you_mean(name, MARKERS)}")
