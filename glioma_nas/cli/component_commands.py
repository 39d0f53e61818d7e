"""Commands that look around: ``list`` and ``doctor``."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from glioma_nas.cli.application import JsonOption, PluginOption, app, load_plugins
from glioma_nas.errors import ConfigError, did_you_mean


@app.command("list")
def list_components(
    kind: Annotated[str | None, typer.Argument(help="one kind, for example operators", show_default=False)] = None,
    plugin: PluginOption = None,
    as_json: JsonOption = False,
) -> None:
    """List what is registered: operators, search spaces, strategies, latency backends, networks and more."""
    from glioma_nas.console import print_table
    from glioma_nas.registry import REGISTRIES, broken_plugins

    if kind is not None and kind not in REGISTRIES:
        raise ConfigError(f"unknown kind '{kind}': {did_you_mean(kind, REGISTRIES)}")
    load_plugins(plugin or [])
    rows = [
        [name, entry.name, entry.summary, entry.origin]
        for name, registry in REGISTRIES.items()
        if kind in (None, name)
        for entry in registry.entries()
    ]
    rows += [["plugin", name, f"broken: {reason}", "entry point"] for name, reason in broken_plugins.items()]
    print_table("Components", ["kind", "name", "summary", "origin"], rows, as_json=as_json)


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Say what this machine offers: Python, libraries, devices, latency backends, disk."""
    import shutil

    import psutil
    import torch

    from glioma_nas.console import print_table
    from glioma_nas.latency_backend import describe_backends
    from glioma_nas.nni_experiments.loopback import guard_state
    from glioma_nas.pipeline import versions

    rows = [[name, "ok" if value != "not installed" else "missing", value] for name, value in versions().items()]
    rows.append(["cpu", "ok", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"])
    rows.append(["memory", "ok", f"{psutil.virtual_memory().available / 1e9:.1f} GB available"])
    rows.append(["disk", "ok", f"{shutil.disk_usage('.').free / 1e9:.1f} GB free here"])
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    rows.append(["cuda", "ok" if gpus else "absent", ", ".join(gpus) or "no CUDA device; set device: cpu"])
    rows.append(["nni guard", *guard_state()])
    rows += [[f"latency backend {status.name}", status.state, status.detail] for status in describe_backends()]
    print_table("Doctor", ["item", "state", "detail"], rows, as_json=as_json)
