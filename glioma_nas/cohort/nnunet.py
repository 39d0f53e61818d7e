"""An nnU-Net data set: ``dataset.json``, ``imagesTr/CASE_0000.nii.gz`` and ``labelsTr/CASE.nii.gz``.

The channels' names in ``dataset.json`` (``channel_names``, or ``modality`` of version 1) say which sequence each is.
Every case counts as a patient of its own unless ``cohort.clinical`` names a sheet with a ``patient_id`` column.
"""

from __future__ import annotations

import re
from pathlib import Path

from glioma_nas.cohort.column_names import sequence_of
from glioma_nas.cohort.records import CohortTable, Problem, Row
from glioma_nas.errors import CohortError, StorageError
from glioma_nas.files import read_json

DATASET = "dataset.json"
IMAGES = "imagesTr"
LABELS = "labelsTr"

_FILE = re.compile(r"^(?P<case>.+)_(?P<channel>\d{4})$")


def is_nnunet(folder: Path) -> bool:
    """Tell whether the folder is an nnU-Net data set."""
    return (folder / DATASET).is_file() and (folder / IMAGES).is_dir()


def read_nnunet(folder: Path) -> CohortTable:
    """Read the training cases of an nnU-Net data set.

    Raises:
        CohortError: ``dataset.json`` is damaged, a channel is no sequence we know, or there is no case.
    """
    channels, ending = _description(folder / DATASET)
    cells: dict[str, dict[str, str]] = {}
    problems: list[Problem] = []
    for path in sorted((folder / IMAGES).glob(f"*{ending}")):
        match = _FILE.match(path.name.removesuffix(ending))
        if match is None or int(match.group("channel")) not in channels:
            text = f"'{path.name}' is not named CASE_CHANNEL{ending} with a channel of {DATASET}; rename or remove it"
            problems.append(Problem(str(folder / IMAGES), text))
            continue
        case_id = match.group("case")
        row = cells.setdefault(case_id, {"case_id": case_id, "patient_id": case_id})
        row[channels[int(match.group("channel"))]] = f"{IMAGES}/{path.name}"
    for case_id, row in cells.items():
        if (folder / LABELS / f"{case_id}{ending}").exists():
            row["mask"] = f"{LABELS}/{case_id}{ending}"
    if not cells:
        raise CohortError(f"{folder}: {IMAGES} holds no file named CASE_0000{ending}; give an nnU-Net data set")
    rows = tuple(Row(str(folder / IMAGES), row) for row in cells.values())
    columns = ("case_id", "patient_id", *channels.values(), "mask")
    return CohortTable(folder, folder, columns, rows, tuple(problems))


def _description(path: Path) -> tuple[dict[int, str], str]:
    try:
        data = read_json(path)
        names = data.get("channel_names", data.get("modality"))
        channels = {int(number): str(name) for number, name in names.items()}
        ending = str(data.get("file_ending", ".nii.gz"))
    except StorageError as err:
        raise CohortError(f"{err}; restore the file") from err
    except (AttributeError, TypeError, ValueError) as err:
        raise CohortError(
            f"{path}: 'channel_names' does not map channel numbers to names; write it as nnU-Net does"
        ) from err
    if ending not in (".nii", ".nii.gz"):
        raise CohortError(f"{path}: file_ending is '{ending}'; only .nii and .nii.gz are read: convert the data set")
    sequences = {number: sequence_of(name) or name for number, name in channels.items()}
    if len(set(sequences.values())) != len(sequences):
        raise CohortError(f"{path}: two channels are called {', '.join(channels.values())}; give each its own sequence")
    return sequences, ending
