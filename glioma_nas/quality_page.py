"""The quality control of a cohort: ``qc.csv``, and ``qc.html`` with every contact sheet, flagged cases first."""

from __future__ import annotations

from html import escape
from pathlib import Path
from urllib.parse import quote

import pandas as pd

from glioma_nas import quality_control
from glioma_nas.files import write_text
from glioma_nas.prepared import CASES_FOLDER, SHEET_FILE, PreparedCohort

QUALITY_TABLE = "qc.csv"
QUALITY_PAGE = "qc.html"

_STYLE = """body{font:14px/1.4 sans-serif;margin:2em auto;max-width:1080px;color:#222;background:#fff}
img{max-width:100%;display:block}section{border-top:1px solid #bbb;padding:.6em 0}
.flag{color:#a40000}table{border-collapse:collapse;font-size:12px}td,th{padding:2px 8px;text-align:right}
.wide{overflow-x:auto}th{background:#eee}"""


def write_quality_report(folder: Path, cohort: PreparedCohort) -> list[str]:
    """Write table and page into ``folder``, the preprocess stage's, and return the ids of the flagged cases."""
    figures = {case_id: case.quality for case_id, case in cohort.cases.items()}
    rows = quality_control.table(figures)
    frame = pd.DataFrame(rows)
    write_text(folder / QUALITY_TABLE, frame.to_csv(index=False))
    raised = quality_control.flags(figures)
    flagged = [case_id for case_id in cohort.cases if raised[case_id]]
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>Preprocessing</title>",
        f"<style>{_STYLE}</style></head><body><h1>Preprocessing, {len(rows)} cases</h1>",
        f"<p>{len(flagged)} flagged, shown first. A flag asks you to look; no case was changed or dropped for it. ",
        f"{len(cohort.excluded)} cases were left out.</p>",
    ]
    if cohort.excluded:
        items = "".join(f"<li>{escape(item.case_id)}: {escape(item.reason)}</li>" for item in cohort.excluded)
        parts.append(f"<h2>Left out</h2><ul>{items}</ul>")
    shown = frame.drop(columns="flags").to_html(index=False, border=0, na_rep="")
    parts.append(f"<h2>Figures</h2><div class='wide'>{shown}</div>")
    for item in rows:
        case_id = str(item["case_id"])
        source = f"{CASES_FOLDER}/{quote(case_id)}/{SHEET_FILE}"
        marks = "".join(f"<div class='flag'>{escape(flag)}</div>" for flag in raised[case_id])
        parts.append(
            f"<section><h3>{escape(case_id)}</h3>{marks}"
            f"<img loading='lazy' src='{source}' alt='contact sheet of {escape(case_id)}'></section>"
        )
    write_text(folder / QUALITY_PAGE, "".join([*parts, "</body></html>\n"]))
    return flagged
