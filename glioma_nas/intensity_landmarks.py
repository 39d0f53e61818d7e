"""Learn the landmarks of the ``nyul`` step from a cohort that is kept apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from glioma_nas.case_preparation import Recipe, intermediate_volumes
from glioma_nas.cohort import Case
from glioma_nas.errors import CohortError, ConfigError, GliomaNasError
from glioma_nas.preprocess_steps.nyul import PERCENTILES, mean_landmarks, scan_percentiles
from glioma_nas.progress import Progress, Silent

STEP = "nyul"


def learn_landmarks(cases: Sequence[Case], recipe: Recipe, progress: Progress | None = None) -> dict[str, Any]:
    """Run the steps that stand before ``nyul`` on every case, and average the percentiles of what comes out.

    Args:
        cases: Patients the networks will never be tested on.
        recipe: Sequences, steps and mask labels of the run that will use the landmarks.
        progress: Where to report.

    Returns:
        Plain JSON for the step: ``percentiles``, ``sequences`` (name → landmarks, 0 to 100), ``n_scans``, ``failed``
        (messages) and ``voxel_hashes`` of the scans, by which a later run notices its own patients.

    Raises:
        ConfigError: ``nyul`` is not one of the steps.
        CohortError: A sequence has fewer than two usable scans.
    """
    if STEP not in recipe.preprocess.steps:
        raise ConfigError(f"'{STEP}' is not one of preprocess.steps ({', '.join(recipe.preprocess.steps)}); add it")
    found: dict[str, list[npt.NDArray[np.float64]]] = {name: [] for name in recipe.sequences}
    hashes: list[str] = []
    failed: list[str] = []
    with (progress or Silent()).task("landmarks", len(cases)) as task:
        for case in cases:
            try:
                volumes, own_hashes = intermediate_volumes(case, recipe, before=STEP)
                own = {name: scan_percentiles(name, data) for name, data in volumes.images.items()}
            except GliomaNasError as err:
                failed.append(f"case {case.case_id}: {err}")
            else:
                hashes.extend(own_hashes)
                for name, percentiles in own.items():
                    found[name].append(percentiles)
            task.advance()
    for name, percentiles_of_scans in found.items():
        if len(percentiles_of_scans) < 2:
            raise CohortError(
                f"sequence '{name}': {len(percentiles_of_scans)} usable scans, at least 2 are needed for landmarks"
                + (f"; {failed[0]}" if failed else "")
            )
    return {
        "percentiles": list(PERCENTILES),
        "sequences": {name: mean_landmarks(scans) for name, scans in found.items()},
        "n_scans": {name: len(scans) for name, scans in found.items()},
        "failed": failed,
        "voxel_hashes": sorted(hashes),
    }
