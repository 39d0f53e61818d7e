"""Stages of a run folder: skipped when done, remade when out of date, resumed when cut off."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml

from glioma_nas.config import RunConfig, load_config, parse_config
from glioma_nas.errors import CohortError, GliomaNasError, StorageError
from glioma_nas.files import read_json
from glioma_nas.pipeline import MANIFEST, STAGES, Pipeline, results_of
from glioma_nas.progress import Silent
from glioma_nas.testing.phantoms import write_phantom_cohort
from tests.tiny_run import TINY_RUN

TINY = {
    **TINY_RUN,
    "train": {**TINY_RUN["train"], "baselines": ["monai_unet"]},
    "export": {"parity_slices": 2},
    "classify": {
        "epochs": 1,
        "slices_per_case": 2,
        "image_size_px": 32,
        "markers": {
            "idh": {"column": "idh", "positive": "mutant", "classifier": "idh"},
            "ki67": {"column": "ki67", "threshold": 10, "classifier": "kinet"},
        },
    },
}


class Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    write_phantom_cohort(tmp_path / "cohort", 8, 0)
    return parse_config(TINY, source="test", folder=tmp_path)


def test_finished_stage_is_skipped(config: RunConfig, tmp_path: Path) -> None:
    notes = Notes()
    Pipeline(config, tmp_path / "run", notes).run(["preprocess"])
    before = (tmp_path / "run" / "preprocess" / MANIFEST).stat().st_mtime_ns
    Pipeline(config, tmp_path / "run", notes).run(["preprocess"])
    assert (tmp_path / "run" / "preprocess" / MANIFEST).stat().st_mtime_ns == before
    assert notes.notes[-1] == "preprocess: done before, skipped"


def test_classify_depends_on_what_its_files_say(tmp_path: Path) -> None:
    (tmp_path / "who.json").write_text("{}")
    (tmp_path / "weights.pt").write_bytes(b"first")
    marker = {"column": "idh", "positive": "mutant", "options": {"pretrained": str(tmp_path / "weights.pt")}}
    data = {"masks": "given", "mask_provenance": "who.json", "markers": {"idh": marker}}
    config = parse_config(
        {"cohort": {"sheet": str(tmp_path / "cohort.csv")}, "classify": data}, source="test", folder=tmp_path
    )
    pipeline = Pipeline(config, tmp_path / "run", Silent())
    stage = next(stage for stage in STAGES if stage.name == "classify")
    for name in stage.needs:
        (tmp_path / "run" / name).mkdir(parents=True)
        (tmp_path / "run" / name / MANIFEST).write_text("{}")
    keys = [pipeline.key(stage)]
    (tmp_path / "who.json").write_text('{"case0": {}}')
    keys.append(pipeline.key(stage))
    (tmp_path / "weights.pt").write_bytes(b"second")
    keys.append(pipeline.key(stage))
    assert len(set(keys)) == 3


def test_manifest_says_what_made_the_stage(config: RunConfig, tmp_path: Path) -> None:
    Pipeline(config, tmp_path / "run", Silent()).run(["preprocess"])
    manifest = read_json(tmp_path / "run" / "preprocess" / MANIFEST)
    assert manifest["seed"] == 1
    assert manifest["versions"]["torch"].startswith("2.")
    assert manifest["wall_s"] > 0
    assert results_of(tmp_path / "run" / "preprocess") == manifest["results"]
    assert load_config(tmp_path / "run" / "config.yaml") == config


def test_changed_configuration_or_scan_makes_a_stage_out_of_date(config: RunConfig, tmp_path: Path) -> None:
    pipeline = Pipeline(config, tmp_path / "run", Silent())
    pipeline.run(["preprocess"])
    changed = config.model_copy(update={"folds": config.folds.model_copy(update={"n_folds": 4})})
    assert not Pipeline(changed, tmp_path / "run", Silent()).is_done(STAGES[0])
    unrelated = config.model_copy(update={"report": config.report.model_copy(update={"title": "other"})})
    assert Pipeline(unrelated, tmp_path / "run", Silent()).is_done(STAGES[0])
    idh = config.classify.markers["idh"].model_copy(update={"options": {"backbone": "resnet18"}})
    classifier = config.classify.model_copy(update={"markers": {**config.classify.markers, "idh": idh}})
    other_classifier = config.model_copy(update={"classify": classifier})
    assert Pipeline(other_classifier, tmp_path / "run", Silent()).is_done(STAGES[0])
    scan = tmp_path / "cohort" / "P002" / "flair.nii.gz"
    os.utime(scan, ns=(0, 0))
    assert not Pipeline(config, tmp_path / "run", Silent()).is_done(STAGES[0])


def test_changed_sheet_makes_preprocessing_out_of_date(config: RunConfig, tmp_path: Path) -> None:
    Pipeline(config, tmp_path / "run", Silent()).run(["preprocess"])
    text = config.cohort.sheet.read_text()
    config.cohort.sheet.write_text(text + "\n")
    assert Pipeline(config, tmp_path / "run", Silent()).is_done(STAGES[0])
    config.cohort.sheet.write_text(text.replace("P002,P002", "P002,P001"))
    assert not Pipeline(config, tmp_path / "run", Silent()).is_done(STAGES[0])


def test_salt_counts_by_content_where_it_hides_ids_and_not_at_all_elsewhere(config: RunConfig, tmp_path: Path) -> None:
    def with_salt(name: str, hash_ids: bool) -> Pipeline:
        update = {"salt_file": tmp_path / name, "hash_ids": hash_ids}
        cohort = config.cohort.model_copy(update=update)
        return Pipeline(config.model_copy(update={"cohort": cohort}), tmp_path / "run", Silent())

    Pipeline(config, tmp_path / "run", Silent()).run(["preprocess"])
    assert with_salt("elsewhere.salt", False).is_done(STAGES[0])
    assert not with_salt("first.salt", True).is_done(STAGES[0])
    hidden = with_salt("first.salt", True).key(STAGES[0])
    (tmp_path / "moved.salt").write_bytes((tmp_path / "first.salt").read_bytes())
    (tmp_path / "moved.salt").chmod(0o600)
    assert with_salt("moved.salt", True).key(STAGES[0]) == hidden != with_salt("second.salt", True).key(STAGES[0])


def test_input_that_was_made_again_makes_later_stages_out_of_date(config: RunConfig, tmp_path: Path) -> None:
    pipeline = Pipeline(config, tmp_path / "run", Silent())
    pipeline.run(["preprocess"])
    search = next(stage for stage in STAGES if stage.name == "search")
    manifest = tmp_path / "run" / "latency" / MANIFEST
    manifest.parent.mkdir()
    manifest.write_text('{"key": "first"}')
    before = pipeline.key(search)
    assert pipeline.key(search) == before
    manifest.write_text('{"key": "second"}')
    assert pipeline.key(search) != before


def test_second_run_in_one_folder_is_refused(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(StorageError, match="another run is at work in this folder"):
            Pipeline(config, tmp_path / "run", Silent()).run(["preprocess"])


def test_stage_cut_off_before_its_rename_is_published_without_running_again(config: RunConfig, tmp_path: Path) -> None:
    pipeline = Pipeline(config, tmp_path / "run", Silent())
    pipeline.run(["preprocess"])
    final, partial = tmp_path / "run" / "preprocess", tmp_path / "run" / ".preprocess.partial"
    final.rename(partial)
    (partial / "key.json").write_text(json.dumps({"key": pipeline.key(STAGES[0], resuming=True)}))
    made = (partial / MANIFEST).stat().st_mtime_ns
    pipeline.run(["preprocess"])
    assert (final / MANIFEST).stat().st_mtime_ns == made
    assert not partial.exists()


def test_stage_without_its_input_says_what_to_run(config: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="stage 'search' needs 'preprocess', which is not done"):
        Pipeline(config, tmp_path / "run", Silent()).run(["search"])


def test_failing_stage_leaves_earlier_results_intact(config: RunConfig, tmp_path: Path) -> None:
    Pipeline(config, tmp_path / "run", Silent()).run(["preprocess"])
    kept = (tmp_path / "run" / "preprocess" / MANIFEST).read_bytes()
    (tmp_path / "cohort" / "P003" / "flair.nii.gz").unlink()
    with config.cohort.sheet.open("a") as sheet:
        sheet.write("\n")
    shown = (tmp_path / "run" / "config.yaml").read_bytes()
    retitled = config.model_copy(update={"report": config.report.model_copy(update={"title": "other"})})
    with pytest.raises(CohortError, match=r"flair"):
        Pipeline(retitled, tmp_path / "run", Silent()).run(["preprocess"])
    assert (tmp_path / "run" / "preprocess" / MANIFEST).read_bytes() == kept
    assert (tmp_path / "run" / "config.yaml").read_bytes() == shown


def test_repaired_file_keeps_the_cases_that_were_done(config: RunConfig, tmp_path: Path) -> None:
    broken = tmp_path / "cohort" / "P003" / "flair.nii.gz"
    content = broken.read_bytes()
    broken.write_bytes(content[: len(content) // 2])
    Pipeline(config, tmp_path / "run", Silent()).run(["preprocess"])
    assert not (tmp_path / "run" / "preprocess" / "cases" / "P003").exists()
    done = tmp_path / "run" / "preprocess" / "cases" / "P001" / "images.npy"
    made = done.stat().st_mtime_ns
    broken.write_bytes(content)
    Pipeline(config, tmp_path / "run", Silent()).run(["preprocess"])
    assert done.stat().st_mtime_ns == made
    assert (tmp_path / "run" / "preprocess" / "cases" / "P003").is_dir()


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        (
            "search",
            {"strategy_options": {"finetune_step": 1}},
            r"unknown option 'finetune_step': did you mean 'finetune_steps'",
        ),
        ("search", {"strategy_options": {"pretrain_epochs": 2}}, "decided by search.pretrain_epochs"),
        ("search", {"strategy": "co_serch"}, "did you mean 'co_search'"),
        ("search", {"space_options": {"preset": "small", "n_layer": 3}}, "did you mean 'n_layers'"),
        ("train", {"loss": "focl"}, "did you mean 'focal'"),
        ("train", {"baselines": ["monai_unt"]}, "did you mean 'monai_unet'"),
        ("train", {"baseline_options": {"unet": {}}}, "not in train.baselines"),
        (
            "train",
            {"baseline_options": {"monai_unet": {"channels": [2, 2, 2, 2, 2, 2, 2]}}},
            r"^baseline 'monai_unet': image of 32×32 pixels: this network needs sides divisible by 64; set [^\n]*$",
        ),
        ("train", {"baseline_options": {"monai_unet": {"chanels": [4, 8]}}}, "did you mean 'channels'"),
        ("latency", {"backend": "onxruntime"}, "did you mean 'onnxruntime'"),
    ],
)
def test_mistake_of_a_late_stage_is_found_before_the_first_runs(
    config: RunConfig, tmp_path: Path, section: str, change: dict[str, object], message: str
) -> None:
    part = getattr(config, section).model_copy(update=change)
    with pytest.raises(GliomaNasError, match=message):
        Pipeline(config.model_copy(update={section: part}), tmp_path / "run", Silent()).run()
    assert not (tmp_path / "run" / "preprocess").exists()


def test_sheet_that_is_no_csv_is_told_by_its_stage(config: RunConfig, tmp_path: Path) -> None:
    config.cohort.sheet.write_text('case_id,patient_id\n"P001,P001\n' + "x" * 200_000)
    with pytest.raises(GliomaNasError, match=r"cohort.csv"):
        Pipeline(config, tmp_path / "run", Silent()).run(["preprocess"])


def run_cli(config: Path, out: Path, *, command: str = "run") -> subprocess.Popen[bytes]:
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    return subprocess.Popen(
        [sys.executable, "-m", "glioma_nas", command, str(config), "--out", str(out)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        # A shell starts what runs in the background with the interrupt ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for(condition: object, process: subprocess.Popen[bytes], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert process.poll() is None, process.stderr and process.stderr.read().decode()
        assert time.monotonic() < deadline, "the run did not come so far in time"
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_run_continues_to_the_same_result_as_an_uninterrupted_one(config: RunConfig, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(TINY))
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    process = run_cli(path, whole)
    assert process.wait(600) == 0, process.stderr and process.stderr.read().decode()

    # The searched architectures depend on the measured latencies, so both runs must share one table.
    process = run_cli(path, cut, command="preprocess")
    assert process.wait(300) == 0
    (whole / "latency").rename(tmp_path / "table")
    (whole / "latency").symlink_to(tmp_path / "table")
    (cut / "latency").symlink_to(tmp_path / "table")

    search = cut / ".search.partial" / "supernet" / "last.ckpt"
    process = run_cli(path, cut)
    wait_for(search.is_file, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (cut / "search").exists()

    training = cut / ".train.partial" / "fold0" / "student" / "last.ckpt"
    process = run_cli(path, cut)
    wait_for(training.is_file, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (cut / "train").exists()

    process = run_cli(path, cut)
    assert process.wait(600) == 0, process.stderr and process.stderr.read().decode()
    for name in ("search/teacher.json", "search/student.json", "search/history.csv", "search/probabilities.json"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes(), name
    for weights in sorted(whole.glob("train/fold*/*/weights.safetensors")):
        assert (cut / weights.relative_to(whole)).read_bytes() == weights.read_bytes(), weights
    pd.testing.assert_frame_equal(
        pd.read_csv(cut / "segment" / "dice.csv"), pd.read_csv(whole / "segment" / "dice.csv")
    )
    for marker in ("idh", "ki67"):
        name = f"classify/{marker}/predictions.csv"
        pd.testing.assert_frame_equal(pd.read_csv(cut / name), pd.read_csv(whole / name))
    assert (cut / "report" / "report.html").is_file()


@pytest.mark.slow
def test_interrupt_leaves_a_resumable_run_and_exits_130(config: RunConfig, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**TINY, "search": {**TINY["search"], "search_epochs": 500}}))
    out = tmp_path / "run"
    process = run_cli(path, out)
    wait_for((out / ".search.partial" / "supernet" / "last.ckpt").is_file, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(300) == 130
    assert process.stderr is not None
    assert process.stderr.read().decode().strip().endswith("interrupted; run the same command again to continue")
    assert (out / "preprocess" / MANIFEST).is_file()
    assert (out / ".search.partial" / "supernet" / "last.ckpt").is_file()
