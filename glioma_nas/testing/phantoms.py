"""Small phantoms whose answers are known by construction: a tiny cohort written in a fraction of a second."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt

from glioma_nas.files import write_text
from glioma_nas.seeding import numpy_generator

SEQUENCES = ("t1", "t1ce", "t2", "flair")

PHANTOM_AFFINE = np.diag([-2.0, -2.0, 6.0, 1.0])
"""Voxels of 2×2×6 mm, axes towards left, posterior, superior."""

# Brightness of brain, mutant tumour, wildtype tumour: a wildtype enhances on t1ce, a mutant is bright on t2 and flair.
_BRIGHTNESS = {"t1": (100, 70, 60), "t1ce": (100, 75, 190), "t2": (80, 180, 140), "flair": (90, 170, 150)}


def write_phantom_cohort(
    folder: Path,
    n_patients: int,
    seed: int,
    *,
    size: tuple[int, int, int] = (48, 48, 6),
    sequences: tuple[str, ...] = SEQUENCES,
) -> Path:
    """Write ellipsoid brains with one spherical tumour each, and their sheet.

    Patients alternate between IDH mutant and wildtype; wildtypes enhance, are older and have a Ki67 index above 10 %.
    The tumour is visible in every sequence.

    Args:
        folder: Where to write; created.
        n_patients: One case each, ``P001`` onwards.
        seed: Same seed, same voxels.
        size: (X, Y, Z) voxels.
        sequences: Which of `SEQUENCES` to write.

    Returns:
        Path of ``cohort.csv``: case_id, patient_id, sequences, mask (label 1), age, sex, idh, codel_1p19q, grade, ki67.
    """
    rows: list[dict[str, str]] = []
    for number in range(1, n_patients + 1):
        case_id = f"P{number:03d}"
        generator = numpy_generator(seed, "phantom", number)
        mutant = number % 2 == 1
        brain, tumour = _shapes(size, generator)
        (folder / case_id).mkdir(parents=True, exist_ok=True)
        row = {"case_id": case_id, "patient_id": case_id}
        for name in sequences:
            healthy, *lesion = _BRIGHTNESS[name]
            image = np.where(tumour, lesion[0 if mutant else 1], healthy) + generator.normal(0, 5, size)
            row[name] = f"{case_id}/{name}.nii.gz"
            write_nifti(folder / row[name], np.where(brain, np.maximum(image, 1), 0).astype(np.int16))
        row["mask"] = f"{case_id}/mask.nii.gz"
        write_nifti(folder / row["mask"], tumour.astype(np.uint8))
        row["age"] = f"{generator.normal(40 if mutant else 62, 6):.0f}"
        row["sex"] = "MF"[int(generator.integers(2))]
        row["idh"] = "mutant" if mutant else "wildtype"
        row["codel_1p19q"] = "codeleted" if number % 4 == 1 else "intact"
        row["grade"] = "G2" if mutant else "G4"
        row["ki67"] = f"{generator.uniform(1, 8) if mutant else generator.uniform(12, 40):.1f}"
        rows.append(row)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(folder / "cohort.csv", text.getvalue())
    return folder / "cohort.csv"


def write_nifti(path: Path, data: npt.NDArray[np.generic], affine: npt.NDArray[np.float64] = PHANTOM_AFFINE) -> Path:
    """Write an array as NIfTI with scanner coordinates and return the path."""
    image = nib.Nifti1Image(data, affine)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    nib.save(image, path)
    return path


def _shapes(
    size: tuple[int, int, int], generator: np.random.Generator
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    # Coordinates in [-1, 1]; the tumour lies well inside the brain, away from the first and last slice.
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, side) for side in size), indexing="ij")
    brain = (x / 0.75) ** 2 + (y / 0.9) ** 2 + (z / 1.3) ** 2 <= 1
    centre = [
        float(generator.choice([-1, 1])) * generator.uniform(0.2, 0.35),
        generator.uniform(-0.35, 0.35),
        generator.uniform(-0.2, 0.2),
    ]
    radius = generator.uniform(0.22, 0.3)
    tumour = (x - centre[0]) ** 2 + (y - centre[1]) ** 2 + ((z - centre[2]) / 2) ** 2 <= radius**2
    return brain, tumour & brain
