"""The report's page: well formed, self-contained, hostile text as text, complete without optional inputs."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

import pytest
from report_run import HOSTILE, HOSTILE_ID, context, make_config, make_run, manifest_only, parse

from glioma_nas.config import RunConfig
from glioma_nas.report.document import show_interval, show_number
from glioma_nas.stages import report


@pytest.mark.slow
def test_report_is_well_formed_and_loads_nothing(report_html: str) -> None:
    page = parse(report_html)
    assert page.links
    for link in page.links:
        assert link.startswith(("#", "data:image/")), link
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert "http://" not in report_html
    assert "https://" not in report_html
    assert "url(" not in report_html
    assert not {"script", "iframe", "object", "embed", "link", "form"} & set(page.tags)


@pytest.mark.slow
def test_report_pictures_load_nothing(report_html: str) -> None:
    drawings = [
        base64.b64decode(text).decode() for text in re.findall(r"data:image/svg\+xml;base64,([^\"]+)", report_html)
    ]
    assert len(drawings) > 8
    for svg in drawings:
        addresses = set(re.findall(r"https?://[^\"'<> ]+", svg))
        assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
        assert "DejaVu" not in svg


@pytest.mark.slow
def test_report_shows_hostile_text_as_text(report_html: str) -> None:
    page = parse(report_html)
    assert HOSTILE not in report_html
    texts = "".join(page.text)
    assert f"Phantom {HOSTILE}" in texts  # the title
    assert texts.count(HOSTILE) >= 3  # title, heading, label value
    assert "script" not in page.tags
    # The worst case: it stands in the list of failures, and below and within its picture.
    assert HOSTILE_ID not in report_html and texts.count(HOSTILE_ID) >= 2
    alternatives = [dict(attrs).get("alt") or "" for attrs in page.images]
    assert any(alternative.startswith(f"Case {HOSTILE_ID}, slice") for alternative in alternatives)


@pytest.mark.slow
def test_report_writes_tables_and_figures(finished_report: tuple[Path, dict[str, Any]]) -> None:
    folder, results = finished_report
    assert results["report"] == "report.html"
    assert results["not_measured"] == []
    assert len(list((folder / "tables").glob("*.csv"))) == results["n_tables"]
    names = {path.stem for path in (folder / "figures").glob("*.png")}
    assert {"dice-by-case", "accuracy-latency", "roc-idh", "probability-idh", "search-loss", "training-loss"} <= names
    assert len([name for name in names if name.startswith("overlay")]) == 6
    assert {path.stem for path in (folder / "figures").glob("*.svg")} == {
        "architecture-teacher",
        "architecture-student",
    }
    for path in (folder / "figures").glob("*.svg"):
        assert path.read_text().startswith("<svg ")
    for path in (folder / "figures").glob("*.png"):
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.slow
def test_report_says_not_measured_when_optional_inputs_are_missing(tmp_path: Path) -> None:
    inputs = make_run(tmp_path)
    manifest_only(inputs, "latency", "search", "train", "export", "segment", "classify")
    results = report.run(context(make_config(tmp_path), tmp_path / "report", inputs))
    html = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    text = "".join(parse(html).text)
    for what in ("Curves of the search", "Derived student", "Dice of the out-of-fold masks", "Latency of the networks"):
        assert what in results["not_measured"]
        assert f"{what}: not measured." in text
    assert "Metrics of idh" in results["not_measured"]


@pytest.mark.slow
def test_report_works_without_markers(tmp_path: Path) -> None:
    inputs = make_run(tmp_path)
    config = make_config(tmp_path).model_copy(update={"classify": RunConfig.model_fields["classify"].default})
    report.run(context(config, tmp_path / "report", inputs))
    html = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert "no markers configured" in html
    parse(html)


def test_show_number_uses_a_minus_sign_and_no_negative_zero() -> None:
    assert show_number(-0.1234, 2) == "−0.12"
    assert show_number(-0.0001, 2) == "0.00"
    assert show_number(float("nan"), 2) is None
    assert show_interval(0.1, None, 2) is None
    assert show_interval(-0.1, 0.25, 2) == "−0.10 to 0.25"
