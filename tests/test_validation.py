"""The cohort check: deliberately broken files are each found with name and remedy; a sound cohort has no findings."""

from __future__ import annotations

import contextlib
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from glioma_nas.config import CohortConfig, MarkerConfig
from glioma_nas.errors import ImageError
from glioma_nas.grids import rotation_about
from glioma_nas.images import open_nifti, read_volume
from glioma_nas.markers import encode_labels
from glioma_nas.testing.phantoms import PHANTOM_AFFINE, write_nifti, write_phantom_cohort
from glioma_nas.validation import Validation, validate_cohort, write_validation
from glioma_nas.validation.file_checks import FileCheck
from glioma_nas.validation.findings import grouped
from glioma_nas.validation.validating import Demands

REAL_DATA = Path(__file__).parents[2] / "shared" / "data"

Breaker = Callable[[Path], object]


def load(path: Path) -> tuple[np.ndarray, np.ndarray]:
    image = nib.load(path)
    return np.asarray(image.dataobj), image.affine


def rewrite(path: Path, change: Callable[[np.ndarray], np.ndarray], affine: np.ndarray | None = None) -> None:
    data, own = load(path)
    write_nifti(path, change(data), own if affine is None else affine)


def with_values(**cells: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(data: np.ndarray) -> np.ndarray:
        data = data.astype(np.float32)
        for index, value in enumerate(cells.values()):
            data[10 + index, 10, 3] = value
        return data

    return change


def truncate(path: Path) -> None:
    raw = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(raw[: len(raw) // 2]))


def cut_stream(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def spoil_header(path: Path, **fields: object) -> None:
    image, _ = open_nifti(path)
    for name, value in fields.items():
        image.header[name] = value
    # Into the bytes of the file, because nibabel mends a header when it writes one.
    raw = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(image.header.binaryblock + raw[len(image.header.binaryblock) :]))


def one_voxel(data: np.ndarray) -> np.ndarray:
    return np.where(np.cumsum(data).reshape(data.shape) == 1, data, 0)


def twin_of(path: Path, other: str) -> None:
    path.write_bytes((path.parents[1] / other).read_bytes())


SHEAR = np.eye(4)
SHEAR[0, 1] = 0.2


def spacing(x: float, y: float, z: float) -> np.ndarray:
    return np.diag([x, y, z, 1.0])


# Code of the finding, severity, file, and what is done to it.
BROKEN: list[tuple[str, str, str, Breaker]] = [
    ("unreadable", "error", "t1ce", truncate),
    ("unreadable", "error", "flair", cut_stream),
    ("unreadable", "error", "flair", lambda path: path.write_bytes(b"")),
    ("unreadable", "error", "flair", lambda path: path.write_bytes(gzip.compress(b"<html>404</html>"))),
    ("not-3d", "error", "t1ce", lambda path: rewrite(path, lambda data: np.stack([data] * 3, axis=-1))),
    ("not-3d", "error", "flair", lambda path: rewrite(path, lambda data: data[:, :, 4])),
    ("not-scalar", "error", "flair", lambda path: rewrite(path, lambda data: data.astype(np.complex64))),
    ("not-finite", "error", "t1ce", lambda path: rewrite(path, with_values(a=float("nan"), b=float("inf")))),
    ("constant", "error", "flair", lambda path: rewrite(path, np.zeros_like)),
    ("affine", "error", "t1ce", lambda path: spoil_header(path, srow_z=np.zeros(4))),
    ("forms-differ", "warning", "flair", lambda path: spoil_header(path, qoffset_x=55.0)),
    ("no-orientation", "warning", "t1ce", lambda path: spoil_header(path, qform_code=0, sform_code=0)),
    ("units", "warning", "flair", lambda path: spoil_header(path, xyzt_units=1)),
    ("header-text", "note", "flair", lambda path: spoil_header(path, descrip=b"SMITH^JOHN 1970-01-01")),
    ("scan-grid", "error", "flair", lambda path: rewrite(path, lambda data: data[:, :-1])),
    ("scan-grid", "error", "flair", lambda path: rewrite(path, np.array, PHANTOM_AFFINE @ spacing(-1, 1, 1))),
    ("scan-grid", "error", "flair", lambda path: rewrite(path, np.array, PHANTOM_AFFINE @ spacing(1, 1, 1.2))),
    ("mask-grid", "error", "mask", lambda path: rewrite(path, lambda data: data[2:])),
    ("mask-labels", "error", "mask", lambda path: rewrite(path, lambda data: data * 7)),
    ("mask-labels", "error", "mask", lambda path: rewrite(path, lambda data: data * np.float32(0.4))),
    ("empty-mask", "warning", "mask", lambda path: rewrite(path, np.zeros_like)),
    ("mask-size", "warning", "mask", lambda path: rewrite(path, one_voxel)),
    ("mask-outside", "warning", "mask", lambda path: rewrite(path, lambda data: np.roll(data, 40, axis=0))),
    ("background", "warning", "t1ce", lambda path: rewrite(path, lambda data: data + 5)),
    ("spacing", "warning", "t1ce", lambda path: rewrite(path, np.array, spacing(2, 2, 20))),
    ("extent", "warning", "t1ce", lambda path: rewrite(path, np.array, spacing(0.5, 0.5, 5))),
    ("sheared", "warning", "t1ce", lambda path: rewrite(path, np.array, PHANTOM_AFFINE @ SHEAR)),
    ("missing-sequence", "error", "t1ce", lambda path: None),
    ("unusable-row", "error", "flair", lambda path: path.unlink()),
    ("same-scan", "error", "flair", lambda path: twin_of(path, "P001/t1ce.nii.gz")),
    ("duplicate-patients", "error", "t1ce", lambda path: twin_of(path, "P002/t1ce.nii.gz")),
]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantom_cohort(tmp_path_factory.mktemp("sound"), 4, 0).parent


def copy_of(folder: Path, target: Path) -> Path:
    import shutil

    shutil.copytree(folder, target, dirs_exist_ok=True)
    return target / "cohort.csv"


def check(sheet: Path, *, sequences: tuple[str, ...] = ("t1ce", "flair"), workers: int = 1) -> Validation:
    return validate_cohort(CohortConfig(sheet=sheet), Demands(sequences), workers=workers)


def test_sound_cohort_has_no_findings(sound: Path) -> None:
    validation = check(sound / "cohort.csv")
    assert [finding.as_row() for finding in validation.findings if finding.code != "extent"] == []
    assert validation.n_errors == 0
    assert validation.n_files == sum(len(case.images) + 1 for case in validation.cohort.cases)


@pytest.mark.parametrize(("code", "severity", "column", "breaker"), BROKEN, ids=lambda item: str(item)[:24])
def test_broken_file_is_found_by_name_with_a_remedy(
    sound: Path, tmp_path: Path, code: str, severity: str, column: str, breaker: Breaker
) -> None:
    sheet = copy_of(sound, tmp_path)
    breaker(tmp_path / "P001" / f"{column}.nii.gz")
    if code == "missing-sequence":
        sheet.write_text(sheet.read_text().replace("P001/t1ce.nii.gz", ""))
    validation = check(sheet)
    found = [item for item in validation.findings if item.code == code]
    assert [item.severity for item in found] == [severity]
    # A copy is told with the second of the two, in the order of the sheet.
    assert found[0].case_id == ("P002" if code == "duplicate-patients" else "P001")
    assert found[0].remedy and found[0].message
    assert str(tmp_path) not in found[0].message or code == "unusable-row"
    assert all(item.case_id in ("P001", "P002", None) for item in validation.findings if item.severity == "error")
    assert len({item.code for item in validation.findings if item.severity == "error"} - {code}) <= 1


def test_copy_with_flipped_axes_is_found(sound: Path, tmp_path: Path) -> None:
    sheet = copy_of(sound, tmp_path)
    data, affine = load(tmp_path / "P003" / "t1ce.nii.gz")
    flip = spacing(-1, 1, 1)
    flip[0, 3] = data.shape[0] - 1
    write_nifti(tmp_path / "P002" / "t1ce.nii.gz", data[::-1], affine @ flip)
    assert "duplicate-patients" in {finding.code for finding in check(sheet).findings}


@pytest.mark.parametrize("rule", ["error", "exclude", "zero", "indicator", "drop"])
def test_a_missing_sequence_is_an_error_only_where_the_run_would_stop(sound: Path, tmp_path: Path, rule: str) -> None:
    sheet = copy_of(sound, tmp_path)
    sheet.write_text(sheet.read_text().replace("P001/t1ce.nii.gz", ""))
    config = CohortConfig.model_validate({"sheet": sheet, "missing_sequence": rule})
    found = [item for item in validate_cohort(config, Demands(("t1ce", "flair"))).findings if item.column == "t1ce"]
    assert [item.severity for item in found] == ["error" if rule == "error" else "warning"]


@pytest.mark.parametrize(("one_grid", "severity"), [(True, "error"), (False, "note")])
def test_scans_on_several_grids_are_an_error_unless_a_step_joins_them(
    sound: Path, tmp_path: Path, one_grid: bool, severity: str
) -> None:
    sheet = copy_of(sound, tmp_path)
    rewrite(tmp_path / "P001" / "flair.nii.gz", lambda data: data[:, :-1])
    demands = Demands(("t1ce", "flair"), one_grid=one_grid)
    found = [item for item in validate_cohort(CohortConfig(sheet=sheet), demands).findings if item.code == "scan-grid"]
    assert [(item.severity, item.column) for item in found] == [(severity, "flair")]


def test_mask_whose_axes_are_stored_otherwise_lies_on_its_scan(sound: Path, tmp_path: Path) -> None:
    sheet = copy_of(sound, tmp_path)
    path = tmp_path / "P001" / "mask.nii.gz"
    data, affine = load(path)
    flip = spacing(-1, 1, 1)
    flip[0, 3] = data.shape[0] - 1
    write_nifti(path, data[::-1], affine @ flip)
    assert check(sheet).n_errors == 0
    assert not [item for item in check(sheet).findings if item.code == "mask-outside"]
    # The same voxels with a header that puts them elsewhere.
    write_nifti(path, np.roll(data, 40, axis=0)[::-1], affine @ flip)
    assert [item.severity for item in check(sheet).findings if item.code == "mask-outside"] == ["warning"]


def test_scans_and_mask_that_agree_but_for_rounding_agree_at_45_degrees(sound: Path, tmp_path: Path) -> None:
    sheet = copy_of(sound, tmp_path)
    for path in (tmp_path / "P001").glob("*.nii.gz"):
        turn = rotation_about(np.zeros(3), (0.0, 0.0, 45 + (1e-5 if path.name == "t1ce.nii.gz" else -1e-5)), (0, 0, 0))
        rewrite(path, np.array, turn @ PHANTOM_AFFINE)
    found = check(sheet)
    assert len({facts.orientation for facts in found.reports[0].files}) == 2
    assert not {item.code for item in found.findings} & {"mask-grid", "scan-grid", "mask-outside"}


def test_mixed_orientations_are_told(sound: Path, tmp_path: Path) -> None:
    sheet = copy_of(sound, tmp_path)
    for path in (tmp_path / "P002").glob("*.nii.gz"):
        rewrite(path, np.array, PHANTOM_AFFINE @ spacing(-1, 1, 1))
    (finding,) = [item for item in check(sheet).findings if item.code == "mixed-orientations"]
    assert "2 orientations" in finding.message and "orient" in finding.remedy


def changed_sheet(sound: Path, folder: Path, change: Callable[[list[list[str]]], None]) -> Path:
    sheet = copy_of(sound, folder)
    rows = [line.split(",") for line in sheet.read_text().splitlines()]
    change(rows)
    sheet.write_text("\n".join(",".join(row) for row in rows) + "\n")
    return sheet


def put(column: str, *values: str) -> Callable[[list[list[str]]], None]:
    def change(rows: list[list[str]]) -> None:
        index = rows[0].index(column)
        for row, value in zip(rows[1:], values, strict=False):
            row[index] = value

    return change


@pytest.mark.parametrize(
    ("column", "values", "code", "severity"),
    [
        ("idh", ("mutant", "Mutant"), "label-spelling", "error"),
        ("idh", ("mut", "mutant"), "label-code", "error"),
        ("ki67", ("12 %",), "ki67-range", "error"),
        ("ki67", ("140",), "ki67-range", "error"),
        ("idh", ("mutant",) * 4, "one-class", "error"),
        ("idh", ("mutant", "wildtype", "mutant", "mutant"), "rare-class", "error"),
        ("patient_id", ("X", "X"), "contradiction", "error"),
    ],
)
def test_label_columns_are_checked(
    sound: Path, tmp_path: Path, column: str, values: tuple[str, ...], code: str, severity: str
) -> None:
    sheet = changed_sheet(sound, tmp_path, put(column, *values))
    markers = {"idh": MarkerConfig(column="idh", positive="mutant")}
    validation = validate_cohort(CohortConfig(sheet=sheet), Demands(("t1ce", "flair"), markers, n_folds=2))
    assert {item.severity for item in validation.findings if item.code == code} == {severity}


def test_classes_count_as_a_run_counts_them(sound: Path, tmp_path: Path) -> None:
    sheet = changed_sheet(sound, tmp_path, put("idh", "Mutant", "Mutant", "wildtype", "wildtype"))
    markers = {"idh": MarkerConfig(column="idh", positive="mutant")}
    validation = validate_cohort(CohortConfig(sheet=sheet), Demands(("t1ce", "flair"), markers, n_folds=2))
    assert encode_labels(validation.cohort.cases, "idh", markers["idh"], sheet=sheet, n_folds=2)
    assert not [item for item in validation.findings if item.code in ("one-class", "rare-class")]


def test_fractions_in_place_of_per_cent_and_conflicts_are_found(tmp_path: Path) -> None:
    sheet = write_phantom_cohort(tmp_path, 6, 0)
    rows = [line.split(",") for line in sheet.read_text().splitlines()]
    put("ki67", *["0.1"] * 6)(rows)
    put("idh", *["wildtype"] * 6)(rows)
    put("codel_1p19q", "codeleted")(rows)
    sheet.write_text("\n".join(",".join(row) for row in rows))
    codes = {item.code for item in check(sheet).findings}
    assert {"ki67-range", "label-conflict"} <= codes


def test_case_ids_like_hospital_numbers_are_told(sound: Path, tmp_path: Path) -> None:
    sheet = changed_sheet(sound, tmp_path, put("case_id", "MRN-00412345"))
    (finding,) = [item for item in check(sheet).findings if item.code == "identifying-id"]
    assert "00412345" not in finding.message


def test_all_rows_and_files_are_checked_in_one_go_whatever_the_workers(sound: Path, tmp_path: Path) -> None:
    sheet = changed_sheet(sound, tmp_path, put("age", "old", "", "ancient"))
    truncate(tmp_path / "P002" / "flair.nii.gz")
    truncate(tmp_path / "P004" / "mask.nii.gz")
    one, two = check(sheet), check(sheet, workers=2)
    assert one == two
    errors = {(item.case_id, item.code) for item in one.findings if item.severity == "error"}
    assert errors == {
        ("P001", "unusable-row"),
        ("P003", "unusable-row"),
        ("P002", "unreadable"),
        ("P004", "unreadable"),
    }


def test_page_and_record_hold_every_finding_and_escape_what_they_show(sound: Path, tmp_path: Path) -> None:
    sheet = changed_sheet(sound, tmp_path, put("idh", "<script>alert(1)</script>"))
    truncate(tmp_path / "P002" / "flair.nii.gz")
    validation = check(sheet)
    page = write_validation(validation, tmp_path / "out").read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page
    record = json.loads((tmp_path / "out" / "validation.json").read_text())
    assert len(record["findings"]) == len(validation.findings)
    assert record["counts"]["error"] == validation.n_errors > 0
    assert {file["case_id"] for file in record["files"]} == {"P001", "P002", "P003", "P004"}
    assert all(finding.code in page or finding.message[:20] in page for finding in validation.findings)
    assert str(tmp_path) not in page


def test_grouping_puts_errors_first_and_counts_cases(sound: Path, tmp_path: Path) -> None:
    sheet = copy_of(sound, tmp_path)
    for name in ("P001", "P002"):
        truncate(tmp_path / name / "flair.nii.gz")
    groups = grouped(check(sheet).findings)
    assert (groups[0].severity, groups[0].code, groups[0].count) == ("error", "unreadable", 2)
    assert groups[0].cases == ("P001", "P002")


def test_bomb_is_refused_before_it_fills_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from glioma_nas import images

    monkeypatch.setattr(images, "_MAX_UNPACKED_BYTES", 1_000_000)
    (tmp_path / "bomb.nii.gz").write_bytes(gzip.compress(bytes(50_000_000)))
    with pytest.raises(ImageError, match="more than one scan"):
        open_nifti(tmp_path / "bomb.nii.gz")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # headers with infinities
def test_spoilt_headers_are_findings_and_never_crashes(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "a.nii", np.arange(240, dtype=np.int16).reshape(6, 8, 5))
    sound = path.read_bytes()
    generator = np.random.default_rng(0)
    codes: set[str] = set()
    for _ in range(400):
        raw = bytearray(sound)
        for _ in range(int(generator.integers(1, 4))):
            raw[int(generator.integers(0, 352))] = int(generator.integers(0, 256))
        path.write_bytes(raw)
        for column in ("t1", "mask"):
            codes |= {finding.code for finding in FileCheck(path, "A", column, (1, 2)).findings}
        with contextlib.suppress(ImageError):
            read_volume(path)
    assert {"unreadable", "not-3d", "affine", "forms-differ", "units"} <= codes


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="third-party MRI is not beside the checkout")
def test_real_cohort_has_missing_sequences_and_no_errors() -> None:
    validation = validate_cohort(CohortConfig(sheet=REAL_DATA / "tcga_lgg.csv"), workers=2)
    assert validation.n_errors == 0
    assert validation.n_files == 206
    assert {group.code: group.count for group in grouped(validation.findings)} == {"missing-sequence": 14}
