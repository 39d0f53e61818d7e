"""Reproduce the published tables about molecular markers on any cohort."""
