"""A drawing canvas for charts that live on light and dark pages and on paper.

A chart is drawn once with Matplotlib, without its global state, and kept twice: as SVG whose colours follow the
reader's colour scheme, for the page, and as PNG on white, for other documents.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas

from glioma_nas.errors import StorageError

# Light colour → colour on a dark page. Lines stay distinct with colour-vision deficiency (after Okabe & Ito, 2008).
INK, MUTED, GRID = "#20262e", "#5c6672", "#dfe3e8"
BLUE, ORANGE, GREEN, PURPLE, BROWN, GREY = "#1f5f99", "#c2571a", "#2b7a5f", "#8c4a82", "#7a6320", "#6b7480"
_DARK = {
    INK: "#e4e7eb",
    MUTED: "#a3acb8",
    GRID: "#343b45",
    BLUE: "#6fb1ec",
    ORANGE: "#f0965a",
    GREEN: "#63c4a0",
    PURPLE: "#d294c8",
    BROWN: "#d1b664",
    GREY: "#9aa4b1",
}
SERIES = (BLUE, ORANGE, GREEN, PURPLE, BROWN, GREY)
LINE_STYLES = ("-", "--", "-.", ":")

_STYLE = {
    "axes.edgecolor": MUTED,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.labelsize": 9,
    "axes.linewidth": 0.7,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlecolor": INK,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.6,
    "svg.fonttype": "none",
    "svg.hashsalt": "glioma_nas",  # the same data gives the same bytes
    "text.color": INK,
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "xtick.labelsize": 8,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
    "ytick.labelsize": 8,
}
# Text is set by the reader's own sans-serif face, narrower than the one Matplotlib measures with: nothing overflows.
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


_SVG_URI = "data:image/svg+xml;base64,"


@dataclass(frozen=True)
class Figure:
    """One picture of the report.

    Attributes:
        name: File name without suffix in ``figures/``.
        uri: ``data:`` address of the picture for the page.
        png: The same as a PNG file; empty for a drawing made elsewhere.
        alt: What it shows, for readers who cannot see it.
        width_px: Natural width on the page.
    """

    name: str
    uri: str
    png: bytes
    alt: str
    width_px: int

    def svg(self) -> bytes:
        """Return the file behind an address that `svg_uri` made."""
        return base64.b64decode(self.uri.removeprefix(_SVG_URI))


class Drawing:
    """A canvas while it is being drawn on; `Drawing.figure` is set once the ``chart`` block ends.

    Attributes:
        canvas: The Matplotlib figure.
        axes: Its one pair of axes.
    """

    def __init__(self, canvas: Any) -> None:
        self.canvas = canvas
        self.axes = canvas.add_subplot()
        self._figure: Figure | None = None

    @property
    def figure(self) -> Figure:
        """The finished picture."""
        assert self._figure is not None, "the chart block has not ended"
        return self._figure

    def finish(self, name: str, alt: str) -> None:
        """Render; called once, by `chart`."""
        width_px = round(self.canvas.get_figwidth() * 96)
        self._figure = Figure(name, svg_uri(_render_svg(self.canvas)), _render_png(self.canvas), alt, width_px)


@contextmanager
def chart(name: str, alt: str, *, width_in: float = 4.6, height_in: float = 3.0) -> Iterator[Drawing]:
    """Open axes in the report's style and render them when the block ends."""
    with matplotlib.rc_context(_STYLE):
        canvas = Canvas(figsize=(width_in, height_in), layout="constrained")
        FigureCanvasAgg(canvas)
        drawing = Drawing(canvas)
        yield drawing
        drawing.finish(name, alt)


def svg_uri(svg: str) -> str:
    """Return SVG text as a ``data:`` address; as an image it can neither run scripts nor load anything."""
    return _SVG_URI + base64.b64encode(svg.encode("utf-8")).decode("ascii")


def drawing_figure(name: str, svg: str, alt: str) -> Figure:
    """Return a drawing made elsewhere, such as a network's, in the colours of the page.

    Args:
        name: File name without suffix.
        svg: One ``<svg>`` element with a ``viewBox``; what it paints in ``currentColor`` follows the page.
        alt: What it shows.

    Raises:
        StorageError: The text is no such element.
    """
    opening = re.search(r"<svg\b[^>]*>", svg)
    box = re.search(r"""viewBox=["'][-\d.]+[ ,]+[-\d.]+[ ,]+([\d.]+)""", opening[0]) if opening else None
    if opening is None or box is None:
        raise StorageError(f"the drawing '{name}' is no SVG element with a viewBox; run the stage that drew it again")
    style = f"<style>svg{{color:{INK}}}@media (prefers-color-scheme:dark){{svg{{color:{_DARK[INK]}}}}}</style>"
    coloured = svg[: opening.end()] + style + svg[opening.end() :]
    return Figure(name, svg_uri(coloured), b"", alt, round(float(box[1])))


def png_uri(png: bytes) -> str:
    """Return a PNG file as a ``data:`` address."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _render_svg(canvas: Any) -> str:
    buffer = io.StringIO()
    canvas.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"'DejaVu Sans'(, [^;\"]*)?", _FONT, svg)
    for number, light in enumerate(_DARK):
        svg = re.sub(re.escape(light), f"var(--c{number})", svg, flags=re.IGNORECASE)
    light_rules = ";".join(f"--c{number}:{light}" for number, light in enumerate(_DARK))
    dark_rules = ";".join(f"--c{number}:{dark}" for number, dark in enumerate(_DARK.values()))
    style = f"<style>svg{{{light_rules}}}@media (prefers-color-scheme:dark){{svg{{{dark_rules}}}}}</style>"
    opening_end = svg.index(">") + 1
    return svg[:opening_end] + style + svg[opening_end:]


def _render_png(canvas: Any) -> bytes:
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png", dpi=160, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()
