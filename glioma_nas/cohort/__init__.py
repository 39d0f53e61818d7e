"""The patients of a run and their files, from a sheet or from a data set folder.

`read_cohort` takes a CSV, TSV or XLSX sheet, a BIDS, BraTS or nnU-Net folder, or a folder of DICOM that was imported
(`glioma_nas.dicom`), and gives the same records for all. No image is opened here. Messages name cases, never patients.
"""

from glioma_nas.cohort.reading import (
    Reading,
    cohort_fingerprint,
    examine_cohort,
    first_of,
    read_cohort,
    select_complete,
)
from glioma_nas.cohort.records import UNKNOWN_VALUES, Case, Cohort, Exclusion, Labelled, Problem, Sex

__all__ = [
    "UNKNOWN_VALUES",
    "Case",
    "Cohort",
    "Exclusion",
    "Labelled",
    "Problem",
    "Reading",
    "Sex",
    "cohort_fingerprint",
    "examine_cohort",
    "first_of",
    "read_cohort",
    "select_complete",
]
