"""Keep NNI's web server off the network: the script that Node loads first, the check of what listens, the guard.

NNI 3.0 listens on every interface, asks for no password, serves any file of the user and runs what is posted to it.
``loopback.js`` closes that door inside Node; `exposed_addresses` looks from outside whether it is closed.

A configuration file cannot pass anything to the Node process, so plain ``nnictl create`` is only as safe as its
environment. `install_guard` writes one line into site-packages that sets ``NODE_OPTIONS`` for every Python process of
that environment, ``nnictl`` included. Without it our trials do not run: `refuse_open_door`.
"""

from __future__ import annotations

import ipaddress
import os
import sysconfig
from collections.abc import Iterable, Mapping
from pathlib import Path

import psutil

from glioma_nas.errors import ConfigError, ExperimentError
from glioma_nas.files import write_text

PRELOAD = Path(__file__).with_name("loopback.js")
LOOPBACK = "127.0.0.1"
HOST_VARIABLE = "GLIOMA_NAS_NNI_HOST"
GUARD_FILE = "glioma_nas_nni_loopback.pth"


def guarded_environment(environment: Mapping[str, str], *, host: str = LOOPBACK) -> dict[str, str]:
    """Return ``environment`` with what makes NNI's Node processes listen on ``host`` only.

    Raises:
        ConfigError: ``host`` is no IP address.
    """
    return {
        **environment,
        "NODE_OPTIONS": _with_preload(environment.get("NODE_OPTIONS", "")),
        HOST_VARIABLE: checked_host(host),
    }


def checked_host(host: str) -> str:
    """Return the address to listen on in its shortest spelling, which is how Node spells it.

    Raises:
        ConfigError: It is no IP address, or a loopback one other than 127.0.0.1, where NNI's parts find each other.
    """
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        raise ConfigError(f"host '{host}': give an IP address, for example {LOOPBACK}") from None
    if address.is_loopback and str(address) != LOOPBACK:
        raise ConfigError(
            f"host '{host}': this machine reaches NNI at {LOOPBACK} without --expose; give an address that others reach"
        )
    return str(address)


def exposed_addresses(pid: int) -> list[str]:
    """List where a process and its children listen beyond the loopback address, as ``address:port``.

    Raises:
        ExperimentError: One of them may not be looked at.
    """
    try:
        root = psutil.Process(pid)
        processes = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
    return _exposed(processes)


def refuse_open_door() -> None:
    """Check, in a trial, that the NNI process which started it listens on the loopback address only.

    Raises:
        ExperimentError: It listens elsewhere, and nobody asked for it with ``--expose``.
    """
    if not ipaddress.ip_address(checked_host(os.environ.get(HOST_VARIABLE, LOOPBACK))).is_loopback:
        return
    exposed = _exposed([process for process in psutil.Process().parents() if _is_nni(process)])
    if exposed:
        raise ExperimentError(
            f"refused: NNI listens on {', '.join(exposed)}, where anyone who reaches it can run commands as you; stop "
            "it, run `glioma-nas nni guard` once in this Python environment, and start it again, or start it with "
            "`glioma-nas nni create`"
        )


def _is_nni(process: psutil.Process) -> bool:
    try:
        return any("nni_node" in part for part in process.cmdline())
    except (psutil.NoSuchProcess, psutil.AccessDenied):  # another user's, who does not run NNI for us
        return False


def _exposed(processes: Iterable[psutil.Process]) -> list[str]:
    found = []
    for process in processes:
        try:
            connections = process.net_connections(kind="inet")
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
        except psutil.AccessDenied:  # what cannot be seen is not known to be closed
            raise ExperimentError(
                f"refused: NNI's process {process.pid} does not show where it listens; it may be another user's"
            ) from None
        found += [
            f"{item.laddr.ip}:{item.laddr.port}"
            for item in connections
            if item.status == psutil.CONN_LISTEN and not ipaddress.ip_address(item.laddr.ip).is_loopback
        ]
    return sorted(set(found))


def install_guard(folder: Path | None = None) -> Path:
    """Make every Python process of this environment start NNI on the loopback address only, plain ``nnictl`` too.

    Args:
        folder: site-packages of the environment; none for this one's.

    Returns:
        The file written; deleting it undoes this.
    """
    path = (folder or _site_packages()) / GUARD_FILE
    write_text(path, _guard_line())
    return path


def remove_guard(folder: Path | None = None) -> bool:
    """Undo `install_guard`; tells whether there was anything to undo."""
    path = (folder or _site_packages()) / GUARD_FILE
    existed = path.is_file()
    path.unlink(missing_ok=True)
    return existed


def guard_state(folder: Path | None = None) -> tuple[str, str]:
    """Return ``ok``, ``absent`` or ``stale``, and what that means, for a table."""
    path = (folder or _site_packages()) / GUARD_FILE
    if not path.is_file():
        return "absent", "plain nnictl would listen on every network interface; `glioma-nas nni guard` prevents it"
    if path.read_text(encoding="utf-8") != _guard_line():
        return "stale", f"{path} is of another version or place; run `glioma-nas nni guard` again"
    return "ok", f"plain nnictl listens on the loopback address ({path})"


def _guard_line() -> str:
    # A line that starts with "import" is executed by site.py at start-up; it must stay a single cheap one. The file may
    # outlive this package and must do nothing then: Node does not start with a script that is gone.
    option = _option()
    return (
        "import os; o = os.environ.get('NODE_OPTIONS', ''); "
        f"os.environ.update({{'NODE_OPTIONS': ({option!r} + ' ' + o).strip()}} "
        f"if {option!r} not in o and os.path.isfile({str(PRELOAD)!r}) else {{}})\n"
    )


def _with_preload(options: str) -> str:
    return options if _option() in options else f"{_option()} {options}".strip()


def _option() -> str:
    path = str(PRELOAD)
    return f'--require "{path}"' if " " in path else f"--require {path}"


def _site_packages() -> Path:
    return Path(sysconfig.get_paths()["purelib"])
