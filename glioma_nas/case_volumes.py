"""The volumes of one case on their way to slices, and what a preprocess step is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from glioma_nas.config import PreprocessConfig
from glioma_nas.images import Affine, FloatVolume, MaskVolume


@dataclass(frozen=True)
class CaseVolumes:
    """One case; steps return a new one and never write into the arrays they got.

    The first image is the *reference*: `affine` is its grid, and its scanner space is the space of all results. Until a
    step such as ``register`` has run, other sequences may lie on grids of their own.

    Attributes:
        images: Sequence name → (X, Y, Z) float32, background 0; only sequences that are present, at least one.
        mask: (X, Y, Z) uint8 0/1, whole tumour, or None.
        affine: (4, 4) float64, voxel index → millimetres in the reference's RAS+ scanner space.
        other_affines: Affines of the sequences that do not lie on the reference's grid.
        mask_on: The sequence on whose grid the mask lies; None for the reference.
        motions: Sequence → (4, 4) rigid map from the reference's scanner space to that sequence's; identity if absent.
    """

    images: Mapping[str, FloatVolume]
    mask: MaskVolume | None
    affine: Affine
    other_affines: Mapping[str, Affine] = field(default_factory=dict)
    mask_on: str | None = None
    motions: Mapping[str, Affine] = field(default_factory=dict)

    @property
    def reference(self) -> str:
        """Name of the first sequence, whose grid and space the others are brought to."""
        return next(iter(self.images))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (X, Y, Z) of the reference, and of every volume once they share a grid."""
        shape = self.images[self.reference].shape
        return shape[0], shape[1], shape[2]

    @property
    def on_one_grid(self) -> bool:
        """Whether every sequence lies on the reference's grid."""
        return not self.other_affines

    def affine_of(self, sequence: str) -> Affine:
        """Return the affine of one sequence's grid."""
        return self.other_affines.get(sequence, self.affine)

    @property
    def brain(self) -> npt.NDArray[np.bool_]:
        """Voxels (X, Y, Z) that are non-zero in some sequence; needs one grid."""
        seen = np.zeros(self.shape, dtype=bool)
        for data in self.images.values():
            seen |= data != 0
        return seen

    def with_images(self, images: Mapping[str, FloatVolume]) -> CaseVolumes:
        """Return the same case with other intensities on the same grids."""
        return replace(self, images=images)


class PreprocessStep(ABC):
    """One registered step, and the way back for probability maps.

    `apply` is called once for each case, in worker processes, on a step made with the options of
    ``preprocess.step_options`` as keyword arguments; `revert` once for each predicted map, in the reverse order of the
    steps, on a step made without options, with the record that `apply` returned for that case.
    """

    joins_grids: ClassVar[bool] = False
    """Whether the step brings sequences of different grids onto the reference's; one of the steps must, or a case whose
    sequences lie on different grids is refused."""

    takes_many_grids: ClassVar[bool] = False
    """Whether the step can run before that one."""

    def check(self) -> None:  # noqa: B027 - most steps need nothing
        """Make sure that what the step needs is there. Called once for each run, before the first case.

        Raises:
            GliomaNasError: A file, program or package is missing; say which, and how to get it.
        """

    def check_cohort(self, voxel_hashes: Iterable[str]) -> str | None:
        """Make sure that the step has not learned from the patients it is used on. Called once, after the last case.

        Args:
            voxel_hashes: Of every scan of the cohort, see `glioma_nas.images.Volume.voxel_hash`.

        Returns:
            A sentence for the manifest, or None.

        Raises:
            LeakageError: It has, and nobody allowed it.
        """
        return None

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
        """Map a probability map from the reference's grid after the step to that before it.

        Args:
            probability: (X, Y, Z) float32 in [0, 1].
            record: What `apply` returned.
        """


class IntensityStep(PreprocessStep):
    """A step that changes intensities and moves no voxel."""

    takes_many_grids = True

    def revert(self, probability: FloatVolume, record: Mapping[str, Any]) -> FloatVolume:
        """Return the map as it is: intensities do not move voxels."""
        return probability
