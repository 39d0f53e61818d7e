"""Integrate the predicted markers of a run into subtypes, patient by patient, beside what the known markers say.

Predictions of different markers are out-of-fold each, so no patient's subtype was helped by its own labels.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import pandas as pd

from glioma_nas import registry
from glioma_nas.cohort import UNKNOWN_VALUES
from glioma_nas.config.markers import SubtypeConfig
from glioma_nas.errors import ConfigError, LabelError, did_you_mean
from glioma_nas.marker_evaluator import patient_level

COLUMNS = (
    "patient_id",
    "call",
    "grade",
    "probability",
    "reason",
    "next_test",
    "next_test_bits",
    "from_known_markers",
)


def check_subtype(config: SubtypeConfig, markers: Collection[str], labels: Iterable[Mapping[str, str]]) -> None:
    """Find what is wrong with a subtype's configuration or columns, before anything is trained.

    Args:
        config: Rules, tau, and where each of the rules' markers comes from.
        markers: Names of the configured markers.
        labels: The sheet's columns of every case.

    Raises:
        UnknownNameError: No rules have that name.
        ConfigError: A marker is unknown.
        LabelError: A measured column is absent or empty, or a cell of it holds neither of the values named.
    """
    rules = registry.subtypes.get(config.rules)(tau=config.tau)
    rules.integrate(dict.fromkeys(config.measured, "unknown"), dict.fromkeys(config.predicted, 0.5))
    for name, marker in config.predicted.items():
        if marker not in markers:
            raise ConfigError(
                f"classify.subtype.predicted.{name}: no marker '{marker}': {did_you_mean(marker, markers)}"
            )
    sheet = list(labels)
    for name, column in config.measured.items():
        if not any(_cell(cells, column.column) for cells in sheet):
            known = sorted({key for cells in sheet for key in cells})
            raise LabelError(
                f"classify.subtype.measured.{name}: the sheet lacks column '{column.column}', or no case of this run "
                f"has a value in it; {did_you_mean(column.column, known)} Correct 'column', or remove the entry"
            )
        for cells in sheet:
            _state(column.column, column.altered, column.wildtype, cells)


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
        GliomaNasError: See `check_subtype`.
    """
    rules = registry.subtypes.get(config.rules)(tau=config.tau)
    check_subtype(config, predictions, labels.values())
    tables = {
        name: patient_level(predictions[marker]).set_index("patient_id") for name, marker in config.predicted.items()
    }
    known_cells: dict[str, dict[str, str]] = {}
    for frame in predictions.values():
        for row in frame.itertuples():
            own = known_cells.setdefault(str(row.patient_id), {})
            # Of several cases of a patient the first with a value counts.
            for column, cell in labels[str(row.case_id)].items():
                if _cell({column: cell}, column):
                    own.setdefault(column, cell)
    common = sorted(set.intersection(*(set(table.index) for table in tables.values())))
    rows = []
    for patient in common:
        cells = known_cells[patient]
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
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    called = table[table["call"].notna()]
    comparable = called[called["from_known_markers"].notna()]
    agree = int((comparable["call"] == comparable["from_known_markers"]).sum())
    summary = {
        "rules": config.rules,
        "tau": config.tau,
        "n_patients": len(table),
        "n_left_out_marker_not_predicted": len(known_cells) - len(table),
        "n_called": len(called),
        "n_comparable": len(comparable),
        "n_agree_with_known_markers": agree,
        "outcomes": _outcomes(table),
        "next_tests": {str(name): int(n) for name, n in table["next_test"].value_counts().items()},
        "disclaimer": rules.integrate({}).disclaimer,
    }
    return table, summary


def _outcomes(table: pd.DataFrame) -> list[dict[str, Any]]:
    rows = []
    for call, group in table.fillna({"call": "none"}).groupby("call", sort=True):
        known = group[group["from_known_markers"].notna()]
        agree = int((known["from_known_markers"] == call).sum())
        rows.append(
            {
                "call": str(call),
                "n": len(group),
                "mean_probability": round(float(group["probability"].mean()), 4),
                "n_comparable": None if call == "none" else len(known),
                "n_agree_with_known_markers": None if call == "none" else agree,
            }
        )
    return rows


def subtype_of(config: SubtypeConfig, probabilities: Mapping[str, float], cells: Mapping[str, str]) -> dict[str, Any]:
    """Integrate the markers of one new patient.

    Args:
        config: Rules, tau, and where each of the rules' markers comes from.
        probabilities: Marker of the configuration → probability of its positive class; markers that were not predicted
            are left out and unknown to the rules.
        cells: The patient's columns, for markers measured in tissue.

    Returns:
        The rules' own fields (call, grade, reason, probabilities, next_test, disclaimer …), ``text``, which says it in
        words, and ``measured`` and ``predicted``: what it was made of.

    Raises:
        LabelError: A measured column holds neither of the values named.
    """
    rules = registry.subtypes.get(config.rules)(tau=config.tau)
    measured = _measured(config, cells)
    predicted = {
        name: round(probabilities[marker], 4) for name, marker in config.predicted.items() if marker in probabilities
    }
    found = rules.integrate(measured, predicted)
    return {**found.as_json(), "text": found.text(), "measured": measured, "predicted": predicted}


def withheld_subtype(config: SubtypeConfig, cells: Mapping[str, str], reason: str) -> dict[str, Any]:
    """Return the fields of `subtype_of` for a patient of whom nothing is called.

    Args:
        config: The rules.
        cells: The patient's columns.
        reason: Why nothing is called.

    Raises:
        LabelError: See `subtype_of`.
    """
    disclaimer = registry.subtypes.get(config.rules)(tau=config.tau).integrate({}).disclaimer
    return {
        "call": None,
        "grade": "",
        "rule": "",
        "reason": reason,
        "probabilities": {},
        "next_test": None,
        "next_test_bits": 0.0,
        "disclaimer": disclaimer,
        "text": f"No call: {reason}. {disclaimer}",
        "measured": _measured(config, cells),
        "predicted": {},
    }


def _measured(config: SubtypeConfig, cells: Mapping[str, str]) -> dict[str, str]:
    """Return the states that tissue has settled."""
    states = {
        name: _state(column.column, column.altered, column.wildtype, cells) for name, column in config.measured.items()
    }
    return {name: state for name, state in states.items() if state != "unknown"}


def _cell(cells: Mapping[str, str], column: str) -> str:
    value = str(cells.get(column, "")).strip().lower()
    return "" if value in UNKNOWN_VALUES else value


def _state(column: str, altered: str, wildtype: str, cells: Mapping[str, str]) -> str:
    value = _cell(cells, column)
    states = {altered.lower(): "altered", wildtype.lower(): "wildtype", "": "unknown"}
    if value not in states:
        raise LabelError(
            f"classify.subtype.measured: column '{column}' holds '{value}'; allowed are '{altered}', '{wildtype}' or "
            "empty for unknown"
        )
    return states[value]
