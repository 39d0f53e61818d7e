"""Figures that tell a badly prepared case from a good one, and the flags they raise.

A figure is measured for each case by itself. A flag is raised where a figure is impossible or unlikely by anatomy, or
where it stands apart from the rest of the cohort (modified z-score, Iglewicz & Hoaglin 1993). A flag asks somebody to
look at the contact sheet; it never changes or drops a case.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from glioma_nas.case_volumes import CaseVolumes
from glioma_nas.grids import IDENTITY, rotation_degrees, shift_mm, spacing_mm

BRAIN_ML = (800.0, 2000.0)
MIN_OVERLAP = 0.85
MAX_OVERLAP_LOSS = 0.02
MAX_SHIFT_MM = 20.0
MAX_ROTATION_DEGREES = 15.0
MAX_TUMOUR_OUTSIDE = 0.02
MAX_BORDER_SHARE = 0.005
MIN_CASES_FOR_OUTLIERS = 8
MAX_MODIFIED_Z = 3.5


def measure(read: CaseVolumes, prepared: CaseVolumes, records: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Measure a case.

    Args:
        read: As read from the files.
        prepared: After the last step.
        records: Step name → what it recorded.

    Returns:
        Plain JSON: ``brain_ml``, ``tumour_ml`` (None without a mask), ``tumour_outside_brain`` and ``border`` (shares),
        ``tumour_voxels_cut``, ``brain_doubt`` (why the outline of the brain is doubtful, or None), and for each
        sequence ``intensity_p95`` (95th percentile of the non-zero voxels as read, in the scanner's units), ``overlap``
        (Dice of its non-zero voxels with the reference's, or of both heads as the registration left them) and, where it
        was registered, ``overlap_before``, ``shift_mm`` of the head's centre,
        ``rotation_degrees``, ``information_before`` and ``information`` (nats), and ``improved``, whether the
        registration was used.
    """
    brain = prepared.brain
    voxel_ml = float(spacing_mm(prepared.affine).prod()) / 1000
    figures: dict[str, Any] = {
        "brain_ml": round(float(brain.sum()) * voxel_ml, 2),
        "tumour_ml": None,
        "tumour_outside_brain": None,
        "tumour_voxels_cut": sum(int(record.get("tumour_voxels_cut", 0)) for record in records.values()),
        "border": round(_border_share(brain), 5),
        "brain_doubt": next((record["doubt"] for record in records.values() if record.get("doubt")), None),
        "sequences": {},
    }
    if prepared.mask is not None:
        n_tumour = int(prepared.mask.sum())
        figures["tumour_ml"] = round(n_tumour * voxel_ml, 3)
        figures["tumour_outside_brain"] = round(float(prepared.mask[~brain].sum()) / n_tumour, 5) if n_tumour else 0.0
    reference = prepared.images[prepared.reference] != 0
    centre = np.append(np.argwhere(reference).mean(axis=0), 1.0) if reference.any() else np.array([0, 0, 0, 1.0])
    centre_mm = (prepared.affine @ centre)[:3]
    for name, data in prepared.images.items():
        scanned = read.images[name]
        figures["sequences"][name] = {
            "overlap": round(_dice(data != 0, reference), 5),
            "intensity_p95": round(float(np.percentile(scanned[scanned != 0], 95)), 3) if scanned.any() else None,
        }
    for record in records.values():
        for name, found in record.get("sequences", {}).items() if "reference" in record else ():
            motion = prepared.motions.get(name, IDENTITY)
            figures["sequences"][name].update(
                shift_mm=round(shift_mm(motion, centre_mm), 3),
                rotation_degrees=round(rotation_degrees(motion), 3),
                information_before=found["information_before"],
                information=found["information"],
                overlap_before=found["overlap_before"],
                overlap=found["overlap"],
                improved=found["improved"],
            )
    return figures


def flags(cases: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return case id → what somebody should look at, an empty list for nothing.

    Args:
        cases: Case id → figures of `measure`.
    """
    found = {case_id: _own_flags(figures) for case_id, figures in cases.items()}
    for label, values in _comparable(cases).items():
        for case_id, z in modified_z(values).items():
            if abs(z) > MAX_MODIFIED_Z:
                side = "high" if z > 0 else "low"
                found[case_id].append(f"{label} {values[case_id]:g} is {side} for this cohort (z {z:.1f})")
    return found


def modified_z(values: Mapping[str, float]) -> dict[str, float]:
    """Return how far each value lies from the median: 0.6745·(x - median) / MAD.

    Fewer than eight values, or values of which half are equal, give nothing.
    """
    numbers = np.array(list(values.values()), dtype=float)
    if len(numbers) < MIN_CASES_FOR_OUTLIERS:
        return {}
    middle = float(np.median(numbers))
    spread = float(np.median(np.abs(numbers - middle)))
    return {} if spread == 0 else {name: 0.6745 * (value - middle) / spread for name, value in values.items()}


def row(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten a case's figures to one row of a table: ``flair_overlap`` and so on."""
    # A doubt is no figure; it stands among the flags.
    flat = {key: value for key, value in figures.items() if key not in ("sequences", "brain_doubt")}
    for name, own in figures.get("sequences", {}).items():
        flat.update({f"{name}_{key}": value for key, value in own.items()})
    return flat


def _own_flags(figures: Mapping[str, Any]) -> list[str]:
    found = []
    if not BRAIN_ML[0] <= figures["brain_ml"] <= BRAIN_ML[1]:
        found.append(f"brain {figures['brain_ml']:.0f} ml, expected {BRAIN_ML[0]:.0f} to {BRAIN_ML[1]:.0f}")
    if figures.get("brain_doubt"):
        found.append(figures["brain_doubt"])
    if figures["border"] > MAX_BORDER_SHARE:
        found.append(f"brain reaches the border of the slices ({figures['border']:.1%} of its voxels)")
    if figures["tumour_voxels_cut"]:
        found.append(f"{figures['tumour_voxels_cut']} tumour voxels lie outside the slices")
    if figures["tumour_ml"] == 0:
        found.append("mask is empty")
    if (figures["tumour_outside_brain"] or 0) > MAX_TUMOUR_OUTSIDE:
        found.append(f"{figures['tumour_outside_brain']:.1%} of the tumour lies where every sequence is 0")
    for name, own in figures["sequences"].items():
        if own["overlap"] < MIN_OVERLAP:
            found.append(f"{name} overlaps the reference by Dice {own['overlap']:.2f}")
        if not own.get("improved", True):
            found.append(f"{name} lies where its header puts it: registration did not raise the mutual information")
        if own["overlap"] < own.get("overlap_before", 0) - MAX_OVERLAP_LOSS:
            found.append(f"{name} overlaps less after registration, Dice {own['overlap_before']:.2f} before")
        if own.get("shift_mm", 0) > MAX_SHIFT_MM or own.get("rotation_degrees", 0) > MAX_ROTATION_DEGREES:
            found.append(f"{name} was moved by {own['shift_mm']:.1f} mm and {own['rotation_degrees']:.1f}°")
    return found


def _comparable(cases: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    # Only figures whose spread over patients is narrow: tumour volumes differ by right.
    tables: dict[str, dict[str, float]] = {"brain_ml": {name: item["brain_ml"] for name, item in cases.items()}}
    for case_id, figures in cases.items():
        for name, own in figures["sequences"].items():
            if "information" in own:
                tables.setdefault(f"{name} mutual information", {})[case_id] = own["information"]
    return tables


def _border_share(brain: np.ndarray) -> float:
    n = int(brain.sum())
    if not n:
        return 0.0
    inner = int(brain[1:-1, 1:-1].sum())
    return (n - inner) / n


def _dice(first: np.ndarray, second: np.ndarray) -> float:
    total = int(first.sum()) + int(second.sum())
    return 2 * int((first & second).sum()) / total if total else math.nan


def table(cases: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one row for each case, flagged ones first: case_id, flags (joined by "; ") and every figure."""
    raised = flags(cases)
    rows = [{"case_id": name, "flags": "; ".join(raised[name]), **row(figures)} for name, figures in cases.items()]
    columns: Sequence[str] = list(dict.fromkeys(key for item in rows for key in item))
    rows.sort(key=lambda item: -len(raised[item["case_id"]]))
    return [{column: item.get(column) for column in columns} for item in rows]
