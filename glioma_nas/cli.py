"""The command line. Heavy libraries are imported inside the commands, so that ``--help`` is quick.

Exit status: 0 done; 1 our fault, with a traceback; 2 the user's mistake, in one line; 130 interrupted, run again to
continue.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import typer

from glioma_nas import __version__
from glioma_nas.errors import ConfigError, GliomaNasError, did_you_mean
from glioma_nas.pipeline import STAGE_NAMES, STAGES
from glioma_nas.progress import Progress

app = typer.Typer(
    name="glioma-nas",
    help="Search, distil and export fast glioma segmentation networks, and predict IDH and Ki67 from their masks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
cohort_app = typer.Typer(help="Check or make cohorts.", no_args_is_help=True)
app.add_typer(cohort_app, name="cohort")

# Newer releases of typer carry their own copy of click, older ones import it; this is the class either raises.
_USAGE_ERROR: type[Exception] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

_options: dict[str, Any] = {"debug": False, "plain": False, "verbose": False}

ConfigArgument = Annotated[Path, typer.Argument(help="YAML configuration", show_default=False)]
OutOption = Annotated[
    Path | None, typer.Option("--out", help="run folder [default: runs/CONFIG_NAME]", show_default=False)
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="override a key: --set train.epochs=20", show_default=False)
]
PluginOption = Annotated[list[Path] | None, typer.Option("--plugin", help="local plugin file", show_default=False)]
ForceOption = Annotated[bool, typer.Option("--force", help="run again even when done with the same inputs")]
JsonOption = Annotated[bool, typer.Option("--json", help="machine-readable output")]


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="print the version and leave")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show tracebacks of mistakes too")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="log what happens inside")] = False,
    plain: Annotated[bool, typer.Option("--plain", help="plain progress lines even on a terminal")] = False,
) -> None:
    """Search, distil and export fast glioma segmentation networks, and predict IDH and Ki67 from their masks."""
    _options.update(debug=debug, plain=plain, verbose=verbose)
    if not verbose:
        # Advice of these libraries to their direct users; what concerns ours is raised as an error of our own.
        for library in _CHATTY_LIBRARIES:
            warnings.filterwarnings("ignore", module=rf"{library}(\..*)?$")
    if version:
        typer.echo(f"glioma-nas {__version__}")
        raise typer.Exit


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="run folder")] = Path("runs/demo"),
    patients: Annotated[int, typer.Option("--patients", min=12, help="synthetic patients")] = 36,
    seed: Annotated[int, typer.Option("--seed", min=0, help="seed of cohort and run")] = 0,
    override: SetOption = None,
) -> None:
    """Run the whole pipeline on a synthetic cohort: a few minutes on a CPU, ends in report.html."""
    import yaml

    from glioma_nas.config import load_config
    from glioma_nas.files import require_writable, write_text
    from glioma_nas.pipeline import MIN_FREE_BYTES
    from glioma_nas.synthetic_cohort import write_synthetic_cohort

    require_writable(out, free_bytes=MIN_FREE_BYTES)
    with _shown_progress() as progress:
        sheet = write_synthetic_cohort(out / "cohort", patients, seed, progress=progress)
    preset = yaml.safe_load(resources.files("glioma_nas").joinpath("demo.yaml").read_text(encoding="utf-8"))
    preset["seed"] = seed
    preset["cohort"]["sheet"] = str(sheet.resolve())
    path = out / "demo.yaml"
    write_text(path, yaml.safe_dump(preset, sort_keys=False))
    _run_stages(load_config(path, override or []), out, STAGE_NAMES, force=False)


@app.command()
def run(
    config: ConfigArgument,
    out: OutOption = None,
    override: SetOption = None,
    plugin: PluginOption = None,
    force: ForceOption = False,
) -> None:
    """Run all stages; those done with the same inputs are skipped, a half-done one continues."""
    _run_stages(_load(config, override, plugin), _run_folder(config, out), STAGE_NAMES, force=force)


def _stage_command(name: str, summary: str) -> None:
    def command(
        config: ConfigArgument,
        out: OutOption = None,
        override: SetOption = None,
        plugin: PluginOption = None,
        force: ForceOption = False,
    ) -> None:
        _run_stages(_load(config, override, plugin), _run_folder(config, out), (name,), force=force)

    app.command(name, help=f"Stage alone: {summary}.")(command)


for _stage in STAGES:
    _stage_command(_stage.name, _stage.summary)


@cohort_app.command("synth")
def cohort_synth(
    out: Annotated[Path, typer.Option("--out", help="folder to fill")],
    patients: Annotated[int, typer.Option("--patients", min=1)] = 40,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
) -> None:
    """Write a synthetic glioma cohort: NIfTI files and a sheet."""
    from glioma_nas.files import require_writable
    from glioma_nas.synthetic_cohort import write_synthetic_cohort

    require_writable(out)
    with _shown_progress() as progress:
        sheet = write_synthetic_cohort(out, patients, seed, progress=progress)
    typer.echo(sheet)


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
    _load_plugins(plugin or [])
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
    from glioma_nas.pipeline import versions

    rows = [[name, "ok" if value != "not installed" else "missing", value] for name, value in versions().items()]
    rows.append(["cpu", "ok", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"])
    rows.append(["memory", "ok", f"{psutil.virtual_memory().available / 1e9:.1f} GB available"])
    rows.append(["disk", "ok", f"{shutil.disk_usage('.').free / 1e9:.1f} GB free here"])
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    rows.append(["cuda", "ok" if gpus else "absent", ", ".join(gpus) or "no CUDA device; set device: cpu"])
    for name, usable, detail in describe_backends():
        rows.append([f"latency backend {name}", "ok" if usable else "missing", detail])
    print_table("Doctor", ["item", "state", "detail"], rows, as_json=as_json)


def main() -> None:
    """Entry point of the ``glioma-nas`` command."""
    # Threads that spin while they wait make every other process on the machine crawl, and crawl themselves as soon as
    # there is one; sleeping instead costs microseconds. It must be set before torch loads its OpenMP runtime.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        status = int(app(standalone_mode=False) or 0)
    except GliomaNasError as err:
        if _options["debug"]:
            traceback.print_exc()
        _complain(f"error: {err}")
        status = 2
    except _USAGE_ERROR as err:
        err.show()  # type: ignore[attr-defined]  # the class is typer's own copy of click's
        status = 2
    except (KeyboardInterrupt, typer.Abort):
        status = 130
    sys.exit(status)


def _run_stages(config: Any, folder: Path, names: tuple[str, ...], *, force: bool) -> None:
    from glioma_nas.pipeline import Pipeline

    _load_plugins(config.plugins)
    try:
        with _shown_progress() as progress:
            Pipeline(config, folder, progress).run(names, force=force)
    except KeyboardInterrupt:
        # Here and not in `main`, because typer ends the process itself when an interrupt reaches it.
        _complain("interrupted; run the same command again to continue")
        raise typer.Exit(130) from None
    last = folder.resolve() / names[-1]
    typer.echo(last / "report.html" if names[-1] == "report" else last)


def _load(config: Path, override: list[str] | None, plugin: list[Path] | None) -> Any:
    from glioma_nas.config import load_config

    loaded = load_config(config, override or [])
    extra = tuple(path.expanduser().resolve() for path in plugin or [])
    return loaded.model_copy(update={"plugins": (*loaded.plugins, *extra)})


def _load_plugins(paths: Any) -> None:
    from glioma_nas.registry import load_file

    for path in paths:
        load_file(path)


def _run_folder(config: Path, out: Path | None) -> Path:
    return out if out is not None else Path("runs") / config.stem


def _complain(text: str) -> None:
    sys.stderr.write(text + "\n")


_CHATTY_LIBRARIES = (
    "pytorch_lightning",
    "lightning_fabric",
    "lightning_utilities",
    "nni",
    "torch",
    "monai",
    "nilearn",
    "sklearn",
)


@contextmanager
def _shown_progress() -> Iterator[Progress]:
    """Show progress, and log records above it rather than across it."""
    from glioma_nas.console import LogHandler, make_progress

    progress = make_progress(force_plain=_options["plain"])
    handler = LogHandler(progress)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    if not _options["verbose"]:
        handler.addFilter(_OwnRecords())
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.INFO if _options["verbose"] else logging.WARNING)
    try:
        yield progress
    finally:
        root.removeHandler(handler)


class _OwnRecords(logging.Filter):
    """Let through our own records, and other libraries' errors.

    NNI's are left out: it logs "failed to be executed" for every exception that it then raises again, an interrupt too.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        library = record.name.split(".")[0]
        return library == "glioma_nas" or (record.levelno >= logging.ERROR and library != "nni")
