"""Figures, flags and pages of the quality control."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from glioma_nas.case_volumes import CaseVolumes
from glioma_nas.contact_sheet import write_contact_sheet
from glioma_nas.prepared import PreparedCohort
from glioma_nas.quality_control import flags, measure, modified_z, table
from glioma_nas.testing.prepared_phantoms import prepare_phantom_cohort


def volumes(shift: int = 0, *, tumour_at: int = 20) -> CaseVolumes:
    image = np.zeros((40, 40, 10), np.float32)
    image[10:30, 10:30, 2:8] = 5
    mask = np.zeros(image.shape, np.uint8)
    mask[tumour_at : tumour_at + 4, 18:22, 4:6] = 1
    return CaseVolumes({"t1ce": image, "flair": np.roll(image, shift, axis=0)}, mask, np.diag([2.0, 2.0, 5.0, 1.0]))


def figures(**changes: object) -> dict[str, object]:
    return {
        "brain_ml": 1300.0,
        "tumour_ml": 20.0,
        "tumour_outside_brain": 0.0,
        "tumour_voxels_cut": 0,
        "border": 0.0,
        "sequences": {"t1ce": {"overlap": 1.0}, "flair": {"overlap": 0.95, "shift_mm": 1.0, "rotation_degrees": 0.5}},
        **changes,
    }


def test_figures_are_volumes_shares_and_overlaps() -> None:
    found = measure(volumes(), volumes(4), {"crop_pad": {"tumour_voxels_cut": 3}})
    # 24·20·6 voxels of 0.02 ml in one sequence or the other, 20·20·6 in each, 16·20·6 in both.
    assert found["brain_ml"] == pytest.approx(57.6)
    assert found["tumour_ml"] == pytest.approx(0.64)
    assert found["tumour_outside_brain"] == 0
    assert found["tumour_voxels_cut"] == 3
    assert found["sequences"]["t1ce"] == {"overlap": 1, "intensity_p95": 5.0}
    assert found["brain_doubt"] is None
    assert measure(volumes(), volumes(), {"strip": {"doubt": "why"}})["brain_doubt"] == "why"
    assert found["sequences"]["flair"]["overlap"] == pytest.approx(0.8)
    outside = measure(volumes(), volumes(tumour_at=28), {})
    assert outside["tumour_outside_brain"] == 0.5


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"brain_ml": 400.0}, "brain 400 ml, expected 800 to 2000"),
        (
            {"brain_doubt": "brain found in t1, where this step is less sure than in t1ce"},
            "brain found in t1, where this step is less sure than in t1ce",
        ),
        ({"border": 0.02}, "brain reaches the border of the slices (2.0% of its voxels)"),
        ({"tumour_voxels_cut": 7}, "7 tumour voxels lie outside the slices"),
        ({"tumour_ml": 0.0}, "mask is empty"),
        ({"tumour_outside_brain": 0.3}, "30.0% of the tumour lies where every sequence is 0"),
        ({"sequences": {"flair": {"overlap": 0.5}}}, "flair overlaps the reference by Dice 0.50"),
        (
            {"sequences": {"t2": {"overlap": 0.9, "shift_mm": 31.0, "rotation_degrees": 2.0}}},
            "t2 was moved by 31.0 mm and 2.0°",
        ),
        (
            {"sequences": {"t2": {"overlap": 0.9, "improved": False}}},
            "t2 lies where its header puts it: registration did not raise the mutual information",
        ),
        (
            {"sequences": {"t2": {"overlap": 0.9, "overlap_before": 0.95, "improved": True}}},
            "t2 overlaps less after registration, Dice 0.95 before",
        ),
    ],
)
def test_impossible_figures_raise_a_flag(change: dict[str, object], flag: str) -> None:
    assert flags({"good": figures(), "bad": figures(**change)}) == {"good": [], "bad": [flag]}


def test_figures_apart_from_the_cohort_raise_a_flag() -> None:
    cases = {f"c{number}": figures(brain_ml=1300.0 + 10 * number) for number in range(9)}
    assert not any(flags(cases).values())
    cases["odd"] = figures(brain_ml=1900.0)
    (flag,) = flags(cases)["odd"]
    assert flag.startswith("brain_ml 1900 is high for this cohort")
    # Median 1345, MAD 25: 0.6745·555/25.
    assert flag.endswith("(z 15.0)")


def test_few_or_equal_values_have_no_outliers() -> None:
    assert modified_z({str(number): float(number) for number in range(7)}) == {}
    assert modified_z({str(number): float(number == 8) for number in range(9)}) == {}


def test_flagged_cases_come_first() -> None:
    rows = table({"a": figures(), "b": figures(tumour_ml=0.0)})
    assert [row["case_id"] for row in rows] == ["b", "a"]
    assert rows[0]["flair_overlap"] == 0.95


def test_contact_sheet_outlines_brain_and_tumour(tmp_path: Path) -> None:
    case = volumes()
    write_contact_sheet(tmp_path / "a.png", "A", case, case)
    write_contact_sheet(tmp_path / "b.png", "A", case, case)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    pixels = np.asarray(Image.open(tmp_path / "a.png")).astype(int)
    red, blue = ((pixels == colour).all(axis=-1) for colour in ((255, 60, 60), (0, 190, 230)))
    assert red.sum() > 200
    assert blue.sum() > 500
    # As read there is no brain outline yet: blue only to the right of the gap.
    assert not blue[:, : 2 * 172].any()
    assert red[:, : 2 * 172].any()


def test_stage_leaves_table_page_and_sheets(tmp_path: Path) -> None:
    folder = prepare_phantom_cohort(tmp_path, n_patients=4, image_size_px=32)
    cohort = PreparedCohort.load(folder)
    rows = pd.read_csv(folder / "qc.csv")
    assert sorted(rows["case_id"]) == list(cohort.cases)
    assert {"flags", "brain_ml", "t1ce_overlap"} <= set(rows.columns)
    page = (folder / "qc.html").read_text()
    for case_id in cohort.cases:
        assert f"src='cases/{case_id}/qc.png'" in page
        assert (folder / "cases" / case_id / "qc.png").is_file()
    assert "expected 800 to 2000" in page  # phantoms are smaller than any head
