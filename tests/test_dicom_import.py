"""From an export of DICOM to a cohort: recognition, review, conversion, and nothing that tells who it is."""

from __future__ import annotations

import csv
import gzip
import tarfile
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from dicom_files import PATIENT, SECRETS, SERIES, write_patient, write_series

from glioma_nas.archives import unpack
from glioma_nas.cohort import read_cohort
from glioma_nas.config import CohortConfig
from glioma_nas.dicom import ImportResult, import_dicom
from glioma_nas.dicom.importing import _convert
from glioma_nas.dicom.sequence_rules import recognise
from glioma_nas.dicom.series import Series, list_series
from glioma_nas.errors import CohortError, StorageError
from glioma_nas.files import write_json
from glioma_nas.privacy.pseudonyms import Pseudonyms
from glioma_nas.progress import Silent
from glioma_nas.testing.phantoms import write_nifti

PSEUDONYMS = Pseudonyms(bytes(range(32)))


def kinds(result: ImportResult) -> dict[int, str]:
    return {entry.series.number: entry.guess.kind for entry in result.entries}


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as handle:
        return list(csv.DictReader(handle))


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    write_patient(folder / "A")
    return folder


@pytest.fixture(scope="module")
def imported(export: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ImportResult]:
    out = tmp_path_factory.mktemp("imported")
    return out, import_dicom(export, out, PSEUDONYMS)


@pytest.mark.slow
def test_every_series_is_recognised(imported: tuple[Path, ImportResult]) -> None:
    _, result = imported
    assert kinds(result) == {
        1: "localizer",
        2: "t1",
        3: "t1ce",
        4: "t2",
        5: "flair",
        6: "dwi",
        7: "adc",
        8: "not-mr",
        9: "empty",
        10: "swi",
    }
    assert all(entry.guess.confidence == "high" for entry in result.entries if entry.use)
    assert {entry.use for entry in result.entries} == {"t1", "t1ce", "t2", "flair", ""}


@pytest.mark.slow
def test_import_gives_a_cohort_that_can_be_read(imported: tuple[Path, ImportResult]) -> None:
    out, result = imported
    (case,) = read_cohort(CohortConfig(sheet=out)).cases
    assert (case.age, case.sex, set(case.images)) == (45.0, "M", set(SERIES))
    assert (result.n_cases, result.n_converted) == (1, 4)
    image = nib.load(case.images["flair"])
    assert image.shape == (32, 32, 8)
    assert np.allclose(np.linalg.norm(image.affine[:3, :3], axis=0), [6.5, 6.5, 6.0])


@pytest.mark.slow
def test_a_voxel_lies_where_dicom_puts_it(export: Path, imported: tuple[Path, ImportResult]) -> None:
    import pydicom

    slices = [pydicom.dcmread(path) for path in sorted((export / "A" / "flair").iterdir())]
    brightest = max(slices, key=lambda data: data.pixel_array.max())
    row, column = np.unravel_index(brightest.pixel_array.argmax(), brightest.pixel_array.shape)
    along_row, along_column = np.array(brightest.ImageOrientationPatient).reshape(2, 3)
    position = np.array(brightest.ImagePositionPatient) + 6.5 * (column * along_row + row * along_column)
    image = nib.load(read_cohort(CohortConfig(sheet=imported[0])).cases[0].images["flair"])
    data = np.asarray(image.dataobj)
    assert (data == data.max()).sum() == 1
    voxel = [int(index) for index in np.unravel_index(data.argmax(), data.shape)]
    # DICOM counts millimetres to the left and to the back, NIfTI to the right and to the front.
    np.testing.assert_allclose(image.affine @ [*voxel, 1], [*(position * [-1, -1, 1]), 1], atol=1e-3)


@pytest.mark.slow
def test_nothing_that_is_written_tells_who_it_is(imported: tuple[Path, ImportResult]) -> None:
    out, result = imported
    for path in out.rglob("*"):
        names = str(path.relative_to(out))
        content = path.read_bytes() if path.is_file() else b""
        content = gzip.decompress(content) if path.name.endswith(".gz") else content
        for secret in SECRETS:
            assert secret not in names
            assert secret.encode() not in content, f"{secret} in {path.name}"
    assert not any(secret in problem for secret in SECRETS for problem in result.problems)


@pytest.mark.slow
def test_oddities_are_told(imported: tuple[Path, ImportResult]) -> None:
    problems = "\n".join(imported[1].problems)
    assert "1 empty files were left out" in problems
    assert "1 files are not DICOM" in problems
    assert "series 9 holds no images" in problems


@pytest.mark.slow
def test_corrections_are_followed_and_added_columns_stay(export: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    import_dicom(export, out, PSEUDONYMS)
    sheet = rows_of(out / "series.csv")
    case_id = sheet[0]["case_id"]
    for row in sheet:
        row["use"] = {"4": "", "10": "swi"}.get(row["number"], row["use"])
    cohort = (out / "cohort.csv").read_text().splitlines()
    (out / "cohort.csv").write_text(f"{cohort[0]},idh\n{cohort[1]},mutant\n")
    with (out / "series.csv").open("w", newline="") as handle:
        writer = csv.DictWriter(handle, sheet[0])
        writer.writeheader()
        writer.writerows(sheet)
    again = import_dicom(export, out, PSEUDONYMS)
    assert again.n_converted == 1
    assert not (out / case_id / "t2.nii.gz").exists()
    assert (out / case_id / "swi.nii.gz").exists()
    (row,) = rows_of(out / "cohort.csv")
    assert row["idh"] == "mutant" and row["swi"] == f"{case_id}/swi.nii.gz" and "t2" not in row
    assert import_dicom(export, out, PSEUDONYMS).n_converted == 0


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("use", "T1/../x", "use is 't1/../x'; write t1"),
        ("use", "flair", "uses two series as flair"),
        ("case_id", "../up", "cannot name a folder"),
        ("patient_id", "", "patient_id is empty"),
        ("patient_id", "somebody", "belongs to patients P-[0-9a-f]{10} and somebody"),
    ],
)
def test_review_sheet_that_cannot_be_followed_is_refused(
    export: Path, tmp_path: Path, column: str, value: str, message: str
) -> None:
    import_dicom(export, tmp_path, PSEUDONYMS, review_only=True)
    sheet = rows_of(tmp_path / "series.csv")
    sheet[1][column] = value
    with (tmp_path / "series.csv").open("w", newline="") as handle:
        writer = csv.DictWriter(handle, sheet[0])
        writer.writeheader()
        writer.writerows(sheet)
    with pytest.raises(CohortError, match=message):
        import_dicom(export, tmp_path, PSEUDONYMS, review_only=True)


def test_file_with_an_unreadable_position_is_no_part_of_its_series(tmp_path: Path) -> None:
    write_series(tmp_path / "in", study="1.2", number=1, n_slices=6, **SERIES["t2"])
    path = sorted((tmp_path / "in").iterdir())[2]
    path.write_bytes(path.read_bytes().replace(b"-100.0", b"-1x0.0"))
    listing = list_series(tmp_path / "in", Silent())
    (series,) = listing.series
    assert (listing.n_other, series.n_images, len(series.files), len(series.positions)) == (1, 5, 5, 5)
    assert path not in series.files


def test_links_in_an_export_are_told_and_not_followed(tmp_path: Path) -> None:
    write_series(tmp_path / "in" / "a", study="1.2", number=1, **SERIES["t2"])
    write_series(tmp_path / "elsewhere", study="1.3", number=2, patient="other", **SERIES["flair"])
    (tmp_path / "in" / "folder").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "in" / "file").symlink_to(next((tmp_path / "elsewhere").iterdir()))
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in", target_is_directory=True)
    result = import_dicom(tmp_path / "in", tmp_path / "out", PSEUDONYMS, review_only=True)
    assert [entry.use for entry in result.entries] == ["t2"]
    assert "3 links were not followed" in result.problems


def test_series_of_two_echoes_is_told_and_does_not_become_one_of_them(tmp_path: Path) -> None:
    for name in ("t2", "flair"):
        write_series(tmp_path / "in" / name, study="1.2", number=1 + (name == "flair"), **SERIES[name])
    for index, path in enumerate(sorted((tmp_path / "in" / "t2").iterdir())):
        data = pydicom.dcmread(path)
        data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
        data.EchoTime, data.EchoNumbers, data.InstanceNumber = 30, 2, 9 + index
        data.save_as(path.with_name(f"second_{path.name}"))
    result = import_dicom(tmp_path / "in", tmp_path / "out", PSEUDONYMS)
    (row,) = rows_of(tmp_path / "out" / "cohort.csv")
    assert row["flair"] and not row.get("t2")
    (told,) = [problem for problem in result.problems if "t2: " in problem]
    assert "dcm2niix made 2 volumes of the series" in told or "4-dimensional" in told


def test_series_that_lacks_a_slice_is_not_converted(tmp_path: Path) -> None:
    for number, name in enumerate(("t2", "flair"), start=1):
        write_series(tmp_path / "in", study="1.2", number=number, n_slices=12, **SERIES[name])
    sorted((tmp_path / "in").iterdir())[4].unlink()
    result = import_dicom(tmp_path / "in", tmp_path / "out", PSEUDONYMS)
    (row,) = rows_of(tmp_path / "out" / "cohort.csv")
    assert row["flair"] and not row.get("t2") and result.n_converted == 1
    (told,) = [problem for problem in result.problems if "slices are uneven" in problem]
    assert "t2: slices are uneven, as where one is missing (1 of 10 gaps are not of 6 mm, such as 12 mm)" in told


@pytest.mark.parametrize(
    ("n_kept", "fields", "told"),
    [
        (slice(0, 10), {"ImagesInAcquisition": 12}, "it has 10 of 12 images"),
        (slice(2, 12), {}, "image numbers begin with 3"),
        (slice(0, 12), {"ImagesInAcquisition": 12}, None),
        (slice(0, 10), {}, None),
    ],
)
def test_headers_tell_that_slices_are_missing_at_an_end(
    tmp_path: Path, n_kept: slice, fields: dict[str, int], told: str | None
) -> None:
    write_series(tmp_path / "in", study="1.2", number=1, n_slices=12, **SERIES["t2"], **fields)
    paths = sorted((tmp_path / "in").iterdir())
    for path in set(paths) - set(paths[n_kept]):
        path.unlink()
    result = import_dicom(tmp_path / "in", tmp_path / "out", PSEUDONYMS, review_only=True)
    doubts = [problem for problem in result.problems if "may lack slices" in problem]
    assert len(doubts) == (told is not None)
    assert told is None or f"may lack slices: {told}; compare it with the scanner's" in doubts[0]


def test_series_that_covers_less_of_the_head_than_the_others_is_told(tmp_path: Path) -> None:
    for number, (name, n_slices) in enumerate((("t2", 12), ("flair", 12), ("t1", 8)), start=1):
        write_series(tmp_path / name, study="1.2", number=number, n_slices=n_slices, **SERIES[name])
    result = import_dicom(tmp_path, tmp_path / "out", PSEUDONYMS, review_only=True)
    (told,) = [problem for problem in result.problems if "covers" in problem]
    assert told.endswith("t1 covers 42 mm across its slices, another sequence 66 mm; slices at an end may be missing")


def test_examination_exported_again_under_the_same_names_and_sizes_is_converted_again(tmp_path: Path) -> None:
    write_series(tmp_path / "in", study="1.2", number=1, **SERIES["t2"])
    assert import_dicom(tmp_path / "in", tmp_path / "out", PSEUDONYMS).n_converted == 1
    assert import_dicom(tmp_path / "in", tmp_path / "out", PSEUDONYMS).n_converted == 0
    path = sorted((tmp_path / "in").iterdir())[3]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    assert import_dicom(tmp_path / "in", tmp_path / "out", PSEUDONYMS).n_converted == 1


def test_columns_of_the_clinical_sheet_that_tell_who_it_is_stay_behind(tmp_path: Path) -> None:
    write_series(tmp_path / "in", study="1.2", number=1, **SERIES["t2"])
    clinical = tmp_path / "labels.csv"
    cells = {
        "PatientID": PATIENT, "idh": "mutant", "ki67": "7.5", "surgery": "2015-06-19", "Surname": "Miller",
        "chart": f"no {PATIENT}", "seen_by": "Jones^Dr", "remarks": "came with her brother from the village near here",
    }  # fmt: skip
    clinical.write_text(f"{','.join(cells)}\n{','.join(cells.values())}\n")
    result = import_dicom(tmp_path / "in", tmp_path / "out", PSEUDONYMS, clinical=clinical)
    (row,) = rows_of(tmp_path / "out" / "cohort.csv")
    assert set(row) & set(cells) == {"idh", "ki67"}
    told = [problem for problem in result.problems if "was left out" in problem]
    assert told == [
        "labels.csv: column 'surgery' was left out (date)",
        "labels.csv: column 'Surname' was left out ('surname' in its heading)",
        "labels.csv: column 'chart' was left out (patient id)",
        "labels.csv: column 'seen_by' was left out (name in DICOM's form)",
        "labels.csv: column 'remarks' was left out (text of over 40 characters)",
    ]


def test_corrected_clinical_sheet_is_followed_when_the_import_runs_again(export: Path, tmp_path: Path) -> None:
    clinical, out = tmp_path / "labels.csv", tmp_path / "out"
    for idh, age, shown in (("mutant", "93", "90"), ("wildtype", "45", "45")):
        clinical.write_text(f"PatientID,idh,age\n{PATIENT},{idh},{age}\n")
        import_dicom(export, out, PSEUDONYMS, clinical=clinical)
        (row,) = rows_of(out / "cohort.csv")
        assert (row["idh"], row["age"]) == (idh, shown)
    for line, message in ((f"{PATIENT},mutant,44", "for the second time"), (",mutant,44", "is empty")):
        clinical.write_text(f"PatientID,idh,age\n{PATIENT},wildtype,45\n{line}\n")
        with pytest.raises(CohortError, match=f"line 3: patient_id .*{message}"):
            import_dicom(export, out, PSEUDONYMS, clinical=clinical)


@pytest.mark.slow
def test_two_studies_are_two_cases_of_one_patient_and_labels_join_by_patient(tmp_path: Path) -> None:
    for folder, patient in (("one", PATIENT), ("two", PATIENT), ("three", "other")):
        from pydicom.uid import generate_uid

        write_series(tmp_path / "in" / folder, study=generate_uid(), number=1, patient=patient, **SERIES["flair"])
    write_nifti(tmp_path / "drawn.nii.gz", np.ones((32, 32, 8), np.uint8))
    (tmp_path / "labels.csv").write_text(
        f"PatientID,idh,sex,mask\n{PATIENT},mutant,F,drawn.nii.gz\nother,,,drawn.nii.gz\nthird,,,gone.nii.gz\n"
    )
    result = import_dicom(tmp_path / "in", tmp_path / "out", PSEUDONYMS, clinical=tmp_path / "labels.csv", workers=2)
    rows = rows_of(tmp_path / "out" / "cohort.csv")
    assert len(rows) == 3 and len({row["patient_id"] for row in rows}) == 2
    of_patient = [row for row in rows if row["patient_id"] == PSEUDONYMS.patient(PATIENT)]
    assert [(row["idh"], row["sex"]) for row in of_patient] == [("mutant", "F")] * 2
    (other,) = [row for row in rows if row not in of_patient]
    assert other["mask"] == f"{other['case_id']}/mask.nii.gz"
    assert np.asarray(nib.load(tmp_path / "out" / other["mask"]).dataobj).all()
    assert [row["mask"] for row in of_patient] == ["", ""]
    assert any("its patient has 2 cases, so the mask is nobody's" in problem for problem in result.problems)


@pytest.mark.slow
def test_one_bad_series_never_stops_the_others(export: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(export / "A" / "t1", tmp_path / "in" / "t1")
    shutil.copytree(export / "A" / "flair", tmp_path / "in" / "flair")
    for path in sorted((tmp_path / "in" / "flair").iterdir()):
        path.write_bytes(path.read_bytes()[:-1500])
    result = import_dicom(tmp_path / "in", tmp_path / "out", PSEUDONYMS)
    (row,) = rows_of(tmp_path / "out" / "cohort.csv")
    assert row["t1"] and not row.get("flair")
    assert any("8 of 8 files are truncated" in problem for problem in result.problems)
    assert any(": flair: " in problem for problem in result.problems)


def test_record_of_an_import_removes_nothing_outside_its_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for path in (tmp_path / "kept.nii.gz", tmp_path / "kept.json", out / "a" / "old.nii.gz", out / "a" / "old.json"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    names = ["../kept.nii.gz", str(tmp_path / "kept.nii.gz"), "..", "a/old.nii.gz"]
    write_json(out / "import.json", dict.fromkeys(names, "state"))
    _convert([], out, 1, Silent())
    assert (tmp_path / "kept.nii.gz").exists() and (tmp_path / "kept.json").exists()
    assert not list((out / "a").iterdir())


def test_folder_without_dicom_is_refused(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("x")
    with pytest.raises(CohortError, match=r"no DICOM series among 1 files \(1 of another kind"):
        import_dicom(tmp_path, tmp_path / "out", PSEUDONYMS)


def test_description_that_a_spreadsheet_would_run_is_quoted(tmp_path: Path) -> None:
    write_series(tmp_path / "in", study="1.2.3", number=1, SeriesDescription="=cmd|' /C calc'!A0")
    import_dicom(tmp_path / "in", tmp_path / "out", PSEUDONYMS, review_only=True)
    assert rows_of(tmp_path / "out" / "series.csv")[0]["description"].startswith("'=")


@pytest.mark.parametrize(
    ("description", "tr", "te", "ti", "agent", "kind", "confidence"),
    [
        ("t1_mpr_sag_p2_iso", 1900, 2.5, 900, False, "t1", "high"),
        ("t1_mpr_sag_p2_iso_KM", 1900, 2.5, 900, False, "t1ce", "high"),
        ("Ax T1 FSPGR post GAD", 8, 3, None, False, "t1ce", "high"),
        ("AX T1 FLAIR", 2500, 9, 900, False, "t1", "high"),
        ("AX T1", 500, 10, None, True, "t1ce", "medium"),
        ("AX T1 pre contrast", 500, 10, None, True, "t1", "high"),
        ("t2_tirm_tra_dark-fluid", 8500, 130, 2440, False, "flair", "high"),
        ("3D FLAIR SPACE", 5000, 390, 1650, False, "flair", "high"),
        ("Sag T2 CUBE", 2500, 80, None, False, "t2", "high"),
        ("AX T2* GRE", 620, 20, None, False, "swi", "high"),
        ("series 5", 9000, 120, 2500, False, "flair", "medium"),
        ("AX T2", 9000, 120, 2500, False, "t2", "low"),
        ("brain", None, None, None, False, "unknown", "low"),
        ("Perfusion_T2w_DSC", 1500, 30, None, True, "perfusion", "high"),
        ("TOF 3D multi-slab", 20, 3, None, False, "angiography", "high"),
    ],
)
def test_words_and_times_are_weighed(
    description: str, tr: float | None, te: float | None, ti: float | None, agent: bool, kind: str, confidence: str
) -> None:
    series = Series(
        "1", "1", "p", description=description, modality="MR", rows=256, columns=256, n_images=24,
        tr_ms=tr, te_ms=te, ti_ms=ti, has_agent=agent, positions={(0.0, 0.0, float(z)) for z in range(24)},
    )  # fmt: skip
    guess = recognise(series)
    assert (guess.kind, guess.confidence) == (kind, confidence), guess.reason


def test_archive_is_imported_like_its_folder(export: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "export.zip", "w") as archive:
        for path in sorted((export / "A" / "flair").iterdir()):
            archive.write(path, f"A/{path.name}")
    result = import_dicom(tmp_path / "export.zip", tmp_path / "out", PSEUDONYMS, review_only=True)
    assert [entry.use for entry in result.entries] == ["flair"]


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil", "..\\evil", "C:\\evil"])
def test_zip_that_would_write_outside_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "in").mkdir()
    info = zipfile.ZipInfo("placeholder")
    info.filename = name  # the constructor would mend it
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        archive.writestr("good", b"x")
        archive.writestr(info, b"x")
    try:
        with pytest.raises(StorageError, match="would be written outside the folder"):
            unpack(tmp_path / "bad.zip", tmp_path / "in")
    finally:
        assert not list(tmp_path.rglob("*evil*"))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_tar_with_links_or_devices_is_refused(tmp_path: Path, kind: bytes) -> None:
    (tmp_path / "in").mkdir()
    member = tarfile.TarInfo("scan.dcm")
    member.type, member.linkname = kind, "/etc/passwd"
    with tarfile.open(tmp_path / "bad.tar.gz", "w:gz") as archive:
        archive.addfile(member)
    with pytest.raises(StorageError, match="is a link or device"):
        unpack(tmp_path / "bad.tar.gz", tmp_path / "in")
    assert not list((tmp_path / "in").iterdir())


def test_zip_that_understates_a_size_and_a_damaged_one_are_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with zipfile.ZipFile(tmp_path / "bad.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb", bytes(5_000_000))
    raw = (tmp_path / "bad.zip").read_bytes()
    (tmp_path / "bad.zip").write_bytes(raw.replace((5_000_000).to_bytes(4, "little"), (10).to_bytes(4, "little")))
    with pytest.raises(StorageError):
        unpack(tmp_path / "bad.zip", tmp_path / "in")
    assert sum(path.stat().st_size for path in (tmp_path / "in").rglob("*")) <= 5_000_000
    (tmp_path / "half.zip").write_bytes(raw[:200])
    with pytest.raises(StorageError, match="damaged or protected archive"):
        unpack(tmp_path / "half.zip", tmp_path / "in")


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.zip"])
def test_archive_of_damaged_bytes_is_refused_and_a_sound_one_is_not(tmp_path: Path, name: str) -> None:
    content = np.random.default_rng(0).integers(0, 20, 30_000).astype(np.uint8).tobytes()
    for member in ("first", "second"):
        (tmp_path / member).write_bytes(content)
    if name.endswith(".zip"):
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as archive:
            for member in ("first", "second"):
                archive.write(tmp_path / member, member)
    else:
        with tarfile.open(tmp_path / name, "w:gz" if name.endswith(".gz") else "w") as tar:
            for member in ("first", "second"):
                tar.add(tmp_path / member, member)
    (tmp_path / "sound").mkdir()
    assert unpack(tmp_path / name, tmp_path / "sound") == 2
    raw = bytearray((tmp_path / name).read_bytes())
    start = raw.index(b"second") if name == "a.tar" else len(raw) // 3  # of a plain .tar only headers have checksums
    raw[start : start + 6] = bytes(255 - byte for byte in raw[start : start + 6])
    (tmp_path / f"bad_{name}").write_bytes(bytes(raw))
    (tmp_path / "in").mkdir()
    with pytest.raises(StorageError, match=r"damaged|cannot be unpacked"):
        unpack(tmp_path / f"bad_{name}", tmp_path / "in")
