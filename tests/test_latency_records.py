from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from glioma_nas.costs import OperatorSpec
from glioma_nas.errors import BackendError, StorageError
from glioma_nas.latency_records import Environment, LatencyRecord, LatencyTable

ENVIRONMENT = Environment("some CPU (2 cores)", 2, "onnxruntime", "1.0", "float32", "2.11", "Linux x86_64")
CONV = OperatorSpec("conv", 8, 16, 2, 32, 32)
ZOOMED = OperatorSpec("zoomed", 8, 16, 2, 32, 32)


def _record(median_ms: float = 2.0, n: int = 5) -> LatencyRecord:
    return LatencyRecord(median_ms, median_ms * 1.5, n, 1, ((1, 8, 32, 32),))


def _saved(path: Path) -> dict[str, Any]:
    LatencyTable(ENVIRONMENT, {CONV: _record()}).save(path)
    data: dict[str, Any] = json.loads(path.read_text())
    return data


def test_lookup_returns_median_of_exactly_that_operator() -> None:
    table = LatencyTable(ENVIRONMENT, {CONV: _record(2.0), ZOOMED: _record(3.0)})
    assert (table.lookup(CONV), table.lookup(ZOOMED)) == (2.0, 3.0)


@pytest.mark.parametrize("change", [{"operator": "zoomed"}, {"in_channels": 9}, {"stride": 1}, {"height": 16}])
def test_lookup_names_the_operator_when_missing(change: dict[str, Any]) -> None:
    missing = dataclasses.replace(CONV, **change)
    with pytest.raises(BackendError, match=r"no time for operator") as caught:
        LatencyTable(ENVIRONMENT, {CONV: _record()}).lookup(missing)
    assert missing.key() in str(caught.value)


def test_table_returns_from_file_unchanged(tmp_path: Path) -> None:
    table = LatencyTable(ENVIRONMENT, {CONV: _record(2.0), ZOOMED: _record(3.0)})
    table.save(tmp_path / "table.json")
    loaded = LatencyTable.load(tmp_path / "table.json")
    assert loaded.environment == ENVIRONMENT
    assert {spec: loaded.record(spec) for spec in loaded} == {spec: table.record(spec) for spec in table}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("device", "another CPU"),
        ("backend", "torch"),
        ("backend_version", "2.0"),
        ("precision", "float16"),
        ("threads", 4),
    ],
)
def test_table_of_another_environment_is_refused(field: str, value: Any) -> None:
    other = dataclasses.replace(ENVIRONMENT, **{field: value})
    with pytest.raises(BackendError, match=f"table of another device or engine .*{field} .*'{value}' here"):
        LatencyTable(ENVIRONMENT).require_same_environment(other)
    with pytest.raises(BackendError, match=r"table of another device"):
        LatencyTable(ENVIRONMENT).merge(LatencyTable(other))


def test_exporting_pytorch_version_does_not_matter() -> None:
    LatencyTable(ENVIRONMENT).require_same_environment(dataclasses.replace(ENVIRONMENT, torch_version="2.12"))


def test_merge_keeps_the_record_with_more_runs() -> None:
    ours = LatencyTable(ENVIRONMENT, {CONV: _record(2.0, n=5)})
    theirs = LatencyTable(ENVIRONMENT, {CONV: _record(9.0, n=50), ZOOMED: _record(3.0)})
    for merged in (ours.merge(theirs), theirs.merge(ours)):
        assert len(merged) == 2
        assert (merged.lookup(CONV), merged.lookup(ZOOMED)) == (9.0, 3.0)
    assert (len(ours), ours.lookup(CONV)) == (1, 2.0)


@pytest.mark.parametrize(
    "values",
    [(0.0, 1.0, 5, 1), (float("nan"), 1.0, 5, 1), (1.0, float("inf"), 5, 1), (-1.0, 1.0, 5, 1), (1.0, 1.0, 0, 1)],
)
def test_impossible_time_is_refused(values: tuple[float, float, int, int]) -> None:
    with pytest.raises(BackendError, match=r"positive number of milliseconds|timed and 1 warm-up calls"):
        LatencyRecord(*values)


def test_damaged_table_is_refused_with_its_name(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    whole = _saved(path)
    path.write_text(path.read_text()[:-40])
    with pytest.raises(StorageError, match=r"table\.json: not readable as JSON"):
        LatencyTable.load(path)
    for broken in (
        [],
        {**whole, "records": [{"spec": {}}]},
        {key: value for key, value in whole.items() if key != "environment"},
    ):
        path.write_text(json.dumps(broken))
        with pytest.raises(StorageError, match=r"table\.json: not a latency table"):
            LatencyTable.load(path)


def test_table_of_a_newer_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(json.dumps({**_saved(path), "format": 99}))
    with pytest.raises(StorageError, match=r"format 99 is not the supported 1"):
        LatencyTable.load(path)


def test_rows_are_flat_and_sorted() -> None:
    rows = LatencyTable(ENVIRONMENT, {ZOOMED: _record(3.0), CONV: _record(2.0)}).rows()
    assert [row["operator"] for row in rows] == ["conv", "zoomed"]
    assert rows[0] == {**dataclasses.asdict(CONV), "median_ms": 2.0, "p95_ms": 3.0, "n": 5, "disturbed": None}
