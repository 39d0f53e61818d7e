"""Scans and masks: complete reading, checks, and masks written back on the scan's grid."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glioma_nas.errors import ImageError
from glioma_nas.images import check_same_grid, read_mask, read_volume, voxel_hash, write_mask
from glioma_nas.testing.phantoms import PHANTOM_AFFINE, write_nifti

SHAPE = (9, 8, 4)


def ramp() -> np.ndarray:
    return np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE)


@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64])
def test_read_volume_returns_voxels_and_affine(tmp_path: Path, name: str, dtype: type) -> None:
    data = (ramp() % 200).astype(dtype)
    volume = read_volume(write_nifti(tmp_path / name, data))
    assert volume.data.dtype == np.float32
    np.testing.assert_array_equal(volume.data, data)
    np.testing.assert_array_equal(volume.affine, PHANTOM_AFFINE)


def test_read_volume_applies_slope_and_intercept(tmp_path: Path) -> None:
    image = nib.Nifti1Image(ramp(), PHANTOM_AFFINE)
    image.header.set_slope_inter(0.5, 10)
    (tmp_path / "scaled.nii").write_bytes(image.to_bytes())
    stored = nib.load(tmp_path / "scaled.nii")
    np.testing.assert_allclose(read_volume(tmp_path / "scaled.nii").data, stored.get_fdata(), rtol=1e-6)


def test_read_volume_reads_nifti2_and_a_trailing_axis_of_one(tmp_path: Path) -> None:
    image = nib.Nifti2Image(ramp()[..., None], PHANTOM_AFFINE)
    nib.save(image, tmp_path / "two.nii.gz")
    np.testing.assert_array_equal(read_volume(tmp_path / "two.nii.gz").data, ramp())


def test_voxel_hash_ignores_the_header_and_sees_one_voxel(tmp_path: Path) -> None:
    first = read_volume(write_nifti(tmp_path / "a.nii", ramp()))
    same = read_volume(write_nifti(tmp_path / "b.nii.gz", ramp().astype(np.float32), np.eye(4)))
    data = ramp()
    data[3, 3, 3] += 1
    other = read_volume(write_nifti(tmp_path / "c.nii", data))
    assert first.voxel_hash() == same.voxel_hash() != other.voxel_hash()


@given(
    order=st.permutations(range(3)),
    flips=st.lists(st.booleans(), min_size=3, max_size=3),
    shape=st.tuples(*[st.integers(2, 7)] * 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_voxel_hash_is_the_same_however_axes_are_stored(
    order: list[int], flips: list[bool], shape: tuple[int, int, int], seed: int
) -> None:
    data = np.random.default_rng(seed).normal(100, 60, shape).astype(np.float32)
    turned = data.transpose(order)[tuple(slice(None, None, -1 if flip else 1) for flip in flips)]
    assert voxel_hash(turned) == voxel_hash(data)
    other = data.copy()
    other[0, 0, 0] += 1
    assert voxel_hash(other) != voxel_hash(data)


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz"])
def test_read_volume_refuses_a_truncated_file(tmp_path: Path, name: str, kept: float) -> None:
    noise = np.random.default_rng(0).integers(1, 1000, (40, 40, 9)).astype(np.int16)
    path = write_nifti(tmp_path / name, noise)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(ImageError, match=rf"{name}: truncated.*copy or export the file again"):
        read_volume(path)


def test_read_volume_refuses_a_damaged_byte(tmp_path: Path) -> None:
    path = write_nifti(
        tmp_path / "scan.nii.gz", np.random.default_rng(0).integers(1, 1000, (40, 40, 9)).astype(np.int16)
    )
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ImageError, match="truncated or damaged"):
        read_volume(path)


def test_read_volume_refuses_a_header_that_promises_terabytes(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "scan.nii", ramp())
    content = bytearray(path.read_bytes())
    content[42:48] = np.array([32767] * 3, dtype="<i2").tobytes()
    path.write_bytes(content)
    with pytest.raises(ImageError, match="truncated"):
        read_volume(path)


@pytest.mark.parametrize(
    "content",
    # mtime: a compressed file holds the clock's time, and parallel test workers must collect equal parameters.
    [b"", b"hello", b"DICM" * 200, gzip.compress(b"not an image at all", mtime=0)],
    ids=["empty", "text", "dicom", "gzip"],
)
def test_read_volume_refuses_other_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "scan.nii.gz").write_bytes(content)
    with pytest.raises(ImageError, match=r"scan\.nii\.gz: not a NIfTI file .*dcm2niix"):
        read_volume(tmp_path / "scan.nii.gz")


def test_read_volume_refuses_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"none\.nii: No such file or directory; mend the path"):
        read_volume(tmp_path / "none.nii")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_read_volume_refuses_nan_and_infinity(tmp_path: Path, bad: float) -> None:
    data = ramp().astype(np.float32)
    data[1, 2, 3] = data[2, 2, 2] = bad
    with pytest.raises(ImageError, match="2 voxels are NaN or infinite"):
        read_volume(write_nifti(tmp_path / "scan.nii.gz", data))


def test_read_volume_refuses_a_constant_image(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="every voxel is 7; a scan must show something"):
        read_volume(write_nifti(tmp_path / "scan.nii.gz", np.full(SHAPE, 7, dtype=np.int16)))


@pytest.mark.parametrize("shape", [(9, 8), (9, 8, 4, 2), (9, 8, 1, 1, 3)])
def test_read_volume_refuses_other_dimensions(tmp_path: Path, shape: tuple[int, ...]) -> None:
    data = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
    with pytest.raises(ImageError, match=r"shape 9×8.* is \d-dimensional; expected one volume"):
        read_volume(write_nifti(tmp_path / "scan.nii.gz", data))


def test_read_volume_refuses_a_singular_affine(tmp_path: Path) -> None:
    image = nib.Nifti1Image(ramp(), np.eye(4))
    image.header.set_sform(np.diag([1.0, 0.0, 1.0, 1.0]), code=1)
    image.header["qform_code"] = 0
    (tmp_path / "scan.nii").write_bytes(nib.Nifti1Image(ramp(), None, image.header).to_bytes())
    with pytest.raises(ImageError, match="affine is singular"):
        read_volume(tmp_path / "scan.nii")


def test_read_mask_joins_the_allowed_labels(tmp_path: Path) -> None:
    data = np.zeros(SHAPE, dtype=np.uint8)
    data[0, 0, 0], data[1, 0, 0], data[2, 0, 0] = 1, 2, 4
    mask = read_mask(write_nifti(tmp_path / "mask.nii.gz", data), (1, 2, 4))
    assert mask.data.dtype == np.uint8
    np.testing.assert_array_equal(np.argwhere(mask.data == 1), [[0, 0, 0], [1, 0, 0], [2, 0, 0]])
    assert mask.data.sum() == 3


def test_read_mask_accepts_an_empty_mask(tmp_path: Path) -> None:
    assert not read_mask(write_nifti(tmp_path / "mask.nii.gz", np.zeros(SHAPE, dtype=np.uint8)), (1,)).data.any()


@pytest.mark.parametrize(("value", "shown"), [(3, "label 3"), (0.5, "label 0.5"), (-1, "label -1"), (255, "label 255")])
def test_read_mask_refuses_unknown_labels(tmp_path: Path, value: float, shown: str) -> None:
    data = np.zeros(SHAPE, dtype=np.float32)
    data[0, 0, 0], data[1, 1, 1] = 1, value
    with pytest.raises(ImageError, match=rf"unknown {shown}; allowed are 0 and 1, 2, 4: .*cohort\.mask_labels"):
        read_mask(write_nifti(tmp_path / "mask.nii.gz", data), (1, 2, 4))


def test_check_same_grid_names_both_shapes() -> None:
    with pytest.raises(ImageError, match=r"flair\.nii: shape 9×8×4 differs from 9×8×5 of t1ce\.nii"):
        check_same_grid(
            Path("flair.nii"), SHAPE, np.eye(4), other=Path("t1ce.nii"), other_shape=(9, 8, 5), other_affine=np.eye(4)
        )


def test_check_same_grid_measures_the_largest_shift() -> None:
    moved = np.eye(4)
    moved[0, 0] = 1.05
    with pytest.raises(ImageError, match=r"affine differs from that of t1ce\.nii in the same case by up to 0\.45 mm"):
        check_same_grid(Path("a.nii"), SHAPE, moved, other=Path("t1ce.nii"), other_shape=SHAPE, other_affine=np.eye(4))
    moved[0, 0] = 1.0001
    check_same_grid(Path("a.nii"), SHAPE, moved, other=Path("t1ce.nii"), other_shape=SHAPE, other_affine=np.eye(4))


@pytest.mark.parametrize(("qform", "sform"), [(1, 0), (0, 2), (1, 1), (2, 4)])
@pytest.mark.parametrize("name", ["mask.nii", "mask.nii.gz"])
def test_write_mask_keeps_the_grid_of_the_scan(tmp_path: Path, qform: int, sform: int, name: str) -> None:
    affine = np.array([[-0.9, 0.05, 0.3, 70], [-0.05, -0.9, 0.4, 80], [0.08, -0.1, 5.9, -60], [0, 0, 0, 1]])
    scan = nib.Nifti1Image(ramp(), affine)
    scan.header["descrip"] = b"Doe^Jane 1950"
    scan.header["db_name"], scan.header["data_type"] = b"Doe^Jane", b"Doe"
    scan.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"Doe^Jane"))
    scan.set_qform(affine, code=qform, strip_shears=True)
    scan.set_sform(affine, code=sform)
    nib.save(scan, tmp_path / "scan.nii.gz")
    mask = (ramp() % 3 == 0).astype(np.uint8)
    write_mask(tmp_path / name, mask, like=tmp_path / "scan.nii.gz")
    scan, written = nib.load(tmp_path / "scan.nii.gz"), nib.load(tmp_path / name)
    np.testing.assert_array_equal(np.asarray(written.dataobj), mask)
    np.testing.assert_array_equal(written.affine, scan.affine)
    assert written.get_data_dtype() == np.uint8
    assert (int(written.header["qform_code"]), int(written.header["sform_code"])) == (qform, sform)
    assert written.header.get_zooms() == scan.header.get_zooms()
    content = (tmp_path / name).read_bytes()
    assert b"Doe" not in (gzip.decompress(content) if name.endswith("gz") else content)


def test_write_mask_gives_equal_bytes_for_equal_masks(tmp_path: Path) -> None:
    write_nifti(tmp_path / "scan.nii.gz", ramp())
    for name in ("a.nii.gz", "b.nii.gz"):
        write_mask(tmp_path / name, np.ones(SHAPE, dtype=np.uint8), like=tmp_path / "scan.nii.gz")
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


def test_write_mask_refuses_another_shape(tmp_path: Path) -> None:
    write_nifti(tmp_path / "scan.nii.gz", ramp())
    with pytest.raises(ImageError, match=r"shape 2×2×2 does not fit scan\.nii\.gz of shape 9×8×4"):
        write_mask(tmp_path / "mask.nii.gz", np.ones((2, 2, 2), dtype=np.uint8), like=tmp_path / "scan.nii.gz")
