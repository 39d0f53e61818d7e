"""Sequences that some case lacks: zero channels with indicators, and sequences dropped from the run."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from glioma_nas.config import RunConfig, load_config, parse_config
from glioma_nas.errors import CohortError
from glioma_nas.missing_sequences import without_incomplete_sequences
from glioma_nas.pipeline import STAGES, Pipeline, results_of
from glioma_nas.prepared import PreparedCohort
from glioma_nas.progress import Silent
from glioma_nas.report.cohort_section import missing_rule
from glioma_nas.space_building import space_options
from glioma_nas.testing.phantoms import write_phantom_cohort


@pytest.fixture
def sheet(tmp_path: Path) -> Path:
    path = write_phantom_cohort(tmp_path / "cohort", 4, 0)
    with path.open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    rows[2]["t1ce"] = ""
    with path.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def config_for(sheet: Path, rule: str, sequences: tuple[str, ...] = ("t1ce", "flair"), **sections: object) -> RunConfig:
    data = {
        "cohort": {"sheet": str(sheet), "sequences": list(sequences), "missing_sequence": rule},
        "preprocess": {"crop_size_px": 48, "image_size_px": 32, "workers": 1},
        "folds": {"n_folds": 2, "stratify_by": []},
        "search": {"space_options": {"preset": "tiny"}},
        **sections,
    }
    return parse_config(data, source="test", folder=sheet.parent)


def test_indicators_are_channels_of_the_run(sheet: Path, tmp_path: Path) -> None:
    config = config_for(sheet, "indicator")
    assert config.cohort.channels == ("t1ce", "flair", "t1ce_is_present", "flair_is_present")
    Pipeline(config, tmp_path / "run", Silent()).run(["preprocess"])
    cohort = PreparedCohort.load(tmp_path / "run" / "preprocess")
    assert cohort.sequences == config.cohort.channels
    assert not cohort.cases["P003"].images()[:, [0, 2]].any()
    assert cohort.cases["P001"].images()[:, 2].any()
    results = results_of(tmp_path / "run" / "preprocess")
    assert results["missing"] == {"t1ce": 1, "flair": 0}
    assert space_options(config)["in_channels"] == 4
    assert "a channel for each sequence says whether it is there" in missing_rule(config)


def test_sequence_that_a_case_lacks_is_dropped_from_the_whole_run(sheet: Path, tmp_path: Path) -> None:
    markers = {"idh": {"column": "idh", "positive": "mutant", "sequences": ["t1ce", "t1"]}}
    config = config_for(sheet, "drop", classify={"markers": markers})
    pipeline = Pipeline(config, tmp_path / "run", Silent())
    assert pipeline.config.cohort.channels == ("flair",)
    assert pipeline.config.classify.markers["idh"].sequences == ("t1",)
    assert "t1ce" in missing_rule(pipeline.config)
    pipeline.run(["preprocess"])
    cohort = PreparedCohort.load(tmp_path / "run" / "preprocess")
    assert cohort.sequences == ("flair", "t1")
    assert len(cohort.cases) == 4
    written = load_config(tmp_path / "run" / "config.yaml")
    assert written.cohort.dropped_sequences == ("t1ce",)
    assert without_incomplete_sequences(written) == written
    assert Pipeline(config, tmp_path / "run", Silent()).is_done(STAGES[0])


def test_dropping_every_sequence_is_refused(sheet: Path) -> None:
    with pytest.raises(
        CohortError, match=r"'drop' leaves no sequence to cohort.sequences \(1 cases lack t1ce, the first is P003\)"
    ):
        without_incomplete_sequences(config_for(sheet, "drop", ("t1ce",)))


def test_nothing_is_dropped_when_nothing_is_missing(sheet: Path) -> None:
    config = config_for(sheet, "drop", ("t1", "flair"))
    assert without_incomplete_sequences(config) is config
