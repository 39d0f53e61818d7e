"""What the report leaves for an article: checklists, methods, model card, and evidence from other commands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from report_run import context, make_config, make_run, parse, read, table, write, write_preprocess

from glioma_nas.errors import StorageError
from glioma_nas.folds import Folds, load_folds
from glioma_nas.report.further_evidence import FurtherEvidence, applied_stages, read_evidence
from glioma_nas.stages import report


@pytest.mark.slow
def test_report_comes_with_what_an_article_needs(
    finished_report: tuple[Path, dict[str, Any]], report_html: str
) -> None:
    folder = finished_report[0]
    claim = {row["number"]: row for row in read(folder / "claim_2024.csv")}
    assert claim["36"]["state"] == "auto" and (folder / "tables" / "characteristics.csv").is_file()
    assert claim["31"]["state"] == "missing" and "grad_cam_cases" in claim["31"]["where"]
    assert claim["16"]["state"] == "manual"
    tripod = {row["number"]: row["state"] for row in read(folder / "tripod_ai.csv")}
    assert (tripod["17"], tripod["23a"], tripod["24"]) == ("manual", "auto", "missing")
    methods = (folder / "methods.md").read_text(encoding="utf-8")
    assert "12 patients with 12 examinations were analysed and 1 examination left out" in methods
    assert "torch 2.11.0" in methods
    listed = re.findall(r"^(\d+)\. ", methods, flags=re.MULTILINE)
    cited = {number for group in re.findall(r"\[([\d, ]+)\]", methods) for number in group.split(", ")}
    assert listed == [str(number) for number in range(1, len(listed) + 1)] and cited == set(listed)
    card = (folder / "model_card.md").read_text(encoding="utf-8")
    assert "| Dice, student | 0.665 |" in card and "| AUC, idh | 0.90 | 0.70 to 1.00 | 11, 7 positive |" in card
    assert "Not meant for" in card
    text = " ".join("".join(parse(report_html).text).split())
    assert "Reporting checklists" in text and "CLAIM 2024 33, test on patients from elsewhere" in text


def evaluation(run: Path) -> dict[str, Any]:
    auc = {"value": 0.7, "low": 0.5, "high": 0.9, "n": 20}
    return {
        "cohort": "elsewhere",
        "network": "student",
        "applied": applied_stages(run),
        "out_of_fold_dice": 0.8,
        "segmentation": {"dice": {"value": 0.6123, "low": 0.5, "high": 0.7, "n": 21}},
        "markers": {"idh": {"metrics": {"auc": auc}, "in_the_run": {"value": 0.9}}, "ki67": {"not_measured": "why"}},
    }


def comparison(folder: Path, folds: Path) -> None:
    shared = folder / "shared" / "preprocess"
    shared.mkdir(parents=True)
    (shared / "folds.json").write_bytes(folds.read_bytes())
    row = {"strategy": "co_search", "seeds": 3, "dice": 0.7, "dice_low": 0.6, "dice_high": 0.8}
    table(folder / "comparison.csv", [{**row, "latency_ms": 2.5, "latency_ms_low": 2.0, "latency_ms_high": 3.0}])


@pytest.mark.slow
def test_other_patients_and_seeds_enter_report_and_checklists(tmp_path: Path) -> None:
    inputs = make_run(tmp_path)
    elsewhere, seeds = tmp_path / "elsewhere", tmp_path / "seeds"
    write(elsewhere / "validation.json", evaluation(tmp_path))
    comparison(seeds, inputs["preprocess"] / "folds.json")
    config = make_config(tmp_path, evaluations=[str(elsewhere)], comparisons=["seeds"])
    report.run(context(config, tmp_path / "report", inputs))
    claim = {row["number"]: row for row in read(tmp_path / "report" / "claim_2024.csv")}
    assert (claim["30"]["state"], claim["33"]["state"]) == ("auto", "auto")
    rows = read(tmp_path / "report" / "tables" / "evaluations.csv")
    assert [(row["figure"], row["value"], row["in_the_run"]) for row in rows] == [
        ("Dice", "0.6123", "0.8"),
        ("AUC, idh", "0.7", "0.9"),
    ]
    (compared,) = read(tmp_path / "report" / "tables" / "comparison.csv")
    assert (compared["strategy"], compared["seeds"]) == ("co_search", "3")
    text = " ".join("".join(parse((tmp_path / "report" / "report.html").read_text()).text).split())
    assert "0.612" in text and "were not tested" not in text


@pytest.mark.parametrize("scored", ["segmentation", "markers", None])
def test_evaluation_counts_as_external_only_where_it_measured_something(scored: str | None) -> None:
    found = {"segmentation": {}, "markers": {"idh": {"not_measured": "why"}}}
    some = {"segmentation": {"dice": {"value": 0.6}}, "markers": {"idh": {"metrics": {"auc": {"value": 0.7}}}}}
    one = found if scored is None else {**found, scored: some[scored]}
    assert bool(FurtherEvidence((one,)).measured) == (scored is not None)


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("evaluations", {"applied": {}}, "was made with another run, or with this one before it changed"),
        ("evaluations", None, r"holds no validation.json; give the --out of `evaluate`"),
        ("comparisons", None, r"holds no comparison.csv; give the --out of `compare`"),
        ("comparisons", {"seed": 1}, "was made on other folds than this run"),
        ("comparisons", {"search": {"search_epochs": 77}}, "was made with other settings of search than this run"),
        ("comparisons", {"train": {"epochs": 77}}, "was made with other settings of train than this run"),
        ("comparisons", {"strategy": "nni.random"}, "has no row of this run's strategy 'co_search'"),
    ],
)
def test_evidence_of_another_run_is_refused(
    tmp_path: Path, key: str, change: dict[str, Any] | None, message: str
) -> None:
    ids = write_preprocess(tmp_path / "preprocess")
    folds = load_folds(tmp_path / "preprocess" / "folds.json")
    config = make_config(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    if change is not None and key == "evaluations":
        write(other / "validation.json", {**evaluation(tmp_path), **change})
    elif change is not None and "seed" not in change:
        comparison(other, tmp_path / "preprocess" / "folds.json")
        for section in change.keys() & {"search", "train"}:
            of_other = getattr(config, section).model_copy(update=change[section])
            text = config.model_copy(update={section: of_other}).to_yaml()
            (other / "shared" / "config.yaml").write_text(text)
        if "strategy" in change:
            rows = (other / "comparison.csv").read_text()
            (other / "comparison.csv").write_text(rows.replace("co_search", change["strategy"]))
    elif change is not None:
        drawn = tmp_path / "drawn.json"
        Folds(change["seed"], ((tuple(ids[:6]), tuple(ids[6:])), (tuple(ids[6:]), tuple(ids[:6])))).write(drawn)
        comparison(other, drawn)
    given = {"evaluations": (), "comparisons": (), key: (other,)}
    with pytest.raises(StorageError, match=message):
        read_evidence(given["evaluations"], given["comparisons"], run=tmp_path, config=config, folds=folds)
