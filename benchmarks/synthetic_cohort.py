"""Measure what the synthetic cohort shows: z-scores of tumour parts, what images and age tell, seconds a patient.

python benchmarks/synthetic_cohort.py --patients 420 --size-px 60
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from functools import partial

import numpy as np
import numpy.typing as npt

from glioma_nas.roc_analysis import delong
from glioma_nas.synthetic.measurement import (
    Z_RANGES,
    auc_within,
    cross_validated_scores,
    image_features,
    part_z,
)
from glioma_nas.synthetic.patients import draw_patient
from glioma_nas.synthetic.scans import draw_scans
from glioma_nas.worker_pool import outcomes

Figures = tuple[npt.NDArray[np.float64], dict[tuple[str, str], float], float]


def measure(seed: int, size_px: int, noise_factor: float, number: int) -> Figures:
    """Draw one patient and describe the scans; the last figure is CPU seconds of drawing."""
    started = time.process_time()
    scans = draw_scans(draw_patient(number, seed), seed, size_px=size_px, noise_factor=noise_factor)
    seconds = time.process_time() - started
    return image_features(scans), part_z(scans), seconds


def line(
    name: str, scores: npt.NDArray[np.float64], positive: npt.NDArray[np.bool_], strata: Sequence[str] = ()
) -> None:
    """Print one AUC, and the one over pairs within strata only."""
    estimate = delong(positive.astype(int), scores)
    text = f"{name:44s} {estimate.value:.3f}  ({estimate.low:.3f} to {estimate.high:.3f}), n {len(positive)}"
    if strata:
        text += f"; within strata {auc_within(scores, positive, strata):.3f}"
    print(text)


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--patients", type=int, default=420)
    parser.add_argument("--size-px", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--noise-factor", type=float, default=1.0)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    numbers = list(range(1, options.patients + 1))
    people = [draw_patient(number, options.seed) for number in numbers]
    job = partial(measure, options.seed, options.size_px, options.noise_factor)
    by_patient = dict(outcomes(job, numbers, workers=options.workers))
    features = np.array([by_patient[k][0] for k in range(len(numbers))])
    wildtype = np.array([not patient.is_mutant for patient in people])
    idh = [patient.idh for patient in people]
    print(f"seed {options.seed}, {options.size_px} px, AUC with 95 % interval (DeLong), out of fold")
    line("IDH wildtype from images", cross_validated_scores(features, wildtype, options.seed), wildtype)
    line("IDH wildtype from age", np.array([patient.age_years for patient in people]), wildtype)
    methylated = np.array([patient.mgmt == "methylated" for patient in people])
    line(
        "MGMT methylated from images, strata IDH",
        cross_validated_scores(features, methylated, options.seed),
        methylated,
        idh,
    )
    proliferating = np.array([patient.ki67_percent >= 10 for patient in people])
    grades = [str(patient.grade) for patient in people]
    line(
        "Ki67 >= 10 % from images, strata grade",
        cross_validated_scores(features, proliferating, options.seed),
        proliferating,
        grades,
    )
    mutant = ~wildtype
    codeleted = np.array([patient.codel_1p19q == "codeleted" for patient in people])[mutant]
    line(
        "1p/19q from images, mutants only", cross_validated_scores(features[mutant], codeleted, options.seed), codeleted
    )
    print(
        "\npart and sequence: mean z of each patient's part (>= 1 ml): 5 %, median, 95 %; share within the real range"
    )
    for key, (low, high) in Z_RANGES.items():
        values = np.array([record[1][key] for record in by_patient.values() if key in record[1]])
        q05, median, q95 = np.percentile(values, [5, 50, 95])
        inside = float(((values >= low) & (values <= high)).mean())
        spread = f"{q05:+.2f} {median:+.2f} {q95:+.2f}"
        print(f"{key[0]:10s} {key[1]:6s} {spread}  [{low:+.1f} {high:+.1f}] {inside:.3f}, n {len(values)}")
    print(
        f"\n{np.median([record[2] for record in by_patient.values()]):.2f} s of CPU a patient (median), nothing written"
    )


if __name__ == "__main__":
    main()
