"""Put names beside the points of a chart so that, if there is room, none covers another name, a point or its bar."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from matplotlib.transforms import Bbox

from glioma_nas.report.figures import Drawing

# Where a name may stand: offset in points, and which of its corners is there. The first that is free is taken.
_PLACES = (
    (7, 3, "left", "bottom"),
    (7, -3, "left", "top"),
    (-7, 3, "right", "bottom"),
    (-7, -3, "right", "top"),
    (0, 8, "center", "bottom"),
    (0, -8, "center", "top"),
)
_RINGS = (1.0, 2.4, 4.0, 6.0)
"""How far out; beyond the first a hairline leads back to the point."""
_POINT_PX = 4.0


@dataclass(frozen=True)
class NamedPoint:
    """A point in the data's units, with a vertical bar that belongs to it.

    Attributes:
        name: What stands beside it.
        x: Place.
        y: Place.
        low: Lower end of the bar; y without one.
        high: Upper end.
        colour: Of the name.
    """

    name: str
    x: float
    y: float
    low: float
    high: float
    colour: str


def place_names(drawing: Drawing, points: Sequence[NamedPoint]) -> None:
    """Write the names; the axes' limits and scales must be final."""
    axes, canvas = drawing.axes, drawing.canvas
    canvas.draw_without_rendering()  # the layout decides where the points lie
    renderer = canvas.canvas.get_renderer()
    inside = axes.get_window_extent(renderer)
    taken = [box for point in points for box in _boxes(axes, point)]
    for point in points:
        text = axes.annotate(
            point.name,
            (point.x, point.y),
            (0, 0),
            textcoords="offset points",
            color=point.colour,
            annotation_clip=False,
        )
        text.set_in_layout(False)
        best: tuple[float, float, tuple[int, int, str, str], Bbox] | None = None
        for ring, place in product(_RINGS, _PLACES):
            box = _moved(text, ring, place, renderer)
            cost = sum(_overlap(box, other) for other in taken) + _area(box) - _overlap(box, inside)
            if best is None or cost < best[0] - 1e-6:
                best = (cost, ring, place, box)
            if cost < 1e-6:
                break
        assert best is not None
        _, ring, place, box = best
        _moved(text, ring, place, renderer)
        taken.append(box)
        if ring > _RINGS[0]:
            line = axes.annotate(
                "",
                (point.x, point.y),
                (place[0] * ring, place[1] * ring),
                textcoords="offset points",
                arrowprops={"arrowstyle": "-", "color": point.colour, "lw": 0.6, "shrinkA": 1, "shrinkB": 3},
            )
            line.set_in_layout(False)


def _moved(text: Any, ring: float, place: tuple[int, int, str, str], renderer: Any) -> Bbox:
    x, y, horizontal, vertical = place
    text.set_position((x * ring, y * ring))
    text.set_horizontalalignment(horizontal)
    text.set_verticalalignment(vertical)
    box: Bbox = text.get_window_extent(renderer)
    return box


def _boxes(axes: Any, point: NamedPoint) -> list[Bbox]:
    (x, y), (_, low), (_, high) = axes.transData.transform(
        [(point.x, point.y), (point.x, point.low), (point.x, point.high)]
    )
    marker = Bbox.from_extents(x - _POINT_PX, y - _POINT_PX, x + _POINT_PX, y + _POINT_PX)
    return [marker, Bbox.from_extents(x - 1, low, x + 1, high)]


def _overlap(first: Bbox, second: Bbox) -> float:
    shared = Bbox.intersection(first, second)
    return 0.0 if shared is None else _area(shared)


def _area(box: Bbox) -> float:
    return float(box.width * box.height)
