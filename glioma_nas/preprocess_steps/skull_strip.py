"""What the skull-stripping steps have in common: find the brain in one sequence, set everything outside it to 0."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
import numpy.typing as npt

from glioma_nas.case_volumes import CaseVolumes, IntensityStep
from glioma_nas.config import PreprocessConfig
from glioma_nas.errors import ImageError
from glioma_nas.grids import spacing_mm
from glioma_nas.images import Affine, FloatVolume

BRAIN_ML = (600.0, 2500.0)
"""Volumes between which a brain mask is believable; adult intracranial contents lie between about 1000 and 1900 ml."""


class SkullStrip(IntensityStep):
    """Base of the skull-stripping steps; a subclass says where the brain is in one scan.

    Args:
        sequence: The sequence the brain is found in. None for the reference when it is one of ``works_on``, since it
            alone was not interpolated, which blurs thick slices; else for the first of ``works_on`` that the case has;
            else for the reference.
    """

    takes_many_grids = False
    works_on: tuple[str, ...] = ("t1", "t1ce")
    sure_in: tuple[str, ...] | None = ("t1", "t1ce")
    """Sequences in which the step was shown to find brains; None for any. In another one its outline is doubtful, which
    the quality control then says."""

    def __init__(self, *, sequence: str | None = None) -> None:
        self.sequence = sequence

    @abstractmethod
    def brain_mask(self, data: FloatVolume, affine: Affine) -> npt.NDArray[np.bool_]:
        """Return the brain of a head (X, Y, Z) as a mask of the same shape, meninges and skull left out.

        Called once for each case, in worker processes.
        """

    def apply(self, volumes: CaseVolumes, config: PreprocessConfig) -> tuple[CaseVolumes, dict[str, Any]]:
        """See `PreprocessStep.apply`; the record says in which sequence the brain was found, its volume, and any doubt.

        Raises:
            ImageError: The mask is no brain: see `BRAIN_ML`.
        """
        name = self._sequence(volumes)
        brain = self.brain_mask(volumes.images[name], volumes.affine)
        volume_ml = float(brain.sum()) * float(spacing_mm(volumes.affine).prod()) / 1000
        if not BRAIN_ML[0] <= volume_ml <= BRAIN_ML[1]:
            raise ImageError(
                f"sequence '{name}': the brain found has {volume_ml:.0f} ml, expected {BRAIN_ML[0]:.0f} to "
                f"{BRAIN_ML[1]:.0f}; look at the scan, try another stripping step, or strip it elsewhere"
            )
        images: dict[str, FloatVolume] = {}
        for sequence, data in volumes.images.items():
            stripped = np.where(brain, data, 0).astype(np.float32)
            if not stripped.any():
                raise ImageError(f"sequence '{sequence}': nothing is left inside the brain; do the sequences overlap?")
            images[sequence] = stripped
        record = {"sequence": name, "brain_ml": round(volume_ml, 2), "doubt": None}
        if self.sure_in is not None and name not in self.sure_in:
            record["doubt"] = f"brain found in {name}, where this step is less sure than in {' or '.join(self.sure_in)}"
        return volumes.with_images(images), record

    def _sequence(self, volumes: CaseVolumes) -> str:
        if self.sequence is not None:
            if self.sequence not in volumes.images:
                raise ImageError(
                    f"sequence '{self.sequence}', in which the brain is to be found, is missing; add the file or "
                    "leave out preprocess.step_options.….sequence"
                )
            return self.sequence
        if volumes.reference in self.works_on:
            return volumes.reference
        return next((name for name in self.works_on if name in volumes.images), volumes.reference)
