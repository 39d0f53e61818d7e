"""Fixtures of several files: a report made once of a run folder made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from report_run import context, make_config, make_run


@pytest.fixture(scope="session")
def finished_report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Return the folder of the report stage and its results."""
    from glioma_nas.stages import report

    folder = tmp_path_factory.mktemp("run")
    inputs = make_run(folder)
    results = report.run(context(make_config(folder), folder / "report", inputs))
    return folder / "report", results


@pytest.fixture(scope="session")
def report_html(finished_report: tuple[Path, dict[str, Any]]) -> str:
    """Return the page."""
    return (finished_report[0] / "report.html").read_text(encoding="utf-8")
