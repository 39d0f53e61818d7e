"""Prepare one case: read its scans completely, check them, run the preprocess steps, write slices.

Runs in worker processes, so nothing here may import torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt

from glioma_nas.case_volumes import CaseVolumes
from glioma_nas.cohort import Case
from glioma_nas.config import PreprocessConfig
from glioma_nas.errors import ConfigError, GliomaNasError, StorageError
from glioma_nas.files import atomic_path, read_json, write_json
from glioma_nas.images import Volume, check_same_grid, read_mask, read_volume
from glioma_nas.prepared import CASE_FILE, IMAGES_FILE, MASK_FILE, volume_to_slices
from glioma_nas.registry import preprocess_steps


@dataclass(frozen=True)
class Recipe:
    """What preparing a case depends on, besides the case.

    Attributes:
        sequences: Channel order; a channel whose sequence the case lacks is zero.
        preprocess: Steps and sizes.
        mask_labels: Mask values that count as tumour.
    """

    sequences: tuple[str, ...]
    preprocess: PreprocessConfig
    mask_labels: tuple[int, ...]


def prepare_case(case: Case, folder: Path, recipe: Recipe) -> None:
    """Write ``images.npy``, ``mask.npy`` and at last ``case.json`` into ``folder``.

    Raises:
        ImageError: A scan or the mask cannot be used; the message names the file.
        ConfigError: The steps do not leave slices of the configured size.
    """
    volumes = {name: read_volume(case.images[name]) for name in recipe.sequences if name in case.images}
    reference = next(iter(volumes))
    read = _gather(case, volumes, reference, recipe)
    prepared, records = _run_steps(case, read, recipe)
    channels = np.zeros((len(recipe.sequences), *prepared.shape), dtype=np.float32)
    for index, name in enumerate(recipe.sequences):
        if name in prepared.images:
            channels[index] = prepared.images[name]
    slices = np.stack([volume_to_slices(channel) for channel in channels], axis=1)
    folder.mkdir(parents=True, exist_ok=True)
    _write_array(folder / IMAGES_FILE, slices)
    tumour_px: list[int] = []
    if prepared.mask is not None:
        mask = volume_to_slices(prepared.mask)
        _write_array(folder / MASK_FILE, mask)
        tumour_px = mask.sum(axis=(1, 2), dtype=np.int64).tolist()
    spacing = np.linalg.norm(prepared.affine[:3, :3], axis=0)
    write_json(
        folder / CASE_FILE,
        {
            "case_id": case.case_id,
            "patient_id": case.patient_id,
            "age": case.age,
            "sex": case.sex,
            "labels": dict(case.labels),
            "sequences": list(recipe.sequences),
            "present": list(volumes),
            "mask": None if case.mask is None else str(case.mask),
            "mask_labels": list(recipe.mask_labels),
            "n_slices": int(slices.shape[0]),
            "tumour_px": tumour_px,
            "brain_px": (slices != 0).any(axis=1).sum(axis=(1, 2), dtype=np.int64).tolist(),
            "min_tumour_px": recipe.preprocess.min_tumour_px,
            "voxel_hashes": {name: volume.voxel_hash() for name, volume in volumes.items()},
            "grid": {
                "reference": str(case.images[reference]),
                "shape": list(read.shape),
                "affine": read.affine.tolist(),
                "orientation": "".join(nib.aff2axcodes(read.affine)),
                "spacing_mm": [round(float(side), 6) for side in spacing],
                "steps": records,
            },
            "inputs": _fingerprints(case),
        },
    )


def is_prepared(case: Case, folder: Path) -> bool:
    """Tell whether ``folder`` holds this case, made from files that have not changed since (by size and time)."""
    if not (folder / CASE_FILE).is_file():
        return False
    try:
        return bool(read_json(folder / CASE_FILE).get("inputs") == _fingerprints(case))
    except StorageError:
        return False


def _gather(case: Case, volumes: dict[str, Volume], reference: str, recipe: Recipe) -> CaseVolumes:
    first = volumes[reference]
    grid: dict[str, Any] = {
        "other": case.images[reference],
        "other_shape": first.data.shape,
        "other_affine": first.affine,
    }
    for name, volume in volumes.items():
        check_same_grid(case.images[name], volume.data.shape, volume.affine, **grid)
    mask = None
    if case.mask is not None:
        found = read_mask(case.mask, recipe.mask_labels)
        check_same_grid(case.mask, found.data.shape, found.affine, **grid)
        mask = found.data
    return CaseVolumes({name: volume.data for name, volume in volumes.items()}, mask, first.affine)


def _run_steps(case: Case, volumes: CaseVolumes, recipe: Recipe) -> tuple[CaseVolumes, list[dict[str, Any]]]:
    records = []
    for name in recipe.preprocess.steps:
        try:
            volumes, record = preprocess_steps.get(name)().apply(volumes, recipe.preprocess)
        except GliomaNasError as err:
            raise type(err)(f"case {case.case_id}: preprocess step '{name}': {err}") from err
        records.append({"name": name, "record": record})
    size = recipe.preprocess.image_size_px
    if volumes.shape[:2] != (size, size):
        raise ConfigError(
            f"preprocess.steps leaves slices of {volumes.shape[0]}×{volumes.shape[1]} pixels, but "
            f"preprocess.image_size_px is {size}; add 'crop_pad' and 'resize' at the end of the steps"
        )
    return volumes, records


def _fingerprints(case: Case) -> dict[str, list[Any]]:
    # Sizes and times, not contents: they only decide whether an interrupted run may reuse what it made minutes ago.
    files: Sequence[tuple[str, Path | None]] = [*sorted(case.images.items()), ("mask", case.mask)]
    stats = [(name, path, path.stat()) for name, path in files if path is not None and path.is_file()]
    return {name: [str(path), stat.st_size, stat.st_mtime_ns] for name, path, stat in stats}


def _write_array(path: Path, array: npt.NDArray[Any]) -> None:
    with atomic_path(path) as temporary, temporary.open("wb") as handle:
        np.save(handle, array, allow_pickle=False)
