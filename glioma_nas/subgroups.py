"""How a classifier does in parts of the cohort: sex, age, grade, site or any other column."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from glioma_nas.binary_statistics import count, wilson_interval
from glioma_nas.roc_analysis import delong

UNKNOWN = "unknown"


def age_groups(ages: Sequence[float | None]) -> list[str]:
    """Return below or from the cohort's median age, in words, for each patient; ``unknown`` without an age."""
    known = [age for age in ages if age is not None]
    if not known:
        return [UNKNOWN] * len(ages)
    middle = float(np.median(known))
    return [
        UNKNOWN if age is None else f"below {middle:.3g} years" if age < middle else f"{middle:.3g} years or more"
        for age in ages
    ]


def subgroup_rows(patients: pd.DataFrame, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Return one row for each value of each column.

    A figure that a group is too small for is none: an AUC needs two patients of each class, sensitivity one positive
    patient, specificity one negative. Groups this small say where to look, not what is so.

    Args:
        patients: ``label``, ``probability``, ``threshold`` and the columns to split by, one row a patient.
        columns: Which ones.
    """
    rows = []
    for column in columns:
        for value, group in patients.groupby(patients[column].fillna(UNKNOWN).astype(str), sort=True):
            rows.append({"column": column, "value": str(value), **_figures(group)})
    return rows


def _figures(group: pd.DataFrame) -> dict[str, Any]:
    labels = group["label"].to_numpy()
    called = (group["probability"] >= group["threshold"]).to_numpy().astype(int)
    c = count(labels, called)
    positive = c.true_positive + c.false_negative
    row: dict[str, Any] = {"n": c.n, "n_positive": positive}
    row |= dict.fromkeys(("auc", "auc_low", "auc_high"))
    if min(positive, c.n - positive) >= 2:
        area = delong(labels, group["probability"])
        row |= {"auc": area.value, "auc_low": area.low, "auc_high": area.high}
    for name, hits, total in (
        ("sensitivity", c.true_positive, positive),
        ("specificity", c.true_negative, c.n - positive),
        ("accuracy", c.true_positive + c.true_negative, c.n),
    ):
        low, high = wilson_interval(hits, total) if total else (None, None)
        row |= {name: hits / total if total else None, f"{name}_low": low, f"{name}_high": high}
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}
