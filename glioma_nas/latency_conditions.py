"""Make sure that a latency table speaks of the machine it is going to be used on, or is meant to be of another one."""

from __future__ import annotations

import dataclasses

from glioma_nas.config import RunConfig
from glioma_nas.errors import BackendError
from glioma_nas.latency_backend import open_backend
from glioma_nas.latency_devices import processor_of
from glioma_nas.latency_records import LatencyTable


def require_table_of_this_machine(table: LatencyTable, config: RunConfig) -> None:
    """Refuse a table that the configured engine would not have measured here, unless the run is for another device.

    How many cores this process may use does not count: the table's times were taken with theirs.

    Args:
        table: What networks are priced with.
        config: The run's configuration; with ``search_for_another_device`` any table will do.

    Raises:
        BackendError: The table is of another device, engine, version, precision or number of threads, or the engine
            cannot be opened here, so that nothing can be said.
    """
    if config.search_for_another_device:
        return
    options = config.latency
    advice = "or set search_for_another_device: true, if the networks are meant for the device of the table"
    try:
        here = open_backend(options.backend, options.precision).environment(threads=options.threads)
    except BackendError as err:
        raise BackendError(f"{table.source}: cannot be compared with this machine, {err}; {advice}") from err
    if processor_of(here.device) == processor_of(table.environment.device):
        here = dataclasses.replace(here, device=table.environment.device)
    try:
        table.require_same_environment(here)
    except BackendError as err:
        raise BackendError(f"{err} (glioma-nas latency build --force); {advice}") from err
