"""The application and what its commands share: options, progress, loading of configuration and plugins."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from glioma_nas import __version__
from glioma_nas.progress import Progress

if TYPE_CHECKING:
    from glioma_nas.config import RunConfig

app = typer.Typer(
    name="glioma-nas",
    help="Search, distil and export fast glioma segmentation networks, and predict IDH and Ki67 from their masks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

options: dict[str, bool] = {"debug": False, "plain": False, "verbose": False}

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
    options.update(debug=debug, plain=plain, verbose=verbose)
    if not verbose:
        # Advice of these libraries to their direct users; what concerns ours is raised as an error of our own.
        for library in _CHATTY_LIBRARIES:
            warnings.filterwarnings("ignore", module=rf"{library}(\..*)?$")
    if version:
        typer.echo(f"glioma-nas {__version__}")
        raise typer.Exit


def load_run_config(config: Path, override: list[str] | None, plugin: list[Path] | None) -> RunConfig:
    """Read a configuration with what the command line changes in it; plugin files of both count."""
    from glioma_nas.config import load_config

    loaded = load_config(config, override or [])
    extra = tuple(path.expanduser().resolve() for path in plugin or [])
    return loaded.model_copy(update={"plugins": (*loaded.plugins, *extra)})


def load_plugins(paths: Iterable[Path]) -> None:
    """Import local plugin files, so that their components can be named."""
    from glioma_nas.registry import load_file

    for path in paths:
        load_file(path)


def run_folder(config: Path, out: Path | None) -> Path:
    """Return ``--out``, or the folder a configuration's run goes to without it."""
    return out if out is not None else Path("runs") / config.stem


def complain(text: str) -> None:
    """Write one line to stderr."""
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
def shown_progress() -> Iterator[Progress]:
    """Show progress, and log records above it rather than across it."""
    from glioma_nas.console import LogHandler, make_progress

    progress = make_progress(force_plain=options["plain"])
    handler = LogHandler(progress)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    if not options["verbose"]:
        handler.addFilter(_OwnRecords())
    for library in ("pytorch_lightning", "lightning_fabric"):
        # Imported before there was a handler, they write to stderr by themselves, across the progress.
        logging.getLogger(library).handlers.clear()
        logging.getLogger(library).propagate = True
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.INFO if options["verbose"] else logging.WARNING)
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
