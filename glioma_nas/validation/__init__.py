"""Check a cohort before anything is computed: every byte of every file, and every cell of the sheet.

`validate_cohort` collects findings instead of stopping at the first; `write_validation` sets them as HTML and JSON.
"""

from glioma_nas.validation.findings import CaseReport, FileFacts, Finding, grouped
from glioma_nas.validation.validating import Validation, validate_cohort, write_validation

__all__ = ["CaseReport", "FileFacts", "Finding", "Validation", "grouped", "validate_cohort", "write_validation"]
