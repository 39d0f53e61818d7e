"""The synthetic cohort: reproducible, shaped like MRI, and correlated as published."""

from __future__ import annotations

import hashlib
from collections import Counter
from functools import cache
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from glioma_nas.cohort import read_cohort
from glioma_nas.config import CohortConfig
from glioma_nas.errors import CohortError
from glioma_nas.seeding import numpy_generator
from glioma_nas.synthetic_cohort import write_synthetic_cohort
from glioma_nas.synthetic_images import SyntheticScan, draw_scan
from glioma_nas.synthetic_patients import SyntheticPatient, draw_patient
from glioma_nas.synthetic_tumours import draw_centre

pytestmark = pytest.mark.slow

PEOPLE = [draw_patient(number, 0) for number in range(1, 1001)]


def patient(**changes: object) -> SyntheticPatient:
    fields = {
        "case_id": "SYN-0001",
        "idh": "mutant",
        "codel_1p19q": "intact",
        "mgmt": "methylated",
        "grade": 2,
        "ki67_percent": 3.0,
        "age_years": 40.0,
        "sex": "F",
        "t2_flair_mismatch": False,
    }
    return SyntheticPatient(**{**fields, **changes})  # type: ignore[arg-type] - the tests give values of the right types


WILDTYPE = {"idh": "wildtype", "grade": 4, "ki67_percent": 30.0}


@cache
def scan_of(number: int, changes: tuple[tuple[str, object], ...]) -> SyntheticScan:
    return draw_scan(patient(**dict(changes)), np.random.default_rng(number))


def scans(n: int, **changes: object) -> list[SyntheticScan]:
    # Tests share scans, because drawing one takes half a second.
    return [scan_of(number, tuple(changes.items())) for number in range(n)]


def region(scan: SyntheticScan, name: str, labels: tuple[int, ...]) -> float:
    # Mean brightness in units of healthy brain.
    healthy = (scan.mask == 0) & (scan.images[name] > 0)
    inside = np.isin(scan.mask, labels)
    return float(scan.images[name][inside].mean() / scan.images[name][healthy].mean()) if inside.any() else float("nan")


def test_patients_do_not_depend_on_the_size_of_the_cohort() -> None:
    assert draw_patient(7, 0) == PEOPLE[6]
    assert PEOPLE[6].case_id == "SYN-0007"
    assert draw_patient(7, 1) != PEOPLE[6]


def test_patients_follow_published_statistics() -> None:
    groups = {
        "oligodendroglioma": [p for p in PEOPLE if p.codel_1p19q == "codeleted"],
        "astrocytoma": [p for p in PEOPLE if p.is_mutant and p.codel_1p19q == "intact"],
        "glioblastoma": [p for p in PEOPLE if not p.is_mutant],
    }
    assert {name: len(group) for name, group in groups.items()} == {
        "oligodendroglioma": 250,
        "astrocytoma": 350,
        "glioblastoma": 400,
    }
    for name, age in (("oligodendroglioma", 46), ("astrocytoma", 38), ("glioblastoma", 60)):
        assert np.mean([p.age_years for p in groups[name]]) == pytest.approx(age, abs=2.5)
    for grade, median in ((2, 3), (3, 8), (4, 25)):
        assert np.median([p.ki67_percent for p in PEOPLE if p.grade == grade]) == pytest.approx(median, rel=0.2)
    assert all(p.is_mutant for p in groups["oligodendroglioma"])
    assert min(p.age_years for p in PEOPLE) >= 18
    assert np.mean([p.t2_flair_mismatch for p in groups["astrocytoma"]]) == pytest.approx(0.4, abs=0.08)
    assert not any(p.t2_flair_mismatch for name in ("oligodendroglioma", "glioblastoma") for p in groups[name])


@pytest.mark.parametrize("n", [8, 12, 24])
def test_small_cohorts_hold_both_classes(n: int) -> None:
    for seed in range(20):
        counts = Counter(draw_patient(number, seed).idh for number in range(1, n + 1))
        assert min(counts["mutant"], counts["wildtype"]) >= max(1, n // 8)


def test_scan_looks_like_a_scan() -> None:
    (scan,) = scans(1)
    assert set(scan.images) == {"t1", "t1ce", "t2", "flair"}
    shape = scan.mask.shape
    assert shape[:2] == (120, 120)
    assert 22 <= shape[2] <= 24
    brain = scan.images["t1"] > 0
    spacing = np.linalg.norm(scan.affine[:3, :3], axis=0)
    assert spacing[0] == pytest.approx(spacing[1])
    assert 1.5 <= spacing[0] <= 2
    assert 5 <= spacing[2] <= 6.5
    # An adult brain has 1 to 1.9 litres.
    assert 1e6 < brain.sum() * np.prod(spacing) < 1.9e6
    assert not brain[0].any()
    assert not brain[:, 0].any()
    assert nib.aff2axcodes(scan.affine) == ("L", "P", "S")
    for image in scan.images.values():
        assert image.dtype == np.int16
        assert image.min() == 0
        np.testing.assert_array_equal(image > 0, brain)
    assert set(np.unique(scan.mask)) <= {0, 1, 2, 4}
    assert not (scan.mask[~brain]).any()


def test_every_tumour_is_visible_and_of_plausible_size() -> None:
    for scan in [*scans(4), *scans(4, **WILDTYPE)]:
        ml = (scan.mask > 0).sum() * np.prod(np.linalg.norm(scan.affine[:3, :3], axis=0)) / 1000
        assert 3 < ml < 250
        assert region(scan, "flair", (1, 2, 4)) > 1.1
        assert region(scan, "t2", (1, 2, 4)) > 1.1
        assert region(scan, "t1", (1, 2, 4)) < 1.0


def test_wildtype_of_grade_4_enhances_around_necrosis_and_low_grade_mutant_mostly_does_not() -> None:
    wildtype, mutant = scans(6, **WILDTYPE), scans(6)
    assert sum((scan.mask == 4).any() for scan in wildtype) >= 5
    assert sum((scan.mask == 4).sum() > 20 for scan in mutant) <= 2
    for scan in wildtype:
        if (scan.mask == 4).any() and (scan.mask == 1).sum() > 10:
            assert region(scan, "t1ce", (4,)) > 1.15 > region(scan, "t1ce", (1,))


def test_ki67_raises_enhancement() -> None:
    low, high = (scans(4, **{**WILDTYPE, "ki67_percent": value}) for value in (4.0, 60.0))
    assert np.nanmean([region(scan, "t1ce", (4,)) for scan in high]) > np.nanmean(
        [region(scan, "t1ce", (4,)) for scan in low]
    )


def test_mismatch_is_bright_on_t2_and_dark_on_flair() -> None:
    for plain, mismatch in zip(scans(4), scans(4, t2_flair_mismatch=True), strict=True):
        ratio = region(mismatch, "t2", (1,)) / region(mismatch, "flair", (1,))
        assert ratio > 1.2 * region(plain, "t2", (1,)) / region(plain, "flair", (1,))


def test_mutants_prefer_the_frontal_lobe() -> None:
    places = np.stack(np.meshgrid([-40, 40], np.arange(-80, 61, 10), [-10, 10, 30], indexing="ij"), axis=-1).reshape(
        -1, 3
    )

    def frontal_share(**changes: object) -> float:
        generator = np.random.default_rng(0)
        drawn = [draw_centre(patient(**changes), places.astype(float), generator) for _ in range(500)]
        return float(np.mean([place[1] > 5 and place[2] > -5 for place in drawn]))

    # A quarter of the places are frontal; four times the weight makes that more than half.
    assert frontal_share() > 0.5 > 0.35 > frontal_share(**WILDTYPE)


def test_cohort_has_the_same_bytes_for_the_same_seed(tmp_path: Path) -> None:
    digests = []
    for name, n in (("a", 2), ("b", 3)):
        write_synthetic_cohort(tmp_path / name, n, 5)
        files = sorted((tmp_path / name).glob("SYN-000[12]/*.nii.gz"))
        assert len(files) == 10
        digests.append([hashlib.sha256(path.read_bytes()).hexdigest() for path in files])
    assert digests[0] == digests[1]


def test_cohort_sheet_is_read_like_any_other(tmp_path: Path) -> None:
    sheet = write_synthetic_cohort(tmp_path, 2, 0, missing_t1ce_fraction=1.0)
    cohort = read_cohort(CohortConfig(sheet=sheet, sequences=("flair",)))
    assert [case.case_id for case in cohort.cases] == ["SYN-0001", "SYN-0002"]
    assert set(cohort.cases[0].images) == {"t1", "t2", "flair"}
    assert set(cohort.cases[0].labels) == {"idh", "codel_1p19q", "mgmt", "grade", "ki67"}
    assert not list(tmp_path.glob("*/t1ce.nii.gz"))


def test_cohort_that_is_there_is_left_alone(tmp_path: Path) -> None:
    sheet = write_synthetic_cohort(tmp_path, 1, 0)
    before = sheet.stat().st_mtime_ns
    write_synthetic_cohort(tmp_path, 1, 0)
    assert sheet.stat().st_mtime_ns == before
    write_synthetic_cohort(tmp_path, 1, 1)
    assert sheet.stat().st_mtime_ns != before


@pytest.mark.parametrize(("n", "fraction", "message"), [(0, 0.0, "at least 1"), (1, 1.5, "between 0 and 1")])
def test_cohort_refuses_impossible_wishes(tmp_path: Path, n: int, fraction: float, message: str) -> None:
    with pytest.raises(CohortError, match=message):
        write_synthetic_cohort(tmp_path, n, 0, missing_t1ce_fraction=fraction)


def test_scan_depends_on_its_generator_only() -> None:
    first, second = (draw_scan(PEOPLE[3], numpy_generator(0, "scan", 4)) for _ in range(2))
    for name in first.images:
        np.testing.assert_array_equal(first.images[name], second.images[name])
