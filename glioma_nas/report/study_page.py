"""What the pages of studies and comparisons share: their frame, and a pandas table as rows of the page."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any

import pandas as pd

from glioma_nas import __version__
from glioma_nas.config import RunConfig
from glioma_nas.report.document import Headline, Section
from glioma_nas.report.page import Page, render
from glioma_nas.report.provenance_section import DISCLAIMER


def study_page(
    title: str,
    config: RunConfig,
    sections: Sequence[Section],
    *,
    subtitle: str = "glioma_nas study",
    facts: Sequence[tuple[str, str]],
    headlines: Sequence[Headline] = (),
) -> str:
    """Return a study's page as self-contained HTML.

    Args:
        title: Heading.
        config: Names the cohort.
        sections: The chapters.
        subtitle: What kind of page this is.
        facts: Beside date, cohort and version, as (term, value).
        headlines: The figures of the study in short.
    """
    now = datetime.datetime.now(datetime.UTC)
    return render(
        Page(
            title=title,
            subtitle=subtitle,
            facts=[
                ("Made", f"{now:%d %B %Y, %H:%M} UTC".removeprefix("0")),
                ("Cohort", config.cohort.sheet.name),
                *facts,
                ("glioma_nas", __version__),
            ],
            disclaimer=DISCLAIMER,
            headlines=headlines,
            sections=sections,
        )
    )


def split_fact(config: RunConfig) -> tuple[str, str]:
    """Return how patients are split, as a fact of the page."""
    return "Folds", f"{config.folds.n_folds}, by patient"


def rows_of(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rows of a table for the page; none where there is no number."""
    clean = table.astype(object).where(table.notna(), None)
    return [{str(key): value for key, value in row.items()} for row in clean.to_dict("records")]
