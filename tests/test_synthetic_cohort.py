"""Writing a synthetic cohort: same bytes for the same seed, three formats that readers understand, resumable."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from typer.testing import CliRunner

from glioma_nas.cli import app
from glioma_nas.cohort import read_cohort
from glioma_nas.config import CohortConfig
from glioma_nas.errors import CohortError
from glioma_nas.progress import Silent, TaskContext
from glioma_nas.synthetic_cohort import write_synthetic_cohort

SIZE = {"size_px": 40}


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cohort")
    write_synthetic_cohort(folder, 3, 5, **SIZE)
    return folder


@pytest.mark.slow
def test_bytes_do_not_depend_on_workers_or_on_the_size_of_the_cohort(cohort: Path, tmp_path: Path) -> None:
    write_synthetic_cohort(tmp_path, 2, 5, workers=2, **SIZE)
    expected = {name: value for name, value in digests(cohort).items() if name.startswith(("SYN-0001/", "SYN-0002/"))}
    assert len(expected) == 10
    found = digests(tmp_path)
    assert {name: found[name] for name in expected} == expected


@pytest.mark.slow
def test_sheet_is_read_like_any_other(cohort: Path) -> None:
    read = read_cohort(CohortConfig(sheet=cohort / "cohort.csv", sequences=("flair",), missing_sequence="zero"))
    assert [case.case_id for case in read.cases] == ["SYN-0001", "SYN-0002", "SYN-0003"]
    case = read.cases[0]
    assert set(case.images) == {"t1", "t1ce", "t2", "flair"}
    assert {"idh", "codel_1p19q", "mgmt", "atrx", "tertp", "cdkn2a", "chr7_10", "egfr", "grade", "ki67", "site"} <= set(
        case.labels
    )
    assert case.age is not None
    assert case.mask is not None
    image, mask = nib.load(case.images["t1"]), nib.load(case.mask)
    np.testing.assert_array_equal(image.affine, mask.affine)


@pytest.mark.slow
def test_complete_cohort_is_left_alone_and_a_cut_off_one_continues(cohort: Path) -> None:
    class Steps(Silent):
        def __init__(self) -> None:
            self.opened = 0

        def task(self, description: str, total: int) -> TaskContext:
            self.opened += 1
            return super().task(description, total)

    before = digests(cohort)
    steps = Steps()
    write_synthetic_cohort(cohort, 3, 5, progress=steps, **SIZE)
    assert steps.opened == 0

    kept = (cohort / "SYN-0001" / "t1.nii.gz").stat().st_mtime_ns
    # As if killed while patient 2 was being written.
    (cohort / "synthetic" / "SYN-0002.json").unlink()
    (cohort / "SYN-0002" / "t2.nii.gz").write_bytes(b"half")
    (cohort / "cohort.csv").unlink()
    write_synthetic_cohort(cohort, 3, 5, **SIZE)
    assert digests(cohort) == before
    assert (cohort / "SYN-0001" / "t1.nii.gz").stat().st_mtime_ns == kept

    write_synthetic_cohort(cohort, 2, 5, **SIZE)
    assert not (cohort / "SYN-0003").exists()
    write_synthetic_cohort(cohort, 3, 5, **SIZE)
    assert digests(cohort) == before


@pytest.mark.slow
def test_patients_without_contrast_have_an_empty_cell(tmp_path: Path) -> None:
    sheet = write_synthetic_cohort(tmp_path, 1, 0, missing_t1ce_fraction=1.0, **SIZE)
    read = read_cohort(CohortConfig(sheet=sheet, sequences=("flair",)))
    assert set(read.cases[0].images) == {"t1", "t2", "flair"}
    assert not list(tmp_path.glob("*/t1ce.nii.gz"))
    write_synthetic_cohort(tmp_path, 1, 0, missing_t1ce_fraction=0.0, **SIZE)
    assert (tmp_path / "SYN-0001" / "t1ce.nii.gz").is_file()


def test_contrast_is_missing_in_nine_per_cent_by_default() -> None:
    from glioma_nas.seeding import numpy_generator

    chances = [numpy_generator(0, "synthetic", "missing", number).random() < 0.09 for number in range(1, 1001)]
    assert np.mean(chances) == pytest.approx(0.09, abs=0.02)


@pytest.mark.slow
def test_bids_folder_is_read_with_masks_and_labels(tmp_path: Path) -> None:
    write_synthetic_cohort(tmp_path, 2, 5, format="bids", missing_t1ce_fraction=0, **SIZE)
    read = read_cohort(CohortConfig(sheet=tmp_path, sequences=("t1ce", "flair")))
    assert [case.case_id for case in read.cases] == ["sub-SYN0001", "sub-SYN0002"]
    case = read.cases[0]
    assert set(case.images) == {"t1", "t1ce", "t2", "flair"}
    assert case.mask is not None and "derivatives" in case.mask.parts
    assert case.labels["idh"] in ("mutant", "wildtype")
    assert case.age is not None
    sidecar = json.loads((tmp_path / "sub-SYN0001/anat/sub-SYN0001_FLAIR.json").read_text())
    assert sidecar["InversionTime"] == 2.5


@pytest.mark.slow
def test_dicom_series_convert_to_the_voxels_and_places_that_were_drawn(tmp_path: Path) -> None:
    import dcm2niix
    import pydicom

    options = {"raw": True, "missing_t1ce_fraction": 0.0, **SIZE}
    write_synthetic_cohort(tmp_path / "dicom", 1, 5, format="dicom", **options)
    write_synthetic_cohort(tmp_path / "nifti", 1, 5, **options)
    for folder, name in (("T1", "t1"), ("T1C", "t1ce"), ("T2", "t2"), ("FLAIR", "flair")):
        out = tmp_path / folder
        out.mkdir()
        command = [
            dcm2niix.bin,
            "-b",
            "n",
            "-z",
            "n",
            "-f",
            "scan",
            "-o",
            str(out),
            f"{tmp_path}/dicom/SYN-0001/{folder}",
        ]
        subprocess.run(command, check=True, capture_output=True)
        (path,) = out.glob("*.nii")
        converted = nib.as_closest_canonical(nib.load(path))
        drawn = nib.as_closest_canonical(nib.load(tmp_path / "nifti" / "SYN-0001" / f"{name}.nii.gz"))
        np.testing.assert_allclose(converted.affine, drawn.affine, atol=1e-3)
        np.testing.assert_array_equal(np.asarray(converted.dataobj), np.asarray(drawn.dataobj))
    slices = [pydicom.dcmread(path) for path in sorted((tmp_path / "dicom/SYN-0001/T1C").glob("*.dcm"))]
    first = slices[0]
    assert str(first.PatientName) == "Synthetic^Patient 0001"
    assert first.ContrastBolusAgent == "GADOLINIUM"
    assert {item.SeriesInstanceUID for item in slices} == {first.SeriesInstanceUID}
    assert len({item.SOPInstanceUID for item in slices}) == len(slices)
    assert not first.StudyDate
    assert first.PatientBirthDate == ""
    again = tmp_path / "again"
    write_synthetic_cohort(again, 1, 5, format="dicom", **options)
    assert digests(again) == digests(tmp_path / "dicom")


@pytest.mark.slow
def test_another_format_in_the_same_folder_is_refused(cohort: Path) -> None:
    with pytest.raises(CohortError, match="holds a synthetic cohort in format 'nifti'; choose an empty folder"):
        write_synthetic_cohort(cohort, 3, 5, format="bids", **SIZE)


@pytest.mark.slow
def test_hard_cohorts_keep_their_labels_and_change_their_images(cohort: Path, tmp_path: Path) -> None:
    write_synthetic_cohort(tmp_path, 3, 5, difficulty="hard", **SIZE)
    assert (tmp_path / "cohort.csv").read_text() == (cohort / "cohort.csv").read_text()
    assert (tmp_path / "SYN-0001/t1.nii.gz").read_bytes() != (cohort / "SYN-0001/t1.nii.gz").read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_patients": 0}, "at least 1"),
        ({"missing_t1ce_fraction": 1.5}, "between 0 and 1"),
        ({"size_px": 8}, "32 to 512"),
        ({"workers": 0}, "at least 1"),
        ({"format": "nift"}, "unknown format 'nift': did you mean 'nifti'"),
        ({"difficulty": "medium"}, "unknown difficulty 'medium'"),
    ],
)
def test_impossible_wishes_are_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"n_patients": 1, "seed": 0, **change}
    with pytest.raises(CohortError, match=message):
        write_synthetic_cohort(tmp_path, **arguments)  # type: ignore[arg-type]  # wrong on purpose
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_command_prints_where_the_sheet_is(tmp_path: Path) -> None:
    arguments = ["cohort", "synth", "--out", str(tmp_path), "--patients", "1", "--size-px", "40", "--format", "bids"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert str(tmp_path / "participants.tsv") in result.output
    assert CliRunner().invoke(app, [*arguments[:-1], "dcm"]).exit_code == 2


@pytest.mark.slow
def test_import_is_quick_because_torch_and_nilearn_are_not_loaded() -> None:
    code = "import sys, glioma_nas.synthetic_cohort; print(sorted({'torch', 'nilearn'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
