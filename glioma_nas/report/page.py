"""Set a report as one HTML page that loads nothing from anywhere."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

import jinja2
from markupsafe import Markup

from glioma_nas.report.document import NOT_MEASURED, Block, Headline, Section


@dataclass(frozen=True)
class Page:
    """Everything the template sets.

    Attributes:
        title: The run's title.
        subtitle: What kind of report this is.
        facts: Date, run, versions and so on, as (term, value).
        disclaimer: Stands at the top and at the bottom.
        headlines: The figures of the run in short.
        sections: The chapters.
    """

    title: str
    subtitle: str
    facts: Sequence[tuple[str, str]]
    disclaimer: str
    headlines: Sequence[Headline]
    sections: Sequence[Section]


def render(page: Page) -> str:
    """Return the page as HTML; every text in it is escaped, whatever it holds."""
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FunctionLoader(_read),
    )
    environment.filters["number_key"] = _key
    template = environment.get_template("page.html")
    # The style sheet is ours and holds no "<"; escaping would break its quotes.
    style = Markup(_read("style.css"))
    return template.render(page=page, style=style, numbers=_numbers(page.sections), not_measured=NOT_MEASURED)


def anchor(text: str) -> str:
    """Return a name for use in ids and file names: letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "x"


def _numbers(sections: Sequence[Section]) -> dict[int, int]:
    # Tables and figures are counted apart and in reading order; blocks have no names, so identity stands for them.
    counts = {"table": 0, "figures": 0}
    numbers: dict[int, int] = {}
    for section in sections:
        for block in section.blocks:
            if block.kind in counts:
                counts[block.kind] += 1
                numbers[_key(block)] = counts[block.kind]
    return numbers


def _key(block: Block) -> int:
    return id(block)


def _read(name: str) -> str:
    return resources.files("glioma_nas.report").joinpath(name).read_text(encoding="utf-8")
