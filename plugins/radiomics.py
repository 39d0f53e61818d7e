"""A baseline of hand-made features: first-order, shape and grey-level co-occurrence (GLCM), then logistic regression.

The definitions follow the Image Biomarker Standardisation Initiative, computed on the chosen axial slices (2-D) and
averaged over them: intensities are the normalised ones, grey levels 16 bins of equal width between the 1st and 99th
percentile of the tumour, co-occurrence at distance 1 px in four directions, symmetric. Compact on purpose: with 50 to
500 patients some forty features are plenty.

References:
    Zwanenburg et al., The Image Biomarker Standardization Initiative, Radiology 295 (2020).
    Haralick, Shanmugam and Dinstein, IEEE Transactions on Systems, Man and Cybernetics 3 (1973).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from glioma_nas.markers import MarkerCase, MetadataEncoder
from glioma_nas.plugins.feature_regression import FeatureRegression
from glioma_nas.registry import classifiers

Floats = NDArray[np.float64]

N_LEVELS = 16
FIRST_ORDER = ("mean", "deviation", "skewness", "kurtosis", "p10", "median", "p90", "entropy")
GLCM = ("contrast", "homogeneity", "correlation", "energy", "glcm_entropy")
SHAPE = ("log_volume", "area_cm2", "circularity", "elongation", "components")
_DIRECTIONS = ((0, 1), (1, 0), (1, 1), (1, -1))


def feature_names(sequences: Sequence[str]) -> list[str]:
    """Return the names of what `radiomics_features` returns, in order."""
    return [*SHAPE, *(f"{sequence}_{name}" for sequence in sequences for name in (*FIRST_ORDER, *GLCM))]


def radiomics_features(case: MarkerCase) -> Floats:
    """Return shape features, then those of each sequence, float64 (5 + 13·C,), finite.

    Slices without tumour are left out. When the mask is empty, shape is 0 and the rest is taken of all non-zero pixels
    of the chosen slices.
    """
    whole = not case.mask.any()
    masks = (case.images != 0).any(axis=1) if whole else case.mask.astype(bool)
    shown = [index for index in range(len(masks)) if masks[index].any()]
    n_channels = case.images.shape[1]
    if not shown:
        return np.zeros(len(SHAPE) + n_channels * (len(FIRST_ORDER) + len(GLCM)))
    shape = np.zeros(len(SHAPE))
    if not whole:
        shape[0] = np.log1p(case.tumour_volume_ml)
        shape[1:] = np.mean([shape_features(masks[index], case.pixel_mm) for index in shown], axis=0)
    texture = [
        np.mean([_texture(case.images[index, channel], masks[index]) for index in shown], axis=0)
        for channel in range(n_channels)
    ]
    return np.concatenate([shape, *texture])


def shape_features(mask: NDArray[np.bool_], pixel_mm: float) -> Floats:
    """Return area in cm², circularity 4π·area/perimeter² (1 for a disc), elongation and number of parts, (4,).

    Elongation is √(λ_minor/λ_major) of the pixels' covariance: 1 is round, 0 a line. The perimeter is Crofton's
    estimate from the borders crossed along rows, columns and diagonals.
    """
    area = float(mask.sum())
    padded = np.pad(mask, 1).astype(np.int8)
    crossings = [
        np.abs(np.diff(padded, axis=1)).sum(),
        np.abs(np.diff(padded, axis=0)).sum(),
        np.abs(padded[1:, 1:] - padded[:-1, :-1]).sum() / np.sqrt(2),
        np.abs(padded[1:, :-1] - padded[:-1, 1:]).sum() / np.sqrt(2),
    ]
    perimeter = np.pi / 8 * float(sum(crossings))
    points = np.argwhere(mask).astype(np.float64)
    elongation = 1.0
    if len(points) > 2:
        values = np.linalg.eigvalsh(np.cov(points.T))
        elongation = float(np.sqrt(max(values[0], 0.0) / values[1])) if values[1] > 0 else 1.0
    circularity = 4 * np.pi * area / perimeter**2
    return np.asarray([area * pixel_mm**2 / 100, circularity, elongation, ndimage.label(mask)[1]])


def _texture(image: NDArray[np.float32], mask: NDArray[np.bool_]) -> Floats:
    values = image[mask].astype(np.float64)
    levels = grey_levels(image, mask)
    return np.concatenate([_first_order(values, levels[mask]), _haralick(co_occurrence(levels, mask))])


def grey_levels(image: NDArray[np.float32], mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the grey level 0 … 15 of every pixel (H, W), from the intensities inside the mask."""
    low, high = np.percentile(image[mask], [1, 99])
    scaled = (image.astype(np.float64) - low) / max(high - low, 1e-12) * N_LEVELS
    levels: NDArray[np.int64] = np.clip(np.floor(scaled), 0, N_LEVELS - 1).astype(np.int64)
    return levels


def _first_order(values: Floats, levels: NDArray[np.int64]) -> Floats:
    mean, deviation = values.mean(), values.std()
    standard = (values - mean) / deviation if deviation > 1e-12 else np.zeros_like(values)
    share = np.bincount(levels, minlength=N_LEVELS) / levels.size
    percentiles = np.percentile(values, [10, 50, 90])
    return np.asarray(
        [mean, deviation, (standard**3).mean(), (standard**4).mean(), *percentiles, _entropy(share)], dtype=np.float64
    )


def co_occurrence(levels: NDArray[np.int64], mask: NDArray[np.bool_]) -> Floats:
    """Return the symmetric, normalised co-occurrence matrix (16, 16) of neighbours that both lie in the mask.

    All zero when no two do.
    """
    matrix = np.zeros((N_LEVELS, N_LEVELS))
    height, width = mask.shape
    for down, right in _DIRECTIONS:
        here = (slice(0, height - down), slice(max(0, -right), width - max(0, right)))
        there = (slice(down, height), slice(max(0, right), width + min(0, right)))
        both = mask[here] & mask[there]
        np.add.at(matrix, (levels[here][both], levels[there][both]), 1.0)
    matrix += matrix.T
    total = matrix.sum()
    return matrix / total if total else matrix


def _haralick(matrix: Floats) -> Floats:
    i, j = np.mgrid[:N_LEVELS, :N_LEVELS]
    mean = float((i * matrix).sum())
    variance = float(((i - mean) ** 2 * matrix).sum())
    correlation = float(((i - mean) * (j - mean) * matrix).sum()) / variance if variance > 1e-12 else 1.0
    return np.asarray(
        [
            ((i - j) ** 2 * matrix).sum(),
            (matrix / (1 + (i - j) ** 2)).sum(),
            correlation,
            (matrix**2).sum(),
            _entropy(matrix.ravel()),
        ],
        dtype=np.float64,
    )


def _entropy(share: Floats) -> float:
    positive = share[share > 0]
    return float(-(positive * np.log2(positive)).sum())


@classifiers.register("radiomics")
class RadiomicsEvaluator(FeatureRegression):
    """Logistic regression on first-order, shape and co-occurrence features of the predicted tumour."""

    # Dozens of correlated features and few patients: a strong penalty.
    inverse_penalty = 0.05

    def features(self, cases: Sequence[MarkerCase], metadata: MetadataEncoder) -> NDArray[np.float64]:
        """See `FeatureRegression.features`."""
        return np.asarray([radiomics_features(case) for case in cases], dtype=np.float64)
