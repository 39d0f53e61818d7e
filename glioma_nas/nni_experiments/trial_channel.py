"""The trial's side of the talk with NNI: hyper-parameters in, epochs and the final result out.

It keeps NNI's channel itself and leaves ``nni.get_current_parameter()`` empty. The strategies that run inside a
co-search trial are NNI experiments of their own, in this process; evaluators must report to them, not to the trial.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glioma_nas.errors import GliomaNasError
from glioma_nas.files import read_json, write_json

SENT_FILE = "intermediate_sent.json"
EPOCHS_FILE = "epochs.json"


class TrialChannel:
    """Talk with the NNI manager that started this process.

    Epochs are kept in the trial's work folder, so that a trial that continues after an interruption, or finds itself
    finished before, shows its whole curve and no epoch twice.
    """

    def __init__(self) -> None:
        from nni.runtime.trial_command_channel import get_default_trial_command_channel

        self._channel = get_default_trial_command_channel()
        record = self._channel.receive_parameter()
        if record is None:
            raise GliomaNasError("NNI gave this trial no hyper-parameters; was its experiment stopped?")
        self._parameter_id = record.get("parameter_id")
        self.parameters: dict[str, Any] = dict(record["parameters"])
        self.trial_id = os.environ.get("NNI_TRIAL_JOB_ID", "STANDALONE")
        self.output_folder = Path(os.environ.get("NNI_OUTPUT_DIR") or ".").resolve()
        self._epochs_file: Path | None = None
        self._epochs: list[dict[str, float]] = []
        self._resumed = False

    def open(self, work_folder: Path) -> None:
        """Send the epochs that an earlier attempt left in ``work_folder`` and that NNI has not seen."""
        self._epochs_file = work_folder / EPOCHS_FILE
        self._epochs = read_json(self._epochs_file) if self._epochs_file.is_file() else []
        self._resumed = bool(self._epochs)
        self._send_new()

    @property
    def epochs(self) -> tuple[dict[str, float], ...]:
        """The figures of every epoch so far, earlier attempts included."""
        return tuple(self._epochs)

    def report_epoch(self, metrics: Mapping[str, float]) -> int:
        """Report the figures of an epoch and return its number within the trial, from 0."""
        assert self._epochs_file is not None, "open() comes first"
        # An attempt that was cut off between reporting and its checkpoint does the epoch again. On a GPU the figures
        # need not be equal to the last bit; NNI keeps those that it has seen.
        if not self._resumed or any(self._epochs[-1].get(key) != metrics.get(key) for key in ("stage", "epoch")):
            self._epochs.append(dict(metrics))
            write_json(self._epochs_file, self._epochs)
            self._send_new()
        self._resumed = False
        return len(self._epochs) - 1

    def report_final(self, metrics: Mapping[str, float | None]) -> None:
        """Report the final result."""
        self._send("FINAL", 0, metrics)

    def _send_new(self) -> None:
        sent_file = self.output_folder / SENT_FILE
        sent = int(read_json(sent_file)) if sent_file.is_file() else 0
        for number in range(sent, len(self._epochs)):
            self._send("PERIODICAL", number, self._epochs[number])
            write_json(sent_file, number + 1)

    def _send(self, kind: str, sequence: int, value: Any) -> None:
        self._channel.send_metric(
            type=kind, parameter_id=self._parameter_id, trial_job_id=self.trial_id, sequence=sequence, value=value
        )
