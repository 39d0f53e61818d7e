"""Integrate the predicted markers of a run into subtypes, patient by patient, beside what the known markers say.

Predictions of different markers are out-of-fold each, so no patient's subtype was helped by its own labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from glioma_nas import registry
from glioma_nas.config.markers import SubtypeConfig
from glioma_nas.errors import ConfigError, LabelError, did_you_mean
from glioma_nas.marker_evaluator import patient_level


def subtype_rows(
    config: SubtypeConfig, predictions: Mapping[str, pd.DataFrame], labels: Mapping[str, Mapping[str, str]]
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Return one row a patient with the integrated call, and a summary.

    A patient needs a prediction of every marker of ``config.predicted``; others are counted as left out.

    Args:
        config: Rules, tau, and where each of the rules' markers comes from.
        predictions: Marker of the configuration → out-of-fold predictions, one row a case.
        labels: Case id → the sheet's columns.

    Raises:
        UnknownNameError: No rules have that name.
        ConfigError: A marker is unknown.
        LabelError: A cell of a measured column holds neither of the values named.
    """
    rules = registry.subtypes.get(config.rules)(tau=config.tau)
    tables = {}
    for name, marker in config.predicted.items():
        if marker not in predictions:
            raise ConfigError(
                f"classify.subtype.predicted.{name}: no marker '{marker}': {did_you_mean(marker, predictions)}"
            )
        tables[name] = patient_level(predictions[marker]).set_index("patient_id")
    first_case = {str(row.patient_id): str(row.case_id) for frame in predictions.values() for row in frame.itertuples()}
    common = sorted(set.intersection(*(set(table.index) for table in tables.values())))
    rows = []
    for patient in common:
        cells = labels[first_case[patient]]
        measured = {
            name: _state(column.column, column.altered, column.wildtype, cells)
            for name, column in config.measured.items()
        }
        found = rules.integrate(
            measured, {name: float(table.loc[patient, "probability"]) for name, table in tables.items()}
        )
        known = {
            name: ("altered" if table.loc[patient, "label"] == 1 else "wildtype") for name, table in tables.items()
        }
        reference = rules.integrate({**measured, **known})
        rows.append(
            {
                "patient_id": patient,
                "call": found.call,
                "grade": found.grade,
                "probability": max(found.probabilities.values()),
                "reason": found.reason,
                "next_test": found.next_test,
                "next_test_bits": round(found.next_test_bits, 4),
                "from_known_markers": reference.call,
            }
        )
    table = pd.DataFrame(rows)
    called = table[table["call"].notna()]
    comparable = called[called["from_known_markers"].notna()]
    agree = int((comparable["call"] == comparable["from_known_markers"]).sum())
    summary = {
        "rules": config.rules,
        "tau": config.tau,
        "n_patients": len(table),
        "n_left_out_marker_not_predicted": len(first_case) - len(table),
        "n_called": len(called),
        "n_comparable": len(comparable),
        "n_agree_with_known_markers": agree,
        "disclaimer": rules.integrate({}).disclaimer,
    }
    return table, summary


def _state(column: str, altered: str, wildtype: str, cells: Mapping[str, str]) -> str:
    value = str(cells.get(column, "")).strip().lower()
    states = {altered.lower(): "altered", wildtype.lower(): "wildtype", "": "unknown", "unknown": "unknown"}
    if value not in states:
        raise LabelError(
            f"classify.subtype.measured: column '{column}' holds '{value}'; allowed are '{altered}', '{wildtype}' or "
            "empty for unknown"
        )
    return states[value]
