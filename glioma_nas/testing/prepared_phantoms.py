"""A phantom cohort that has been through the preprocess stage, for tests of what reads prepared cases."""

from __future__ import annotations

from pathlib import Path

from glioma_nas.config import parse_config
from glioma_nas.pipeline import Pipeline
from glioma_nas.progress import Silent
from glioma_nas.testing.phantoms import write_phantom_cohort


def prepare_phantom_cohort(
    folder: Path, *, n_patients: int, image_size_px: int, n_folds: int = 2, seed: int = 0
) -> Path:
    """Write a phantom cohort and preprocess it.

    Args:
        folder: Where to write.
        n_patients: See `write_phantom_cohort`.
        image_size_px: Side of the prepared slices.
        n_folds: Folds, by patient.
        seed: Of cohort and folds.

    Returns:
        The folder of the preprocess stage, as `PreparedCohort.load` takes it.
    """
    sheet = write_phantom_cohort(folder / "cohort", n_patients, seed)
    config = parse_config(
        {
            "seed": seed,
            "cohort": {"sheet": str(sheet), "sequences": ["t1ce", "flair"]},
            "preprocess": {"crop_size_px": 48, "image_size_px": image_size_px, "workers": 1},
            "folds": {"n_folds": n_folds},
        },
        source="phantom cohort",
        folder=folder,
    )
    Pipeline(config, folder / "run", Silent()).run(["preprocess"])
    return folder / "run" / "preprocess"
