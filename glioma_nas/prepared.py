"""What the preprocess stage leaves behind and every later stage reads.

``RUN/preprocess/index.json`` names sequences and cases; ``cases/<case_id>/`` holds ``images.npy``, ``mask.npy`` (unless
the case has none) and ``case.json``; ``folds.json`` the folds. Slices are axial and displayed as radiologists do: rows
run from anterior to posterior, columns from the patient's right to the left.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from glioma_nas.cohort import Exclusion, Sex
from glioma_nas.errors import CohortError, StorageError, did_you_mean
from glioma_nas.files import read_json
from glioma_nas.folds import Folds, check_folds, load_folds
from glioma_nas.grids import IDENTITY, resample_to_grid, same_grid
from glioma_nas.images import Affine, FloatVolume, MaskVolume, read_mask
from glioma_nas.registry import preprocess_steps

CASE_FILE = "case.json"
IMAGES_FILE = "images.npy"
MASK_FILE = "mask.npy"
SHEET_FILE = "qc.png"
NATIVE_MASK_FILE = "native_mask.nii.gz"
INDEX_FILE = "index.json"
FOLDS_FILE = "folds.json"
CASES_FOLDER = "cases"


@dataclass(frozen=True)
class ScanGrid:
    """Where one sequence's scan lies, and how the patient moved between it and the reference.

    Attributes:
        path: An empty mask on its grid, in the case's folder, with the scan's qform, sform and codes.
        shape: (X, Y, Z).
        affine: (4, 4) voxel index → millimetres, RAS+.
        motion: (4, 4) rigid map from the reference's scanner space to this scan's.
    """

    path: Path
    shape: tuple[int, int, int]
    affine: Affine
    motion: Affine


@dataclass(frozen=True)
class PreparedCase:
    """One case as slices, with the way back to its scans.

    Attributes:
        folder: Where its files lie.
        case_id: As in the sheet.
        patient_id: As in the sheet.
        age: Years, or None.
        sex: ``M``, ``F`` or None.
        labels: Every other non-empty column as text.
        sequences: Channel order of `images`.
        present: Those sequences the case really has; the other channels are zero.
        n_slices: Number of axial slices Z, from inferior to superior.
        tumour_px: Tumour pixels of each slice; empty for a case without a mask.
        brain_px: Pixels of each slice that are non-zero in some channel.
        min_tumour_px: Tumour pixels from which a slice counts as showing tumour.
        voxel_hashes: Sequence → hash of the scan's voxels.
        native_sequence: The sequence whose scan `to_native` returns to by default: the one the expert mask was drawn
            on, or the reference.
        reference: An empty mask on that scan's grid.
        native_shape: (X, Y, Z) of its grid.
        native_affine: (4, 4) of its grid, voxel index → millimetres, RAS+.
        scans: Sequence → grid of its scan, for every sequence the case has.
        step_sequence: The reference: the sequence on whose grid the steps started.
        affine: (4, 4) of the prepared volume (X, Y, Z), voxel index → millimetres in the reference's space.
        spacing_mm: Pixel width, pixel height and slice distance of the prepared slices.
        mask_path: The expert mask, 0/1, on the scan it was drawn on; None for a case without one.
        steps: Name and record of each preprocess step, in order.
        training_slices: Indices of the slices that may be trained on; every slice is predicted all the same.
        quality: Figures of the quality control, see `glioma_nas.quality_control`.
    """

    folder: Path
    case_id: str
    patient_id: str
    age: float | None
    sex: Sex | None
    labels: Mapping[str, str]
    sequences: tuple[str, ...]
    present: tuple[str, ...]
    n_slices: int
    tumour_px: tuple[int, ...]
    brain_px: tuple[int, ...]
    min_tumour_px: int
    voxel_hashes: Mapping[str, str]
    native_sequence: str
    reference: Path
    native_shape: tuple[int, int, int]
    native_affine: Affine
    scans: Mapping[str, ScanGrid]
    step_sequence: str
    affine: Affine
    spacing_mm: tuple[float, float, float]
    mask_path: Path | None
    steps: tuple[tuple[str, Mapping[str, Any]], ...]
    training_slices: tuple[int, ...]
    quality: Mapping[str, Any]

    @classmethod
    def load(cls, folder: Path) -> PreparedCase:
        """Read ``case.json`` in ``folder``.

        Raises:
            StorageError: It is missing or not of this form.
        """
        data = read_json(folder / CASE_FILE)
        try:
            scans = {
                name: ScanGrid(
                    grid_file(folder, name),
                    tuple(scan["shape"]),
                    np.array(scan["affine"], dtype=np.float64),
                    np.array(scan["motion"], dtype=np.float64),
                )
                for name, scan in data["scans"].items()
            }
            native = data["native_sequence"]
            grid = data["grid"]
            return cls(
                folder=folder,
                case_id=data["case_id"],
                patient_id=data["patient_id"],
                age=data["age"],
                sex=data["sex"],
                labels=dict(data["labels"]),
                sequences=tuple(data["sequences"]),
                present=tuple(data["present"]),
                n_slices=data["n_slices"],
                tumour_px=tuple(data["tumour_px"]),
                brain_px=tuple(data["brain_px"]),
                min_tumour_px=data["min_tumour_px"],
                voxel_hashes=dict(data["voxel_hashes"]),
                native_sequence=native,
                reference=scans[native].path,
                native_shape=scans[native].shape,
                native_affine=scans[native].affine,
                scans=scans,
                step_sequence=data["step_sequence"],
                affine=np.array(grid["affine"], dtype=np.float64),
                spacing_mm=tuple(grid["spacing_mm"]),
                mask_path=folder / NATIVE_MASK_FILE if data["mask"] else None,
                steps=tuple((step["name"], step["record"]) for step in grid["steps"]),
                training_slices=tuple(data["training_slices"]),
                quality=dict(data["quality"]),
            )
        except (KeyError, TypeError, ValueError) as err:
            raise StorageError(
                f"{folder / CASE_FILE}: not a prepared case ({type(err).__name__}: {err}); "
                "run the preprocess stage again"
            ) from err

    @property
    def has_mask(self) -> bool:
        """Whether an expert mask exists; a case without one is predicted but never trained on."""
        return self.mask_path is not None

    @property
    def tumour_slices(self) -> tuple[int, ...]:
        """Indices of the slices that show tumour according to the expert mask."""
        return tuple(index for index, pixels in enumerate(self.tumour_px) if pixels >= max(1, self.min_tumour_px))

    @property
    def native_voxel_ml(self) -> float:
        """Volume of one voxel of the scan, in millilitres."""
        return float(abs(np.linalg.det(self.native_affine[:3, :3]))) / 1000

    def images(self) -> npt.NDArray[np.float32]:
        """Return the slices as a read-only memory map: (Z, C, H, W) float32, background 0, C as `sequences`."""
        return _load_array(self.folder / IMAGES_FILE)

    def mask(self) -> npt.NDArray[np.uint8] | None:
        """Return the expert mask as a read-only memory map (Z, H, W) uint8 0/1, or None."""
        return _load_array(self.folder / MASK_FILE) if self.has_mask else None

    def channels(self, sequences: tuple[str, ...]) -> tuple[int, ...]:
        """Return the channel index of each sequence.

        Raises:
            CohortError: One was not prepared.
        """
        for name in sequences:
            if name not in self.sequences:
                raise CohortError(f"sequence '{name}' was not prepared: {did_you_mean(name, self.sequences)}")
        return tuple(self.sequences.index(name) for name in sequences)

    def to_native(self, probability: npt.NDArray[np.float32], sequence: str | None = None) -> FloatVolume:
        """Map a predicted map back to the grid of a scan.

        The reference's grid is reached by undoing every preprocess step, which loses nothing but what resampling lost.
        A scan on another grid, or one that was moved by registration, is reached by one interpolation through the
        affines and the recorded motion.

        Args:
            probability: (Z, H, W) float32 in [0, 1], on the prepared slices.
            sequence: Whose scan; by default `native_sequence`.

        Returns:
            (X, Y, Z) float32 in [0, 1] on that scan's grid; 0 where the slices did not reach.

        Raises:
            CohortError: The case has no such sequence.
        """
        name = self.native_sequence if sequence is None else sequence
        if name not in self.scans:
            raise CohortError(f"case {self.case_id} has no sequence '{name}': {did_you_mean(name, self.scans)}")
        scan, start = self.scans[name], self.scans[self.step_sequence]
        volume = slices_to_volume(np.asarray(probability, dtype=np.float32))
        if not np.array_equal(scan.motion, IDENTITY) or not same_grid(
            scan.shape, scan.affine, start.shape, start.affine
        ):
            back = np.linalg.inv(scan.motion).astype(np.float64)
            return np.clip(resample_to_grid(volume, self.affine, scan.affine, scan.shape, motion=back), 0.0, 1.0)
        for step, record in reversed(self.steps):
            volume = preprocess_steps.get(step)().revert(volume, record)
        assert volume.shape == scan.shape
        return np.ascontiguousarray(volume, dtype=np.float32)

    def native_mask(self) -> MaskVolume | None:
        """Read the expert mask on the scan's own grid: (X, Y, Z) uint8 0/1, or None.

        Raises:
            ImageError: The file has changed or vanished since it was prepared.
        """
        return None if self.mask_path is None else read_mask(self.mask_path, (1,)).data


@dataclass(frozen=True)
class PreparedCohort:
    """All prepared cases and their folds.

    Attributes:
        folder: The preprocess stage's folder.
        cases: Case id → case, in the sheet's order.
        sequences: Channel order of every case.
        image_size_px: Side of the slices.
        excluded: Cases left out, with reasons.
    """

    folder: Path
    cases: dict[str, PreparedCase]
    sequences: tuple[str, ...]
    image_size_px: int
    excluded: tuple[Exclusion, ...]

    @classmethod
    def load(cls, folder: Path) -> PreparedCohort:
        """Read what a finished preprocess stage left in ``folder``.

        Raises:
            StorageError: A file is missing or damaged.
        """
        index = read_json(folder / INDEX_FILE)
        try:
            cases = {case_id: PreparedCase.load(folder / CASES_FOLDER / case_id) for case_id in index["cases"]}
            return cls(
                folder=folder,
                cases=cases,
                sequences=tuple(index["sequences"]),
                image_size_px=index["image_size_px"],
                excluded=tuple(Exclusion(item["case_id"], item["reason"]) for item in index["excluded"]),
            )
        except (KeyError, TypeError) as err:
            raise StorageError(f"{folder / INDEX_FILE}: not an index ({err}); run the preprocess stage again") from err

    @cached_property
    def folds(self) -> Folds:
        """The folds drawn by the preprocess stage, checked against the cases at the first look.

        Raises:
            LeakageError: A patient or a scan stands on both sides of one.
            StorageError: The file is missing or was changed.
        """
        folds = load_folds(self.folder / FOLDS_FILE)
        check_folds(folds, self)
        return folds

    def select(self, case_ids: tuple[str, ...]) -> list[PreparedCase]:
        """Return the cases with these ids, in this order."""
        return [self.cases[case_id] for case_id in case_ids]


def grid_file(folder: Path, sequence: str) -> Path:
    """Return where a case's folder keeps the grid of one sequence's scan."""
    return folder / f"grid_{sequence}.nii.gz"


def volume_to_slices(volume: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Turn a canonical volume (X, Y, Z) into axial slices (Z, H, W): anterior on top, patient's right at the left."""
    return np.ascontiguousarray(volume[::-1, ::-1, :].transpose(2, 1, 0))


def slices_to_volume(slices: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Undo `volume_to_slices`."""
    return np.ascontiguousarray(slices.transpose(2, 1, 0)[::-1, ::-1, :])


def _load_array(path: Path) -> npt.NDArray[Any]:
    try:
        array: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as err:
        raise StorageError(
            f"{path}: missing or damaged ({err}); delete the run's preprocess folder and run that stage again"
        ) from err
    return array
