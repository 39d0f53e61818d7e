"""The preprocess stage end to end on phantoms: what it leaves, how it resumes, what it says of bad input."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from glioma_nas import registry
from glioma_nas.case_preparation import _fingerprints
from glioma_nas.cohort import Case
from glioma_nas.config import RunConfig, parse_config
from glioma_nas.errors import CohortError, GliomaNasError, LabelError, LeakageError, UnknownNameError
from glioma_nas.files import canonical_json, sha256_text
from glioma_nas.grids import rotation_about
from glioma_nas.pipeline import Pipeline, results_of
from glioma_nas.prepared import PreparedCohort
from glioma_nas.privacy.pseudonyms import Pseudonyms, is_pseudonym
from glioma_nas.progress import Silent
from glioma_nas.testing.head_phantoms import HEAD_CENTRE_MM, write_raw_patient
from glioma_nas.testing.phantoms import write_nifti, write_phantom_cohort

REAL_DATA = Path(__file__).parents[2] / "shared" / "data"


def make_config(sheet: Path, **sections: dict[str, Any]) -> RunConfig:
    data: dict[str, Any] = {
        "cohort": {"sheet": str(sheet)},
        "preprocess": {"crop_size_px": 48, "image_size_px": 32, "workers": 1},
        "folds": {"n_folds": 3},
    }
    for name, section in sections.items():
        data[name] = {**data.get(name, {}), **section}
    return parse_config(data, source="test", folder=sheet.parent)


def preprocess(sheet: Path, run: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    Pipeline(make_config(sheet, **sections), run, Silent()).run(["preprocess"])
    return results_of(run / "preprocess")


def edit_sheet(sheet: Path, change: Callable[[list[dict[str, str]]], None]) -> None:
    with sheet.open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    change(rows)
    with sheet.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def contents(folder: Path) -> dict[str, bytes]:
    about_the_run = ("manifest.json", "config.yaml")
    names = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in about_the_run]
    return {str(path.relative_to(folder)): path.read_bytes() for path in names}


def test_phantom_cohort_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_phantom_cohort(tmp_path / name, 2, seed)
    first, second, other = (nib.load(tmp_path / name / "P002" / "flair.nii.gz").get_fdata() for name in "abc")
    np.testing.assert_array_equal(first, second)
    assert (first != other).any()


def test_stage_leaves_cases_index_and_folds(tmp_path: Path) -> None:
    sheet = write_phantom_cohort(tmp_path / "cohort", 9, 0)
    markers = {"ki67": {"column": "ki67", "threshold": 10, "sequences": ["t1", "flair"]}}
    results = preprocess(sheet, tmp_path / "run", classify={"markers": markers})
    prepared = PreparedCohort.load(tmp_path / "run" / "preprocess")
    assert prepared.sequences == ("t1ce", "flair", "t1")
    assert prepared.image_size_px == 32
    assert list(prepared.cases) == [f"P{i:03d}" for i in range(1, 10)]
    assert prepared.folds.n == 3
    case = prepared.cases["P002"]
    assert case.images().shape == (6, 3, 32, 32)
    assert case.labels["idh"] == "wildtype"
    slices = [len(case.tumour_slices) for case in prepared.cases.values()]
    assert (results["n_cases"], results["n_patients"], results["n_slices"]) == (9, 9, 54)
    assert results["n_tumour_slices"] == sum(slices) >= 9
    assert results["labels"]["idh"] == {"mutant": 5, "wildtype": 4, "unknown": 0}
    assert results["missing"] == {"t1ce": 0, "flair": 0, "t1": 0}
    assert results["folds_hash"] == prepared.folds.hash
    ages = [case.age for case in prepared.cases.values() if case.age is not None]
    assert results["age_mean_years"] == pytest.approx(np.mean(ages), abs=0.05)
    for fold in range(3):
        assert {prepared.cases[case_id].labels["idh"] for case_id in prepared.folds.test(fold)} == {
            "mutant",
            "wildtype",
        }


@pytest.mark.slow
def test_stage_gives_the_same_files_with_any_number_of_workers(tmp_path: Path) -> None:
    sheet = write_phantom_cohort(tmp_path / "cohort", 6, 0)
    for workers in (1, 3):
        preprocess(sheet, tmp_path / str(workers), preprocess={"workers": workers})
    assert contents(tmp_path / "1" / "preprocess") == contents(tmp_path / "3" / "preprocess")


@pytest.mark.slow
def test_raw_scans_give_the_same_files_with_any_number_of_workers(tmp_path: Path) -> None:
    rows = []
    for number in range(2):
        motion = rotation_about(HEAD_CENTRE_MM, (0.0, 3.0, -2.0), (3.0, 0.0, 2.0 * number))
        paths = write_raw_patient(
            tmp_path / f"P{number}", spacing_mm=(3.0, 3.0, 6.0), motions={"flair": motion}, seed=number
        )
        columns = ("t1ce", "flair", "mask")
        cells = {name: str(paths[name].relative_to(tmp_path)) for name in columns}
        rows.append({"case_id": f"P{number}", "patient_id": f"P{number}", **cells})
    with (tmp_path / "cohort.csv").open("w", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    steps = ["orient", "register", "strip_template", "zscore", "crop_pad", "resize"]
    for workers in (1, 2):
        results = preprocess(
            tmp_path / "cohort.csv",
            tmp_path / str(workers),
            preprocess={
                "steps": steps,
                "mask_sequence": "flair",
                "crop_size_px": 80,
                "image_size_px": 80,
                "workers": workers,
            },
            folds={"n_folds": 2, "stratify_by": []},
        )
        assert results["failed"] == []
    assert contents(tmp_path / "1" / "preprocess") == contents(tmp_path / "2" / "preprocess")


def test_worker_module_does_not_import_torch() -> None:
    script = "import sys, glioma_nas.stages.preprocess, glioma_nas.prepared; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False, cwd=Path(__file__).parents[1]).returncode == 0


class Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_stage_leaves_bad_cases_out_and_takes_the_others_over_once_they_are_mended(tmp_path: Path) -> None:
    sheet = write_phantom_cohort(tmp_path / "cohort", 6, 0)
    truncated = tmp_path / "cohort" / "P002" / "flair.nii.gz"
    good = truncated.read_bytes()
    truncated.write_bytes(good[:1000])
    mask = tmp_path / "cohort" / "P005" / "mask.nii.gz"
    good_mask = nib.load(mask).get_fdata().astype(np.uint8)
    write_nifti(mask, good_mask * 9)
    notes = Notes()
    Pipeline(make_config(sheet), tmp_path / "run", notes).run(["preprocess"])
    done = tmp_path / "run" / "preprocess"
    assert any(
        re.search(
            r"2 cases cannot be prepared and are left out: .*P002/flair\.nii\.gz: truncated.*\(and 1 more\)", note
        )
        for note in notes.notes
    )
    problems = json.loads((done / "problems.json").read_text())
    assert [(item["case_id"], item["error"]) for item in problems] == [("P002", "ImageError"), ("P005", "ImageError")]
    assert "unknown label 9" in problems[1]["message"]
    assert results_of(done)["failed"] == problems
    prepared = PreparedCohort.load(done)
    assert list(prepared.cases) == ["P001", "P003", "P004", "P006"]
    assert {item.case_id for item in prepared.excluded} == {"P002", "P005"}
    assert {case_id for fold in range(3) for case_id in prepared.folds.test(fold)} == set(prepared.cases)
    finished = (done / "cases" / "P001" / "case.json").stat().st_mtime_ns
    truncated.write_bytes(good)
    write_nifti(mask, good_mask)
    preprocess(sheet, tmp_path / "run")
    assert (done / "cases" / "P001" / "case.json").stat().st_mtime_ns == finished
    assert not (done / "problems.json").exists()
    preprocess(sheet, tmp_path / "fresh")
    assert contents(done) == contents(tmp_path / "fresh" / "preprocess")


def test_stage_fails_when_too_many_cases_cannot_be_prepared(tmp_path: Path) -> None:
    sheet = write_phantom_cohort(tmp_path / "cohort", 6, 0)
    for number in (1, 2, 3, 4):
        (tmp_path / "cohort" / f"P00{number}" / "t1ce.nii.gz").write_bytes(b"no scan")
    with pytest.raises(CohortError, match=r"4 cases cannot be prepared.*of 6 cases that is more than .*failed_share"):
        preprocess(sheet, tmp_path / "run")
    assert not (tmp_path / "run" / "preprocess").exists()
    with pytest.raises(CohortError, match=r"2 patients cannot be split into 3 folds.*4 cases cannot be prepared"):
        preprocess(sheet, tmp_path / "run", preprocess={"max_failed_share": 0.9})
    preprocess(sheet, tmp_path / "run", preprocess={"max_failed_share": 0.9}, folds={"n_folds": 2})


MARK = 100
"""Brightness of one voxel in the case that `step_that_fails` fails over; 101 in the others."""


def step_that_fails(sheet: Path, name: str, how: str, *, case: str = "P001") -> tuple[Path, list[str]]:
    """Write and load a plugin whose step runs the statement ``how`` over one case; return it, and a chain with it."""
    plugin = sheet.parent / f"{name}.py"
    plugin.write_text(
        "import os\nimport signal\n\nfrom glioma_nas.case_volumes import IntensityStep\n"
        "from glioma_nas.registry import preprocess_steps\n\n\n"
        f"@preprocess_steps.register('{name}')\n"
        "class Moody(IntensityStep):\n"
        '    """Fail over one case."""\n\n'
        "    def apply(self, volumes, config):\n"
        f"        if volumes.images['t1ce'][24, 24, 3] == {MARK}:\n"
        f"            {how}\n"
        "        return volumes, {}\n"
    )
    registry.load_file(plugin)
    for path in sheet.parent.glob("P*/t1ce.nii.gz"):
        image = nib.load(path).get_fdata().astype(np.int16)
        image[24, 24, 3] = MARK if path.parent.name == case else MARK + 1
        write_nifti(path, image)
    return plugin, [name, "orient", "zscore", "crop_pad", "resize"]


def test_stage_counts_a_strangers_error_against_the_case_alone(tmp_path: Path) -> None:
    sheet = write_phantom_cohort(tmp_path / "cohort", 6, 0)
    _, steps = step_that_fails(sheet, "moody", "raise RuntimeError('not today')")
    results = preprocess(sheet, tmp_path / "run", preprocess={"steps": steps})
    assert [item["case_id"] for item in results["failed"]] == ["P001"]
    assert "RuntimeError in a preprocess step: not today" in results["failed"][0]["message"]


@pytest.mark.slow
def test_case_whose_worker_is_killed_is_left_out_alone(tmp_path: Path) -> None:
    sheet = write_phantom_cohort(tmp_path / "cohort", 6, 0)
    plugin, steps = step_that_fails(sheet, "deadly", "os.kill(os.getpid(), signal.SIGKILL)", case="P003")
    config = make_config(sheet, preprocess={"steps": steps, "workers": 2}).model_copy(update={"plugins": (plugin,)})
    Pipeline(config, tmp_path / "run", Silent()).run(["preprocess"])
    done = tmp_path / "run" / "preprocess"
    (problem,) = results_of(done)["failed"]
    assert (problem["case_id"], problem["error"]) == ("P003", "ResourceError")
    assert "case P003: the system killed the process that worked on it, with no other" in problem["message"]
    assert list(PreparedCohort.load(done).cases) == ["P001", "P002", "P004", "P005", "P006"]
    assert not (done / "cases" / "P003").exists()


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("TypeError", "raise TypeError('odd', {path!r}) from ValueError({path!r})"),
        ("AssertionError", "raise AssertionError('odd', {path!r}) from ValueError({path!r})"),
        # What the kernel answers to whoever reads the first page of his own memory: an input/output error.
        ("OSError", "open('/proc/self/mem', 'rb').read(1)"),
    ],
)
def test_error_over_one_case_is_that_cases_and_names_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, how: str
) -> None:
    sheet = write_phantom_cohort(tmp_path / "cohort", 6, 0)
    person = sheet.parent / "SMITH_JOHN"
    _, steps = step_that_fails(sheet, f"odd_{kind.lower()}", how.format(path=str(person / "t1ce.nii.gz")))
    (sheet.parent / "P001").rename(person)
    sheet.write_text(sheet.read_text().replace("P001/", "SMITH_JOHN/"))
    caplog.set_level("INFO")
    hidden = {"hash_ids": True, "salt_file": str(tmp_path / "salt")}
    (problem,) = preprocess(sheet, tmp_path / "run", cohort=hidden, preprocess={"steps": steps})["failed"]
    assert problem["error"] == kind and f"{kind} in a preprocess step" in problem["message"]
    assert is_pseudonym(problem["case_id"]) and kind in caplog.text
    assert "SMITH" not in problem["message"] + caplog.text


def test_prepared_case_tells_neither_path_nor_time_of_its_scans(tmp_path: Path) -> None:
    scan = tmp_path / "SMITH_JOHN.nii.gz"
    scan.write_bytes(b"12345")
    before = _fingerprints(Case("a", "a", {"flair": scan}))
    assert re.fullmatch("[0-9a-f]{64}", before["flair"]) and before["flair"] != sha256_text(str(scan))
    os.utime(scan, ns=(1, 1))
    assert _fingerprints(Case("a", "a", {"flair": scan})) != before


def test_where_ids_are_hidden_no_guess_at_a_path_size_and_time_can_be_checked(tmp_path: Path) -> None:
    scan = tmp_path / "SMITH_JOHN.nii.gz"
    scan.write_bytes(b"12345")
    guess = canonical_json([str(scan), 5, scan.stat().st_mtime_ns])
    assert _fingerprints(Case("a", "a", {"flair": scan}))["flair"] == sha256_text(guess)
    ours, theirs = (Case("a", "a", {"flair": scan}, pseudonyms=Pseudonyms(bytes([key] * 32))) for key in (1, 2))
    assert re.fullmatch("[0-9a-f]{64}", _fingerprints(ours)["flair"])
    assert _fingerprints(ours)["flair"] not in (sha256_text(guess), _fingerprints(theirs)["flair"])
    assert "pseudonyms" not in repr(ours)


def test_full_disk_is_no_fault_of_a_case(tmp_path: Path) -> None:
    sheet = write_phantom_cohort(tmp_path / "cohort", 6, 0)
    # Nothing fits on this device, as on a disk that is full.
    _, steps = step_that_fails(sheet, "thirsty", "open('/dev/full', 'wb', buffering=0).write(b'x')")
    with pytest.raises(OSError, match="No space left on device"):
        preprocess(sheet, tmp_path / "run", preprocess={"steps": steps})
    assert not (tmp_path / "run" / "preprocess").exists()


def test_stage_prepares_a_case_again_when_its_scan_changed_in_between(tmp_path: Path) -> None:
    sheet = write_phantom_cohort(tmp_path / "cohort", 4, 0)
    broken = tmp_path / "cohort" / "P004" / "t1ce.nii.gz"
    good = broken.read_bytes()
    broken.write_bytes(b"")
    preprocess(sheet, tmp_path / "run", folds={"n_folds": 2})
    broken.write_bytes(good)
    other = nib.load(tmp_path / "cohort" / "P001" / "flair.nii.gz").get_fdata().astype(np.int16)
    other[20, 20, 3] += 50
    write_nifti(tmp_path / "cohort" / "P001" / "flair.nii.gz", other)
    preprocess(sheet, tmp_path / "run", folds={"n_folds": 2})
    preprocess(sheet, tmp_path / "fresh", folds={"n_folds": 2})
    assert contents(tmp_path / "run" / "preprocess") == contents(tmp_path / "fresh" / "preprocess")


@pytest.mark.parametrize("rule", ["zero", "exclude"])
def test_stage_follows_the_rule_for_missing_sequences(tmp_path: Path, rule: str) -> None:
    sheet = write_phantom_cohort(tmp_path / "cohort", 7, 0)
    edit_sheet(sheet, lambda rows: rows[0].update(t1ce=""))
    results = preprocess(sheet, tmp_path / "run", cohort={"missing_sequence": rule})
    prepared = PreparedCohort.load(tmp_path / "run" / "preprocess")
    if rule == "zero":
        assert results["missing"] == {"t1ce": 1, "flair": 0}
        assert prepared.cases["P001"].present == ("flair",)
        assert not prepared.cases["P001"].images()[:, 0].any()
    else:
        assert results["excluded"] == [{"case_id": "P001", "reason": "has no t1ce"}]
        assert [item.case_id for item in prepared.excluded] == ["P001"]
        assert "P001" not in prepared.cases


def test_stage_fills_a_sequence_only_a_marker_needs_with_zeros(tmp_path: Path) -> None:
    sheet = write_phantom_cohort(tmp_path / "cohort", 6, 0)
    edit_sheet(sheet, lambda rows: rows[1].update(t1=""))
    markers = {"idh": {"column": "idh", "positive": "mutant", "sequences": ["t1"]}}
    results = preprocess(sheet, tmp_path / "run", classify={"markers": markers})
    assert results["missing"] == {"t1ce": 0, "flair": 0, "t1": 1}
    prepared = PreparedCohort.load(tmp_path / "run" / "preprocess")
    assert prepared.cases["P002"].present == ("t1ce", "flair")


def test_stage_keeps_a_case_without_mask(tmp_path: Path) -> None:
    sheet = write_phantom_cohort(tmp_path / "cohort", 6, 0)
    edit_sheet(sheet, lambda rows: rows[1].update(mask=""))
    assert preprocess(sheet, tmp_path / "run")["n_without_mask"] == 1


def copy_scan_of_another_patient(rows: list[dict[str, str]]) -> None:
    for row in rows[1:]:
        row["flair"] = rows[0]["flair"]


@pytest.mark.parametrize(
    ("change", "sections", "error", "message"),
    [
        (copy_scan_of_another_patient, {}, LeakageError, "hold identical voxels under two patients"),
        (lambda rows: rows[0].update(t1ce=""), {}, CohortError, "case P001 has no t1ce; add the file, or set"),
        (
            lambda rows: rows[1].update(case_id="P001"),
            {},
            CohortError,
            "line 3: case_id 'P001' is the same as in line 2",
        ),
        (
            lambda rows: rows[1].update(flair="gone.nii.gz"),
            {},
            CohortError,
            "case P002: flair is 'gone.nii.gz', no such file",
        ),
        (
            lambda rows: None,
            {"classify": {"markers": {"m": {"column": "idh2", "positive": "mutant"}}}},
            LabelError,
            "marker 'm', column 'idh2'.*did you mean 'idh'",
        ),
        (
            lambda rows: [row.update(idh="mutant") for row in rows],
            {"classify": {"markers": {"idh": {"column": "idh", "positive": "mutant"}}}},
            LabelError,
            "of one class",
        ),
        (
            lambda rows: None,
            {"classify": {"markers": {"m": {"column": "idh", "positive": "mutant", "sequences": ["dwi"]}}}},
            CohortError,
            "no column for sequence 'dwi', which a marker needs",
        ),
        (lambda rows: None, {"folds": {"stratify_by": ["grad"]}}, LabelError, "did you mean 'grade'"),
        (lambda rows: None, {"folds": {"n_folds": 9}}, CohortError, "6 patients cannot be split into 9 folds"),
        (lambda rows: None, {"preprocess": {"steps": ["orient", "zscor"]}}, UnknownNameError, "did you mean 'zscore'"),
    ],
)
def test_stage_refuses_bad_input_with_one_line(
    tmp_path: Path,
    change: Callable[[list[dict[str, str]]], Any],
    sections: dict[str, Any],
    error: type[GliomaNasError],
    message: str,
) -> None:
    sheet = write_phantom_cohort(tmp_path / "cohort", 6, 0)
    edit_sheet(sheet, change)
    with pytest.raises(error, match=message) as caught:
        preprocess(sheet, tmp_path / "run", **sections)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "preprocess").exists()


@pytest.mark.slow
def test_stage_goes_on_after_kill_and_ends_with_the_same_files(tmp_path: Path) -> None:
    sheet = write_phantom_cohort(tmp_path / "cohort", 30, 0, size=(96, 96, 12))
    sections = {"preprocess": {"crop_size_px": 96, "image_size_px": 64, "workers": 2}}
    script = tmp_path / "stage.py"
    script.write_text(
        "import json, sys\nfrom pathlib import Path\nfrom glioma_nas.config import parse_config\n"
        "from glioma_nas.pipeline import Pipeline\nfrom glioma_nas.progress import Silent\n"
        "if __name__ == '__main__':\n"
        "    config = parse_config(json.loads(sys.argv[1]), source='test', folder=Path())\n"
        "    Pipeline(config, Path(sys.argv[2]), Silent()).run(['preprocess'])\n"
    )
    config = make_config(sheet, **sections).model_dump(mode="json")
    process = subprocess.Popen(
        [sys.executable, str(script), json.dumps(config), str(tmp_path / "run")], cwd=Path(__file__).parents[1]
    )
    cases = tmp_path / "run" / ".preprocess.partial" / "cases"
    while not (cases / "P004" / "case.json").exists():
        assert process.poll() is None, "the stage ended before it could be killed"
    process.kill()
    process.wait()
    preprocess(sheet, tmp_path / "run", **sections)
    preprocess(sheet, tmp_path / "fresh", **sections)
    assert contents(tmp_path / "run" / "preprocess") == contents(tmp_path / "fresh" / "preprocess")


@pytest.mark.real_data
@pytest.mark.slow
@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="third-party MRI is not beside the checkout")
def test_stage_prepares_the_real_three_dimensional_cases(tmp_path: Path) -> None:
    results = preprocess(
        REAL_DATA / "brats3d.csv",
        tmp_path / "run",
        cohort={"sequences": ["t1ce", "flair"]},
        preprocess={"crop_size_px": 192, "image_size_px": 96},
        folds={"n_folds": 2, "stratify_by": []},
    )
    assert (results["n_cases"], results["n_without_mask"], results["n_slices"]) == (8, 1, 8 * 155)
    assert results["cases_with_cut_tumour"] == {}
    for case in PreparedCohort.load(tmp_path / "run" / "preprocess").cases.values():
        mask, native = case.mask(), case.native_mask()
        if mask is None or native is None:
            continue
        found = case.to_native(mask.astype(np.float32)) >= 0.5
        assert 2 * (found & (native > 0)).sum() / (found.sum() + native.sum()) > 0.93


def test_stage_takes_folds_from_a_file_and_notices_when_it_changes(tmp_path: Path) -> None:
    sheet = write_phantom_cohort(tmp_path / "cohort", 6, 0)
    names = [f"P{number:03d}" for number in range(1, 7)]
    path = tmp_path / "splits_final.json"

    def write_splits(first: list[str]) -> list[set[str]]:
        second = [name for name in names if name not in first]
        path.write_text(json.dumps([{"train": second, "val": first}, {"train": first, "val": second}]))
        return [set(first), set(second)]

    # The configuration's own number of folds says nothing about those of a file.
    sections = {"folds": {"file": str(path), "n_folds": 5}}
    sections["classify"] = {"markers": {"idh": {"column": "idh", "positive": "mutant"}}}
    for first in (names[:3], names[1:4]):
        expected = write_splits(first)
        preprocess(sheet, tmp_path / "run", **sections)
        folds = PreparedCohort.load(tmp_path / "run" / "preprocess").folds
        assert [set(folds.test(fold)) for fold in range(folds.n)] == expected
