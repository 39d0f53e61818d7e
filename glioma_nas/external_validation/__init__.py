"""Validate a finished run on patients from elsewhere: networks, classifiers and thresholds frozen.

`validation` does it, `drift` says how the new patients differ from the run's, `validation_page` shows both.
"""
