"""Read the sheet of labels that an import of DICOM joins by PatientID, without what would tell who somebody is."""

from __future__ import annotations

from pathlib import Path

from glioma_nas.cohort.cells import MAX_AGE_YEARS, read_age
from glioma_nas.cohort.column_names import known_column
from glioma_nas.cohort.spreadsheet import read_spreadsheet
from glioma_nas.errors import CohortError
from glioma_nas.privacy.label_columns import telling_columns
from glioma_nas.privacy.text_patterns import KnownIdentifiers

_OURS = ("case_id", "patient_id", "mask", "age", "sex")
_OLDEST_YEARS = 90.0


def read_clinical_sheet(path: Path) -> tuple[dict[str, dict[str, str]], dict[str, Path], list[str]]:
    """Return the labels and the mask of each PatientID, and which columns were left out and why, one line each.

    Raises:
        CohortError: The sheet cannot be read, lacks the column, or a line is of nobody or of a patient named before.
    """
    header, lines = read_spreadsheet(path)
    names = {heading: known_column(heading) or heading for heading in header}
    if "patient_id" not in names.values():
        raise CohortError(f"{path}: no column 'patient_id' (columns: {', '.join(header)}); it holds DICOM's PatientID")
    free = {heading: names[heading] for heading in header if names[heading] not in _OURS}
    cells_of = {name: [cells[heading] for _, cells in lines] for heading, name in free.items()}
    patients = [cells[heading] for _, cells in lines for heading in header if names[heading] == "patient_id"]
    telling = telling_columns(cells_of, KnownIdentifiers(dict.fromkeys(patients, "patient id")))
    labels: dict[str, dict[str, str]] = {}
    masks: dict[str, Path] = {}
    for line, cells in lines:
        person = {names[heading]: cell for heading, cell in cells.items() if cell and names[heading] not in telling}
        patient = person.pop("patient_id", "")
        if not patient or patient in labels:
            fault = "stands there for the second time; keep one" if patient else "is empty; fill it or delete the line"
            raise CohortError(f"{path}: line {line}: patient_id {fault}")
        person.pop("case_id", None)
        if age := person.get("age"):
            person["age"] = shown_age(age) or age  # what is no age is refused where the cohort is read
        if mask := person.pop("mask", ""):
            masks[patient] = path.parent / mask
        labels[patient] = person
    left_out = [f"{path.name}: column '{name}' was left out ({why})" for name, why in telling.items()]
    return labels, masks, left_out


def shown_age(text: str) -> str:
    """Return an age as it may be written down, empty for what is none."""
    try:
        age = read_age("", text)
    except CohortError:
        age = None
    if age is None or age > MAX_AGE_YEARS:
        return ""
    # Above 89 so few people are left that an age identifies them (US rule 45 CFR 164.514).
    return f"{min(age, _OLDEST_YEARS):.4g}"
