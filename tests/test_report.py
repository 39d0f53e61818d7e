"""The report of a run folder made by hand: what it shows, what it escapes, what it refuses."""

from __future__ import annotations

import base64
import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from glioma_nas.config import RunConfig, parse_config
from glioma_nas.errors import StorageError
from glioma_nas.folds import Folds
from glioma_nas.pipeline import StageContext
from glioma_nas.progress import Silent
from glioma_nas.report.document import show_interval, show_number
from glioma_nas.report.figures import drawing_figure
from glioma_nas.report.intervals import estimate, mean, patient_means
from glioma_nas.report.marker_section import baseline_sentence
from glioma_nas.report.overlays import choose_slice, window
from glioma_nas.report.records import MarkerRecords
from glioma_nas.report.segmentation_section import rank_name, spread
from glioma_nas.stages import report

HOSTILE = "<script>alert(1)</script>"
N_CASES = 12
SIDE, DEPTH = 48, 5
NETWORKS = ("teacher", "student", "u_net")
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Checker(HTMLParser):
    """Follow the nesting of elements and collect what a browser would load."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            assert not name.startswith("on"), f"{tag} has the handler {name}"
            if name in ("src", "href", "srcset", "action", "data", "poster"):
                self.links.append(value or "")
            if name == "id":
                self.ids.append(value or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> is not nested"

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parse(html: str) -> Checker:
    checker = Checker()
    checker.feed(html)
    checker.close()
    assert checker.open == [], f"never closed: {checker.open}"
    return checker


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def table(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def manifest(folder: Path, results: dict[str, Any]) -> None:
    versions = {"python": "3.11.0", "torch": "2.11.0", "nni": "3.0"}
    content = {"stage": folder.name, "key": folder.name * 4, "seed": 0, "versions": versions, "wall_s": 12.3}
    write(folder / "manifest.json", {**content, "results": results})


def disc(radius: float) -> np.ndarray:
    rows, columns = np.mgrid[:SIDE, :SIDE]
    return ((rows - 20) ** 2 + (columns - 28) ** 2 <= radius**2).astype(np.uint8)


def write_preprocess(folder: Path) -> list[str]:
    ids = [f"case_{number:02d}" for number in range(N_CASES)]
    rows, columns = np.mgrid[:SIDE, :SIDE]
    brain = ((rows - 24) / 20) ** 2 + ((columns - 24) / 16) ** 2 <= 1
    noise = np.random.default_rng(0)
    for number, case_id in enumerate(ids):
        mask = np.zeros((DEPTH, SIDE, SIDE), np.uint8)
        mask[1:4] = disc(6 + number % 3)
        images = np.zeros((DEPTH, 2, SIDE, SIDE), np.float32)
        for index in range(DEPTH):
            tissue = np.sin(columns / 4) * 0.3 + noise.normal(0, 0.15, (SIDE, SIDE)) + mask[index] * 1.5
            images[index, 0] = np.where(brain, tissue + 0.01, 0)
            images[index, 1] = np.where(brain, tissue * 0.7 - 0.01, 0)
        home = folder / "cases" / case_id
        home.mkdir(parents=True)
        np.save(home / "images.npy", images)
        np.save(home / "mask.npy", mask)
        labels = {"idh": "mutant" if number % 3 else "wildtype", "grade": HOSTILE if number == 0 else "G2"}
        if number == 5:
            del labels["idh"]
        write(
            home / "case.json",
            {
                "case_id": case_id,
                "patient_id": f"patient_{number:02d}",
                "age": None if number == 3 else 30.0 + 2 * number,
                "sex": "F" if number % 2 else "M",
                "labels": labels,
                "sequences": ["t1ce", "flair"],
                "present": ["flair"] if number == 7 else ["t1ce", "flair"],
                "mask": str(folder / "mask.nii.gz"),
                "mask_labels": [1],
                "n_slices": DEPTH,
                "tumour_px": mask.sum(axis=(1, 2)).tolist(),
                "brain_px": [int(brain.sum())] * DEPTH,
                "min_tumour_px": 10,
                "voxel_hashes": {"flair": f"hash{number}"},
                "native_sequence": "flair",
                "step_sequence": "flair",
                "scans": {
                    "flair": {
                        "path": str(folder / "flair.nii.gz"),
                        "shape": [SIDE, SIDE, DEPTH],
                        "affine": np.eye(4).tolist(),
                        "motion": np.eye(4).tolist(),
                    }
                },
                "grid": {"affine": np.eye(4).tolist(), "spacing_mm": [1.0, 1.0, 5.0], "steps": []},
                "training_slices": list(range(DEPTH)),
                "quality": {
                    "brain_ml": 300.0 if number == 2 else 1200.0,
                    "tumour_ml": 20.0 + number,
                    "tumour_outside_brain": 0.0,
                    "tumour_voxels_cut": 0,
                    "border": 0.0,
                    "sequences": {"flair": {"overlap": 1.0}},
                },
            },
        )
    excluded = [{"case_id": "case_99", "reason": "sequence t1ce missing"}]
    write(
        folder / "index.json",
        {"sequences": ["t1ce", "flair"], "image_size_px": SIDE, "cases": ids, "excluded": excluded},
    )
    halves = (tuple(ids[0::2]), tuple(ids[1::2]))
    Folds(0, ((halves[1], halves[0]), halves)).write(folder / "folds.json")
    manifest(folder, {"n_cases": N_CASES})
    return ids


def write_search(folder: Path) -> None:
    rows = []
    for epoch in range(8):
        searching = epoch >= 3
        rows.append(
            {
                "epoch": epoch,
                "phase": "search" if searching else "pretrain",
                "loss_weights": 1 / (epoch + 1),
                "loss_architecture_teacher": 0.5 / epoch if searching else "",
                "loss_architecture_student": 0.6 / epoch if searching else "",
                "expected_latency_ms": 12 - epoch if searching else "",
                "entropy_operator": 1.6 - 0.1 * epoch if searching else "",
                "entropy_scale": 0.6 if searching else "",
                "entropy_width": 1.5 if searching else "",
                "dice_validation": 0.1 * epoch,
            }
        )
    table(folder / "history.csv", rows)
    svg = '<svg viewBox="0 0 300 60" xmlns="http://www.w3.org/2000/svg"><rect width="80"/><script>x()</script></svg>'
    cells = [
        {"layer": 0, "scale": 2, "operator": "conv3x3", "width": 32, "down": False},
        {"layer": 1, "scale": 2, "operator": "zoomed_conv", "width": 24, "down": True},
    ]
    results: dict[str, Any] = {
        "search_fold": 0,
        "n_search_patients": 6,
        "search_patients_note": "The architecture was searched on the training patients of fold 0 alone.",
    }
    for name in ("teacher", "student"):
        write(folder / f"{name}.json", {"id": f"{name}0123456789", "choices": {"branches": "2_8"}})
        write(folder / f"{name}_cells.json", cells)
        write(folder / f"{name}.svg", svg)
        candidates = [{"branches": "2_8", "accuracy": 0.71, "latency_ms": 8.0, "target": 0.62}]
        results[name] = {"id": name, "branches": "2_8", "table_latency_ms": 8.25, "candidates": candidates}
    manifest(folder, results)


def write_train(folder: Path) -> None:
    for fold in range(2):
        for number, network in enumerate(NETWORKS):
            rows = [
                {
                    "epoch": epoch,
                    "loss": (1 + 0.1 * number + 0.1 * fold) / (epoch + 1),
                    "dice_validation": 0.6 - 0.5 / (epoch + 1) + 0.05 * number,
                    "learning_rate": 0.01,
                }
                for epoch in range(6)
            ]
            table(folder / f"fold{fold}" / network / "history.csv", rows)
    manifest(folder, {"networks": list(NETWORKS)})


def write_export(folder: Path) -> None:
    networks = {
        name: {
            "median_ms": 5.0 * (number + 1),
            "p95_ms": 6.5 * (number + 1),
            "n": 50,
            "warmup_runs": 3,
            "params_m": 1.25 * (number + 1),
            "macs_g": 2.5 * (number + 1),
            "times_student": {"median": 0.5 * (number + 1), "p5": 0.4 * (number + 1), "p95": 0.6 * (number + 1)},
        }
        for number, name in enumerate(NETWORKS)
    }
    environment = {"device": "Test CPU", "threads": 2, "backend": "onnxruntime", "backend_version": "1.20"}
    shape = [1, 2, SIDE, SIDE]
    write(
        folder / "latency.json",
        {"environment": {**environment, "precision": "float32"}, "input_shape": shape, "fold": 0, "networks": networks},
    )
    record = {"network": "student", "fold": 0, "max_abs_logit_difference": 3.2e-6, "mask_dice": 1.0, "n_slices": 16}
    write(folder / "parity.json", {"backend": "onnxruntime", "tolerance": {}, "engines": {"student.onnx": record}})
    manifest(folder, {})


def write_segment(folder: Path, ids: list[str]) -> None:
    rows = []
    for number, network in enumerate(NETWORKS):
        for index, case_id in enumerate(ids):
            dice = round(0.95 - 0.05 * index - 0.01 * number, 3)
            rows.append(
                {
                    "network": network,
                    "case_id": case_id,
                    "patient_id": f"patient_{index:02d}",
                    "fold": index % 2,
                    "dice": dice,
                    "hd95_mm": "" if index == 0 else 3.0 + index,
                    "volume_true_ml": 30.0,
                    "volume_predicted_ml": 28.5,
                }
            )
            home = folder / "masks_prepared" / network
            home.mkdir(parents=True, exist_ok=True)
            mask = np.zeros((DEPTH, SIDE, SIDE), np.uint8)
            mask[1:4] = np.roll(disc(7), index, axis=1)
            np.save(home / f"{case_id}.npy", mask)
    table(folder / "dice.csv", rows)
    manifest(folder, {})


def metrics(auc: float) -> dict[str, Any]:
    values = {"auc": auc, "accuracy": 0.7, "sensitivity": 0.75, "specificity": 0.6}
    split = "out-of-fold, patient level, 2 folds"
    return {
        name: {
            "value": value,
            "low": value - 0.2,
            "high": min(1, value + 0.2),
            "n": 11,
            "n_positive": 7,
            "split": split,
        }
        for name, value in values.items()
    }


def write_classify(folder: Path, ids: list[str]) -> None:
    for prefix, auc, strength in (("", 0.9, 1.0), ("baseline_age_sex_", 0.6, 0.2)):
        rows = []
        for number, case_id in enumerate(ids):
            if number == 5:
                continue
            label = int(number % 3 != 0)
            probability = 0.5 + strength * 0.3 * (label - 0.5) + 0.02 * ((number * 7) % 11 - 5)
            rows.append(
                {
                    "case_id": case_id,
                    "patient_id": f"patient_{number:02d}",
                    "fold": number % 2,
                    "label": label,
                    "probability": round(probability, 4),
                    "threshold": 0.5,
                }
            )
        table(folder / "idh" / f"{prefix}predictions.csv", rows)
        write(folder / "idh" / f"{prefix}metrics.json", metrics(auc))
    write(folder / "idh" / "summary.json", {"n_left_out_label_unknown": 1})
    manifest(folder, {})


def make_config(folder: Path, **report_options: Any) -> RunConfig:
    data = {
        "cohort": {"sheet": "cohort.csv"},
        "classify": {"markers": {"idh": {"column": "idh", "positive": "mutant"}}},
        "train": {"baselines": ["u_net"]},
        "report": {"title": f"Phantom {HOSTILE}", **report_options},
    }
    return parse_config(data, source="test", folder=folder)


def make_run(folder: Path) -> dict[str, Path]:
    inputs = {
        name: folder / name for name in ("preprocess", "latency", "search", "train", "export", "segment", "classify")
    }
    ids = write_preprocess(inputs["preprocess"])
    manifest(inputs["latency"], {"entries": 123})
    write_search(inputs["search"])
    write_train(inputs["train"])
    write_export(inputs["export"])
    write_segment(inputs["segment"], ids)
    write_classify(inputs["classify"], ids)
    return inputs


def context(config: RunConfig, folder: Path, inputs: dict[str, Path]) -> StageContext:
    folder.mkdir(exist_ok=True)
    return StageContext(config, folder, inputs, Silent())


def manifest_only(inputs: dict[str, Path], *names: str) -> None:
    for name in names:
        for path in inputs[name].rglob("*"):
            if path.is_file() and path.name != "manifest.json":
                path.unlink()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("run")
    inputs = make_run(folder)
    results = report.run(context(make_config(folder), folder / "report", inputs))
    return folder / "report", results


@pytest.fixture(scope="module")
def html(finished: tuple[Path, dict[str, Any]]) -> str:
    return (finished[0] / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_report_is_well_formed_and_loads_nothing(html: str) -> None:
    page = parse(html)
    assert page.links
    for link in page.links:
        assert link.startswith(("#", "data:image/")), link
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert "http://" not in html
    assert "https://" not in html
    assert "url(" not in html
    assert not {"script", "iframe", "object", "embed", "link", "form"} & set(page.tags)


@pytest.mark.slow
def test_report_pictures_load_nothing(html: str) -> None:
    drawings = [base64.b64decode(text).decode() for text in re.findall(r"data:image/svg\+xml;base64,([^\"]+)", html)]
    assert len(drawings) > 8
    for svg in drawings:
        addresses = set(re.findall(r"https?://[^\"'<> ]+", svg))
        assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
        assert "DejaVu" not in svg


@pytest.mark.slow
def test_report_shows_hostile_text_as_text(html: str) -> None:
    page = parse(html)
    assert HOSTILE not in html
    texts = "".join(page.text)
    assert f"Phantom {HOSTILE}" in texts  # the title
    assert texts.count(HOSTILE) >= 3  # title, heading, label value
    assert "script" not in page.tags


@pytest.mark.slow
def test_report_states_dice_with_n_split_and_interval(finished: tuple[Path, dict[str, Any]], html: str) -> None:
    # Dice of the student: 0.94, 0.89, … 0.39; mean 0.665, median 0.665; fold 0 holds the even ones: mean 0.69.
    rows = {row["network"]: row for row in read(finished[0] / "tables" / "segmentation.csv")}
    student = rows["student"]
    assert float(student["dice_mean"]) == pytest.approx(0.665)
    assert float(student["dice_search_fold"]) == pytest.approx(0.69)
    assert float(student["dice_low"]) < 0.665 < float(student["dice_high"])
    assert (student["n_patients"], student["split"], student["n_hd95"]) == ("12", "out-of-fold", "11")
    assert float(student["hd95_median_mm"]) == pytest.approx(9.0)
    assert "0.665" in html
    assert "0.690 (6)" in html
    paired = {row["comparison"]: row for row in read(finished[0] / "tables" / "segmentation-paired.csv")}
    assert float(paired["student − u_net"]["difference"]) == pytest.approx(0.01)
    assert float(paired["student − teacher"]["difference"]) == pytest.approx(-0.01)
    failures = read(finished[0] / "tables" / "failures.csv")
    assert [row["case_id"] for row in failures] == ["case_11", "case_10", "case_09"]


@pytest.mark.parametrize(("p_holm", "beats"), [(0.03, True), (0.09, False)])
def test_baseline_sentence_says_what_the_corrected_comparison_says(p_holm: float, beats: bool) -> None:
    frame = pd.DataFrame(
        {
            "case_id": [f"c{number}" for number in range(20)],
            "patient_id": [f"p{number}" for number in range(20)],
            "fold": 0,
            "label": [0, 1] * 10,
            "threshold": 0.5,
        }
    )
    good = frame.assign(probability=[0.3 + 0.4 * (number % 2) + 0.001 * number for number in range(20)])
    poor = frame.assign(probability=[(number * 7 % 20) / 20 for number in range(20)])
    found = MarkerRecords(good, {}, poor, {}, {"auc_minus_baseline": {"beats": beats, "p_holm": p_holm}})
    sentence = baseline_sentence(found)
    assert sentence is not None and sentence[1] is beats
    assert ("corrected by Holm" in sentence[0]) is not beats


@pytest.mark.slow
def test_report_compares_marker_with_baseline(html: str) -> None:
    text = " ".join("".join(parse(html).text).split())
    assert "age and sex alone: AUC difference" in text
    assert "0.70 to 1.00; n = 11, 7 positive, out-of-fold, patient level, 2 folds" in text
    assert "The architecture was searched on the training patients of fold 0 alone." in text


@pytest.mark.slow
def test_report_writes_tables_and_figures(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, results = finished
    assert results["report"] == "report.html"
    assert results["not_measured"] == []
    assert len(list((folder / "tables").glob("*.csv"))) == results["n_tables"]
    names = {path.stem for path in (folder / "figures").glob("*.png")}
    assert {"dice-by-case", "accuracy-latency", "roc-idh", "probability-idh", "search-loss", "training-loss"} <= names
    assert len([name for name in names if name.startswith("overlay")]) == 6
    for path in (folder / "figures").glob("*.png"):
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.slow
def test_report_tells_the_partitions_apart(finished: tuple[Path, dict[str, Any]]) -> None:
    rows = {row["characteristic"]: row for row in read(finished[0] / "tables" / "characteristics.csv")}
    # Even cases are tested in fold 0 and are men; 0, 6 and 9 of 0 … 11 are wildtype beside 3, and 5 has no label.
    assert [rows["patients"][part] for part in ("all", "fold 0", "fold 1")] == ["12", "6", "6"]
    assert (rows["women"]["fold 0"], rows["women"]["fold 1"]) == ("0 (0%)", "6 (100%)")
    assert rows["idh: wildtype"]["all"] == "4 (33%)" and rows["idh: unknown"]["fold 1"] == "1 (17%)"
    assert rows["age, years"]["fold 0"] == "40 (35 to 45)" and rows["age, years"]["fold 1"].endswith(", 1 unknown")
    assert rows["t1ce missing"]["fold 1"] == "1 (17%)"
    flow = {row["step"]: int(row["cases"]) for row in read(finished[0] / "tables" / "flow.csv")}
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
def test_report_lists_flagged_scans(finished: tuple[Path, dict[str, Any]], html: str) -> None:
    rows = read(finished[0] / "tables" / "quality-flags.csv")
    assert [row["case_id"] for row in rows] == ["case_02"]
    assert "brain 300 ml" in rows[0]["flag"] and "1 of 12 cases flagged" in " ".join(html.split())


@pytest.mark.slow
def test_report_comes_with_what_an_article_needs(finished: tuple[Path, dict[str, Any]], html: str) -> None:
    folder = finished[0]
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
    text = " ".join("".join(parse(html).text).split())
    assert "Reporting checklists" in text and "CLAIM 2024 33, test on patients from elsewhere" in text


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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("segment/dice.csv", "network,case_id,patient_id,fold\nstudent,a,b,0\n", "dice.csv: column dice missing"),
        ("segment/dice.csv", "network,case_id,patient_id,fold,dice\nstudent,a,b,0,high\n", "column dice holds text"),
        ("segment/dice.csv", "network,case_id,patient_id,fold,dice\nstudent,a,b,0,1.5\n", "Dice of case a is outside"),
        ("export/latency.json", "[]", "latency.json: expected an object"),
        ("export/latency.json", '{"networks": {"student": {}}}', "'student' of 'networks' lacks median_ms"),
        ("search/student_cells.json", "{}", "student_cells.json: expected a list"),
        ("search/history.csv", "epoch\n1\n", "history.csv: column phase missing"),
        ("classify/idh/metrics.json", '{"auc": {"value": 1}}', "metric 'auc' lacks low"),
        ("classify/idh/metrics.json", "{", "not readable as JSON"),
    ],
)
def test_report_refuses_broken_inputs(tmp_path: Path, name: str, content: str, message: str) -> None:
    inputs = make_run(tmp_path)
    write(tmp_path / name, content)
    with pytest.raises(StorageError, match=re.escape(message)):
        report.run(context(make_config(tmp_path), tmp_path / "report", inputs))
    assert not (tmp_path / "report" / "report.html").exists()


@pytest.mark.slow
def test_report_refuses_accuracy_outside_sensitivity_and_specificity(tmp_path: Path) -> None:
    inputs = make_run(tmp_path)
    wrong = metrics(0.9)
    wrong["accuracy"]["value"] = 0.8
    write(inputs["classify"] / "idh" / "metrics.json", wrong)
    with pytest.raises(StorageError, match=r"accuracy 0\.8 lies outside"):
        report.run(context(make_config(tmp_path), tmp_path / "report", inputs))


@pytest.mark.slow
def test_report_refuses_a_mask_of_another_shape(tmp_path: Path) -> None:
    inputs = make_run(tmp_path)
    np.save(inputs["segment"] / "masks_prepared" / "student" / "case_00.npy", np.zeros((1, 2, 3), np.uint8))
    with pytest.raises(StorageError, match=r"shape \(1, 2, 3\) is not \(5, 48, 48\)"):
        report.run(context(make_config(tmp_path), tmp_path / "report", inputs))


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as handle:
        return list(csv.DictReader(handle))


def test_estimate_averages_a_patients_cases_first() -> None:
    # Patient a: mean of 0 and 1; patient b: 1. Mean over patients 0.75, not 2/3 over cases.
    assert patient_means([0, 1, 1], ["a", "a", "b"]).tolist() == [0.5, 1.0]
    found = estimate([0, 1, 1], ["a", "a", "b"], np.random.default_rng(0), statistic=mean)
    assert found is not None
    assert (found.value, found.low, found.high, found.n) == (0.75, 0.5, 1.0, 2)


def test_estimate_has_no_interval_with_one_patient_and_is_none_without() -> None:
    generator = np.random.default_rng(0)
    one = estimate([0.5, 0.7], ["a", "a"], generator, statistic=mean)
    assert one is not None
    assert (one.value, one.low, one.high, one.n) == (pytest.approx(0.6), None, None, 1)
    assert estimate([], [], generator, statistic=mean) is None


def test_estimate_interval_covers_the_truth_about_95_times_in_100() -> None:
    generator = np.random.default_rng(1)
    patients = [str(number) for number in range(40)]
    hits = 0
    for _ in range(200):
        found = estimate(generator.normal(0, 1, 40).tolist(), patients, generator, statistic=mean, samples=400)
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= 0 <= found.high
    assert 180 <= hits <= 198


def test_drawing_figure_gives_the_page_colours_to_a_drawing() -> None:
    figure = drawing_figure("x", '<svg viewBox="0 0 320.5 40"><text>a</text></svg>', "a drawing")
    svg = base64.b64decode(figure.uri.split(",")[1]).decode()
    assert svg.startswith('<svg viewBox="0 0 320.5 40"><style>svg{color:#')
    assert figure.width_px == 320


def test_drawing_figure_refuses_what_is_no_drawing() -> None:
    with pytest.raises(StorageError, match="'x' is no SVG element with a viewBox"):
        drawing_figure("x", "<svg><rect/></svg>", "no viewBox")


def test_choose_slice_takes_the_largest_expert_mask_and_else_the_predicted_one() -> None:
    truth = np.zeros((4, 3, 3), np.uint8)
    predicted = np.zeros((4, 3, 3), np.uint8)
    assert choose_slice(truth, predicted) == 2
    predicted[3, 0, 0] = 1
    assert choose_slice(truth, predicted) == 3
    truth[1, :2, :2] = 1
    assert choose_slice(truth, predicted) == 1


def test_window_keeps_background_black_and_fills_the_range() -> None:
    image = np.zeros((10, 10), np.float32)
    image[2:8, 2:8] = np.linspace(-2, 2, 36, dtype=np.float32).reshape(6, 6)
    shown = window(image)
    assert shown.min() == 0
    assert shown.max() == 1
    assert not shown[image == 0].any()


def test_spread_holds_best_median_and_worst() -> None:
    assert spread(55, 3) == [0, 27, 54]
    assert [rank_name(rank, 55) for rank in spread(55, 3)] == ["best", "median", "worst"]
    assert spread(1, 6) == [0]
    assert rank_name(0, 1) == "best"


def test_show_number_uses_a_minus_sign_and_no_negative_zero() -> None:
    assert show_number(-0.1234, 2) == "−0.12"
    assert show_number(-0.0001, 2) == "0.00"
    assert show_number(float("nan"), 2) is None
    assert show_interval(0.1, None, 2) is None
    assert show_interval(-0.1, 0.25, 2) == "−0.10 to 0.25"
