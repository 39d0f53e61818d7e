"""The report's chapter on the cohort: who is in which partition, who was left out, what was flagged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from report_run import read


@pytest.mark.slow
def test_report_tells_the_partitions_apart(finished_report: tuple[Path, dict[str, Any]]) -> None:
    rows = {row["characteristic"]: row for row in read(finished_report[0] / "tables" / "characteristics.csv")}
    # Even cases are tested in fold 0 and are men; 0, 6 and 9 of 0 … 11 are wildtype beside 3, and 5 has no label.
    assert [rows["patients"][part] for part in ("all", "fold 0", "fold 1")] == ["12", "6", "6"]
    assert (rows["women"]["fold 0"], rows["women"]["fold 1"]) == ("0 (0%)", "6 (100%)")
    assert rows["idh: wildtype"]["all"] == "4 (33%)" and rows["idh: unknown"]["fold 1"] == "1 (17%)"
    assert rows["age, years"]["fold 0"] == "40 (35 to 45)" and rows["age, years"]["fold 1"].endswith(", 1 unknown")
    assert rows["t1ce missing"]["fold 1"] == "1 (17%)"
    flow = {row["step"]: int(row["cases"]) for row in read(finished_report[0] / "tables" / "flow.csv")}
    assert flow == {
        "in the sheet": 13,
        "left out: sequence t1ce missing": -1,
        "analysed": 12,
        "with an expert mask": 12,
        "outline scored": 12,
        "idh known": 11,
        "idh predicted": 11,
    }


@pytest.mark.slow
def test_report_lists_flagged_scans(finished_report: tuple[Path, dict[str, Any]], report_html: str) -> None:
    rows = read(finished_report[0] / "tables" / "quality-flags.csv")
    assert [row["case_id"] for row in rows] == ["case_02"]
    assert "brain 300 ml" in rows[0]["flag"] and "1 of 12 cases flagged" in " ".join(report_html.split())
