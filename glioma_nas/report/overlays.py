"""Pictures of cases: a slice of each sequence with the expert's outline and the network's."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from numpy.typing import NDArray

from glioma_nas.report.figures import Figure, png_uri

TRUTH_COLOUR, PREDICTION_COLOUR = "#56c8f5", "#ffa733"
_PANEL_IN = 2.2
_DPI = 130


def choose_slice(truth: NDArray[np.uint8], predicted: NDArray[np.uint8]) -> int:
    """Return the slice that shows most of the expert's mask; of the predicted one where the expert drew nothing.

    Args:
        truth: uint8 (Z, H, W), 0 or 1.
        predicted: The same.
    """
    areas = truth.sum(axis=(1, 2), dtype=np.int64)
    if not areas.any():
        areas = predicted.sum(axis=(1, 2), dtype=np.int64)
    return int(areas.argmax()) if areas.any() else truth.shape[0] // 2


def overlay(
    name: str,
    images: NDArray[np.float32],
    sequences: Sequence[str],
    truth: NDArray[np.uint8],
    predicted: NDArray[np.uint8],
    *,
    aspect: float,
    alt: str,
) -> Figure:
    """Draw one slice, one panel for each sequence, with both outlines; the patient's right is on the left.

    Args:
        name: File name without suffix.
        images: float32 (C, H, W), the slice in each sequence.
        sequences: What stands in each of the C panels.
        truth: uint8 (H, W), 0 or 1.
        predicted: uint8 (H, W), 0 or 1.
        aspect: Height of a pixel relative to its width.
        alt: What the picture shows.
    """
    canvas = Canvas(figsize=(_PANEL_IN * len(sequences), _PANEL_IN), facecolor="black")
    FigureCanvasAgg(canvas)
    rows, columns = _bounding_box(images)
    for position, sequence in enumerate(sequences):
        axes = canvas.add_axes((position / len(sequences), 0, 1 / len(sequences), 1))
        axes.set_axis_off()
        axes.imshow(window(images[position]), cmap="gray", vmin=0, vmax=1, interpolation="bilinear", aspect=aspect)
        for mask, colour, style in ((truth, TRUTH_COLOUR, "-"), (predicted, PREDICTION_COLOUR, "--")):
            if mask.any():
                axes.contour(mask, levels=[0.5], colors=[colour], linewidths=1.1, linestyles=[style])
        axes.set_xlim(columns[0], columns[1])
        axes.set_ylim(rows[1], rows[0])
        axes.text(0.03, 0.97, sequence, transform=axes.transAxes, va="top", color="white", fontsize=8)
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png", dpi=_DPI, facecolor="black", metadata={"Software": None})
    png = buffer.getvalue()
    return Figure(name, png_uri(png), png, alt, round(canvas.get_figwidth() * 96))


def window(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """Stretch the 1st … 99th percentile of the tissue to [0, 1]; background, exactly 0 in prepared slices, stays 0.

    Args:
        image: float32 (H, W).
    """
    tissue = image != 0
    if not tissue.any():
        return np.zeros_like(image)
    low, high = np.percentile(image[tissue], [1, 99])
    scaled = np.clip((image - low) / max(float(high - low), 1e-6), 0, 1)
    return np.asarray(np.where(tissue, scaled, 0), dtype=np.float32)


def _bounding_box(images: NDArray[Any]) -> tuple[tuple[float, float], tuple[float, float]]:
    # A square around what is not background, so that the brain fills the panel.
    shown = np.any(images != 0, axis=0)
    height, width = shown.shape
    if not shown.any():
        return (-0.5, height - 0.5), (-0.5, width - 0.5)
    rows, columns = np.flatnonzero(shown.any(axis=1)), np.flatnonzero(shown.any(axis=0))
    half = max(rows[-1] - rows[0], columns[-1] - columns[0]) / 2 + 3
    row, column = (rows[0] + rows[-1]) / 2, (columns[0] + columns[-1]) / 2
    return (row - half, row + half), (column - half, column + half)
