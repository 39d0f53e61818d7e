"""Show an architecture: as rows of a table and as an SVG that a page can hold inline.

The drawing uses the page's own text colour and half-transparent fills, so it reads on light and on dark pages; it
refers to nothing outside itself, and its ids do not clash with those of another drawing on the page.
"""

from __future__ import annotations

import hashlib
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import Any

from glioma_nas.search_spaces.layout import Cell, Layout
from glioma_nas.search_spaces.plan import NetworkPlan, Step

_COLUMN_PX, _ROW_PX = 114, 96
_BOX_WIDTH_PX, _BOX_HEIGHT_PX = 96, 62
_MARGIN_PX = 70
SHARED_COLOUR = "#8b6cc1"
BRANCH_COLOURS = ("#2f7fd6", "#d9822b", "#35a06a", "#c2507f", "#8a8a2d")


def describe(plan: NetworkPlan) -> list[dict[str, Any]]:
    """List the cells of every branch from the stem on, as tables 4-3 and 4-4 do.

    Returns:
        Rows with ``branch`` (final scale), ``cell`` (number within the branch, from 1), ``layer``, ``operator``,
        ``scale`` (of the input), ``stride``, ``width`` (χ), ``out_channels`` (χ·scale·stride) and ``shared`` (with
        another branch).
    """
    rows = []
    for final in plan.outputs:
        for number, index in enumerate(plan.branch_steps(final), start=1):
            step = plan.steps[index]
            rows.append(
                {
                    "branch": final,
                    "cell": number,
                    "layer": step.cell.layer,
                    "operator": step.operator,
                    "scale": step.cell.scale,
                    "stride": step.stride,
                    "width": step.width,
                    "out_channels": step.out_channels,
                    "shared": len(step.branches) > 1,
                }
            )
    return rows


def cell_colour(steps: Sequence[Step], colours: Mapping[int, str]) -> str:
    """Return the colour of a cell: shared if a step of it is, else that of the finest branch that computes there.

    Where branches part, each computes a step of its own in one cell; nothing is shared there.
    """
    if any(len(step.branches) > 1 for step in steps):
        return SHARED_COLOUR
    return colours[min(branch for step in steps for branch in step.branches)]


def edge_colours(
    layout: Layout, plan: NetworkPlan, colours: Mapping[int, str]
) -> dict[tuple[tuple[int, int], tuple[int, int]], str]:
    """Return the colour of every line between two places (scale, layer), from the stem at layer 0 to the head at L+1.

    A line is shared where several branches hand on the output of one step; of branches that have parted and only run
    side by side, the finest gives the colour.
    """
    carried: dict[tuple[tuple[int, int], tuple[int, int]], dict[int, int | None]] = {}
    for final, path in plan.paths.items():
        own = {plan.steps[index].cell: index for index in plan.branch_steps(final)}
        stops = [(layout.scales[0], 0), *((cell.scale, cell.layer) for cell in path), (final, layout.n_layers + 1)]
        source: int | None = None
        for start, end in pairwise(stops):
            source = own.get(Cell(*start), source) if start[1] else None
            carried.setdefault((start, end), {})[final] = source
    return {
        edge: SHARED_COLOUR if len(sources) > 1 and len(set(sources.values())) == 1 else colours[min(sources)]
        for edge, sources in carried.items()
    }


def draw(layout: Layout, plan: NetworkPlan) -> str:
    """Draw the grid of cells, the branches through it, stem and head.

    Args:
        layout: The space.
        plan: The network.

    Returns:
        One ``<svg>`` element as text.
    """
    canvas = _Canvas(layout, plan)
    width, height = canvas.size
    label = f"Derived network with branches {', '.join(map(str, plan.outputs))}: {len(plan.steps)} cells"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(label)}" '
        f'style="max-width:100%;height:auto" font-family="system-ui, sans-serif" font-size="11" fill="currentColor">',
        f"<title>{escape(label)}</title>",
        *canvas.axes(),
        *canvas.paths(),
        *canvas.cells(),
        *canvas.ends(),
        *canvas.legend(),
        "</svg>",
    ]
    return "\n".join(parts)


class _Canvas:
    def __init__(self, layout: Layout, plan: NetworkPlan) -> None:
        self.layout = layout
        self.plan = plan
        self.colours = {
            scale: BRANCH_COLOURS[layout.scales.index(scale) % len(BRANCH_COLOURS)] for scale in plan.outputs
        }
        self.steps_at: dict[Cell, list[Step]] = {}
        for step in plan.steps:
            self.steps_at.setdefault(step.cell, []).append(step)
        self.id = "a" + hashlib.sha256(repr(plan).encode()).hexdigest()[:8]

    @property
    def size(self) -> tuple[int, int]:
        columns = self.layout.n_layers + 2
        return columns * _COLUMN_PX + _MARGIN_PX, len(self.layout.scales) * _ROW_PX + 2 * _MARGIN_PX

    def centre(self, scale: int, layer: float) -> tuple[float, float]:
        # Layer 0 is the stem, layer L+1 the head.
        x = _MARGIN_PX + (layer + 0.5) * _COLUMN_PX
        return x, _MARGIN_PX + (self.layout.scales.index(scale) + 0.5) * _ROW_PX

    def axes(self) -> Iterable[str]:
        for scale in self.layout.scales:
            _, y = self.centre(scale, 0)
            yield _text(_MARGIN_PX - 30, y, f"1/{scale}", size=14)
        for layer in range(1, self.layout.n_layers + 1):
            x, _ = self.centre(self.layout.scales[0], layer)
            yield _text(x, _MARGIN_PX - 18, str(layer), opacity=0.7)

    def cells(self) -> Iterable[str]:
        for cell in self.layout.cells:
            x, y = self.centre(cell.scale, cell.layer)
            steps = self.steps_at.get(cell, [])
            if steps:
                yield from self._used(x, y, steps)
                continue
            passed = any(cell in path for path in self.plan.paths.values())
            fill, opacity = ("currentColor", 0.8) if passed else ("none", 0.35)
            name = "skip, left out" if passed else "not used"
            yield (
                f'<circle cx="{x:g}" cy="{y:g}" r="4" fill="{fill}" stroke="currentColor" opacity="{opacity}">'
                f"<title>scale {cell.scale}, layer {cell.layer}: {name}</title></circle>"
            )

    def _used(self, x: float, y: float, steps: list[Step]) -> Iterable[str]:
        colour = cell_colour(steps, self.colours)
        yield (
            f'<rect x="{x - _BOX_WIDTH_PX / 2:g}" y="{y - _BOX_HEIGHT_PX / 2:g}" width="{_BOX_WIDTH_PX}" '
            f'height="{_BOX_HEIGHT_PX}" rx="8" fill="{colour}" fill-opacity="0.3" stroke="{colour}" '
            f'stroke-width="1.5"/>'
        )
        lines = []
        for operator in dict.fromkeys(step.operator for step in steps):
            lines += textwrap.wrap(operator.replace("_", " "), 12)
        outputs = dict.fromkeys((step.stride, step.width, step.out_channels) for step in steps)
        lines += [f"{'↘' if stride == 2 else '→'} χ {chi} · {channels} ch" for stride, chi, channels in outputs]
        for number, line in enumerate(lines):
            yield _text(x, y + (number - (len(lines) - 1) / 2) * 13, line)

    def paths(self) -> Iterable[str]:
        colours = (SHARED_COLOUR, *self.colours.values())
        for number, colour in enumerate(colours):
            yield (
                f'<defs><marker id="{self.id}-{number}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="5" '
                f'markerHeight="5" orient="auto"><path d="M0 0 8 4 0 8z" fill="{colour}"/></marker></defs>'
            )
        for (start, end), colour in edge_colours(self.layout, self.plan, self.colours).items():
            (x1, y1), (x2, y2) = self.centre(*start), self.centre(*end)
            x1 += self._half_width(start)
            x2 -= self._half_width(end)
            yield (
                f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{colour}" stroke-width="2.5" '
                f'marker-end="url(#{self.id}-{colours.index(colour)})"/>'
            )

    def _half_width(self, stop: tuple[int, int]) -> float:
        scale, layer = stop
        if 1 <= layer <= self.layout.n_layers and Cell(scale, layer) not in self.steps_at:
            return 4
        return _BOX_WIDTH_PX / 2

    def ends(self) -> Iterable[str]:
        first = self.layout.scales[0]
        x, y = self.centre(first, 0)
        yield from _plain_box(x, y, _BOX_HEIGHT_PX)
        channels = self.plan.end_width * first
        for number, line in enumerate((f"stem {self.layout.stem}", f"χ {self.plan.end_width} · {channels} ch")):
            yield _text(x, y + (number - 0.5) * 13, line)
        finals = list(self.plan.outputs)
        x, top = self.centre(finals[0], self.layout.n_layers + 1)
        _, bottom = self.centre(finals[-1], self.layout.n_layers + 1)
        yield from _plain_box(x, (top + bottom) / 2, bottom - top + _BOX_HEIGHT_PX)
        lines = ("head", " + ".join(f"1/{scale}" for scale in finals), f"{self.layout.n_classes} classes")
        for number, line in enumerate(lines):
            yield _text(x, (top + bottom) / 2 + (number - 1) * 13, line)

    def legend(self) -> Iterable[str]:
        x, y = float(_MARGIN_PX), self.size[1] - 28
        entries = [(colour, f"branch 1/{scale}") for scale, colour in self.colours.items()]
        if any(len(step.branches) > 1 for step in self.plan.steps):
            entries.append((SHARED_COLOUR, "shared by branches"))
        for colour, name in entries:
            yield f'<rect x="{x:g}" y="{y - 7}" width="14" height="14" rx="3" fill="{colour}" fill-opacity="0.6"/>'
            yield _text(x + 22, y, name, anchor="start")
            x += 34 + 7 * len(name)
        yield f'<circle cx="{x + 7:g}" cy="{y}" r="4" opacity="0.8"/>'
        yield _text(x + 22, y, "skip, left out", anchor="start")


def _plain_box(x: float, y: float, height: float) -> Iterable[str]:
    yield (
        f'<rect x="{x - _BOX_WIDTH_PX / 2:g}" y="{y - height / 2:g}" width="{_BOX_WIDTH_PX}" height="{height:g}" '
        f'rx="8" fill="currentColor" fill-opacity="0.08" stroke="currentColor" stroke-width="1.5"/>'
    )


def _text(x: float, y: float, text: str, *, size: int = 11, opacity: float = 1, anchor: str = "middle") -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" dominant-baseline="central" '
        f'opacity="{opacity}">{escape(text)}</text>'
    )
