"""Draw an architecture as PNG, for slides and documents that take no SVG: the same picture as `drawing.draw`."""

from __future__ import annotations

import io
import textwrap
from typing import Any

from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch, Patch

from glioma_nas.search_spaces.drawing import BRANCH_COLOURS, SHARED_COLOUR, cell_colour, edge_colours
from glioma_nas.search_spaces.layout import Cell, Layout
from glioma_nas.search_spaces.plan import NetworkPlan, Step

_COLUMN_IN, _ROW_IN = 1.1, 0.95
_BOX_WIDTH, _BOX_HEIGHT = 0.84, 0.62


def draw_png(layout: Layout, plan: NetworkPlan, *, dpi: int = 120) -> bytes:
    """Draw the grid of cells, the branches through it, stem and head on a white ground.

    Args:
        layout: The space.
        plan: The network.
        dpi: Pixels per inch; a network of sixteen layers is about 20 inches wide.

    Returns:
        A PNG file.
    """
    rows, last = len(layout.scales), layout.n_layers + 1
    figure = Figure(figsize=(_COLUMN_IN * (last + 1.6), _ROW_IN * (rows + 1.5)))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(-1.0, last + 0.6)
    axes.set_ylim(rows + 0.5, -1.0)
    axes.axis("off")
    colours = {scale: BRANCH_COLOURS[layout.scales.index(scale) % len(BRANCH_COLOURS)] for scale in plan.outputs}
    for row, scale in enumerate(layout.scales):
        axes.text(-0.8, row, f"1/{scale}", fontsize=11, va="center", ha="center")
    for layer in range(1, layout.n_layers + 1):
        axes.text(layer, -0.7, str(layer), fontsize=8, va="center", ha="center", color="0.4")

    for edge, colour in edge_colours(layout, plan, colours).items():
        (scale, layer), (next_scale, next_layer) = edge
        rows_of_edge = (layout.scales.index(scale), layout.scales.index(next_scale))
        axes.plot((layer, next_layer), rows_of_edge, color=colour, linewidth=2, zorder=1)

    steps_at: dict[Cell, list[Step]] = {}
    for step in plan.steps:
        steps_at.setdefault(step.cell, []).append(step)
    passed = {cell for path in plan.paths.values() for cell in path}
    for cell in layout.cells:
        x, y = cell.layer, layout.scales.index(cell.scale)
        if cell not in steps_at:
            used = cell in passed
            axes.plot(x, y, "o", markersize=5, color="0.3" if used else "0.75", fillstyle="full" if used else "none")
            continue
        steps = steps_at[cell]
        _box(axes, x, y, _BOX_HEIGHT, cell_colour(steps, colours))
        lines = [
            line
            for name in dict.fromkeys(step.operator for step in steps)
            for line in textwrap.wrap(name.replace("_", " "), 13)
        ]
        outputs = dict.fromkeys((step.stride, step.width, step.out_channels) for step in steps)
        lines += [f"{'↘' if stride == 2 else '→'} χ {chi} · {channels} ch" for stride, chi, channels in outputs]
        axes.text(x, y, "\n".join(lines), fontsize=6.5, va="center", ha="center", zorder=3)

    _box(axes, 0, 0, _BOX_HEIGHT, "0.5")
    axes.text(0, 0, f"stem {layout.stem}\nχ {plan.end_width}", fontsize=6.5, va="center", ha="center", zorder=3)
    ends = [layout.scales.index(scale) for scale in plan.outputs]
    middle = (min(ends) + max(ends)) / 2
    _box(axes, last, middle, max(ends) - min(ends) + _BOX_HEIGHT, "0.5")
    text = "head\n" + " + ".join(f"1/{scale}" for scale in plan.outputs) + f"\n{layout.n_classes} classes"
    axes.text(last, middle, text, fontsize=6.5, va="center", ha="center", zorder=3)
    entries = [(colours[scale], f"branch 1/{scale}") for scale in plan.outputs]
    if any(len(step.branches) > 1 for step in plan.steps):
        entries.append((SHARED_COLOUR, "shared by branches"))
    keys: list[Artist] = [
        Patch(facecolor=(*to_rgb(colour), 0.25), edgecolor=colour, label=text) for colour, text in entries
    ]
    dot: dict[str, Any] = {"linestyle": "none", "marker": "o", "markersize": 5}
    keys.append(Line2D([], [], color="0.3", label="skip, left out", **dot))
    keys.append(Line2D([], [], color="0.75", fillstyle="none", label="cell not used", **dot))
    axes.legend(handles=keys, loc="lower left", ncols=len(keys), frameon=False, fontsize=8)
    buffer = io.BytesIO()
    # Without the version of matplotlib in it, equal networks give equal files.
    figure.savefig(buffer, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


# Any: matplotlib ships no types that the checker is given.
def _box(axes: Any, x: float, y: float, height: float, colour: str) -> None:
    axes.add_patch(
        FancyBboxPatch(
            (x - _BOX_WIDTH / 2, y - height / 2),
            _BOX_WIDTH,
            height,
            boxstyle="round,pad=0,rounding_size=0.06",
            facecolor="white",
            edgecolor="none",
            zorder=2,
        )
    )
    axes.add_patch(
        FancyBboxPatch(
            (x - _BOX_WIDTH / 2, y - height / 2),
            _BOX_WIDTH,
            height,
            boxstyle="round,pad=0,rounding_size=0.06",
            facecolor=(*to_rgb(colour), 0.25),
            edgecolor=colour,
            linewidth=1.2,
            zorder=2,
        )
    )
