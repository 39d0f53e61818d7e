"""Measure on drawn scans what was designed into them: z-scores of the tumour's parts, and what images tell of markers.

A network is not needed for that: figures of brightness, texture, border and place inside the tumour outline, joined by
logistic regression under cross-validation, are what a radiomics study would compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from scipy.stats import rankdata

from glioma_nas.seeding import derive_seed
from glioma_nas.synthetic.contrasts import SEQUENCES
from glioma_nas.synthetic.scans import PatientScans
from glioma_nas.synthetic.tumours import CORE, ENHANCING, OEDEMA

Z_RANGES = {
    ("oedema", "flair"): (1.3, 5.4),
    ("oedema", "t2"): (0.6, 3.6),
    ("enhancing", "t1ce"): (1.3, 5.3),
    ("core", "t1"): (-1.8, 0.6),
}
"""Part of the tumour and sequence → the mean z-scores seen in real patients, smallest and largest."""

_LABELS = {"core": CORE, "oedema": OEDEMA, "enhancing": ENHANCING}
_MIN_VOLUME_ML = 1.0


def z_scores(scans: PatientScans) -> dict[str, npt.NDArray[np.float32]]:
    """Return each aligned sequence with mean 0 and deviation 1 inside the brain, 0 outside."""
    brain = scans.brain > 0
    scores = {}
    for name, scan in scans.scans.items():
        values = scan.data[brain].astype(np.float32)
        image = np.zeros(brain.shape, dtype=np.float32)
        image[brain] = (values - values.mean()) / values.std()
        scores[name] = image
    return scores


def part_z(scans: PatientScans) -> dict[tuple[str, str], float]:
    """Return the mean z-score of every part of at least 1 ml on every sequence."""
    voxel_ml = float(np.prod(scans.scans[scans.reference].grid.spacing_mm)) / 1000
    scores = z_scores(scans)
    means = {}
    for part, label in _LABELS.items():
        inside = scans.mask == label
        if inside.sum() * voxel_ml >= _MIN_VOLUME_ML:
            means.update({(part, name): float(image[inside].mean()) for name, image in scores.items()})
    return means


def image_features(scans: PatientScans) -> npt.NDArray[np.float64]:
    """Describe a tumour by its images and its outline, without the parts of the mask; (F,), the same F for everyone.

    Args:
        scans: Aligned, with all sequences.
    """
    scores = z_scores(scans)
    inside, brain = scans.mask > 0, scans.brain > 0
    spacing = np.array(scans.scans[scans.reference].grid.spacing_mm)
    if not inside.any():
        raise ValueError("the mask is empty")
    features = [float(np.log(inside.sum() * np.prod(spacing) / 1000))]
    for name in SEQUENCES:
        values = scores[name][inside]
        features += [float(values.mean()), float(values.std()), *np.percentile(values, [10, 90]).tolist()]
    depth_mm = ndimage.distance_transform_edt(inside, sampling=spacing)
    deep = inside & (depth_mm >= np.percentile(depth_mm[inside], 60))
    for name in SEQUENCES:
        features.append(float(scores[name][deep].mean() - scores[name][inside & ~deep].mean()))
    features.append(float((scores["t2"] - scores["flair"])[deep].mean()))
    features += [float((scores["t1ce"] - scores["t1"])[inside].mean()), float((scores["t1ce"][inside] > 1.5).mean())]
    border = inside ^ ndimage.binary_erosion(inside)
    slope = np.hypot(*np.gradient(scores["flair"], *spacing[:2], axis=(0, 1)))
    features.append(float(slope[border].mean()))
    # Surface by volume, against a ball: how ragged the outline is.
    features.append(float(border.sum() / inside.sum() ** (2 / 3)))
    places = np.argwhere(brain)
    low, high = places.min(axis=0), places.max(axis=0)
    centre = (np.argwhere(inside).mean(axis=0) - low) / (high - low)
    features += [abs(float(centre[0]) - 0.5), float(centre[1]), float(centre[2])]
    return np.array(features)


def cross_validated_scores(
    features: npt.NDArray[np.float64], positive: npt.NDArray[np.bool_], seed: int, *, repeats: int = 4
) -> npt.NDArray[np.float64]:
    """Return out-of-fold logits of a logistic regression, (n,), averaged over repeated stratified five folds."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    scores = np.zeros(len(positive))
    for repeat in range(repeats):
        split = StratifiedKFold(5, shuffle=True, random_state=derive_seed(seed, "figures", repeat) % 2**32)
        for train, test in split.split(features, positive):
            model: Any = make_pipeline(StandardScaler(), LogisticRegression(C=0.03, max_iter=1000))
            model.fit(features[train], positive[train])
            scores[test] += model.decision_function(features[test]) / repeats
    return scores


def auc(scores: npt.NDArray[np.float64], positive: npt.NDArray[np.bool_]) -> float:
    """Return the area under the ROC curve, ties counting half."""
    n, m = int(positive.sum()), int((~positive).sum())
    return float((rankdata(scores)[positive].sum() - n * (n + 1) / 2) / (n * m))


def auc_within(scores: npt.NDArray[np.float64], positive: npt.NDArray[np.bool_], strata: Sequence[str]) -> float:
    """Return the AUC over pairs of patients of the same stratum only, so that the stratum itself is worth nothing."""
    right = pairs = 0.0
    for name in sorted(set(strata)):
        chosen = np.array([stratum == name for stratum in strata])
        n = float(positive[chosen].sum()) * float((~positive[chosen]).sum())
        if n:
            right += n * auc(scores[chosen], positive[chosen])
            pairs += n
    return right / pairs
