"""The cohort sheet: what is read, and one clear line for whatever is wrong with it."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from glioma_nas.cohort import read_cohort, select_complete
from glioma_nas.config import CohortConfig
from glioma_nas.errors import CohortError

REAL_DATA = Path(__file__).parents[2] / "shared" / "data"
HEADER = ["case_id", "patient_id", "t1ce", "flair", "mask", "age", "sex", "idh", "ki67"]
GOOD = ["A", "P", "a/t1ce.nii.gz", "a/flair.nii.gz", "a/mask.nii.gz", "51.5", "F", "mutant", "12"]


def write_sheet(folder: Path, *rows: list[str], header: list[str] = HEADER) -> CohortConfig:
    # The reader opens no image, so empty files stand for scans.
    (folder / "a").mkdir(exist_ok=True)
    for name in ("t1ce", "flair", "mask"):
        (folder / "a" / f"{name}.nii.gz").touch()
    with (folder / "cohort.csv").open("w", newline="") as handle:
        csv.writer(handle).writerows([header, *rows])
    return CohortConfig(sheet=folder / "cohort.csv")


def changed(column: str, value: str, row: list[str] = GOOD) -> list[str]:
    return [value if name == column else cell for name, cell in zip(HEADER, row, strict=True)]


def test_read_cohort_gives_every_field_of_a_row(tmp_path: Path) -> None:
    cohort = read_cohort(write_sheet(tmp_path, GOOD))
    (case,) = cohort.cases
    assert (case.case_id, case.patient_id, case.age, case.sex) == ("A", "P", 51.5, "F")
    assert case.images == {name: (tmp_path / "a" / f"{name}.nii.gz").resolve() for name in ("t1ce", "flair")}
    assert case.mask == (tmp_path / "a" / "mask.nii.gz").resolve()
    assert case.labels == {"idh": "mutant", "ki67": "12"}
    assert cohort.sequences == ("t1ce", "flair")
    assert cohort.label_columns == ("idh", "ki67")


def test_read_cohort_leaves_unknown_values_out(tmp_path: Path) -> None:
    row = ["A", "P", "", "a/flair.nii.gz", "", "", "", "unknown", ""]
    (case,) = read_cohort(write_sheet(tmp_path, row)).cases
    assert (case.age, case.sex, case.mask, case.labels) == (None, None, None, {})
    assert list(case.images) == ["flair"]


def test_read_cohort_takes_a_column_of_nifti_paths_as_a_sequence(tmp_path: Path) -> None:
    header = [*HEADER, "t2"]
    cohort = read_cohort(write_sheet(tmp_path, [*GOOD, "a/flair.nii.gz"], header=header))
    assert cohort.sequences == ("t1ce", "flair", "t2")


def test_read_cohort_accepts_a_byte_order_mark_and_blank_lines(tmp_path: Path) -> None:
    config = write_sheet(tmp_path, GOOD)
    config.sheet.write_bytes(b"\xef\xbb\xbf" + config.sheet.read_bytes() + b",,,,,,,,\n\n")
    assert len(read_cohort(config).cases) == 1


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("case_id", "", "line 3: case_id is empty"),
        ("case_id", "../B", r"line 3: case_id '\.\./B' cannot name a folder; leave out '/'"),
        ("case_id", "B/C", "cannot name a folder"),
        ("case_id", "B\\C", "cannot name a folder"),
        ("case_id", ".B", "cannot name a folder.*leading '.'"),
        ("case_id", "B\tC", "cannot name a folder"),
        ("case_id", "B" * 200, "has 200 characters; at most 128"),
        ("case_id", "腫瘍" * 40, "takes 240 bytes; at most 200"),
        ("case_id", "A", r"line 3: case_id 'A' is the same as in line 2; every case needs its own"),
        ("patient_id", "", "case B has no patient_id"),
        ("flair", "a/flare.nii.gz", r"line 3: case B: flair is 'a/flare.nii.gz', no such file .*; mend the path"),
        ("flair", "a/../../../nowhere/flair.nii.gz", "no such file"),
        ("flair", "a/flair.dcm", r"flair is 'a/flair.dcm'; expected a NIfTI file ending in .nii or .nii.gz"),
        ("mask", "a/nothing.nii.gz", "case B: mask is 'a/nothing.nii.gz', no such file"),
        ("age", "fifty", "case B: age is 'fifty'; expected years between 0 and 120"),
        ("age", "inf", "age is 'inf'"),
        ("age", "999Y", "age is '999Y'"),
        ("case_id", "-B", "cannot name a folder.*leading '.' or '-'"),
        ("case_id", "B.", "cannot name a folder on every system"),
        ("case_id", "NUL", "cannot name a folder on every system"),
        ("case_id", "a", "line 3: case_id 'a' is hardly different from that in line 2"),
        ("age", "-3", "age is '-3'"),
        ("age", "1e9", "age is '1e9'"),
        ("sex", "X", "case B: sex is 'X'; expected M or F, or an empty cell"),
    ],
)
def test_read_cohort_names_line_value_and_remedy_when_a_cell_is_wrong(
    tmp_path: Path, column: str, value: str, message: str
) -> None:
    second = changed(column, value, changed("case_id", "B"))
    with pytest.raises(CohortError, match=message) as caught:
        read_cohort(write_sheet(tmp_path, GOOD, second))
    assert "cohort.csv" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_read_cohort_counts_further_findings(tmp_path: Path) -> None:
    config = write_sheet(tmp_path, changed("age", "x"), changed("sex", "y", changed("case_id", "B")))
    with pytest.raises(CohortError, match=r"line 2: case A: age is 'x'.*\(and 1 more\)$"):
        read_cohort(config)


def test_read_cohort_refuses_a_dangling_link(tmp_path: Path) -> None:
    config = write_sheet(tmp_path, GOOD)
    (tmp_path / "a" / "flair.nii.gz").unlink()
    (tmp_path / "a" / "flair.nii.gz").symlink_to(tmp_path / "gone.nii.gz")
    with pytest.raises(CohortError, match=r"flair is 'a/flair.nii.gz', no such file"):
        read_cohort(config)


def test_read_cohort_refuses_a_missing_sheet(tmp_path: Path) -> None:
    with pytest.raises(CohortError, match=r"none\.csv: No such file or directory; give the path of a sheet"):
        read_cohort(CohortConfig(sheet=tmp_path / "none.csv"))


def test_read_cohort_refuses_a_sheet_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "cohort.csv").write_bytes(b"PK\x03\x04\xff\xfe\x00\x9c")
    with pytest.raises(CohortError, match=r"cohort\.csv: not a comma-separated text file in UTF-8"):
        read_cohort(CohortConfig(sheet=tmp_path / "cohort.csv"))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (["id", *HEADER[1:]], r"no column 'case_id' \(columns: id, patient_id"),
        (["|".join(HEADER)], "no column 'case_id'.*separated by commas"),
        (["case_id", "patient", *HEADER[2:]], "no column 'patient_id'"),
        ([*HEADER[:3], "flare", *HEADER[4:]], "no column for sequence 'flair': did you mean 'flare'"),
        ([*HEADER[:8], "idh"], "column 'idh' stands 2 times"),
    ],
)
def test_read_cohort_refuses_a_header(tmp_path: Path, header: list[str], message: str) -> None:
    with pytest.raises(CohortError, match=message):
        read_cohort(write_sheet(tmp_path, GOOD[: len(header)], header=header))


def test_read_cohort_refuses_a_row_of_another_length(tmp_path: Path) -> None:
    with pytest.raises(CohortError, match="line 2: 10 cells, but the header has 9 columns"):
        read_cohort(write_sheet(tmp_path, [*GOOD, "extra"]))


def test_read_cohort_refuses_a_sheet_without_rows(tmp_path: Path) -> None:
    with pytest.raises(CohortError, match="holds no rows below the header"):
        read_cohort(write_sheet(tmp_path))


def incomplete_cohort(tmp_path: Path, rule: str) -> CohortConfig:
    rows = [GOOD, changed("t1ce", "", changed("case_id", "B")), ["C", "R", "", "", "", "", "", "", ""]]
    config = write_sheet(tmp_path, *rows)
    return CohortConfig.model_validate({**config.model_dump(), "missing_sequence": rule})


def test_select_complete_stops_at_a_missing_sequence_by_default(tmp_path: Path) -> None:
    config = incomplete_cohort(tmp_path, "error")
    with pytest.raises(
        CohortError,
        match=r"case B has no t1ce; add the file, or set .*'exclude', 'zero', 'indicator' or 'drop' \(and 1 more\)",
    ):
        select_complete(read_cohort(config), config)


@pytest.mark.parametrize(("rule", "kept", "left_out"), [("exclude", ["A"], ["B", "C"]), ("zero", ["A", "B"], ["C"])])
def test_select_complete_follows_the_rule(tmp_path: Path, rule: str, kept: list[str], left_out: list[str]) -> None:
    config = incomplete_cohort(tmp_path, rule)
    cohort, excluded = select_complete(read_cohort(config), config)
    assert [case.case_id for case in cohort.cases] == kept
    assert [item.case_id for item in excluded] == left_out
    assert excluded[-1].reason == "has no t1ce, flair"


def test_select_complete_refuses_to_leave_nobody(tmp_path: Path) -> None:
    config = CohortConfig.model_validate(
        {**write_sheet(tmp_path, changed("flair", "")).model_dump(), "missing_sequence": "exclude"}
    )
    with pytest.raises(CohortError, match="no case has the sequences t1ce, flair"):
        select_complete(read_cohort(config), config)


@pytest.mark.real_data
@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="third-party MRI is not beside the checkout")
def test_read_cohort_reads_the_real_sheets() -> None:
    cohort = read_cohort(CohortConfig(sheet=REAL_DATA / "tcga_lgg.csv"))
    assert len(cohort.cases) == 55
    assert cohort.sequences == ("t1", "t1ce", "flair")
    assert sum("t1ce" not in case.images for case in cohort.cases) == 9
    assert sum(case.labels.get("idh") == "wildtype" for case in cohort.cases) == 10
