"""The command line. Heavy libraries are imported inside the commands, so that ``--help`` is quick.

Exit status: 0 done; 1 our fault, with a traceback; 2 the user's mistake, in one line; 130 interrupted, run again to
continue.
"""

from __future__ import annotations

import os
import sys
import traceback

import typer

# Importing a module of commands adds them to the application.
from glioma_nas.cli import (  # noqa: F401
    architecture_commands,
    cohort_commands,
    compare_commands,
    component_commands,
    evaluate_commands,
    fold_commands,
    latency_commands,
    latency_study_commands,
    marker_study_commands,
    nni_commands,
    pipeline_commands,
    predict_commands,
    preprocess_commands,
    privacy_commands,
    segmentation_study_commands,
)
from glioma_nas.cli.application import app, complain, options
from glioma_nas.errors import GliomaNasError

# Newer releases of typer carry their own copy of click, older ones import it; this is the class either raises.
_USAGE_ERROR: type[Exception] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


def main() -> None:
    """Entry point of the ``glioma-nas`` command."""
    # Threads that spin while they wait make every other process on the machine crawl, and crawl themselves as soon as
    # there is one; sleeping instead costs microseconds. It must be set before torch loads its OpenMP runtime.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        status = int(app(standalone_mode=False) or 0)
    except GliomaNasError as err:
        if options["debug"]:
            traceback.print_exc()
        complain(f"error: {err}")
        status = 2
    except _USAGE_ERROR as err:
        err.show()  # type: ignore[attr-defined]  # the class is typer's own copy of click's
        status = 2
    except (KeyboardInterrupt, typer.Abort):
        status = 130
    sys.exit(status)
