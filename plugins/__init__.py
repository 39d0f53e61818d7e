"""Evaluator plugins that consume masks (IDH, Ki67) and baseline networks."""
