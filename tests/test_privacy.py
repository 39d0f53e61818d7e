"""Pseudonyms, clean headers, and the scan for what is left."""

from __future__ import annotations

import datetime
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from dicom_files import NAME, PATIENT, SECRETS, SERIES, write_series
from PIL import Image, PngImagePlugin

from glioma_nas.cohort import Case, cohort_fingerprint, examine_cohort, read_cohort
from glioma_nas.config import CohortConfig
from glioma_nas.errors import ImageError, StorageError
from glioma_nas.monai_bundle import metadata
from glioma_nas.privacy.dicom_header import scrub_dicom
from glioma_nas.privacy.hidden_paths import one_line, without_paths
from glioma_nas.privacy.nifti_header import scrub_nifti
from glioma_nas.privacy.phi_scan import PhiScan, scan_folder
from glioma_nas.privacy.pseudonyms import Pseudonyms, is_pseudonym, load_salt
from glioma_nas.privacy.scrubbing import scrub
from glioma_nas.privacy.text_patterns import KnownIdentifiers, Span, find_identifiers
from glioma_nas.testing.phantoms import write_nifti, write_phantom_cohort

PSEUDONYMS = Pseudonyms(bytes(range(32)))


def test_pseudonyms_depend_on_salt_kind_and_id_alone() -> None:
    other = Pseudonyms(bytes(32))
    assert PSEUDONYMS.patient("00412345") == Pseudonyms(bytes(range(32))).patient("00412345")
    assert len({PSEUDONYMS.patient("a"), PSEUDONYMS.patient("b"), other.patient("a")}) == 3
    assert PSEUDONYMS.patient("a")[2:] != PSEUDONYMS.case("a")[2:]
    assert is_pseudonym(PSEUDONYMS.patient("a")) and not is_pseudonym("P-Smith")
    # By hand: HMAC-SHA256 with key 00…1f of "patient", a zero byte and "a".
    import hashlib

    inner = hashlib.sha256(bytes(b ^ 0x36 for b in [*range(32), *[0] * 32]) + b"patient\0a").digest()
    outer = hashlib.sha256(bytes(b ^ 0x5C for b in [*range(32), *[0] * 32]) + inner).hexdigest()
    assert PSEUDONYMS.patient("a") == f"P-{outer[:10]}"


def test_salt_is_made_once_and_readable_by_its_owner_alone(tmp_path: Path) -> None:
    first = load_salt(tmp_path / "salt", create=True)
    assert load_salt(tmp_path / "salt", create=True) == first and len(first) == 32
    assert (tmp_path / "salt").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("content", "message"), [("xyz", "not a salt"), ("ab" * 8, "8 bytes is too short"), ("", "0 bytes is too short")]
)
def test_file_that_is_no_salt_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "salt").write_text(content)
    with pytest.raises(StorageError, match=message):
        load_salt(tmp_path / "salt", create=True)


def test_missing_salt_is_refused_when_it_must_exist(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="give the file that holds the project's salt"):
        load_salt(tmp_path / "salt", create=False)


def hashed_config(sheet: Path) -> CohortConfig:
    return CohortConfig(sheet=sheet, hash_ids=True, salt_file=sheet.parent / "salt")


def test_hash_ids_replace_case_and_patient_everywhere(tmp_path: Path) -> None:
    sheet = write_phantom_cohort(tmp_path / "c", 4, 0)
    plain = read_cohort(CohortConfig(sheet=sheet))
    hashed = read_cohort(hashed_config(sheet))
    assert [case.labels for case in hashed.cases] == [case.labels for case in plain.cases]
    assert all(is_pseudonym(case.case_id) and is_pseudonym(case.patient_id) for case in hashed.cases)
    assert read_cohort(hashed_config(sheet)) == hashed


def test_hashed_ids_stand_in_messages_too(tmp_path: Path) -> None:
    sheet = write_phantom_cohort(tmp_path / "c", 3, 0)
    sheet.write_text(sheet.read_text().replace("P002/flair", "P002/flare"))
    (problem,) = examine_cohort(hashed_config(sheet)).problems
    assert "P002" not in str(problem) and "line 3" in str(problem)
    assert problem.case_id is not None and is_pseudonym(problem.case_id)


def test_hashed_ids_do_not_come_back_through_another_column(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sheet = write_phantom_cohort(tmp_path / "c", 3, 0)
    header, *lines = sheet.read_text().splitlines()
    cells = [line.split(",")[0] for line in lines]
    told = [f"{header},chart,operated", *(f"{line},folder {cells[0]},2015-06-17" for line in lines)]
    sheet.write_text("\n".join(told) + "\n")
    plain = read_cohort(CohortConfig(sheet=sheet))
    assert {"chart", "operated"} <= set(plain.label_columns)
    hashed = read_cohort(hashed_config(sheet))
    assert set(plain.label_columns) - set(hashed.label_columns) == {"chart", "operated"}
    assert not any({"chart", "operated"} & set(case.labels) for case in hashed.cases)
    assert "column 'operated' is left out (date)" in caplog.text and cells[0] not in caplog.text


def test_date_of_the_week_is_the_softwares_own_only_with_a_time(tmp_path: Path) -> None:
    written = datetime.datetime(2024, 5, 17, 12, tzinfo=datetime.UTC)
    for name, text in (
        ("a.json", '{"started": "2024-05-13T08:30:00Z", "written": "2024-05-17"}'),
        ("b.json", '{"surgery": "2024-05-13"}'),
        ("c.json", '{"started": "2024-05-01 08:30"}'),
    ):
        (tmp_path / name).write_text(text)
        os.utime(tmp_path / name, (written.timestamp(), written.timestamp()))
    assert [(leak.file, leak.kind) for leak in scan_folder(tmp_path).leaks] == [("b.json", "date"), ("c.json", "date")]


def test_another_salt_makes_a_run_out_of_date(tmp_path: Path) -> None:
    config = hashed_config(write_phantom_cohort(tmp_path / "c", 3, 0))
    before = cohort_fingerprint(config)
    assert cohort_fingerprint(config) == before
    config.salt_file.unlink()
    assert cohort_fingerprint(config) != before


def nifti_with_text(path: Path) -> Path:
    image = nib.Nifti1Image(np.arange(120, dtype=np.int16).reshape(4, 5, 6), np.diag([2, 2, 5, 1.0]))
    image.header["descrip"] = b"Smith^John 20150617"
    image.header["db_name"] = b"00412345"
    image.header.set_slope_inter(2.5, 7)
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"Dr^Jones"))
    image.to_filename(path)
    return path


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_scrubbed_nifti_keeps_voxels_and_grid_and_loses_text(tmp_path: Path, suffix: str) -> None:
    source = nifti_with_text(tmp_path / f"a{suffix}")
    assert scrub_nifti(source, tmp_path / f"b{suffix}")
    before, after = nib.load(source), nib.load(tmp_path / f"b{suffix}")
    assert np.array_equal(np.asarray(before.dataobj.get_unscaled()), np.asarray(after.dataobj.get_unscaled()))
    assert np.array_equal(before.get_fdata(), after.get_fdata())
    assert np.array_equal(before.affine, after.affine) and before.get_data_dtype() == after.get_data_dtype()
    raw = (tmp_path / f"b{suffix}").read_bytes()
    raw = gzip.decompress(raw) if suffix == ".nii.gz" else raw
    assert not [secret for secret in SECRETS if secret.encode() in raw]
    assert not scrub_nifti(tmp_path / f"b{suffix}", tmp_path / f"c{suffix}")


@pytest.mark.parametrize("place", ["behind a short text", "between header and voxels", "after the voxels"])
def test_text_where_no_program_shows_it_is_found_and_removed(tmp_path: Path, place: str) -> None:
    raw = nib.Nifti1Image(np.arange(24, dtype=np.int16).reshape(2, 3, 4), np.eye(4)).to_bytes()
    if place == "behind a short text":
        raw = raw[:148] + b"FSL\0Smith^John" + raw[162:]
    elif place == "after the voxels":
        raw += b"Smith^John"
    else:
        raw = raw[:108] + np.float32(368).tobytes() + raw[112:352] + b"Smith^John\0\0\0\0\0\0" + raw[352:]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.nii").write_bytes(raw)
    assert ("error", "name in DICOM's form") in found(scan_folder(tmp_path))
    assert scrub_nifti(tmp_path / "in" / "a.nii", tmp_path / "out" / "a.nii")
    assert b"Smith" not in (tmp_path / "out" / "a.nii").read_bytes()
    assert scan_folder(tmp_path / "out").leaks == ()
    assert np.array_equal(nib.load(tmp_path / "out" / "a.nii").get_fdata().ravel(order="C"), np.arange(24))


def test_scrubbed_dicom_keeps_the_image_and_nothing_of_the_person(tmp_path: Path) -> None:
    write_series(tmp_path / "in", study="1.2.3.4", number=4, n_slices=3, **{**SERIES["flair"], "PatientAge": "093Y"})
    done = scrub(tmp_path / "in", tmp_path / "out", PSEUDONYMS)
    assert (done.n_dicom, done.left_out) == (3, ())
    series = set()
    for source, target in zip(sorted((tmp_path / "in").iterdir()), sorted((tmp_path / "out").iterdir()), strict=True):
        before, after = pydicom.dcmread(source), pydicom.dcmread(target)
        assert np.array_equal(before.pixel_array, after.pixel_array)
        assert before.ImagePositionPatient == after.ImagePositionPatient and before.EchoTime == after.EchoTime
        assert after.PatientID == PSEUDONYMS.patient(PATIENT) and after.PatientAge == "090Y"
        assert not [element for element in after.iterall() if element.tag.is_private]
        assert not [secret for secret in (*SECRETS, before.SOPInstanceUID) if secret.encode() in target.read_bytes()]
        series.add(after.SeriesInstanceUID)
    assert len(series) == 1
    assert scan_folder(tmp_path / "out").n_errors == 0


def test_scrub_leaves_out_what_it_cannot_clean_without_naming_it(tmp_path: Path) -> None:
    write_series(tmp_path / "in", study="1.2", number=1, n_slices=1, BurnedInAnnotation="YES")
    (tmp_path / "in" / "Smith.txt").write_text("x")
    (tmp_path / "in" / "link.nii").symlink_to("/etc/passwd")
    done = scrub(tmp_path / "in", tmp_path / "out", PSEUDONYMS)
    assert (done.n_nifti, done.n_dicom, len(done.left_out)) == (0, 0, 3)
    assert any("burned into the pixels" in line for line in done.left_out)
    assert "Smith" not in "".join(done.left_out)
    with pytest.raises(StorageError, match="give a folder of its own"):
        scrub(tmp_path / "in", tmp_path / "in" / "out", PSEUDONYMS)
    with pytest.raises(ImageError, match="burned into the pixels"):
        scrub_dicom(next((tmp_path / "in").glob("IM*")), tmp_path / "x.dcm", PSEUDONYMS)


@pytest.mark.parametrize("lacking", ["SOPInstanceUID", "SOPClassUID", "SeriesInstanceUID", "TransferSyntaxUID"])
def test_one_damaged_dicom_file_does_not_stop_the_others(tmp_path: Path, lacking: str) -> None:
    write_series(tmp_path / "in", study="1.2", number=1, n_slices=3)
    first = min((tmp_path / "in").iterdir())
    data = pydicom.dcmread(first)
    delattr(data.file_meta if lacking == "TransferSyntaxUID" else data, lacking)
    pydicom.dcmwrite(first, data, implicit_vr=False, little_endian=True)
    done = scrub(tmp_path / "in", tmp_path / "out", PSEUDONYMS)
    assert done.n_dicom == 2 and len(done.left_out) == 1
    assert f"its header lacks {lacking}" in done.left_out[0]


def found(scan: PhiScan) -> set[tuple[str, str]]:
    return {(leak.severity, leak.kind) for leak in scan.leaks}


LEAKS = {
    "a.json": ('{"PatientName": "Smith", "n": 3}', ("error", "DICOM field PatientName")),
    "b.csv": ("case,born\n1,1970-05-03\n", ("warning", "date")),
    "c.log": ("loading 1.3.12.2.1107.5.2.32.35131.30000015061707", ("error", "DICOM UID")),
    "d.html": ("<p>Smith^John</p>", ("error", "name in DICOM's form")),
    "e.txt": ("MRN: 00412345", ("error", "hospital number")),
    "f.md": ("scanned on 17.06.2015", ("warning", "date")),
    "g.yaml": ("study: 20150617", ("warning", "date")),
    "h.txt": ("ask j.smith@hospital.org", ("warning", "e-mail address")),
    "i.txt": ("seen 17 June 2015", ("warning", "date")),
}


@pytest.mark.parametrize("name", LEAKS)
def test_scan_finds_identifiers_in_text_and_does_not_repeat_them(tmp_path: Path, name: str) -> None:
    text, expected = LEAKS[name]
    (tmp_path / name).write_text(text)
    scan = scan_folder(tmp_path)
    assert found(scan) == {expected}
    shown = json.dumps([leak.as_row() for leak in scan.leaks])
    assert not [secret for secret in ("Smith", "00412345", "1970", "2015", "hospital.org") if secret in shown]


def test_scan_of_harmless_output_is_silent(tmp_path: Path) -> None:
    import datetime

    today = datetime.datetime.now(datetime.UTC)
    (tmp_path / "manifest.json").write_text(
        json.dumps(
            {
                "versions": {"dcm2niix": "1.0.20241211", "types": "6.0.12.20261113"},
                "hash": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
                "written": f"{today:%Y-%m-%d %H:%M:%S}",
                "case": "C-0123456789",
                "PatientID": "P-0123456789-abcd",
                "image": "data:image/png;base64,MjAxNS0wNi0xNw==" * 3,
                "sop": "1.2.840.10008.5.1.4.1.1.4",
            }
        )
    )
    write_nifti(tmp_path / "mask.nii.gz", np.zeros((4, 4, 4), np.uint8))
    assert scan_folder(tmp_path).leaks == ()


def test_scan_of_an_exported_bundle_is_silent_about_the_address_of_its_schema(tmp_path: Path) -> None:
    text = json.dumps(metadata("student", ("t1ce", "flair"), 224, {}))
    assert "meta_schema_20220324.json" in text
    (tmp_path / "metadata.json").write_text(text)
    assert scan_folder(tmp_path).leaks == ()
    # Only that address, not any date in any other.
    for one, other in (("MONAI-extra-test-data", "Smith"), ("20220324", "19700503")):
        (tmp_path / "metadata.json").write_text(text.replace(one, other))
        assert found(scan_folder(tmp_path)) == {("warning", "date")}


def test_known_identifier_is_found_in_the_address_of_the_schema_too() -> None:
    today = datetime.datetime.now(datetime.UTC).date()
    text = metadata("student", ("t1ce", "flair"), 224, {})["schema"]
    hits = list(find_identifiers(text, KnownIdentifiers({"20220324": "patient id"}), Span(today, today)))
    assert [(hit.severity, hit.kind) for hit in hits] == [("error", "patient id")]


def test_scan_looks_into_headers_pictures_names_archives_and_binary_files(tmp_path: Path) -> None:
    nifti_with_text(tmp_path / "scan.nii.gz")
    write_series(tmp_path / "dicom", study="1.2.3", number=1, n_slices=1)
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", f"{NAME} MRN 00412345")
    Image.new("L", (4, 4)).save(tmp_path / "figure.png", pnginfo=text)
    (tmp_path / "SMITH_19700503").mkdir()
    (tmp_path / "SMITH_19700503" / "model.onnx").write_bytes(b"\0\1\2 trained on TCGA-AB-1234\0\xff")
    (tmp_path / "more.zip").write_bytes(b"PK")
    (tmp_path / "out").symlink_to("/etc")
    (tmp_path / "broken.nii.gz").write_bytes(b"\x1f\x8bnonsense")
    scan = scan_folder(tmp_path, KnownIdentifiers({"TCGA-AB-1234": "patient id", "Smith": "name", "x": "name"}))
    kinds = {(leak.file, leak.where, leak.kind) for leak in scan.leaks}
    assert ("scan.nii.gz", "NIfTI header", "name in DICOM's form") in kinds
    assert ("scan.nii.gz", "NIfTI header", "header extension of code 6") in kinds
    assert ("figure.png", "picture's text", "hospital number") in kinds
    dicom = {kind for file, _, kind in kinds if file.startswith("dicom/")}
    assert {"DICOM field PatientID", "DICOM date or time StudyDate", "private DICOM element"} <= dicom
    assert {"patient id", "archive, not opened", "link, not followed"} <= {kind for _, _, kind in kinds}
    assert any(kind.startswith("cannot be looked into") for _, _, kind in kinds)
    assert not [leak for leak in scan.leaks if "smith" in json.dumps(leak.as_row()).lower()]


def test_scan_looks_into_workbooks_arrays_and_wide_text(tmp_path: Path) -> None:
    import openpyxl

    book = openpyxl.Workbook()
    book.active.append(["case", "patient AB12"])
    book.save(tmp_path / "table.xlsx")
    np.savez_compressed(tmp_path / "scores.npz", names=np.array([b"AB12"]), AB12=np.zeros(3))
    (tmp_path / "wide.csv").write_bytes("case,MRN 00412345\n".encode("utf-16"))
    (tmp_path / "short.bin").write_bytes(b"\0\1AB12\0\2")
    scan = scan_folder(tmp_path, KnownIdentifiers({"AB12": "patient id"}))
    kinds = {(leak.file, leak.kind) for leak in scan.leaks if leak.severity == "error"}
    assert kinds == {
        ("table.xlsx", "patient id"),
        ("scores.npz", "patient id"),
        ("wide.csv", "hospital number"),
        ("short.bin", "patient id"),
    }


def test_scan_says_when_a_file_is_too_long_to_be_read_to_its_end(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "long.log.gz", "wb", compresslevel=1) as stream:
        stream.write(bytes(64_000_001))
    assert found(scan_folder(tmp_path)) == {("note", "only the first 64 MB were looked through")}


def test_secret_of_the_pseudonyms_is_found_under_any_name(tmp_path: Path) -> None:
    load_salt(tmp_path / "notes.txt", create=True)
    assert found(scan_folder(tmp_path)) == {("error", "secret that makes the pseudonyms")}


def test_scrubbed_file_is_compressed_when_its_name_says_so_in_capitals(tmp_path: Path) -> None:
    nifti_with_text(tmp_path / "a.nii.gz")
    scrub_nifti(tmp_path / "a.nii.gz", tmp_path / "B.NII.GZ")
    assert (tmp_path / "B.NII.GZ").read_bytes()[:2] == b"\x1f\x8b"


def test_scan_reads_what_people_type_into_dicom(tmp_path: Path) -> None:
    write_series(tmp_path / "in", study="1.2", number=1, n_slices=1)
    scrub(tmp_path / "in", tmp_path / "out", PSEUDONYMS)
    (path,) = (tmp_path / "out").iterdir()
    data = pydicom.dcmread(path)
    data.PatientComments, data.SeriesDescription = "sister of Smith^Ann", "control after 17.06.2015"
    data.save_as(path)
    assert found(scan_folder(tmp_path / "out")) == {("error", "name in DICOM's form"), ("warning", "date")}


def test_known_identifiers_are_found_as_whole_words_only() -> None:
    known = KnownIdentifiers({"P001": "patient id", "ab": "short"})
    assert [hit.kind for hit in known.find("case p001, P0012, XP001, (P001)")] == ["patient id"] * 2
    assert known.n_too_short == 1


def test_scan_of_a_long_run_of_letters_ends(tmp_path: Path) -> None:
    # Patterns that start anew at every letter would take hours here.
    (tmp_path / "a.txt").write_text("A" * 2_000_000 + " Smith^John")
    assert found(scan_folder(tmp_path)) == {("error", "name in DICOM's form")}


@pytest.mark.slow
def test_run_with_hashed_ids_leaves_no_identifier_in_what_is_shared(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parent.parent
    sheet = write_phantom_cohort(tmp_path / "cohort", 6, 0)
    for number in range(1, 7):
        (tmp_path / "cohort" / f"P00{number}").rename(tmp_path / "cohort" / f"SMITH00{number}")
    sheet.write_text(sheet.read_text().replace("P00", "SMITH00"))
    (tmp_path / "cohort" / "SMITH002" / "flair.nii.gz").write_bytes(b"")
    (tmp_path / "run.yaml").write_text(
        "cohort: {sheet: cohort/cohort.csv, sequences: [flair], hash_ids: true}\n"
        "folds: {n_folds: 2}\npreprocess: {crop_size_px: 48, image_size_px: 32, workers: 1}\n"
    )

    def cli(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "glioma_nas", *arguments],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
            check=False,
        )

    done = cli("--verbose", "preprocess", "run.yaml", "--out", "run")
    assert done.returncode == 0, done.stderr
    assert "SMITH" not in done.stdout + done.stderr
    scan = cli("phi-scan", "run", "--cohort", "run.yaml", "--json")
    assert scan.returncode == 0, scan.stdout
    # The same scan must be able to find something: the sheet itself holds the ids.
    assert cli("phi-scan", "cohort", "--cohort", "run.yaml").returncode == 2


def test_paths_are_hidden_whole_where_all_sequences_have_one_file_name() -> None:
    person = Path("/data/SMITH_JOHN")
    case = Case("C-1", "P-1", {name: person / name / "scan.nii.gz" for name in ("t1ce", "flair")})
    broken = f"{person}/flair/scan.nii.gz: truncated; see {person}/t1ce and {person}, scan.nii.gz"
    assert without_paths(broken, case) == "flair of case C-1: truncated; see … and …, scan"


def test_path_is_hidden_before_the_text_is_shortened() -> None:
    case = Case("C-1", "P-1", {"flair": Path("/data/SMITH_JOHN/flair.nii.gz")})
    long = ValueError(f"{case.images['flair']}{'x' * 280}")
    assert "JOHN" not in one_line(long, case, hidden=True) and "JOHN" in one_line(long, case, hidden=False)
