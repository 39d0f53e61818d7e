"""Make intensities comparable between scanners by a standard histogram (Nyúl & Udupa).

Nyúl, Udupa & Zhang 2000, https://doi.org/10.1109/42.836373: percentiles of each scan are mapped, piecewise linearly, to
the mean place they have in a set of scans. That mean is learned, so it must not be learned from patients the networks
are tested on. In cross-validation every patient is tested once, which leaves no patient of the cohort to learn it from:
the landmarks come from a file, made of other scans by ``glioma-nas cohort landmarks``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from glioma_nas.case_volumes import CaseVolumes, IntensityStep
from glioma_nas.config import PreprocessConfig
from glioma_nas.errors import ConfigError, ImageError, LeakageError, StorageError, did_you_mean
from glioma_nas.files import read_json
from glioma_nas.images import FloatVolume
from glioma_nas.preprocess_steps.percentile import inside
from glioma_nas.registry import preprocess_steps

PERCENTILES = (1.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0, 90.0, 99.0)
_SCALE = 100.0
_REMEDY = "learn them from other patients with `glioma-nas cohort landmarks CONFIG --out FILE`"


@preprocess_steps.register("nyul")
class Nyul(IntensityStep):
    """Map percentiles of each sequence's non-zero voxels to learned landmarks; the scale ends at about -2 and 2.

    Args:
        landmarks: JSON file of ``glioma-nas cohort landmarks``.
        allow_own_patients: Accept landmarks that were learned from scans of this cohort. They carry no labels, but test
            patients have then taken part in the preprocessing; the manifest says so.
    """

    def __init__(self, *, landmarks: str | None = None, allow_own_patients: bool = False) -> None:
        self.path = None if landmarks is None else Path(landmarks).expanduser()
        self.allow_own_patients = allow_own_patients

    def check(self) -> None:
        """See `PreprocessStep.check`.

        Raises:
            ConfigError: No file is named.
            StorageError: The file is missing or holds no landmarks.
        """
        self._read()

    def check_cohort(self, voxel_hashes: Iterable[str]) -> str | None:
        """See `PreprocessStep.check_cohort`.

        Raises:
            LeakageError: The landmarks were learned from scans of this cohort, and that was not allowed.
        """
        known = set(self._read()["voxel_hashes"])
        shared = known & set(voxel_hashes)
        if not shared:
            return None
        if not self.allow_own_patients:
            raise LeakageError(
                f"{self.path}: the landmarks were learned from {len(shared)} scans of this cohort, so test patients "
                f"took part in the preprocessing; {_REMEDY}, or set preprocess.step_options.nyul.allow_own_patients"
            )
        return f"Nyul landmarks were learned from {len(shared)} scans of this cohort, test patients among them"

    def apply(self, volumes: CaseVolumes, config: PreprocessConfig) -> tuple[CaseVolumes, dict[str, Any]]:
        """See `PreprocessStep.apply`; the record holds each sequence's own percentiles.

        Raises:
            ImageError: Percentiles of a sequence coincide.
            ConfigError: No landmarks were learned for a sequence.
        """
        standard = self._read()["sequences"]
        images: dict[str, FloatVolume] = {}
        record: dict[str, Any] = {}
        for name, data in volumes.images.items():
            if name not in standard:
                raise ConfigError(f"{self.path}: no landmarks for sequence '{name}': {did_you_mean(name, standard)}")
            brain = data != 0
            own = scan_percentiles(name, data)
            target = np.asarray(standard[name], dtype=np.float64)
            values = data[brain].astype(np.float64)
            mapped = np.interp(values, own, target)
            # Beyond the outer percentiles the outer segments go on.
            for end, first, second in ((values < own[0], 0, 1), (values > own[-1], -1, -2)):
                slope = (target[second] - target[first]) / (own[second] - own[first])
                mapped[end] = target[first] + slope * (values[end] - own[first])
            images[name] = inside(data, brain, ((mapped - _SCALE / 2) / (_SCALE / 4)).astype(np.float32))
            record[name] = {"percentiles": own.tolist()}
        return volumes.with_images(images), record

    def _read(self) -> Mapping[str, Any]:
        if self.path is None:
            raise ConfigError(f"preprocess step 'nyul' needs preprocess.step_options.nyul.landmarks: {_REMEDY}")
        data = read_json(self.path)
        # Without the hashes nobody could tell whether the landmarks were learned from the patients they are used on.
        if (
            not isinstance(data, dict)
            or not {"sequences", "voxel_hashes"} <= set(data)
            or data.get("percentiles") != list(PERCENTILES)
        ):
            raise StorageError(f"{self.path}: holds no intensity landmarks; {_REMEDY}")
        return data


def scan_percentiles(name: str, data: FloatVolume) -> npt.NDArray[np.float64]:
    """Return the percentiles `PERCENTILES` of a scan's non-zero voxels, strictly increasing.

    Raises:
        ImageError: Two of them coincide.
    """
    values = data[data != 0].astype(np.float64)
    found = np.percentile(values, PERCENTILES) if values.size else np.zeros(len(PERCENTILES))
    if (np.diff(found) <= 0).any():
        raise ImageError(
            f"sequence '{name}': percentiles of its {values.size} non-zero voxels coincide, so it has too few grey "
            "values for 'nyul'; export it again or use 'zscore'"
        )
    return found


def mean_landmarks(percentiles: Iterable[npt.NDArray[np.float64]]) -> list[float]:
    """Return the mean place of each percentile on a scale where the first is 0 and the last 100."""
    scaled = [(own - own[0]) / (own[-1] - own[0]) * _SCALE for own in percentiles]
    return [round(float(value), 6) for value in np.mean(scaled, axis=0)]
