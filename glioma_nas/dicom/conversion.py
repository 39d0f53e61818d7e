"""Convert one DICOM series to one NIfTI file with dcm2niix, without anything that tells who it is.

dcm2niix runs with ``-ba y``; even so it writes the acquisition's time into the header and the series' description into
the sidecar, so the header is scrubbed and of the sidecar only physical parameters are kept.
"""

from __future__ import annotations

import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from glioma_nas.errors import GliomaNasError, ImageError, ResourceError
from glioma_nas.files import read_json, write_json
from glioma_nas.images import read_volume
from glioma_nas.privacy.nifti_header import scrub_nifti

SIDECAR_KEYS = (
    "Modality", "MagneticFieldStrength", "Manufacturer", "MRAcquisitionType", "ScanningSequence", "SequenceVariant",
    "EchoTime", "RepetitionTime", "InversionTime", "FlipAngle", "EchoTrainLength", "SliceThickness",
    "SpacingBetweenSlices", "PixelBandwidth", "AcquisitionMatrixPE", "ReconMatrixPE", "ConversionSoftware",
    "ConversionSoftwareVersion",
)  # fmt: skip

_TIMEOUT_S = 600


@dataclass(frozen=True)
class ConversionTask:
    """What a worker gets: the files of one series, and where its NIfTI goes."""

    files: tuple[Path, ...]
    target: Path


def convert_series(task: ConversionTask) -> str | None:
    """Convert a series; return what went wrong as one line without paths, or None.

    Never raises for a bad series, so that one never stops the others.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="glioma_nas_dicom_") as scratch:
            _convert(task, Path(scratch))
    except GliomaNasError as err:
        return str(err)
    return None


def _convert(task: ConversionTask, scratch: Path) -> None:
    source, result = scratch / "in", scratch / "out"
    source.mkdir()
    result.mkdir()
    for index, path in enumerate(task.files):
        # Plain names, so that no file name reaches the converter's command line or its output.
        (source / f"{index:06d}.dcm").symlink_to(path.resolve())
    done = _run_converter(source, result)
    volumes = sorted(result.glob("*.nii.gz"))
    if not volumes:
        raise ImageError(f"dcm2niix made nothing of {len(task.files)} files (status {done}); look at the series")
    if len(volumes) > 1:
        raise ImageError(
            f"dcm2niix made {len(volumes)} volumes of the series (uneven slices, several echoes or orientations); "
            "choose another series, or convert it by hand"
        )
    (volume,) = volumes
    try:
        read_volume(volume)
    except ImageError as err:
        raise ImageError(str(err).replace(f"{volume}: ", "")) from err
    sidecar = volume.with_name(volume.name.replace(".nii.gz", ".json"))
    kept = read_json(sidecar) if sidecar.is_file() else {}
    write_json(
        task.target.with_name(task.target.name.replace(".nii.gz", ".json")),
        {key: kept[key] for key in SIDECAR_KEYS if key in kept},
    )
    scrub_nifti(volume, task.target)


def _run_converter(source: Path, result: Path) -> int:
    command = [_converter(), "-b", "y", "-ba", "y", "-z", "i", "-f", "scan", "-o", str(result), str(source)]
    try:
        # Its output names patients and files, so nobody gets to see it.
        return subprocess.run(command, capture_output=True, check=False, timeout=_TIMEOUT_S).returncode
    except subprocess.TimeoutExpired as err:
        raise ResourceError(f"dcm2niix took over {_TIMEOUT_S} s; look at the series") from err
    except OSError as err:
        raise ResourceError(f"dcm2niix cannot be started ({err.strerror or err}); pip install dcm2niix") from err


def _converter() -> str:
    try:
        import dcm2niix
    except ImportError as err:
        raise ResourceError("dcm2niix is not installed; pip install dcm2niix") from err
    return str(dcm2niix.bin)
