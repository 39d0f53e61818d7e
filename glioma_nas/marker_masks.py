"""Where the tumour masks that feed a marker classifier come from, and the proof that they are out-of-fold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glioma_nas.config import RunConfig
from glioma_nas.errors import CohortError, ConfigError, StorageError, did_you_mean
from glioma_nas.files import read_json
from glioma_nas.markers import check_out_of_fold
from glioma_nas.prepared import PreparedCase

EXPERT = "expert"
GIVEN = "given"
PROVENANCE_FILE = "provenance.json"


@dataclass(frozen=True)
class MaskSource:
    """Masks of one origin.

    Attributes:
        name: ``expert``, ``given`` or the name of a network.
        folder: Where ``<case_id>.npy`` lie, uint8 (Z, H, W) on the prepared grid; none for masks of the sheet.
        provenance: Case id → which network made its mask and which patients that was trained on; none when people drew
            them.
        record: The file ``provenance`` was read from, for messages.
    """

    name: str
    folder: Path | None
    provenance: Mapping[str, Mapping[str, Any]] | None
    record: Path | None

    @property
    def words(self) -> str:
        """What a report calls them."""
        if self.name == EXPERT:
            return "drawn by experts, from the sheet"
        if self.name == GIVEN:
            return "given in the sheet, out-of-fold by their provenance"
        return f"out-of-fold predictions of the {self.name}"

    def check(self, cases: Sequence[PreparedCase]) -> None:
        """Make sure that every case has a mask and that no mask comes from a network that saw its patient.

        Raises:
            LeakageError: A network saw the patient, or it is not recorded whom it saw.
            CohortError: A case has no mask in the sheet.
        """
        if self.provenance is not None and self.record is not None:
            check_out_of_fold(self.provenance, cases, source=self.record)
        if self.folder is None:
            without = [case.case_id for case in cases if not case.has_mask]
            if without:
                raise CohortError(
                    f"classify.masks is '{self.name}', but case {without[0]} has no mask in the sheet ({len(without)} "
                    "such cases); fill the column, leave the case out, or use a network's masks"
                )

    def read(self, case: PreparedCase) -> NDArray[np.uint8]:
        """Return a case's mask on the prepared grid, (Z, H, W), non-zero is tumour.

        Raises:
            StorageError: The file is missing or damaged.
        """
        if self.folder is None:
            mask = case.mask()
            assert mask is not None, "check() was not called"
            return mask
        path = self.folder / f"{case.case_id}.npy"
        try:
            found: NDArray[np.uint8] = np.load(path, allow_pickle=False)
        except (OSError, ValueError) as err:
            raise StorageError(
                f"{path}: predicted mask missing or damaged ({err}); run the segment stage again"
            ) from err
        return found


def mask_source(config: RunConfig, segment_folder: Path | None) -> MaskSource:
    """Find the masks ``classify.masks`` names.

    Args:
        config: The run's configuration.
        segment_folder: Finished folder of the segment stage; none when it was not run.

    Raises:
        ConfigError: There is no such network, or ``given`` masks come without provenance.
        StorageError: The provenance is missing or not JSON.
    """
    name = config.classify.masks
    if name == EXPERT:
        return MaskSource(EXPERT, None, None, None)
    if name == GIVEN:
        if config.classify.mask_provenance is None:
            raise ConfigError(
                "classify.masks is 'given': set classify.mask_provenance to a JSON file that says for each case which "
                "network made its mask and which patients it was trained on, or masks: expert if people drew them"
            )
        record = config.cohort.sheet.parent / config.classify.mask_provenance
        provenance = read_json(record)
        if not isinstance(provenance, dict) or not all(isinstance(entry, dict) for entry in provenance.values()):
            raise ConfigError(f"{record}: not an object of case id → {{network, train_patients}}; see docs/markers.md")
        return MaskSource(GIVEN, None, provenance, record)
    if segment_folder is None:
        raise ConfigError(
            f"classify.masks is '{name}', but nothing was segmented; run the segment stage, or use expert"
        )
    masks = segment_folder / "masks_prepared"
    known = sorted(path.name for path in masks.iterdir() if path.is_dir()) if masks.is_dir() else []
    if name not in known:
        raise ConfigError(f"classify.masks: unknown network '{name}': {did_you_mean(name, [*known, EXPERT, GIVEN])}")
    record = masks / name / PROVENANCE_FILE
    return MaskSource(name, masks / name, read_json(record), record)
