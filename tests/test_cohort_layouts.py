"""Sheets of other tools and data set folders: all become the same records."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import openpyxl
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from glioma_nas.cohort import cohort_fingerprint, examine_cohort, read_cohort
from glioma_nas.cohort.cells import check_case_id, read_age, sanitised_case_id
from glioma_nas.cohort.column_names import sequence_of_file
from glioma_nas.config import CohortConfig, parse_config
from glioma_nas.errors import CohortError
from glioma_nas.pipeline import STAGES, Pipeline
from glioma_nas.prepared import PreparedCohort
from glioma_nas.progress import Silent
from glioma_nas.testing.phantoms import write_phantom_cohort


def touch(folder: Path, *names: str) -> None:
    # Readers open no image, so empty files stand for scans.
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def config(path: Path, **options: object) -> CohortConfig:
    return CohortConfig.model_validate({"sheet": path, **options})


def write_workbook(path: Path, rows: list[list[object]]) -> None:
    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(row)
    book.save(path)


def test_xlsx_sheet_gives_the_same_case_as_csv(tmp_path: Path) -> None:
    touch(tmp_path, "t1ce.nii.gz", "flair.nii.gz")
    rows = [
        ["case_id", "patient_id", "t1ce", "flair", "age", "sex", "idh", "ki67"],
        ["A", 17, "t1ce.nii.gz", "flair.nii.gz", 54, "f", "mutant", 7.5],
        ["B", 18, "t1ce.nii.gz", "flair.nii.gz", "045Y", "M", None, None],
    ]
    write_workbook(tmp_path / "cohort.xlsx", rows)
    text = "\n".join(",".join("" if cell is None else str(cell) for cell in row) for row in rows)
    (tmp_path / "cohort.csv").write_text(text)
    excel, plain = (read_cohort(config(tmp_path / name)).cases for name in ("cohort.xlsx", "cohort.csv"))
    assert excel == plain
    assert (excel[0].patient_id, excel[0].age, excel[0].sex) == ("17", 54.0, "F")
    assert excel[0].labels == {"idh": "mutant", "ki67": "7.5"}
    assert (excel[1].age, excel[1].labels) == (45.0, {})


def test_xlsx_formula_without_result_is_refused(tmp_path: Path) -> None:
    write_workbook(tmp_path / "c.xlsx", [["case_id", "patient_id", "age"], ["A", "P", "=2026-1970"]])
    with pytest.raises(CohortError, match=r"line 2: the formula =2026-1970 has no stored result"):
        read_cohort(config(tmp_path / "c.xlsx"))


def test_xlsx_date_is_refused_without_repeating_it(tmp_path: Path) -> None:
    import datetime

    write_workbook(tmp_path / "c.xlsx", [["case_id", "patient_id", "birth"], ["A", "P", datetime.date(1970, 5, 3)]])
    with pytest.raises(CohortError, match=r"line 2: a cell holds a date") as caught:
        read_cohort(config(tmp_path / "c.xlsx"))
    assert "1970" not in str(caught.value)


def test_file_named_xlsx_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.xlsx").write_bytes(b"case_id,patient_id\n")
    with pytest.raises(CohortError, match=r"not an Excel workbook"):
        read_cohort(config(tmp_path / "c.xlsx"))


def test_semicolons_as_european_spreadsheets_write_them(tmp_path: Path) -> None:
    touch(tmp_path, "t1ce.nii.gz", "flair.nii.gz")
    (tmp_path / "c.csv").write_text("case_id;patient_id;t1ce;flair;\nA;P;t1ce.nii.gz;flair.nii.gz;\n")
    assert set(read_cohort(config(tmp_path / "c.csv")).cases[0].images) == {"t1ce", "flair"}


def test_gandlf_sheet_is_read_by_its_file_names(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{case}/{case}_{name}.nii.gz" for case in "AB" for name in ("t1gd", "flair", "seg")))
    lines = ["SubjectID,Channel_0,Channel_1,Label,ValueToPredict_IDH"]
    lines += [f"{c},{c}/{c}_t1gd.nii.gz,{c}/{c}_flair.nii.gz,{c}/{c}_seg.nii.gz,1" for c in "AB"]
    (tmp_path / "train.csv").write_text("\n".join(lines))
    reading = examine_cohort(config(tmp_path / "train.csv"))
    assert not reading.problems
    (first, _) = reading.cohort.cases
    assert (first.case_id, first.patient_id, first.labels) == ("A", "A", {"ValueToPredict_IDH": "1"})
    assert {name: path.name for name, path in first.images.items()} == {
        "t1ce": "A_t1gd.nii.gz",
        "flair": "A_flair.nii.gz",
    }
    assert first.mask is not None and first.mask.name == "A_seg.nii.gz"
    assert any("every case_id counts as one patient" in note for note in reading.notes)


def test_gandlf_channels_that_file_names_do_not_tell_need_a_word(tmp_path: Path) -> None:
    touch(tmp_path, "1.nii.gz", "2.nii.gz")
    (tmp_path / "train.csv").write_text("SubjectID,Channel_0,Channel_1\nA,1.nii.gz,2.nii.gz\n")
    with pytest.raises(CohortError, match=r"'Channel_0' do not agree on a sequence.*cohort\.columns"):
        read_cohort(config(tmp_path / "train.csv"))
    named = config(tmp_path / "train.csv", columns={"t1ce": "Channel_0", "flair": "Channel_1"})
    assert read_cohort(named).cases[0].images["flair"].name == "2.nii.gz"


def test_columns_that_name_no_heading_are_refused(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text("case_id,patient_id,IDH status\nA,P,1\n")
    with pytest.raises(CohortError, match=r"calls 'IDH Status' idh, but there is no such column: did you mean"):
        read_cohort(config(tmp_path / "c.csv", columns={"idh": "IDH Status"}))


def test_two_headings_for_one_thing_are_refused(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text("case_id,patient_id,T1c,T1Gd,flair\nA,P,a.nii.gz,b.nii.gz,c.nii.gz\n")
    with pytest.raises(CohortError, match="columns 'T1c' and 'T1Gd' both mean t1ce"):
        read_cohort(config(tmp_path / "c.csv"))


def bids(folder: Path) -> Path:
    touch(
        folder,
        "sub-01/anat/sub-01_T1w.nii.gz",
        "sub-01/anat/sub-01_ce-gadolinium_T1w.nii.gz",
        "sub-01/anat/sub-01_run-1_FLAIR.nii.gz",
        "sub-01/anat/sub-01_acq-fast_run-2_FLAIR.nii.gz",
        "sub-02/ses-1/anat/sub-02_ses-1_ce-gd_T1w.nii.gz",
        "sub-02/ses-1/anat/sub-02_ses-1_FLAIR.nii.gz",
        "sub-02/ses-2/anat/sub-02_ses-2_FLAIR.nii.gz",
        "derivatives/masks/sub-01/anat/sub-01_label-tumor_mask.nii.gz",
        "derivatives/masks/sub-01/anat/sub-01_desc-brain_mask.nii.gz",
    )
    (folder / "participants.tsv").write_text(
        "participant_id\tage\tsex\tidh\nsub-01\t51\tF\tmutant\nsub-02\tn/a\tM\tn/a\n"
    )
    return folder


def test_bids_folder_gives_sessions_as_cases(tmp_path: Path) -> None:
    reading = examine_cohort(config(bids(tmp_path)))
    assert (reading.format, reading.problems) == ("bids", ())
    first, second, third = reading.cohort.cases
    assert (first.case_id, first.age, first.sex, first.labels) == ("sub-01", 51.0, "F", {"idh": "mutant"})
    assert {name: path.name for name, path in first.images.items()} == {
        "t1": "sub-01_T1w.nii.gz",
        "t1ce": "sub-01_ce-gadolinium_T1w.nii.gz",
        "flair": "sub-01_run-1_FLAIR.nii.gz",
    }
    assert first.mask is not None and first.mask.name == "sub-01_label-tumor_mask.nii.gz"
    assert (second.case_id, second.patient_id, second.age, second.labels) == ("sub-02_ses-1", "sub-02", None, {})
    assert (third.case_id, third.patient_id, set(third.images)) == ("sub-02_ses-2", "sub-02", {"flair"})
    assert any("2 scans for flair; sub-01_run-1_FLAIR.nii.gz is used" in note for note in reading.notes)


def test_bids_folder_with_two_tumour_masks_of_a_case_is_a_problem(tmp_path: Path) -> None:
    touch(bids(tmp_path), "derivatives/other/sub-01/sub-01_label-lesion_dseg.nii.gz")
    with pytest.raises(CohortError, match=r"case sub-01 has several tumour masks"):
        read_cohort(config(tmp_path))


def test_brats_folder_is_read_whatever_the_year(tmp_path: Path) -> None:
    for case, names, joint in (
        ("HGG/Brats18_X_1", ("t1", "t1ce", "t2", "flair", "seg"), "_"),
        ("BraTS-GLI-00005-000", ("t1n", "t1c", "t2w", "t2f", "seg"), "-"),
        ("BraTS-GLI-00005-001", ("t1n", "t1c", "t2w", "t2f"), "-"),
    ):
        touch(tmp_path, *(f"{case}/{Path(case).name}{joint}{name}.nii.gz" for name in names))
    cases = {case.case_id: case for case in read_cohort(config(tmp_path)).cases}
    assert set(cases) == {"Brats18_X_1", "BraTS-GLI-00005-000", "BraTS-GLI-00005-001"}
    assert all(set(case.images) == {"t1", "t1ce", "t2", "flair"} for case in cases.values())
    assert cases["BraTS-GLI-00005-000"].images["flair"].name == "BraTS-GLI-00005-000-t2f.nii.gz"
    assert cases["BraTS-GLI-00005-000"].patient_id == cases["BraTS-GLI-00005-001"].patient_id == "BraTS-GLI-00005"
    assert cases["BraTS-GLI-00005-001"].mask is None


def nnunet(folder: Path, **description: object) -> Path:
    touch(folder, *(f"imagesTr/{c}_000{n}.nii.gz" for c in ("g_1", "g_2") for n in (0, 1)), "labelsTr/g_1.nii.gz")
    content = {"channel_names": {"0": "T1Gd", "1": "FLAIR"}, "file_ending": ".nii.gz", **description}
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def test_nnunet_data_set_is_read_with_its_channel_names(tmp_path: Path) -> None:
    first, second = read_cohort(config(nnunet(tmp_path))).cases
    assert {name: path.name for name, path in first.images.items()} == {
        "t1ce": "g_1_0000.nii.gz",
        "flair": "g_1_0001.nii.gz",
    }
    assert first.mask is not None and first.mask.name == "g_1.nii.gz"
    assert (second.case_id, second.mask) == ("g_2", None)


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({"channel_names": ["T1"]}, "does not map channel numbers to names"),
        ({"channel_names": {"0": "t1c", "1": "T1ce"}}, "two channels are called"),
        ({"file_ending": ".mha"}, "only .nii and .nii.gz are read"),
    ],
)
def test_nnunet_description_that_cannot_be_used_is_refused(
    tmp_path: Path, description: dict[str, object], message: str
) -> None:
    with pytest.raises(CohortError, match=message):
        read_cohort(config(nnunet(tmp_path, **description)))


def test_nnunet_file_of_another_name_is_a_problem_of_its_own(tmp_path: Path) -> None:
    touch(nnunet(tmp_path), "imagesTr/stray.nii.gz")
    reading = examine_cohort(config(tmp_path))
    assert len(reading.cohort.cases) == 2
    assert "'stray.nii.gz' is not named CASE_CHANNEL.nii.gz" in str(reading.problems[0])


def test_clinical_sheet_adds_labels_and_patients(tmp_path: Path) -> None:
    nnunet(tmp_path / "data")
    (tmp_path / "people.csv").write_text("case_id,patient_id,Age,Gender,idh\ng_1,P,045Y,male,mutant\ng_9,Q,1,M,x\n")
    reading = examine_cohort(config(tmp_path / "data", clinical=tmp_path / "people.csv"))
    first, second = reading.cohort.cases
    assert (first.patient_id, first.age, first.sex, first.labels) == ("P", 45.0, "M", {"idh": "mutant"})
    assert (second.patient_id, second.labels) == ("g_2", {})
    assert any("1 of 2 cases are not in it" in note for note in reading.notes)


def test_clinical_sheet_that_parts_a_patient_is_refused(tmp_path: Path) -> None:
    for session in ("1", "2"):
        touch(tmp_path / "bids", f"sub-A/ses-{session}/anat/sub-A_ses-{session}_FLAIR.nii.gz")
    (tmp_path / "bids" / "participants.tsv").write_text("participant_id\nsub-A\n")
    names = [case.case_id for case in examine_cohort(config(tmp_path / "bids", sequences=["flair"])).cohort.cases]
    assert len(names) == 2
    people = tmp_path / "people.csv"
    people.write_text(f"case_id,patient_id\n{names[0]},P\n")
    with pytest.raises(CohortError, match=r"cases of one patient of the data set different patient_ids, or only some"):
        examine_cohort(config(tmp_path / "bids", sequences=["flair"], clinical=people))
    people.write_text(f"case_id,patient_id\n{names[0]},P\n{names[1]},P\n")
    assert {
        case.patient_id
        for case in examine_cohort(config(tmp_path / "bids", sequences=["flair"], clinical=people)).cohort.cases
    } == {"P"}


def test_folder_with_a_sheet_stands_for_the_sheet(tmp_path: Path) -> None:
    touch(tmp_path, "a_t1ce.nii.gz", "a_flair.nii.gz")
    (tmp_path / "cohort.csv").write_text("case_id,patient_id,t1ce,flair\nA,P,a_t1ce.nii.gz,a_flair.nii.gz\n")
    assert [case.case_id for case in read_cohort(config(tmp_path)).cases] == ["A"]


def test_folder_of_nothing_known_lists_what_is_read(tmp_path: Path) -> None:
    with pytest.raises(CohortError, match=r"none of the layouts that are read.*BIDS.*nnU-Net.*BraTS"):
        read_cohort(config(tmp_path))


def test_folder_of_dicom_says_how_to_import_it(tmp_path: Path) -> None:
    (tmp_path / "IM0").write_bytes(b"\0" * 128 + b"DICM")
    with pytest.raises(CohortError, match=r"holds DICOM files; run `glioma-nas cohort import-dicom"):
        read_cohort(config(tmp_path))


def test_archive_in_place_of_a_sheet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cohort.zip").write_bytes(b"PK")
    with pytest.raises(CohortError, match="an archive must be unpacked"):
        read_cohort(config(tmp_path / "cohort.zip"))


@pytest.mark.parametrize(
    ("age", "sex", "expected"),
    [
        ("045Y", "male", (45.0, "M")),
        ("45Y", "M", (45.0, "M")),
        ("018M", "Female", (1.5, "F")),
        ("026W", "O", (26 * 7 / 365.25, None)),
        ("n/a", "other", (None, None)),
        ("", "unknown", (None, None)),
    ],
)
def test_ages_and_sexes_are_read_as_dicom_and_bids_write_them(
    tmp_path: Path, age: str, sex: str, expected: tuple[float | None, str | None]
) -> None:
    touch(tmp_path, "t1ce.nii.gz", "flair.nii.gz")
    (tmp_path / "c.csv").write_text(
        f"case_id,patient_id,t1ce,flair,age,sex\nA,P,t1ce.nii.gz,flair.nii.gz,{age},{sex}\n"
    )
    (case,) = read_cohort(config(tmp_path / "c.csv")).cases
    assert (case.age, case.sex) == (pytest.approx(expected[0]) if expected[0] else None, expected[1])


@pytest.mark.parametrize("age", ["45M", "9w", "1D", "1045Y"])
def test_age_whose_unit_is_in_doubt_is_refused(age: str) -> None:
    with pytest.raises(CohortError, match=f"case A: age is '{age}'; expected years .*045Y"):
        read_age("A", age)


@pytest.mark.parametrize("follow", [False, True])
def test_link_out_of_the_folder_is_refused_unless_allowed(tmp_path: Path, follow: bool) -> None:
    touch(tmp_path, "secret/scan.nii.gz", "set/A/A_t1ce.nii.gz")
    (tmp_path / "set" / "A" / "A_flair.nii.gz").symlink_to(tmp_path / "secret" / "scan.nii.gz")
    chosen = config(tmp_path / "set", follow_links=follow)
    if follow:
        assert read_cohort(chosen).cases[0].images["flair"] == tmp_path / "secret" / "scan.nii.gz"
    else:
        with pytest.raises(CohortError, match=r"a link that leads out of .*set; copy the file there, or set"):
            read_cohort(chosen)


def test_link_inside_the_folder_and_a_path_written_out_are_fine(tmp_path: Path) -> None:
    touch(tmp_path, "set/.annex/1.nii.gz", "elsewhere/t1ce.nii.gz")
    (tmp_path / "set" / "flair.nii.gz").symlink_to(tmp_path / "set" / ".annex" / "1.nii.gz")
    sheet = tmp_path / "set" / "cohort.csv"
    sheet.write_text(f"case_id,patient_id,t1ce,flair\nA,P,{tmp_path / 'elsewhere' / 't1ce.nii.gz'},flair.nii.gz\n")
    assert set(read_cohort(config(sheet)).cases[0].images) == {"t1ce", "flair"}


def test_circle_of_links_ends(tmp_path: Path) -> None:
    touch(tmp_path, "A/A_t1ce.nii.gz")
    (tmp_path / "A" / "A_flair.nii.gz").symlink_to("A_flair.nii.gz")
    (tmp_path / "A" / "loop").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(CohortError, match=r"flair is 'A/A_flair\.nii\.gz', no such file"):
        read_cohort(config(tmp_path))


def test_hostile_folder_name_becomes_a_harmless_case_id(tmp_path: Path) -> None:
    name = "x..\n<script>\u202e;rm -rf"
    touch(tmp_path, f"{name}/t1ce.nii.gz", f"{name}/flair.nii.gz")
    reading = examine_cohort(config(tmp_path))
    (case,) = reading.cohort.cases
    check_case_id(case.case_id)
    assert "<" not in case.case_id and os.sep not in case.case_id
    assert any("was renamed to" in note for note in reading.notes)


@given(st.text(max_size=300))
@example("\\CON.x")
@example("x" * 300)
@example("腫瘍" * 70)
def test_sanitised_case_ids_are_allowed_stable_and_distinct(name: str) -> None:
    safe = sanitised_case_id(name)
    check_case_id(safe)
    assert sanitised_case_id(safe) == safe
    assert sanitised_case_id(name + "/") != safe


def test_fingerprint_changes_with_table_and_scans(tmp_path: Path) -> None:
    chosen = config(nnunet(tmp_path))
    before = cohort_fingerprint(chosen)
    assert cohort_fingerprint(chosen) == before
    (tmp_path / "imagesTr" / "g_1_0000.nii.gz").write_bytes(b"other")
    scans = cohort_fingerprint(chosen)
    assert scans["sheet"] == before["sheet"] and scans["scans"] != before["scans"]
    touch(tmp_path, "imagesTr/g_3_0000.nii.gz")
    assert cohort_fingerprint(chosen)["sheet"] != before["sheet"]


@pytest.mark.parametrize(
    ("name", "sequence"),
    [
        ("BraTS-GLI-1-t1n.nii.gz", "t1"),
        ("x_T1Gd.nii", "t1ce"),
        ("UCSF-PDGM-0004_T1_post.nii.gz", "t1ce"),
        ("a_T2.nii.gz", "t2"),
        ("a_t2_flair.nii.gz", "flair"),
        ("a_swi.nii.gz", None),
        (".nii", None),
    ],
)
def test_sequence_is_recognised_by_file_name(name: str, sequence: str | None) -> None:
    assert sequence_of_file(name) == sequence


def as_bids(sheet: Path, target: Path) -> Path:
    lines = ["participant_id\tage\tsex\tidh"]
    for case in read_cohort(config(sheet)).cases:
        name = f"sub-{case.case_id}"
        for sequence, entity in (("t1ce", "ce-gad_T1w"), ("flair", "FLAIR")):
            copy(case.images[sequence], target / name / "anat" / f"{name}_{entity}.nii.gz")
        copy(case.mask, target / "derivatives" / "seg" / name / "anat" / f"{name}_label-tumor_mask.nii.gz")
        lines.append(f"{name}\t{case.age:g}\t{case.sex}\t{case.labels['idh']}")
    (target / "participants.tsv").write_text("\n".join(lines) + "\n")
    return target


def as_brats(sheet: Path, target: Path) -> Path:
    for case in read_cohort(config(sheet)).cases:
        for sequence, path in (*case.images.items(), ("seg", case.mask)):
            copy(path, target / case.case_id / f"{case.case_id}_{sequence}.nii.gz")
    return target


def as_nnunet(sheet: Path, target: Path) -> Path:
    for case in read_cohort(config(sheet)).cases:
        for channel, sequence in enumerate(("t1ce", "flair")):
            copy(case.images[sequence], target / "imagesTr" / f"{case.case_id}_{channel:04d}.nii.gz")
        copy(case.mask, target / "labelsTr" / f"{case.case_id}.nii.gz")
    (target / "dataset.json").write_text(json.dumps({"channel_names": {"0": "T1c", "1": "FLAIR"}}))
    return target


def copy(source: Path | None, target: Path) -> None:
    assert source is not None
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [as_bids, as_brats, as_nnunet])
def test_every_layout_runs_through_the_preprocess_stage(tmp_path: Path, layout: Callable[[Path, Path], Path]) -> None:
    sheet = write_phantom_cohort(tmp_path / "phantoms", 4, 0)
    run = parse_config(
        {
            "cohort": {"sheet": str(layout(sheet, tmp_path / "set"))},
            "preprocess": {"crop_size_px": 48, "image_size_px": 32, "workers": 1},
            "folds": {"n_folds": 2},
        },
        source="test",
        folder=tmp_path,
    )
    pipeline = Pipeline(run, tmp_path / "run", Silent())
    pipeline.run(["preprocess"])
    assert pipeline.is_done(STAGES[0])
    prepared = PreparedCohort.load(tmp_path / "run" / "preprocess")
    assert [name.removeprefix("sub-") for name in prepared.cases] == ["P001", "P002", "P003", "P004"]
    assert all(case.has_mask and case.tumour_slices for case in prepared.cases.values())
    splits = json.loads((tmp_path / "run" / "preprocess" / "splits_final.json").read_text())
    assert sorted(name for fold in splits for name in fold["val"]) == sorted(prepared.cases)
