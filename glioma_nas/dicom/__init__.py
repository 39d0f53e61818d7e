"""From folders of DICOM to a cohort: find the series, recognise the sequences, let the user correct, convert.

`import_dicom` does all of it; the review sheet ``series.csv`` is where a person has the last word.
"""

from glioma_nas.dicom.importing import ImportResult, import_dicom

__all__ = ["ImportResult", "import_dicom"]
