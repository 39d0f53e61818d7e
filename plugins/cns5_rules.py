"""The rules of WHO CNS5 (2021) for adult-type diffuse glioma, as a table: read by `glioma_nas.plugins.subtype`.

Rules are tried from top to bottom; the first whose conditions hold decides. ``all_of`` gives for each marker the states
it may have; every group of ``any_of`` needs at least one of its (marker, state) pairs.

Reference:
    Louis et al., The 2021 WHO Classification of Tumors of the Central Nervous System, Neuro-Oncology 23 (2021);
    Brat et al., cIMPACT-NOW update 3, Acta Neuropathologica 136 (2018): molecular criteria of glioblastoma.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

ALTERED, WILDTYPE, UNKNOWN = "altered", "wildtype", "unknown"

MARKERS: Mapping[str, str] = {
    "h3": "H3 K27 or G34 alteration",
    "idh": "IDH1/2 mutation",
    "codel_1p19q": "1p/19q codeletion",
    "atrx": "ATRX loss",
    "cdkn2a": "CDKN2A/B homozygous deletion",
    "tertp": "TERT promoter mutation",
    "egfr": "EGFR amplification",
    "chr7_10": "gain of chromosome 7 with loss of 10",
    "mvp": "microvascular proliferation",
    "necrosis": "necrosis",
}
"""What the rules know, by the name that configurations and results use."""

PRIORS: Mapping[str, float] = {"h3": 0.05}
"""Chance that a marker nobody measured or predicted is altered, for choosing the next test; one half where not given.

A convention, not epidemiology: H3 alterations are rare in adults, and about the others nothing is assumed.
"""

Pairs = tuple[tuple[str, str], ...]
_GLIOBLASTOMA = ("tertp", "egfr", "chr7_10", "mvp", "necrosis")
_GRADE_4 = ("cdkn2a", "mvp", "necrosis")


@dataclass(frozen=True)
class Rule:
    """One row of the table.

    Attributes:
        name: For results and tests.
        diagnosis: What follows.
        grade: CNS WHO grade in words; empty when none follows.
        kind: ``diagnosis``, ``nos`` (not tested enough), ``nec`` (tested, fits nothing), ``conflict`` (withheld) or
            ``out_of_scope``.
        all_of: Marker → states it may have.
        any_of: Groups of which one pair each must hold.
    """

    name: str
    diagnosis: str
    grade: str
    kind: str
    all_of: Mapping[str, tuple[str, ...]]
    any_of: tuple[Pairs, ...] = ()

    def holds(self, states: Mapping[str, str]) -> bool:
        """Tell whether the conditions hold for a state of every marker."""
        return all(states[marker] in allowed for marker, allowed in self.all_of.items()) and all(
            any(states[marker] == state for marker, state in group) for group in self.any_of
        )


def _altered(markers: tuple[str, ...]) -> Pairs:
    return tuple((marker, ALTERED) for marker in markers)


_ASTROCYTIC: Pairs = (("codel_1p19q", WILDTYPE), ("atrx", ALTERED))
_MUTANT = {"idh": (ALTERED,)}
_IDH_WILDTYPE = {"idh": (WILDTYPE,)}

RULES: tuple[Rule, ...] = (
    Rule("h3_altered", "H3-altered diffuse glioma, outside these rules", "", "out_of_scope", {"h3": (ALTERED,)}),
    Rule(
        "conflict_codeletion_without_idh_mutation",
        "withheld: 1p/19q codeletion with IDH wildtype",
        "",
        "conflict",
        {**_IDH_WILDTYPE, "codel_1p19q": (ALTERED,)},
    ),
    Rule(
        "conflict_codeletion_with_atrx_loss",
        "withheld: 1p/19q codeletion with ATRX loss",
        "",
        "conflict",
        {"codel_1p19q": (ALTERED,), "atrx": (ALTERED,)},
    ),
    Rule(
        "conflict_idh_mutation_with_egfr",
        "withheld: IDH mutation with EGFR amplification",
        "",
        "conflict",
        {**_MUTANT, "egfr": (ALTERED,)},
    ),
    Rule(
        "conflict_idh_mutation_with_chr7_10",
        "withheld: IDH mutation with gain of 7 and loss of 10",
        "",
        "conflict",
        {**_MUTANT, "chr7_10": (ALTERED,)},
    ),
    Rule(
        "oligodendroglioma",
        "oligodendroglioma, IDH-mutant and 1p/19q-codeleted",
        "2 or 3",
        "diagnosis",
        {**_MUTANT, "codel_1p19q": (ALTERED,)},
    ),
    Rule(
        "astrocytoma_grade_4",
        "astrocytoma, IDH-mutant",
        "4",
        "diagnosis",
        _MUTANT,
        (_ASTROCYTIC, _altered(_GRADE_4)),
    ),
    Rule(
        "astrocytoma_grade_2_or_3",
        "astrocytoma, IDH-mutant",
        "2 or 3",
        "diagnosis",
        {**_MUTANT, **dict.fromkeys(_GRADE_4, (WILDTYPE,))},
        (_ASTROCYTIC,),
    ),
    Rule(
        "astrocytoma_grade_open",
        "astrocytoma, IDH-mutant",
        "2 to 4, not all of its criteria tested",
        "diagnosis",
        _MUTANT,
        (_ASTROCYTIC,),
    ),
    Rule("idh_mutant_nos", "diffuse glioma, IDH-mutant, NOS", "", "nos", _MUTANT),
    Rule(
        "glioblastoma",
        "glioblastoma, IDH-wildtype",
        "4",
        "diagnosis",
        {**_IDH_WILDTYPE, "h3": (WILDTYPE,)},
        (_altered(_GLIOBLASTOMA),),
    ),
    Rule(
        "idh_wildtype_nec",
        "diffuse glioma, IDH-wildtype and H3-wildtype, NEC",
        "",
        "nec",
        {**_IDH_WILDTYPE, "h3": (WILDTYPE,), **dict.fromkeys(_GLIOBLASTOMA, (WILDTYPE,))},
    ),
    Rule("idh_wildtype_nos", "diffuse glioma, IDH-wildtype, NOS", "", "nos", _IDH_WILDTYPE),
    Rule("idh_unknown_nos", "diffuse glioma, NOS", "", "nos", {"idh": (UNKNOWN,)}),
)
