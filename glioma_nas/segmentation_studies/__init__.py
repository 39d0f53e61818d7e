"""Table 4-5 of the method's source on any cohort: segmentation networks by accuracy and speed.

`methods_study` runs the pipeline once for each seed and sums up, `methods_page` shows it.
"""
