"""Prepare one case: read its scans completely, check them, run the preprocess steps, write slices.

Runs in worker processes, so nothing here may import torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt

from glioma_nas.case_volumes import CaseVolumes, PreprocessStep
from glioma_nas.cohort import Case
from glioma_nas.config import PreprocessConfig, indicated_by, indicator_of
from glioma_nas.contact_sheet import write_contact_sheet
from glioma_nas.errors import ConfigError, GliomaNasError, ImageError, StorageError
from glioma_nas.files import atomic_path, canonical_json, read_json, sha256_file, sha256_text, write_json
from glioma_nas.grids import IDENTITY, same_grid, spacing_mm, turn_onto
from glioma_nas.images import MaskVolume, Volume, check_same_grid, read_mask, read_volume, write_mask
from glioma_nas.prepared import (
    CASE_FILE,
    IMAGES_FILE,
    MASK_FILE,
    NATIVE_MASK_FILE,
    SHEET_FILE,
    grid_file,
    volume_to_slices,
)
from glioma_nas.quality_control import measure
from glioma_nas.registry import preprocess_steps
from glioma_nas.space_building import construct

_USUAL_REFERENCE = "t1ce"
PREPARATION = 2
"""Raised whenever the same recipe makes other voxels of the same scans."""


@dataclass(frozen=True)
class Recipe:
    """What preparing a case depends on, besides the case.

    Attributes:
        sequences: Channel order; a channel whose sequence the case lacks is zero.
        preprocess: Steps and sizes.
        mask_labels: Mask values that count as tumour.
        indicated: Sequences that have a further channel, which is 1 in the brain of a case that has the sequence.
    """

    sequences: tuple[str, ...]
    preprocess: PreprocessConfig
    mask_labels: tuple[int, ...]
    indicated: tuple[str, ...] = ()

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the prepared channels, in order."""
        return (*self.sequences, *map(indicator_of, self.indicated))

    @property
    def hash(self) -> str:
        """Hash of all that can change a prepared case; the number of workers cannot."""
        preprocess = self.preprocess.model_dump(mode="json", exclude={"workers", "max_failed_share"})
        files = {str(path): sha256_file(path) for path in self.preprocess.option_files()}
        return sha256_text(
            canonical_json([PREPARATION, list(self.channels), preprocess, list(self.mask_labels), files])
        )


def prepare_case(case: Case, folder: Path, recipe: Recipe) -> None:
    """Write ``images.npy``, ``mask.npy``, ``qc.png`` and at last ``case.json`` into ``folder``.

    Raises:
        ImageError: A scan or the mask cannot be used; the message names the file.
        ConfigError: The steps do not leave slices of the configured size, or do not fit together.
    """
    steps = build_steps(recipe.preprocess)
    scans = _read_scans(case, recipe)
    read = _gather(case, scans, recipe, joined=any(step.joins_grids for step in steps.values()))
    prepared, records = _run_steps(case, read, steps, recipe)
    channels = np.zeros((len(recipe.channels), *prepared.shape), dtype=np.float32)
    for index, name in enumerate(recipe.channels):
        if name in prepared.images:
            channels[index] = prepared.images[name]
        elif indicated_by(name) in prepared.images:
            channels[index] = prepared.brain
    slices = np.stack([volume_to_slices(channel) for channel in channels], axis=1)
    folder.mkdir(parents=True, exist_ok=True)
    _write_array(folder / IMAGES_FILE, slices)
    tumour_px: list[int] = []
    if prepared.mask is not None:
        mask = volume_to_slices(prepared.mask)
        _write_array(folder / MASK_FILE, mask)
        tumour_px = mask.sum(axis=(1, 2), dtype=np.int64).tolist()
    brain_px = (slices != 0).any(axis=1).sum(axis=(1, 2), dtype=np.int64).tolist()
    write_contact_sheet(folder / SHEET_FILE, case.case_id, read, prepared)
    _write_grids(folder, case, scans, read)
    write_json(
        folder / CASE_FILE,
        {
            "case_id": case.case_id,
            "patient_id": case.patient_id,
            "age": case.age,
            "sex": case.sex,
            "labels": dict(case.labels),
            "sequences": list(recipe.channels),
            "present": [name for name in recipe.sequences if name in scans],
            "mask": case.mask is not None,
            "n_slices": int(slices.shape[0]),
            "tumour_px": tumour_px,
            "brain_px": brain_px,
            "min_tumour_px": recipe.preprocess.min_tumour_px,
            "training_slices": _training_slices(brain_px, tumour_px, recipe.preprocess),
            "voxel_hashes": {name: scans[name].voxel_hash() for name in recipe.sequences if name in scans},
            "native_sequence": read.mask_on or read.reference,
            "step_sequence": read.reference,
            "scans": {
                name: {
                    "shape": list(scan.data.shape),
                    "affine": scan.affine.tolist(),
                    "motion": prepared.motions.get(name, IDENTITY).tolist(),
                }
                for name, scan in scans.items()
            },
            "grid": {
                "affine": prepared.affine.tolist(),
                "orientation": "".join(nib.aff2axcodes(read.affine)),
                "spacing_mm": [round(float(side), 6) for side in spacing_mm(prepared.affine)],
                "steps": records,
            },
            "quality": measure(read, prepared, {item["name"]: item["record"] for item in records}),
            "recipe": recipe.hash,
            "preparation": PREPARATION,
            "inputs": _fingerprints(case),
        },
    )


def build_steps(config: PreprocessConfig) -> dict[str, PreprocessStep]:
    """Make the configured steps, in order, with their options.

    Raises:
        UnknownNameError: A step is not registered.
        ConfigError: A step does not take an option.
    """
    return {
        name: construct(
            preprocess_steps.get(name),
            config.step_options.get(name, {}),
            where=f"preprocess.step_options of '{name}'",
        )
        for name in config.steps
    }


def intermediate_volumes(case: Case, recipe: Recipe, *, before: str) -> tuple[CaseVolumes, list[str]]:
    """Return a case as it reaches the step ``before``, and the voxel hashes of its scans.

    Raises:
        ImageError: See `prepare_case`.
    """
    steps = build_steps(recipe.preprocess)
    scans = _read_scans(case, recipe)
    volumes = _gather(case, scans, recipe, joined=any(step.joins_grids for step in steps.values()))
    earlier = dict(list(steps.items())[: list(steps).index(before)])
    return _apply(case, volumes, earlier, recipe)[0], [scan.voxel_hash() for scan in scans.values()]


def is_prepared(case: Case, folder: Path, recipe: Recipe) -> bool:
    """Tell whether ``folder`` holds this case, made by this recipe from files that have not changed since.

    Files count by size and time of change.
    """
    if not (folder / CASE_FILE).is_file():
        return False
    try:
        known = read_json(folder / CASE_FILE)
    except StorageError:
        return False
    # Columns of the sheet are stored too, and a sheet can be mended without touching a scan.
    row = {"patient_id": case.patient_id, "age": case.age, "sex": case.sex, "labels": dict(case.labels)}
    wanted = {**row, "recipe": recipe.hash, "preparation": PREPARATION, "inputs": _fingerprints(case)}
    return all(known.get(key) == value for key, value in wanted.items())


def _read_scans(case: Case, recipe: Recipe) -> dict[str, Volume]:
    # The reference first, then the recipe's order.
    names = [name for name in recipe.sequences if name in case.images]
    wanted = recipe.preprocess.reference or _USUAL_REFERENCE
    if wanted in names:
        names = [wanted, *(name for name in names if name != wanted)]
    return {name: read_volume(case.images[name]) for name in names}


def _gather(case: Case, scans: dict[str, Volume], recipe: Recipe, *, joined: bool) -> CaseVolumes:
    reference = next(iter(scans))
    first = scans[reference]
    grid: dict[str, Any] = {
        "other": case.images[reference],
        "other_shape": first.data.shape,
        "other_affine": first.affine,
    }
    others = {}
    for name, scan in scans.items():
        if joined:
            if not same_grid(scan.data.shape, scan.affine, first.data.shape, first.affine):
                others[name] = scan.affine
        else:
            check_same_grid(case.images[name], scan.data.shape, scan.affine, **grid)
    mask: MaskVolume | None = None
    mask_on: str | None = None
    if case.mask is not None and joined:
        mask, mask_on = _drawn_mask(case, case.mask, scans, recipe)
    elif case.mask is not None:
        found = read_mask(case.mask, recipe.mask_labels)
        mask, affine = turn_onto(found.data, found.affine, first.affine)
        check_same_grid(case.mask, mask.shape, affine, **grid)
    images = {name: scan.data for name, scan in scans.items()}
    return CaseVolumes(images, mask, first.affine, others, None if mask_on == reference else mask_on)


def _drawn_mask(case: Case, path: Path, scans: dict[str, Volume], recipe: Recipe) -> tuple[MaskVolume, str]:
    """Return the mask, its axes as those of the scan it was drawn on, and the name of that scan."""
    found = read_mask(path, recipe.mask_labels)
    wanted = recipe.preprocess.mask_sequence
    candidates = [wanted] if wanted in scans else list(scans)
    for name in candidates:
        mask, affine = turn_onto(found.data, found.affine, scans[name].affine)
        if same_grid(mask.shape, affine, scans[name].data.shape, scans[name].affine):
            return mask, str(name)
    raise ImageError(
        f"{path}: the mask lies on the grid of none of {', '.join(map(str, candidates))} in the same case; give "
        "the mask on the grid of the scan it was drawn on, and its name in preprocess.mask_sequence"
    )


def _apply(
    case: Case, volumes: CaseVolumes, steps: dict[str, PreprocessStep], recipe: Recipe
) -> tuple[CaseVolumes, list[dict[str, Any]]]:
    records = []
    for name, step in steps.items():
        try:
            if volumes.other_affines and not step.takes_many_grids:
                raise ConfigError(
                    f"sequence '{next(iter(volumes.other_affines))}' still lies on a grid of its own; put 'register' "
                    "(or 'same_grid', when the patient did not move) before it in preprocess.steps"
                )
            volumes, record = step.apply(volumes, recipe.preprocess)
        except GliomaNasError as err:
            raise type(err)(f"case {case.case_id}: preprocess step '{name}': {err}") from err
        records.append({"name": name, "record": record})
    return volumes, records


def _run_steps(
    case: Case, volumes: CaseVolumes, steps: dict[str, PreprocessStep], recipe: Recipe
) -> tuple[CaseVolumes, list[dict[str, Any]]]:
    volumes, records = _apply(case, volumes, steps, recipe)
    size = recipe.preprocess.image_size_px
    if volumes.shape[:2] != (size, size):
        raise ConfigError(
            f"preprocess.steps leaves slices of {volumes.shape[0]}×{volumes.shape[1]} pixels, but "
            f"preprocess.image_size_px is {size}; add 'crop_pad' and 'resize' at the end of the steps"
        )
    return volumes, records


def _training_slices(brain_px: Sequence[int], tumour_px: Sequence[int], config: PreprocessConfig) -> list[int]:
    if config.training_slices == "all":
        return list(range(len(brain_px)))
    area, least = (brain_px, 1) if config.training_slices == "brain" else (tumour_px, max(1, config.min_tumour_px))
    return [index for index, pixels in enumerate(area) if pixels >= least]


def _write_grids(folder: Path, case: Case, scans: Mapping[str, Volume], read: CaseVolumes) -> None:
    # Empty masks hold the scans' grids with all codes, and a copy holds the expert mask. The run then needs the scans
    # no more, can be moved, and names none of their paths, in which patients are apt to stand.
    for name, scan in scans.items():
        write_mask(grid_file(folder, name), np.zeros(scan.data.shape, dtype=np.uint8), like=case.images[name])
    if read.mask is not None:
        write_mask(folder / NATIVE_MASK_FILE, read.mask, like=case.images[read.mask_on or read.reference])


def _fingerprints(case: Case) -> dict[str, str]:
    # Sizes and times, not contents: they only decide whether an interrupted run may reuse what it made minutes ago.
    files: Sequence[tuple[str, Path | None]] = [*sorted(case.images.items()), ("mask", case.mask)]
    stats = [(name, path, path.stat()) for name, path in files if path is not None and path.is_file()]
    # In one digest: of a path alone it could be tried out who the patient is, and a size and a time tell a file apart.
    return {name: case.digest([str(path), stat.st_size, stat.st_mtime_ns]) for name, path, stat in stats}


def _write_array(path: Path, array: npt.NDArray[Any]) -> None:
    with atomic_path(path) as temporary, temporary.open("wb") as handle:
        np.save(handle, array, allow_pickle=False)
