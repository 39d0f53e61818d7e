"""Skull strippers that are programs of their own, with weights the user has: HD-BET and SynthStrip.

Neither is part of this project, and nothing is ever downloaded: the program must be on the PATH and the weights must be
named. Both run in a folder of their own that is deleted afterwards.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from abc import abstractmethod
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt

from glioma_nas.errors import BackendError, ConfigError, ImageError
from glioma_nas.grids import same_grid, turn_onto
from glioma_nas.images import Affine, FloatVolume, read_mask
from glioma_nas.preprocess_steps.skull_strip import SkullStrip
from glioma_nas.registry import preprocess_steps

_MAX_SECONDS = 1800
_HD_BET_FOLDER = "hd-bet_params"
_HD_BET_WEIGHTS = "release_2.0.0/fold_all/checkpoint_final.pth"


class ExternalStrip(SkullStrip):
    """Base of the adapters.

    Args:
        weights: File or folder of weights.
        sequence: See `SkullStrip`.
    """

    works_on = ("t1ce", "t1")
    sure_in = None
    step: str
    program: str
    where: str

    def __init__(self, *, weights: str | None = None, sequence: str | None = None) -> None:
        super().__init__(sequence=sequence)
        self.weights = None if weights is None else Path(weights).expanduser().resolve()

    def check(self) -> None:
        """See `PreprocessStep.check`.

        Raises:
            ConfigError: No weights are given, or they do not exist.
            BackendError: The program is not on the PATH.
        """
        if self.weights is None:
            raise ConfigError(
                f"preprocess step '{self.step}' needs preprocess.step_options.{self.step}.weights: nothing is "
                f"downloaded at run time; fetch them once ({self.where}) and give their path"
            )
        if not self.weights.exists():
            raise ConfigError(
                f"preprocess.step_options.{self.step}.weights: {self.weights}: no such file or folder; fetch the "
                f"weights once ({self.where}) and give their path"
            )
        if shutil.which(self.program) is None:
            raise BackendError(
                f"preprocess step '{self.step}' needs the program '{self.program}', which is not on the PATH; install "
                f"it ({self.where}), or use 'strip_deepbet' or 'strip_template'"
            )

    @abstractmethod
    def command(self, program: str, scan: Path, folder: Path) -> tuple[list[str], Path]:
        """Return the command line, and the mask it will write into ``folder``."""

    def environment(self) -> dict[str, str]:
        """Return the environment of the program."""
        return {**os.environ, "OMP_NUM_THREADS": "1"}

    def brain_mask(self, data: FloatVolume, affine: Affine) -> npt.NDArray[np.bool_]:
        """See `SkullStrip.brain_mask`.

        Raises:
            BackendError: The program fails or takes longer than half an hour.
        """
        self.check()
        with tempfile.TemporaryDirectory(prefix="glioma_nas_strip_") as name:
            folder = Path(name)
            scan = folder / "scan.nii.gz"
            nib.save(nib.Nifti1Image(data, affine), scan)
            command, written = self.command(str(shutil.which(self.program)), scan, folder)
            try:
                done = subprocess.run(
                    command, capture_output=True, text=True, timeout=_MAX_SECONDS, check=False, env=self.environment()
                )
            except subprocess.TimeoutExpired as err:
                raise BackendError(f"'{self.program}' did not finish within {_MAX_SECONDS} s") from err
            if done.returncode or not written.is_file():
                last = (done.stderr or done.stdout).strip().splitlines()[-1:]
                raise BackendError(
                    f"'{self.program}' ended with status {done.returncode} and no mask ({''.join(last)[:200]}); "
                    "run it by hand on the scan"
                )
            mask = read_mask(written, (1,))
        found, place = turn_onto(mask.data, mask.affine, affine)
        if found.shape != data.shape:
            raise ImageError(f"'{self.program}' wrote a mask of shape {found.shape} for a scan of shape {data.shape}")
        if not same_grid(found.shape, place, data.shape, affine):
            raise ImageError(
                f"'{self.program}' wrote a mask that lies elsewhere than the scan; run it by hand on the scan"
            )
        return np.asarray(found > 0)


@preprocess_steps.register("strip_hd_bet")
class HdBetStrip(ExternalStrip):
    """Skull stripping by HD-BET 2 (Isensee et al. 2019), installed and given weights by the user."""

    step = "strip_hd_bet"
    program = "hd-bet"
    where = "https://github.com/MIC-DKFZ/HD-BET"

    def command(self, program: str, scan: Path, folder: Path) -> tuple[list[str], Path]:
        """See `ExternalStrip.command`."""
        out = folder / "out.nii.gz"
        arguments = [
            "-i",
            str(scan),
            "-o",
            str(out),
            "-device",
            "cpu",
            "--disable_tta",
            "--save_bet_mask",
            "--no_bet_image",
        ]
        return [program, *arguments], folder / "out_bet.nii.gz"

    def check(self) -> None:
        """See `PreprocessStep.check`; the weights are a folder that HD-BET finds by its name.

        A folder without them is refused, because HD-BET would then download them.
        """
        super().check()
        assert self.weights is not None
        if self.weights.name != _HD_BET_FOLDER:
            raise ConfigError(
                f"preprocess.step_options.{self.step}.weights: {self.weights}: the folder must be called "
                f"'{_HD_BET_FOLDER}', as HD-BET names it"
            )
        if not (self.weights / _HD_BET_WEIGHTS).is_file():
            raise ConfigError(
                f"preprocess.step_options.{self.step}.weights: {self.weights}: holds no {_HD_BET_WEIGHTS}, so HD-BET "
                f"would download it; fetch the weights of version 2 once ({self.where}) and unpack them there"
            )

    def environment(self) -> dict[str, str]:
        """See `ExternalStrip.environment`: HD-BET looks for its weights in the home folder, so it gets another."""
        assert self.weights is not None
        return {**super().environment(), "HOME": str(self.weights.parent)}


@preprocess_steps.register("strip_synthstrip")
class SynthStrip(ExternalStrip):
    """Skull stripping by SynthStrip (Hoopes et al. 2022), installed and given weights by the user."""

    step = "strip_synthstrip"
    program = "mri_synthstrip"
    where = "https://surfer.nmr.mgh.harvard.edu/docs/synthstrip"

    def command(self, program: str, scan: Path, folder: Path) -> tuple[list[str], Path]:
        """See `ExternalStrip.command`."""
        out = folder / "mask.nii.gz"
        return [program, "-i", str(scan), "-m", str(out), "--model", str(self.weights)], out
