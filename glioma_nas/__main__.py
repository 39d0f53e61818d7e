"""Run the command line with ``python -m glioma_nas``."""

from __future__ import annotations

from glioma_nas.cli import main

if __name__ == "__main__":
    main()
