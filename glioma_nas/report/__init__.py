"""The self-contained HTML report of a run: what was read, how it is summarised, drawn and set."""
