"""A run folder made by hand, with every file the report reads, and what tests need to look at the page."""

from __future__ import annotations

import csv
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from glioma_nas.config import RunConfig, parse_config
from glioma_nas.folds import Folds
from glioma_nas.pipeline import StageContext
from glioma_nas.progress import Silent

HOSTILE = "<script>alert(1)</script>"
HOSTILE_ID = '<img src=x onerror="alert(1)">'
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
        self.images: list[list[tuple[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "img":
            self.images.append(attrs)
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
    ids = [*(f"case_{number:02d}" for number in range(N_CASES - 1)), HOSTILE_ID]
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


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as handle:
        return list(csv.DictReader(handle))
