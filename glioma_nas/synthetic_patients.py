"""Draw synthetic glioma patients whose age, grade and molecular markers go together as published.

Three groups: IDH-mutant with 1p/19q codeletion (oligodendroglioma), IDH-mutant and intact (astrocytoma), IDH-wildtype
(mostly glioblastoma). Shares are chosen so that a small cohort still holds enough of each class; ages follow Ostrom et
al. 2022 (CBTRUS, https://doi.org/10.1093/neuonc/noac202) and Ki67 rises with grade.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from glioma_nas.cohort import Sex
from glioma_nas.seeding import numpy_generator

# One block of patients in random order. A cohort is a prefix of repeated blocks, so patient 7 is the same person in a
# cohort of ten and in one of a hundred.
_BLOCK = ("oligodendroglioma",) * 5 + ("astrocytoma",) * 7 + ("glioblastoma",) * 8


@dataclass(frozen=True)
class _Group:
    idh: str
    codel_1p19q: str
    methylated: float
    grades: tuple[float, float, float]
    age_years: tuple[float, float]


# Shares of grades 2, 3, 4; mean and deviation of age.
_GROUPS = {
    "oligodendroglioma": _Group("mutant", "codeleted", 0.92, (0.6, 0.4, 0.0), (46, 13)),
    "astrocytoma": _Group("mutant", "intact", 0.8, (0.45, 0.35, 0.2), (38, 11)),
    "glioblastoma": _Group("wildtype", "intact", 0.42, (0.0, 0.15, 0.85), (60, 12)),
}
_KI67_MEDIAN_PERCENT = {2: 3.0, 3: 8.0, 4: 25.0}
_KI67_LOG_DEVIATION = 0.5
_MALE_SHARE = 0.58
_MISMATCH_SHARE = 0.4


@dataclass(frozen=True)
class SyntheticPatient:
    """What is known of a synthetic patient, before any image is drawn.

    Attributes:
        case_id: ``SYN-0001`` onwards.
        idh: ``mutant`` or ``wildtype``.
        codel_1p19q: ``codeleted`` or ``intact``.
        mgmt: ``methylated`` or ``unmethylated``; leaves no trace in the images.
        grade: 2, 3 or 4.
        ki67_percent: Proliferation index, 0.5 to 95.
        age_years: 18 to 85.
        sex: ``M`` or ``F``; leaves no trace in the images.
        t2_flair_mismatch: Whether the core is bright on T2 and dark on FLAIR with a bright rim; mutant and intact only.
    """

    case_id: str
    idh: str
    codel_1p19q: str
    mgmt: str
    grade: int
    ki67_percent: float
    age_years: float
    sex: Sex
    t2_flair_mismatch: bool

    @property
    def is_mutant(self) -> bool:
        """Whether IDH is mutant."""
        return self.idh == "mutant"

    @property
    def proliferation(self) -> float:
        """Ki67 index on a scale from 0 to 1 that is ½ at 10 %."""
        return 1.0 / (1.0 + float(np.exp(-1.5 * np.log(self.ki67_percent / 10.0))))


def draw_patient(number: int, seed: int) -> SyntheticPatient:
    """Draw patient ``number`` (from 1) of the cohort with this seed."""
    block, place = divmod(number - 1, len(_BLOCK))
    order = numpy_generator(seed, "synthetic", "block", block).permutation(len(_BLOCK))
    name = _BLOCK[int(order[place])]
    group = _GROUPS[name]
    generator = numpy_generator(seed, "synthetic", "patient", number)
    grade = 2 + int(generator.choice(3, p=group.grades))
    ki67 = _KI67_MEDIAN_PERCENT[grade] * float(np.exp(generator.normal(0, _KI67_LOG_DEVIATION)))
    return SyntheticPatient(
        case_id=f"SYN-{number:04d}",
        idh=group.idh,
        codel_1p19q=group.codel_1p19q,
        mgmt="methylated" if generator.random() < group.methylated else "unmethylated",
        grade=grade,
        ki67_percent=round(float(np.clip(ki67, 0.5, 95.0)), 1),
        age_years=round(float(np.clip(generator.normal(*group.age_years), 18, 85))),
        sex="M" if generator.random() < _MALE_SHARE else "F",
        t2_flair_mismatch=bool(name == "astrocytoma" and generator.random() < _MISMATCH_SHARE),
    )
