"""Draw synthetic glioma patients whose age, grade, markers and imaging phenotype go together as published.

Three groups: IDH-mutant with 1p/19q codeletion (oligodendroglioma), IDH-mutant and intact (astrocytoma), IDH-wildtype
(mostly glioblastoma). The markers beside IDH are what the WHO 2021 rules ask for, drawn so that the rules agree with
the group: ATRX is lost in astrocytoma, the TERT promoter mutated in oligodendroglioma and glioblastoma, and so on.
Shares follow Eckel-Passow et al. 2015 (https://doi.org/10.1056/NEJMoa1407279), Ceccarelli et al. 2016
(https://doi.org/10.1016/j.cell.2015.12.028) and Brat et al. 2018 (https://doi.org/10.1007/s00401-018-1913-0), rounded.
``grade`` is the histological one: a wildtype of grade 2 or 3 may still be a glioblastoma by its markers.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np

from glioma_nas.cohort import Sex
from glioma_nas.seeding import numpy_generator

Enhancement = Literal["none", "patches", "ring"]
Group = Literal["oligodendroglioma", "astrocytoma", "glioblastoma"]

# One block of patients in random order: 21, 36 and 43 %. A cohort is a prefix of repeated blocks, so patient 7 is the
# same person in a cohort of ten and in one of a hundred, and a small cohort holds every group.
_BLOCK: tuple[Group, ...] = ("oligodendroglioma",) * 3 + ("astrocytoma",) * 5 + ("glioblastoma",) * 6


# Ages of a group follow a sequence that fills its distribution evenly (multiples of the golden ratio, from a random
# start) but for this share of their deviation, which is chance. Drawn independently, the ages of 84 patients would tell
# IDH with an AUC that scatters by 0.05, so that many a small cohort would not show what is designed into it.
_GOLDEN = (5**0.5 - 1) / 2
_AGE_CHANCE = 0.1


@dataclass(frozen=True)
class GroupFigures:
    """What is designed into one group.

    Attributes:
        grades: Shares of grades 2, 3 and 4.
        age_years: Mean and deviation, before ages are cut to 18 to 85.
        mismatch: Share with the T2-FLAIR mismatch sign.
        male: Share of men.
        lobes: Where the tumour begins: frontal, temporal, parietal, occipital, insular, deep.
    """

    grades: tuple[float, float, float]
    age_years: tuple[float, float]
    mismatch: float
    male: float
    lobes: tuple[float, float, float, float, float, float]


LOBES = ("frontal", "temporal", "parietal", "occipital", "insular", "deep")

GROUPS: dict[Group, GroupFigures] = {
    "oligodendroglioma": GroupFigures((0.54, 0.45, 0.01), (46, 13), 0.01, 0.55, (0.62, 0.12, 0.13, 0.03, 0.08, 0.02)),
    "astrocytoma": GroupFigures((0.48, 0.41, 0.11), (38, 11), 0.40, 0.56, (0.50, 0.22, 0.11, 0.03, 0.12, 0.02)),
    "glioblastoma": GroupFigures((0.02, 0.19, 0.79), (60, 12), 0.01, 0.59, (0.30, 0.30, 0.21, 0.08, 0.04, 0.07)),
}

METHYLATED = {True: 0.85, False: 0.42}
"""Share with a methylated MGMT promoter by whether IDH is mutant; nothing else matters."""

KI67_MEDIAN_PERCENT = {2: 3.0, 3: 8.0, 4: 25.0}
KI67_LOG_DEVIATION = 0.5

# Shares of ring and of patchy enhancement, by whether IDH is mutant and grade; the rest does not enhance.
_RING_AND_PATCHES = {
    (True, 2): (0.02, 0.12),
    (True, 3): (0.08, 0.22),
    (True, 4): (0.45, 0.40),
    (False, 2): (0.10, 0.30),
    (False, 3): (0.25, 0.40),
    (False, 4): (0.90, 0.08),
}


@dataclass(frozen=True)
class SyntheticPatient:
    """What is known of a synthetic patient before any image is drawn.

    Attributes:
        case_id: ``SYN-0001`` onwards.
        age_years: 18 to 85; leaves no trace in the images.
        sex: ``M`` or ``F``; leaves no trace in the images.
        site: ``A`` onwards; whose scanner it was, whatever the tumour.
        idh: ``mutant`` or ``wildtype``.
        codel_1p19q: ``codeleted`` or ``intact``.
        mgmt: ``methylated`` or ``unmethylated``; depends on IDH alone.
        grade: 2, 3 or 4, histological.
        ki67_percent: Proliferation index, 0.5 to 95.
        atrx: ``lost`` or ``retained``.
        tertp: TERT promoter, ``mutant`` or ``wildtype``.
        cdkn2a: ``deleted`` (CDKN2A/B, homozygous) or ``intact``.
        chr7_10: ``altered`` (gain of 7 and loss of 10) or ``intact``.
        egfr: ``amplified`` or ``not_amplified``.
        h3: ``wildtype`` always; adult-type gliomas only.
        mvp: Microvascular proliferation, ``present`` or ``absent``.
        necrosis: In the tissue, ``present`` or ``absent``.
        t2_flair_mismatch: The core is bright on T2 and dark on FLAIR within a bright rim.
        enhancement: How the tumour takes up contrast agent.
        lobe: Where it begins, one of `LOBES`.
    """

    case_id: str
    age_years: float
    sex: Sex
    site: str
    idh: str
    codel_1p19q: str
    mgmt: str
    grade: int
    ki67_percent: float
    atrx: str
    tertp: str
    cdkn2a: str
    chr7_10: str
    egfr: str
    h3: str
    mvp: str
    necrosis: str
    t2_flair_mismatch: bool
    enhancement: Enhancement
    lobe: str

    @property
    def is_mutant(self) -> bool:
        """Whether IDH is mutant."""
        return self.idh == "mutant"

    @property
    def group(self) -> Group:
        """The group by IDH and 1p/19q."""
        if not self.is_mutant:
            return "glioblastoma"
        return "oligodendroglioma" if self.codel_1p19q == "codeleted" else "astrocytoma"

    @property
    def proliferation(self) -> float:
        """Logarithm of the Ki67 index against the median of the patient's grade, in deviations."""
        return float(np.log(self.ki67_percent / KI67_MEDIAN_PERCENT[self.grade])) / KI67_LOG_DEVIATION


def draw_patient(number: int, seed: int, *, n_sites: int = 4) -> SyntheticPatient:
    """Draw patient ``number`` (from 1) of the cohort with this seed."""
    block, place = divmod(number - 1, len(_BLOCK))
    order = numpy_generator(seed, "synthetic", "block", block).permutation(len(_BLOCK))
    group = _BLOCK[int(order[place])]
    earlier = block * _BLOCK.count(group) + sum(_BLOCK[int(other)] == group for other in order[:place])
    figures = GROUPS[group]
    generator = numpy_generator(seed, "synthetic", "patient", number)
    mutant = group != "glioblastoma"
    grade = 2 + int(generator.choice(3, p=figures.grades))
    ki67 = KI67_MEDIAN_PERCENT[grade] * float(np.exp(generator.normal(0, KI67_LOG_DEVIATION)))
    mismatch = bool(generator.random() < figures.mismatch)
    ring, patches = _RING_AND_PATCHES[mutant, grade]
    chance = float(generator.random())
    enhancement: Enhancement = "ring" if chance < ring else "patches" if chance < ring + patches else "none"
    age_years = _age_years(figures, seed, group, earlier, chance=float(generator.standard_normal()))
    sex: Sex = "M" if generator.random() < figures.male else "F"
    methylated = generator.random() < METHYLATED[mutant]
    lobe = LOBES[int(generator.choice(len(LOBES), p=figures.lobes))]
    site = chr(ord("A") + int(generator.integers(n_sites)))
    return SyntheticPatient(
        case_id=f"SYN-{number:04d}",
        age_years=age_years,
        sex=sex,
        site=site,
        idh="mutant" if mutant else "wildtype",
        codel_1p19q="codeleted" if group == "oligodendroglioma" else "intact",
        mgmt="methylated" if methylated else "unmethylated",
        grade=grade,
        ki67_percent=round(float(np.clip(ki67, 0.5, 95.0)), 1),
        **_molecular(group, grade, numpy_generator(seed, "synthetic", "molecular", number)),
        t2_flair_mismatch=mismatch,
        # The sign is defined on tumours that do not enhance.
        enhancement="none" if mismatch else enhancement,
        lobe=lobe,
    )


def _age_years(figures: GroupFigures, seed: int, group: Group, earlier: int, *, chance: float) -> int:
    """Return the age of the patient before whom there are ``earlier`` of the same group; normal over all cohorts."""
    start = float(numpy_generator(seed, "synthetic", "ages", group).random())
    even = NormalDist().inv_cdf(min(max((start + earlier * _GOLDEN) % 1, 1e-9), 1 - 1e-9))
    mean, deviation = figures.age_years
    age = mean + deviation * ((1 - _AGE_CHANCE**2) ** 0.5 * even + _AGE_CHANCE * chance)
    return round(float(np.clip(age, 18, 85)))


def _molecular(group: Group, grade: int, generator: np.random.Generator) -> dict[str, str]:
    def drawn(share: float) -> bool:
        return bool(generator.random() < share)

    if group == "oligodendroglioma":
        lost, promoter, deleted, gain, amplified = False, drawn(0.96), grade > 2 and drawn(0.1), False, False
        vessels, necrosis = grade > 2 and drawn(0.5), grade > 2 and drawn(0.15)
    elif group == "astrocytoma":
        lost, promoter, gain, amplified = drawn(0.88), drawn(0.04), False, False
        # Any of these three makes an astrocytoma grade 4, and nothing else does.
        deleted, vessels, necrosis = grade == 4 and drawn(0.5), grade == 4 and drawn(0.7), grade == 4 and drawn(0.6)
        if grade == 4 and not (deleted or vessels or necrosis):
            vessels = True
    else:
        lost, promoter, deleted = drawn(0.02), drawn(0.75), drawn(0.55)
        gain, amplified = drawn(0.6), drawn(0.42)
        vessels, necrosis = grade == 4 and drawn(0.85), grade == 4 and drawn(0.85)
        if grade == 4 and not (vessels or necrosis):
            vessels = True
    return {
        "atrx": "lost" if lost else "retained",
        "tertp": "mutant" if promoter else "wildtype",
        "cdkn2a": "deleted" if deleted else "intact",
        "chr7_10": "altered" if gain else "intact",
        "egfr": "amplified" if amplified else "not_amplified",
        "h3": "wildtype",
        "mvp": "present" if vessels else "absent",
        "necrosis": "present" if necrosis else "absent",
    }
