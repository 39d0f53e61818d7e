"""The commands on latency, as a user types them, on a space that is measured in seconds."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from glioma_nas.cli.application import app
from glioma_nas.config import load_config
from glioma_nas.errors import BackendError, ConfigError, StorageError
from glioma_nas.latency_calibration import Calibration
from glioma_nas.latency_conditions import require_table_of_this_machine
from glioma_nas.latency_devices import processor_of
from glioma_nas.latency_records import Environment, LatencyTable
from glioma_nas.pipeline import StageContext
from glioma_nas.progress import Silent
from glioma_nas.stages import search

ON_PURPOSE = "search_for_another_device=true"

CONFIG = """
cohort: {sheet: none.csv, sequences: [t1ce, flair]}
preprocess: {image_size_px: 32, crop_size_px: 32}
latency: {backend: onnxruntime, threads: 1, warmup_runs: 1, runs: 3, max_runs: 3, shared_table: shared.json}
search: {space_options: {preset: tiny, operators: [skip, conv3x3]}}
"""


def call(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(item) for item in arguments], standalone_mode=False)
    if done.exception is not None:
        raise done.exception
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a latency table."""
    folder = tmp_path_factory.mktemp("latency")
    (folder / "tiny.yaml").write_text(CONFIG)
    call("latency", "build", folder / "tiny.yaml", "--out", folder / "run")
    return folder


@pytest.mark.slow
def test_build_writes_table_csv_and_the_shared_table(folder: Path) -> None:
    table = LatencyTable.load(folder / "run" / "latency" / "latency_table.json")
    rows = (folder / "run" / "latency" / "latency_table.csv").read_text().splitlines()
    assert len(rows) == len(table) + 1
    assert "median_ms" in rows[0] and "device" in rows[0]
    shared = LatencyTable.load(folder / "shared.json")
    assert {spec: shared.lookup(spec) for spec in shared} == {spec: table.lookup(spec) for spec in table}


@pytest.mark.slow
def test_second_space_takes_what_the_shared_table_knows(folder: Path) -> None:
    (folder / "more.yaml").write_text(CONFIG.replace("conv3x3]", "conv3x3, zoomed_conv]"))
    first = LatencyTable.load(folder / "shared.json")
    for spec in first:  # on a busy machine some would be measured anew
        first.add(spec, dataclasses.replace(first.record(spec), disturbed=0.0))
    first.save(folder / "shared.json")
    call("latency", "build", folder / "more.yaml", "--out", folder / "more")
    second = LatencyTable.load(folder / "more" / "latency" / "latency_table.json")
    assert all(second.record(spec) == first.record(spec) for spec in first)
    assert len(second) > len(first)
    assert len(LatencyTable.load(folder / "shared.json")) == len(second)


@pytest.mark.slow
def test_forced_build_measures_anew_what_the_shared_table_knows(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(CONFIG.replace("conv3x3]", "conv3x3], n_layers: 3, scales: [2, 4]"))
    arguments = ("latency", "build", tmp_path / "tiny.yaml", "--out", tmp_path / "run")
    call(*arguments)
    shared = LatencyTable.load(tmp_path / "shared.json")
    for spec in shared:  # an hour that no operator takes, known as well as can be
        shared.add(spec, dataclasses.replace(shared.record(spec), median_ms=3.6e6, p95_ms=3.6e6, disturbed=0.0))
    shared.save(tmp_path / "shared.json")
    call(*arguments, "--force")
    for path in (tmp_path / "shared.json", tmp_path / "run" / "latency" / "latency_table.json"):
        table = LatencyTable.load(path)
        assert set(table) == set(shared) and all(table.lookup(spec) < 3.6e6 for spec in table)


@pytest.fixture
def elsewhere(folder: Path, tmp_path: Path) -> Path:
    """The run folder as it would be if its table had been measured on another machine."""
    path = tmp_path / "run" / "latency" / "latency_table.json"
    path.parent.mkdir(parents=True)
    data = json.loads((folder / "run" / "latency" / "latency_table.json").read_text())
    data["environment"]["device"] = "another processor (64 cores)"
    path.write_text(json.dumps(data))
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("command", [("latency", "nni"), ("study", "table-4-2")])
def test_table_of_another_machine_is_used_only_on_purpose(elsewhere: Path, command: tuple[str, str]) -> None:
    bound = ("--max-ms", "1e6", "--networks", "1") if "nni" in command else ()
    arguments = (*command, elsewhere / "tiny.yaml", "--out", elsewhere / "run", *bound)
    with pytest.raises(
        BackendError, match=r"'another processor .64 cores.' in the table.*search_for_another_device: true"
    ):
        call(*arguments)
    call(*arguments, "--set", "search_for_another_device=true")


@pytest.mark.slow
def test_search_refuses_the_table_of_another_machine_before_it_begins(elsewhere: Path) -> None:
    config = load_config(elsewhere / "tiny.yaml")
    inputs = {"latency": elsewhere / "run" / "latency", "preprocess": elsewhere / "none"}
    context = StageContext(config, elsewhere, inputs, Silent())
    with pytest.raises(BackendError, match=r"table of another device.*search_for_another_device: true"):
        search.run(context)
    # On purpose: it goes on to the cohort, which this folder lacks.
    with pytest.raises(StorageError, match=r"index\.json"):
        search.run(dataclasses.replace(context, config=load_config(elsewhere / "tiny.yaml", [ON_PURPOSE])))


@pytest.mark.slow
def test_cores_of_the_searching_process_are_no_condition_of_the_table(folder: Path) -> None:
    table = LatencyTable.load(folder / "run" / "latency" / "latency_table.json")
    device = f"{processor_of(table.environment.device)} (1000 cores)"
    more = LatencyTable(dataclasses.replace(table.environment, device=device))
    require_table_of_this_machine(more, load_config(folder / "tiny.yaml"))


def test_table_cannot_be_compared_where_its_engine_is_missing(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    (tmp_path / "gpu.yaml").write_text(CONFIG.replace("backend: onnxruntime", "backend: torch_cuda"))
    table = LatencyTable(Environment("a GPU", 1, "torch_cuda", "2", "float32", "2", "Linux x86_64"))
    with pytest.raises(BackendError, match=r"cannot be compared with this machine, .*no CUDA device.*; or set search_"):
        require_table_of_this_machine(table, load_config(tmp_path / "gpu.yaml"))
    require_table_of_this_machine(table, load_config(tmp_path / "gpu.yaml", [ON_PURPOSE]))


@pytest.mark.slow
@pytest.mark.parametrize("change", ["latency.threads=2", "latency.backend=openvino", "latency.precision=int8"])
def test_calibrating_another_engine_than_the_tables_is_refused_before_it_measures(folder: Path, change: str) -> None:
    arguments = ("latency", "calibrate", folder / "tiny.yaml", "--out", folder / "run", "--networks", "10")
    before = sorted((folder / "run" / "calibration").glob("*"))
    with pytest.raises(BackendError, match="table of another device or engine"):
        call(*arguments, "--minutes", "0", "--set", change)
    assert sorted((folder / "run" / "calibration").glob("*")) == before


@pytest.mark.slow
def test_show_lists_slowest_first_and_filters(folder: Path, tmp_path: Path) -> None:
    shown = json.loads(call("latency", "show", folder / "run", "--json", "--csv", tmp_path / "table.csv"))
    times = [row["median_ms"] for row in shown]
    assert times == sorted(times, reverse=True)
    assert (tmp_path / "table.csv").read_text().count("\n") == len(shown) + 1
    text = call("latency", "show", folder / "run", "--operator", "conv3x3", "--limit", "2")
    assert "onnxruntime" in text and text.count("conv3x3") == 2
    with pytest.raises(ConfigError, match="did you mean 'conv3x3'"):
        call("latency", "show", folder / "run", "--operator", "conv3x4")
    with pytest.raises(StorageError, match="glioma-nas latency build"):
        call("latency", "show", tmp_path)


@pytest.mark.slow
def test_merge_joins_tables_and_refuses_those_of_another_engine(folder: Path, tmp_path: Path) -> None:
    call("latency", "merge", folder / "run", folder / "shared.json", "--out", tmp_path / "both.json")
    assert len(LatencyTable.load(tmp_path / "both.json")) == len(LatencyTable.load(folder / "shared.json"))
    other = json.loads((folder / "shared.json").read_text())
    other["environment"]["backend"] = "openvino"
    (tmp_path / "other.json").write_text(json.dumps(other))
    with pytest.raises(BackendError, match="table of another device or engine"):
        call("latency", "merge", folder / "run", tmp_path / "other.json", "--out", tmp_path / "none.json")


@pytest.mark.slow
def test_calibrate_works_in_portions_and_its_result_can_be_searched_with(folder: Path) -> None:
    arguments = ("latency", "calibrate", folder / "tiny.yaml", "--out", folder / "run", "--networks", "12")
    options = ("--held-out", "3", "--runs", "2")
    assert "1 of 12 networks are measured; run the same command again" in call(*arguments, *options, "--minutes", "0")
    rows = json.loads(call(*arguments, *options, "--json"))
    assert [row["n"] for row in rows] == [9, 3, 3]
    written = folder / "run" / "calibration"
    assert (written / "calibration.png").stat().st_size > 5000
    assert Calibration.load(written / "calibration.json").held_out.n == 3
    text = call("latency", "nni", folder / "tiny.yaml", "--out", folder / "run", "--max-ms", "1e6", "--networks", "2")
    plain = json.loads(
        call("latency", "nni", folder / "tiny.yaml", "--out", folder / "run", "--max-ms", "1e6", "--json")
    )
    key = f"search.latency_calibration={written / 'calibration.json'}"
    calibrated = json.loads(
        call("latency", "nni", folder / "tiny.yaml", "--out", folder / "run", "--max-ms", "1e6", "--json", "--set", key)
    )
    assert [row["id"] for row in plain] == [row["id"] for row in calibrated]
    assert [row["ms"] for row in plain] != [row["ms"] for row in calibrated]
    assert "filter: {max: 1e+06}" in text


@pytest.mark.slow
def test_nni_says_when_a_bound_leaves_nothing(folder: Path) -> None:
    arguments = ("latency", "nni", folder / "tiny.yaml", "--out", folder / "run")
    assert "no network is accepted" in call(*arguments, "--max-ms", "1e-9", "--draws", "20")
    with pytest.raises(ConfigError, match="no bound is given"):
        call(*arguments)


@pytest.mark.slow
def test_profile_shows_the_parts_beside_the_table(folder: Path) -> None:
    call("latency", "nni", folder / "tiny.yaml", "--out", folder / "run", "--max-ms", "1e6", "--networks", "1")
    record = next((folder / "run" / "latency_nni").glob("*.json"))
    arguments = ("latency", "profile", folder / "tiny.yaml", "--out", folder / "run", "--architecture", record)
    rows = json.loads(call(*arguments, "--runs", "3", "--json"))
    assert rows[0]["part"] == "stem"
    assert all(row["table ms"] > 0 for row in rows if row["table ms"] is not None)
    assert {row["part"] for row in rows if row["table ms"] is not None} >= {"stem", "head"}
    text = call(*arguments, "--runs", "6")
    assert "after 1 warm-up" in text and "p95" in text
    # What an engine does not tell is said once the profile is there.
    with pytest.raises(BackendError, match="does not tell what its layers are"):
        call(*arguments, "--inspect", folder / "layers.json")
    # Another engine keeps the precision that is asked for.
    with pytest.raises(BackendError, match=r"'onnxruntime' does not compute in 'bfloat16'"):
        call(*arguments, "--backend", "onnxruntime", "--set", "latency.precision=bfloat16")
    with pytest.raises(BackendError, match="table of another device or engine"):
        call(*arguments, "--backend", "openvino")


@pytest.mark.slow
def test_table_4_1_counts_are_those_of_a_convolution_of_256_channels(folder: Path) -> None:
    arguments = ("study", "table-4-1", folder / "tiny.yaml", "--out", folder / "run", "--set", "latency.network_runs=3")
    rows = {row["operator"]: row for row in json.loads(call(*arguments, "--json"))}
    plain = rows["conv3x3"]
    assert plain["GMAC"] == pytest.approx(256 * 256 * 9 * 32 * 64 / 1e9, abs=1e-4)
    assert plain["params M"] == pytest.approx((256 * 256 * 9 + 2 * 256) / 1e6, abs=1e-4)
    assert rows["grouped_conv"]["GMAC"] == pytest.approx(plain["GMAC"] / 2, abs=1e-4)
    assert rows["zoomed_conv"]["GMAC"] == pytest.approx(plain["GMAC"] / 4, abs=1e-4)
    # The printed table says -75 %: the weights of a convolution do not depend on the resolution it runs at.
    assert rows["zoomed_conv"]["params M"] == plain["params M"]
    assert (plain["× field"], rows["dilated_conv"]["× field"]) == (1.0, pytest.approx(5 / 3, abs=0.01))
    assert plain["× conv"] == 1.0 and all(row["n"] == 3 and row["median ms"] > 0 for row in rows.values())
    assert all(row["warm-up"] == 1 and {"disturbed", "clock MHz"} <= row.keys() for row in rows.values())
    written = (folder / "run" / "studies" / "table-4-1.csv").read_text().splitlines()
    assert len(written) == 5 and written[0].startswith("operator,median ms")


@pytest.mark.slow
def test_table_4_2_weights_are_inverse_to_the_sensitivities(folder: Path) -> None:
    rows = json.loads(call("study", "table-4-2", folder / "tiny.yaml", "--out", folder / "run", "--json"))
    assert [row["variable"] for row in rows] == ["operator", "scale", "width"]
    assert sum(row["w"] for row in rows) == pytest.approx(1, abs=1e-3)
    order = sorted(rows, key=lambda row: row["Δ latency ms"])
    assert [row["w"] for row in order] == sorted((row["w"] for row in rows), reverse=True)
