"""The volumes of one case on their way to slices, and what a preprocess step is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from glioma_nas.config import PreprocessConfig
from glioma_nas.images import Affine, FloatVolume, MaskVolume


@dataclass(frozen=True)
class CaseVolumes:
    """One case on one grid; steps return a new one and never write into the arrays they got.

    Attributes:
        images: Sequence name → (X, Y, Z) float32, background 0; only sequences that are present, at least one.
        mask: (X, Y, Z) uint8 0/1, whole tumour, or None.
        affine: (4, 4) float64, voxel index → millimetres in RAS+ scanner space.
    """

    images: Mapping[str, FloatVolume]
    mask: MaskVolume | None
    affine: Affine

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (X, Y, Z) that all volumes share."""
        shape = next(iter(self.images.values())).shape
        return shape[0], shape[1], shape[2]


class PreprocessStep(ABC):
    """One registered step, and the way back for probability maps.

    A step is made without arguments. `apply` is called once for each case, in worker processes; `revert` once for each
    predicted map, in the reverse order of the steps, with the record that `apply` returned for that case.
    """

    @abstractmethod
    def apply(self, volumes: CaseVolumes, config: PreprocessConfig) -> tuple[CaseVolumes, dict[str, Any]]:
        """Take a case one step nearer to slices.

        Returns:
            The new volumes, and plain JSON that `revert` needs.

        Raises:
            ImageError: The case cannot be processed; name the sequence, the caller adds the case.
        """

    @abstractmethod
    def revert(self, probability: FloatVolume, record: Mapping[str, Any]) -> FloatVolume:
        """Map a probability map from the grid after the step to the grid before it.

        Args:
            probability: (X, Y, Z) float32 in [0, 1].
            record: What `apply` returned.
        """
