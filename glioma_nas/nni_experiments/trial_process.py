"""The trial proper, run as a child of `glioma_nas.nni_experiments.trial_supervisor`: ``python -m … trial.yaml``."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

from glioma_nas.errors import GliomaNasError
from glioma_nas.nni_experiments.trial_supervisor import REASON_FILE


def main(settings_file: Path) -> int:
    """Run the trial; leave the reason in ``failure.txt`` of NNI's output folder when it fails."""
    try:
        from glioma_nas.nni_experiments.trial_channel import TrialChannel
        from glioma_nas.nni_experiments.trial_run import run_trial

        run_trial(settings_file, TrialChannel())
    except GliomaNasError as err:
        return _failed(str(err))
    except Exception as err:  # noqa: BLE001 - a plugin may raise anything; whatever it is becomes the trial's reason
        traceback.print_exc()
        return _failed(f"{type(err).__name__}: {err}")
    return 0


def _failed(reason: str) -> int:
    path = Path(os.environ.get("NNI_OUTPUT_DIR") or ".") / REASON_FILE
    try:
        path.write_text(" ".join(reason.split()) + "\n", encoding="utf-8")
    except OSError:
        sys.stderr.write(f"{reason}\n")  # a full disk is a likely reason in itself
    return 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
