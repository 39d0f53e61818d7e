"""The page of table 4-6: what each part of search and training brings, the source's figures beside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from glioma_nas.config import RunConfig
from glioma_nas.report.document import Figures, Paragraph, Picture, Section, Table, number, text
from glioma_nas.report.study_page import rows_of, split_fact, study_page
from glioma_nas.segmentation_studies.methods_page import (
    DICE_CAPTION,
    dice_columns,
    front_figure,
    limits,
    speed_columns,
)


def render_ablation(
    table: pd.DataFrame,
    latencies: Sequence[Mapping[str, Any]],
    config: RunConfig,
    *,
    folds: Sequence[int],
    n_seeds: int,
) -> str:
    """Return the page as self-contained HTML; the arguments are those of `render_methods`."""
    rows = [{**row, "network": row["setting"]} for row in rows_of(table)]
    section = Section("ablation", "Ablation")
    section.add(
        Paragraph(
            "Searched: operators O, scales s, widths χ; b: branches. T: teacher, S: student; T → S: S is taught by T. "
            "Rows without an arrow are trained on the labels alone. T → T pruned: the teacher with every "
            "width the narrowest."
        ),
        Table("table-4-6-dice", DICE_CAPTION.format(reference="T → S"), dice_columns(n_seeds), rows),
        Table(
            "table-4-6-speed",
            "Batch 1, all networks in turns in one run: medians, and medians of the ratios round by round.",
            speed_columns(rows),
            rows,
        ),
        Table(
            "table-4-6-source",
            "The source's table 4-6, on its own patients and GPU at 224×224. Its FLOPs cannot be reached by such "
            "networks under any reading and are shown as printed.",
            (
                text("network", "Setting"),
                number("dice", "Dice here", 3),
                number("source_dice", "Source: Dice", 3),
                number("speed_hz", "Hz here", 1),
                number("source_speed_hz", "Source: Hz", 1),
                number("macs_g", "GMAC here", 3),
                number("source_flops_g", "Source: GFLOPs", 1),
                number("params_m", "Parameters here, M", 3),
                number("source_params_m", "Source: parameters, M", 1),
            ),
            [row for row in rows if row["source_dice"] is not None],
        ),
    )
    caption = "Dice against latency; up and to the left is better. The line joins the front."
    section.add(Figures(caption, [Picture(front_figure(rows))]))
    sections = [section, limits(latencies, config, folds, n_seeds)]
    return study_page("Table 4-6: ablation", config, sections, facts=[split_fact(config)])
