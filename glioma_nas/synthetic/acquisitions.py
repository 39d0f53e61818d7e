"""How each synthetic sequence says that it was acquired, in the words of DICOM and BIDS."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

FIELD_STRENGTH_T = 3.0
MANUFACTURER = "glioma_nas synthetic"


@dataclass(frozen=True)
class Protocol:
    """One sequence's parameters, typical of clinical brain protocols.

    Attributes:
        number: Series number.
        folder: Name of its DICOM folder.
        description: Series description.
        repetition_ms: Repetition time.
        echo_ms: Echo time.
        inversion_ms: Inversion time, or None.
        contrast: Name of the contrast agent, or empty.
    """

    number: int
    folder: str
    description: str
    repetition_ms: float
    echo_ms: float
    inversion_ms: float | None = None
    contrast: str = ""

    def sidecar(self) -> dict[str, Any]:
        """Return the BIDS sidecar; times in seconds."""
        fields: dict[str, Any] = {
            "Modality": "MR",
            "Manufacturer": MANUFACTURER,
            "MagneticFieldStrength": FIELD_STRENGTH_T,
            "SeriesDescription": self.description,
            "RepetitionTime": self.repetition_ms / 1000,
            "EchoTime": self.echo_ms / 1000,
        }
        if self.inversion_ms is not None:
            fields["InversionTime"] = self.inversion_ms / 1000
        if self.contrast:
            fields["ContrastBolusIngredient"] = self.contrast
        return fields


PROTOCOLS = {
    "t1": Protocol(2, "T1", "AX T1 SE", 550, 10),
    "t1ce": Protocol(5, "T1C", "AX T1 SE POST GD", 550, 10, contrast="GADOLINIUM"),
    "t2": Protocol(3, "T2", "AX T2 TSE", 4500, 100),
    "flair": Protocol(4, "FLAIR", "AX T2 FLAIR", 9000, 120, inversion_ms=2500),
}
