"""Predict many new cases, each for itself: done ones are skipped, bad ones are listed and do not stop the rest."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from glioma_nas.cohort import Case
from glioma_nas.errors import CohortError, GliomaNasError
from glioma_nas.files import read_json, write_text
from glioma_nas.new_patients.case_inputs import find_cases, told, with_patient
from glioma_nas.new_patients.dicom_seg import require_highdicom
from glioma_nas.new_patients.frozen_run import FrozenRun
from glioma_nas.new_patients.input_checks import require_sequences
from glioma_nas.new_patients.prediction import (
    MASK_FILE,
    PAGE_FILE,
    PREDICTION_FILE,
    SEG_FILE,
    is_predicted,
    predict_case,
)
from glioma_nas.privacy.hidden_paths import one_line
from glioma_nas.progress import Progress

TABLE_FILE = "predictions.csv"

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How one case ended.

    Attributes:
        case_id: The case.
        state: ``predicted``, ``done before`` or ``failed``.
        record: Content of its ``prediction.json``; none when it failed.
        problem: Why it failed.
        markers: Names of the run's markers, in order.
    """

    case_id: str
    state: str
    record: Mapping[str, Any] | None
    problem: str
    markers: tuple[str, ...]

    def cells(self) -> list[Any]:
        """Return volume, the probability of each marker, and what a reader should know, for a table."""
        if self.record is None:
            return [None, *([None] * len(self.markers)), self.problem]
        found = {marker["marker"]: marker["probability"] for marker in self.record["markers"]}
        shown = [None if found.get(name) is None else round(found[name], 3) for name in self.markers]
        notes = [*self.record["warnings"], *self.record["quality_flags"]]
        return [self.record["segmentation"]["volume_ml"], *shown, "; ".join(notes)]

    def row(self) -> dict[str, Any]:
        """Return the case as a row of ``predictions.csv``."""
        row: dict[str, Any] = {"case_id": self.case_id, "state": self.state, "problem": self.problem}
        if self.record is not None:
            row.update({key: value for key, value in self.record["segmentation"].items() if key != "network"})
            for marker in self.record["markers"]:
                for key in ("probability", "lowest", "highest", "threshold", "call", "reason"):
                    row[f"{marker['marker']}_{key}"] = marker[key]
            if self.record["subtype"] is not None:
                for key in ("call", "reason"):
                    row[f"subtype_{key}"] = self.record["subtype"][key]
            row["warnings"] = "; ".join(self.record["warnings"])
            row["quality_flags"] = "; ".join(self.record["quality_flags"])
        return row


@dataclass(frozen=True)
class Served:
    """What a call of `predict_all` did.

    Attributes:
        outcomes: One a case, in order.
        problems: What could not even be read as a case.
    """

    outcomes: tuple[Outcome, ...]
    problems: tuple[str, ...]

    @property
    def n_failed(self) -> int:
        """How many cases could not be served."""
        return sum(outcome.state == "failed" for outcome in self.outcomes)


def predict_all(
    source: Path,
    run: FrozenRun,
    out: Path,
    *,
    patient: Mapping[str, Any],
    force: bool,
    progress: Progress,
    any_spacing: bool = False,
    dicom_seg: bool = False,
) -> Served:
    """Predict every case of ``source`` into ``out/CASE`` and list them in ``out/predictions.csv``.

    Args:
        source: See `glioma_nas.new_patients.case_inputs.find_cases`.
        run: The frozen run.
        out: Where the results go.
        patient: ``case_id``, ``age`` and ``sex`` from the command line, for a source of one case.
        force: Predict again what is done.
        progress: Where to report.
        any_spacing: See `glioma_nas.new_patients.input_checks.require_servable`.
        dicom_seg: Write ``mask.dcm`` beside ``mask.nii.gz``; the source must be a folder of DICOM.

    Raises:
        CohortError: The source cannot be read; ``patient`` was given for several cases; or the only case cannot be
            served, which is said before anything is computed.
    """
    if dicom_seg:
        require_highdicom()
    found = find_cases(source, run, out, progress)
    cases, problems, series = found.cases, found.problems, dict(found.series)
    if dicom_seg and not series:
        raise CohortError(f"{source}: --dicom-seg refers to DICOM series; give a folder of DICOM, archives unpacked")
    if any(value is not None for value in patient.values()):
        if len(cases) != 1:
            raise CohortError(
                f"{source}: holds {len(cases)} cases; --case-id, --age and --sex describe one patient, so use "
                "columns of a sheet"
            )
        renamed = with_patient(cases[0], **patient)
        series = {renamed.case_id: series[cases[0].case_id]} if series else {}
        cases = (renamed,)
    if len(cases) == 1 and not problems:
        require_sequences(cases[0], run)
    outcomes = []
    with progress.task("predict", len(cases)) as task:
        for case in cases:
            files = series.get(case.case_id, {}) if dicom_seg else None
            outcomes.append(_serve(case, run, out / case.case_id, force=force, any_spacing=any_spacing, series=files))
            if outcomes[-1].state == "failed":
                progress.note(f"predict: {outcomes[-1].problem}")
            task.advance()
    write_text(out / TABLE_FILE, pd.DataFrame([outcome.row() for outcome in outcomes]).to_csv(index=False))
    return Served(tuple(outcomes), problems)


def unexpected(err: Exception, case: Case, run: FrozenRun) -> str:
    """Return an error that is not one of ours as one line, without paths where the run hides ids."""
    return f"case {case.case_id}: {type(err).__name__}: {one_line(err, case, hidden=run.config.cohort.hash_ids)}"


def _serve(
    case: Case,
    run: FrozenRun,
    folder: Path,
    *,
    force: bool,
    any_spacing: bool = False,
    series: Mapping[str, Sequence[Path]] | None = None,
) -> Outcome:
    markers = tuple(run.markers)
    try:
        is_there = series is None or (folder / SEG_FILE).is_file()
        if not force and is_there and is_predicted(case, run, folder):
            return Outcome(case.case_id, "done before", read_json(folder / PREDICTION_FILE), "", markers)
        # What was made of earlier scans or by an earlier run must not be taken for the result when this one fails.
        for name in (PREDICTION_FILE, PAGE_FILE, MASK_FILE, SEG_FILE):
            (folder / name).unlink(missing_ok=True)
        record = predict_case(case, run, folder, any_spacing=any_spacing, series=series)
    except (GliomaNasError, OSError) as err:  # a scan may vanish, or its disk fail, after the cohort was read
        _logger.info("case %s failed", case.case_id)
        return Outcome(case.case_id, "failed", None, told(str(err), case, run), markers)
    except Exception as err:
        # Libraries raise what they like over a strange scan, which is the case's fault and must not cost the others. A
        # traceback quotes paths, in which patients are apt to stand.
        hidden = run.config.cohort.hash_ids
        _logger.info("case %s failed: %s", case.case_id, type(err).__name__, exc_info=not hidden)
        return Outcome(case.case_id, "failed", None, unexpected(err, case, run), markers)
    return Outcome(case.case_id, "predicted", record, "", markers)
