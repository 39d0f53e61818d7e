"""Find the brain with deepbet, a network whose weights come inside its wheel (MIT licence)."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt

from glioma_nas.errors import BackendError, ImageError
from glioma_nas.images import Affine, FloatVolume
from glioma_nas.preprocess_steps.skull_strip import SkullStrip
from glioma_nas.registry import preprocess_steps


@preprocess_steps.register("strip_deepbet")
class DeepbetStrip(SkullStrip):
    """Skull stripping by deepbet (Fisch et al. 2024), trained on T1-weighted scans of healthy adults.

    https://doi.org/10.1016/j.compbiomed.2024.108845. It runs on one CPU thread, for the same result everywhere.
    """

    def check(self) -> None:
        """See `PreprocessStep.check`."""
        _network()

    def brain_mask(self, data: FloatVolume, affine: Affine) -> npt.NDArray[np.bool_]:
        """See `SkullStrip.brain_mask`.

        Raises:
            BackendError: deepbet is not installed.
            ImageError: It finds no brain.
        """
        import torch

        network = _network()
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            _, mask, _ = network.run(nib.Nifti1Image(data, affine))
        except (AssertionError, ValueError) as err:
            raise ImageError(
                f"deepbet finds no brain ({err}); try 'strip_template', or strip the scan elsewhere"
            ) from err
        finally:
            torch.set_num_threads(threads)
        return np.asarray(mask.dataobj) > 0


@lru_cache(maxsize=1)
def _network() -> Any:  # deepbet has no types
    try:
        from deepbet.bet import BrainExtraction
    except ImportError as err:
        raise BackendError(
            f"preprocess step 'strip_deepbet' needs deepbet ({err}); pip install 'glioma-nas[skull-strip]', or use "
            "'strip_template'"
        ) from err
    return BrainExtraction(no_gpu=True)
