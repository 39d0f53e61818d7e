"""What a trial leaves for the eyes in ``$NNI_OUTPUT_DIR``: TensorBoard records, the drawing, a page that shows both."""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from glioma_nas.files import read_json, write_text

TENSORBOARD_FOLDER = "tensorboard"
PAGE_FILE = "report.html"
DRAWING_FILE = "architecture.svg"


class TrialBoard:
    """TensorBoard records of a trial, in the folder where NNI's web UI looks for them; use as a context manager.

    Args:
        output_folder: ``$NNI_OUTPUT_DIR``.

    Attributes:
        is_new: Whether no earlier attempt of this trial has left records there.
    """

    def __init__(self, output_folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.is_new = not (output_folder / TENSORBOARD_FOLDER).exists()
        self._step = 0
        self._writer = SummaryWriter(str(output_folder / TENSORBOARD_FOLDER), flush_secs=10)

    def __enter__(self) -> TrialBoard:
        return self

    def __exit__(self, *exception: object) -> None:
        self._writer.close()

    def add_epoch(self, stage: str, step: int, figures: Mapping[str, float]) -> None:
        """Draw an epoch's figures as points of their curves.

        Args:
            stage: ``search`` or ``train``.
            step: Number of the epoch within the trial: where steps fall back, TensorBoard drops what it has read.
            figures: By name.
        """
        self._step = step
        for name, value in figures.items():
            self._writer.add_scalar(f"{stage}/{name}", value, step)

    def add_architecture(self, drawing_png: bytes, probabilities: Path, choices: Mapping[str, Sequence[Any]]) -> None:
        """Show the architecture, and the search's probabilities as heat maps where it left some.

        Args:
            drawing_png: A PNG file.
            probabilities: ``probabilities.json`` of the search stage; an architecture trial has none.
            choices: Label of the space → what it chooses from.
        """
        from PIL import Image

        picture = np.asarray(Image.open(io.BytesIO(drawing_png)).convert("RGB"))
        self._writer.add_image("architecture", picture, self._step, dataformats="HWC")
        if probabilities.is_file():
            for role, weights in read_json(probabilities).items():
                for kind, prefix in (("alpha, operators", "op_"), ("beta, inputs", "in_"), ("gamma, widths", "width_")):
                    rows = {label: row for label, row in weights.items() if label.startswith(prefix)}
                    if rows:
                        self._writer.add_figure(
                            f"{role}/{kind}", _heat_map(rows, choices, f"{role}: {kind}"), self._step
                        )


def _heat_map(rows: Mapping[str, list[float]], choices: Mapping[str, Sequence[Any]], title: str) -> Any:
    from matplotlib.figure import Figure

    # Rows of one kind can differ in length: the first layer of a scale has fewer inputs.
    longest = max(len(row) for row in rows.values())
    grid = np.full((len(rows), longest), np.nan)
    for index, row in enumerate(rows.values()):
        grid[index, : len(row)] = row
    figure = Figure(figsize=(1.5 + 0.7 * longest, 0.9 + 0.28 * len(rows)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(grid, vmin=0, vmax=1, aspect="auto", cmap="viridis")
    axes.set_yticks(range(len(rows)), list(rows), fontsize=7)
    names = [str(value) for value in max((choices.get(label, ()) for label in rows), key=len)]
    axes.set_xticks(range(longest), names if len(names) == longest else None, rotation=30, ha="right", fontsize=7)
    axes.set_title(title, fontsize=9)
    figure.colorbar(image, label="probability")
    return figure


def write_trial_page(
    folder: Path, parameters: Mapping[str, Any], metrics: Mapping[str, float | None], *, drawing: str, run_folder: Path
) -> None:
    """Write ``architecture.svg`` and ``report.html``, a page with the parameters, the figures and the drawing.

    Args:
        folder: ``$NNI_OUTPUT_DIR``.
        parameters: Hyper-parameters of the trial.
        metrics: Its final metrics; none means not measured.
        drawing: SVG text.
        run_folder: Folder of the run whose data the trial used.
    """
    write_text(folder / DRAWING_FILE, drawing)
    page = [
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>glioma_nas trial</title>',
        "<style>body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:70em;padding:0 1em}"
        "table{border-collapse:collapse;margin:1em 0}td,th{border:1px solid #8884;padding:.2em .7em;text-align:left}"
        "svg{max-width:100%;height:auto}</style>",
        "<h1>Trial</h1><p>Research use only. Measured on validation patients, which the search may have used; "
        "no estimate of how good the network is on new patients.</p>",
        _table(
            "Result", {name: "not measured" if value is None else f"{value:.6g}" for name, value in metrics.items()}
        ),
        _table("Hyper-parameters", parameters),
        "<h2>Architecture</h2>",
        drawing,
        f"<p>Data and latency table: {html.escape(str(run_folder))}</p></html>",
    ]
    write_text(folder / PAGE_FILE, "\n".join(page))


def _table(title: str, rows: Mapping[str, Any]) -> str:
    cells = "".join(f"<tr><th>{html.escape(str(k))}</th><td>{html.escape(str(v))}</td></tr>" for k, v in rows.items())
    return f"<h2>{title}</h2><table>{cells}</table>"
