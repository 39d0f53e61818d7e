from __future__ import annotations

import csv
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


def _record(median_ms: float = 2.0, n: int = 5, **changes: Any) -> LatencyRecord:
    return LatencyRecord(median_ms, median_ms * 1.5, n, 1, ((1, 8, 32, 32),), **changes)


def _known_to(width: float, **changes: Any) -> LatencyRecord:
    """Return a record whose median's interval is so wide, relative to the median."""
    return _record(median_low_ms=2.0, median_high_ms=2.0 + 2.0 * width, **changes)


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


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        # More calls were made because the median would not stand still.
        (_known_to(0.01, n=20), _known_to(0.08, n=60)),
        (_known_to(0.08, n=20), _record(n=3)),
        (_known_to(0.01, disturbed=0.1), _known_to(0.01, disturbed=0.3)),
        (_known_to(0.01, disturbed=0.1), _known_to(0.01, disturbed=None)),
        # Calls that all waited agree very well with each other.
        (_known_to(0.08, disturbed=0.0), _known_to(0.001, disturbed=1.0)),
    ],
    ids=["narrower", "with an interval", "less disturbed", "known to be", "not disturbed"],
)
def test_merge_keeps_the_record_whose_median_is_known_better(better: LatencyRecord, worse: LatencyRecord) -> None:
    good = LatencyTable(ENVIRONMENT, {CONV: better})
    bad = LatencyTable(ENVIRONMENT, {CONV: worse, ZOOMED: _record(3.0)})
    for merged in (good.merge(bad), bad.merge(good)):
        assert (len(merged), merged.record(CONV), merged.lookup(ZOOMED)) == (2, better, 3.0)
    assert (len(good), bad.record(CONV)) == (1, worse)


def test_merge_takes_the_later_time_of_an_operator_whose_code_has_changed() -> None:
    before, after = (_known_to(width, component=code) for width, code in ((0.01, "a"), (0.05, "b")))
    merged = LatencyTable(ENVIRONMENT, {CONV: before}).merge(LatencyTable(ENVIRONMENT, {CONV: after}))
    assert merged.record(CONV) == after


def test_update_replaces_even_a_better_known_time() -> None:
    ours, theirs = (LatencyTable(ENVIRONMENT, {CONV: _known_to(width)}) for width in (0.01, 0.05))
    assert ours.updated(theirs).record(CONV) == theirs.record(CONV)
    with pytest.raises(BackendError, match="table of another device"):
        ours.updated(LatencyTable(dataclasses.replace(ENVIRONMENT, device="another")))


def test_update_keeps_a_good_time_from_one_of_a_busy_machine_and_the_same_code() -> None:
    good, busy = (LatencyTable(ENVIRONMENT, {CONV: _known_to(0.01, disturbed=share)}) for share in (0.0, 0.9))
    assert good.updated(busy).record(CONV) == good.record(CONV)
    assert busy.updated(busy).record(CONV) == busy.record(CONV)
    changed = LatencyTable(ENVIRONMENT, {CONV: _known_to(0.01, disturbed=0.9, component="of another code")})
    assert good.updated(changed).record(CONV) == changed.record(CONV)


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


def test_impossible_time_in_a_file_is_refused_with_file_and_operator(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    whole = _saved(path)
    for name, value in (("median_ms", -1.0), ("p95_ms", float("nan")), ("n", 0)):
        path.write_text(json.dumps({**whole, "records": [{**whole["records"][0], name: value}]}))
        with pytest.raises(StorageError, match=rf"table\.json: conv 8->16 .*{name if name != 'n' else '0 timed'}"):
            LatencyTable.load(path)


def test_table_of_another_batch_size_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(json.dumps({**_saved(path), "batch_size": 4}))
    with pytest.raises(StorageError, match=r"table\.json: latency table of batch size 4"):
        LatencyTable.load(path)


def test_csv_tells_how_every_time_was_taken(tmp_path: Path) -> None:
    record = _known_to(0.1, clock_mhz=2400.0, disturbed=0.25)
    LatencyTable(ENVIRONMENT, {CONV: record}).save_csv(tmp_path / "table.csv")
    (row,) = csv.DictReader((tmp_path / "table.csv").read_text().splitlines())
    taken = {"warmup_runs": "1", "input_shapes": "1x8x32x32", "n": "5", "clock_mhz": "2400.0", "disturbed": "0.25"}
    assert {name: row[name] for name in taken} == taken
    assert (float(row["median_low_ms"]), float(row["median_high_ms"])) == pytest.approx((2.0, 2.2))
    assert row["device"] == ENVIRONMENT.device and row["precision"] == "float32"


def test_table_of_a_newer_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(json.dumps({**_saved(path), "format": 99}))
    with pytest.raises(StorageError, match=r"format 99 is not the supported 1"):
        LatencyTable.load(path)


def test_rows_are_flat_and_sorted() -> None:
    rows = LatencyTable(ENVIRONMENT, {ZOOMED: _record(3.0), CONV: _record(2.0)}).rows()
    assert [row["operator"] for row in rows] == ["conv", "zoomed"]
    measured = {"median_ms": 2.0, "p95_ms": 3.0, "n": 5, "warmup_runs": 1, "disturbed": None, "clock_mhz": None}
    assert rows[0].items() >= {**dataclasses.asdict(CONV), **measured, "input_shapes": "1x8x32x32"}.items()
