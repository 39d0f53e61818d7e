"""Serve new patients with a finished run: its networks, thresholds and preprocessing frozen as they are.

`frozen_run` opens the run, `case_inputs` finds the scans of the new cases, `prediction` segments them and predicts
their markers, `case_page` shows the result on one page.
"""
