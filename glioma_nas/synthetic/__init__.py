"""Synthetic glioma patients: labels, anatomy, a grown tumour, contrasts, a scanner.

`glioma_nas.synthetic_cohort` writes whole cohorts of them.
"""
