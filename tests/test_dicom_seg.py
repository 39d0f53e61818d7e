"""A DICOM segmentation lies where the NIfTI mask lies, refers to its series, and is not written when it would not."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from dicom_files import SERIES, write_patient, write_series
from finished_run import make_finished_run

from glioma_nas.errors import CohortError, ImageError
from glioma_nas.new_patients.batch import predict_all
from glioma_nas.new_patients.dicom_seg import seg_voxels, write_dicom_seg
from glioma_nas.new_patients.frozen_run import FrozenRun
from glioma_nas.progress import Silent

NOBODY = {"case_id": None, "age": None, "sex": None}
STUDY = "1.2.826.0.1.3680043.8.498.1"
N_SLICES, SIDE = 7, 32


@pytest.fixture
def series(tmp_path: Path) -> list[Path]:
    """Slices turned by 30° in their plane, with pixels that are not square, in files out of order."""
    cos, sin = np.cos(np.pi / 6), 0.5
    turned = {"ImageOrientationPatient": [cos, sin, 0, -sin, cos, 0], "PixelSpacing": [6.5, 4.0]}
    write_series(tmp_path / "flair", study=STUDY, number=5, n_slices=N_SLICES, **SERIES["flair"], **turned)
    return sorted((tmp_path / "flair").iterdir(), reverse=True)


def affine_as_converted() -> np.ndarray:
    """Columns to the left, rows upwards (dcm2niix flips them), slices from the lowest; in RAS+."""
    cos, sin = np.cos(np.pi / 6), 0.5
    along_row, along_column = np.array([cos, sin, 0]) * 4.0, np.array([-sin, cos, 0]) * 6.5
    lps = np.eye(4)
    lps[:3, 0], lps[:3, 1], lps[:3, 2] = along_row, -along_column, [0, 0, 6.0]
    lps[:3, 3] = np.array([-100.0, -110.0, -20.0]) + (SIDE - 1) * along_column
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ lps


def a_mask() -> np.ndarray:
    mask = np.zeros((SIDE, SIDE, N_SLICES), np.uint8)
    mask[4:9, 20:23, 1:4] = 1
    mask[4, 22, 4] = 1
    return mask


def test_segmentation_lies_where_the_mask_lies(series: list[Path], tmp_path: Path) -> None:
    mask, affine, path = a_mask(), affine_as_converted(), tmp_path / "mask.dcm"
    write_dicom_seg(path, mask, affine, series=series, network="student", key="abc")
    expected = (np.column_stack([np.argwhere(mask), np.ones(mask.sum())]) @ affine.T)[:, :3]
    found = seg_voxels(path)
    assert len(found) == len(expected) == 46
    np.testing.assert_allclose(sorted(found.round(2).tolist()), sorted(expected.round(2).tolist()), atol=0.02)
    stored = pydicom.dcmread(path)
    source = pydicom.dcmread(series[0])
    assert stored.Modality == "SEG" and stored.PatientID == source.PatientID
    assert stored.ReferencedSeriesSequence[0].SeriesInstanceUID == source.SeriesInstanceUID
    assert stored.SegmentSequence[0].SegmentedPropertyTypeCodeSequence[0].CodeMeaning == "Neoplasm"


def test_empty_outline_is_a_segmentation_too(series: list[Path], tmp_path: Path) -> None:
    write_dicom_seg(tmp_path / "m.dcm", 0 * a_mask(), affine_as_converted(), series=series, network="a", key="b")
    assert len(seg_voxels(tmp_path / "m.dcm")) == 0
    assert int(pydicom.dcmread(tmp_path / "m.dcm").NumberOfFrames) == N_SLICES


@pytest.mark.parametrize("shift_voxels", [0.5, 3.0])
def test_mask_of_another_grid_is_refused(series: list[Path], tmp_path: Path, shift_voxels: float) -> None:
    affine = affine_as_converted()
    affine[:3, 3] += shift_voxels * affine[:3, 0]
    with pytest.raises(ImageError, match="do not lie on the grid of the mask"):
        write_dicom_seg(tmp_path / "m.dcm", a_mask(), affine, series=series, network="a", key="b")
    assert not (tmp_path / "m.dcm").exists()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> FrozenRun:
    return FrozenRun.open(make_finished_run(tmp_path_factory.mktemp("finished")), network="teacher")


@pytest.mark.slow
def test_dicom_patient_gets_a_segmentation_on_request(run: FrozenRun, tmp_path: Path) -> None:
    write_patient(tmp_path / "export")

    def predicted(**options: bool) -> str:
        served = predict_all(
            tmp_path / "export", run, tmp_path / "out", patient=NOBODY, force=False, progress=Silent(), **options
        )
        assert served.outcomes[0].problem == ""
        return served.outcomes[0].state

    assert predicted() == "predicted"
    (folder,) = [path.parent for path in (tmp_path / "out").glob("*/prediction.json")]
    assert not (folder / "mask.dcm").exists()
    assert predicted(dicom_seg=True) == "predicted" and predicted(dicom_seg=True) == "done before"
    mask = nib.load(folder / "mask.nii.gz")
    inside = np.argwhere(mask.get_fdata() > 0)
    expected = (np.column_stack([inside, np.ones(len(inside))]) @ mask.affine.T)[:, :3]
    np.testing.assert_allclose(
        sorted(seg_voxels(folder / "mask.dcm").round(1).tolist()), sorted(expected.round(1).tolist()), atol=0.11
    )


def test_segmentation_of_what_is_no_dicom_is_refused(run: FrozenRun, tmp_path: Path) -> None:
    sheet = run.config.cohort.sheet
    with pytest.raises(CohortError, match="--dicom-seg refers to DICOM series"):
        predict_all(sheet, run, tmp_path, patient=NOBODY, force=False, progress=Silent(), dicom_seg=True)


def test_dicom_of_another_modality_is_refused_before_converting(run: FrozenRun, tmp_path: Path) -> None:
    write_series(tmp_path / "export", study=STUDY, number=1, Modality="CT", SeriesDescription="CT HEAD")
    with pytest.raises(CohortError, match="holds series of modality CT; the run's networks read MR"):
        predict_all(tmp_path / "export", run, tmp_path / "out", patient=NOBODY, force=False, progress=Silent())


def test_dicom_without_a_needed_sequence_is_refused_before_converting(run: FrozenRun, tmp_path: Path) -> None:
    write_series(tmp_path / "export", study=STUDY, number=1, **SERIES["t1ce"])
    with pytest.raises(CohortError, match="lacks flair: this run's network needs t1ce, flair"):
        predict_all(tmp_path / "export", run, tmp_path / "out", patient=NOBODY, force=False, progress=Silent())
    assert not list((tmp_path / "out").rglob("*.nii.gz"))
