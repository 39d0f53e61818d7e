"""Write files so that a reader never sees half of one, and name inputs by what they contain.

Every write goes to a temporary name in the same folder and is renamed into place, which POSIX makes atomic.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from glioma_nas.errors import StorageError

_CHUNK_BYTES = 1 << 20


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path with the same suffixes that becomes ``path`` when the block ends without an error.

    Raises:
        StorageError: The folder cannot be written.
    """
    temporary = path.with_name(f".{os.getpid()}.tmp.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        # Data must be on disk before the name points at it, or a power cut leaves an empty file under a good name.
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
    except OSError as err:
        if isinstance(err, FileNotFoundError) and not temporary.exists() and path.parent.is_dir():
            raise
        raise StorageError(
            f"{path}: cannot be written ({err.strerror or err}); choose another folder or free space"
        ) from err
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Replace the content of ``path`` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def read_bytes(path: Path) -> bytes:
    """Read a file.

    Raises:
        StorageError: It is missing or cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as err:
        raise StorageError(f"{path}: {err.strerror or err}") from err


def write_text(path: Path, text: str) -> None:
    """Replace the content of ``path`` with UTF-8 text atomically."""
    write_bytes(path, text.encode("utf-8"))


def canonical_json(value: Any) -> str:
    """Render plain data so that equal data gives equal text: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)


def write_json(path: Path, value: Any) -> None:
    """Write plain data as indented JSON, keys in the order given, atomically."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        StorageError: The file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as err:
        raise StorageError(f"{path}: no such file") from err
    except (OSError, ValueError) as err:
        raise StorageError(f"{path}: not readable as JSON ({err}); delete it and run the stage again") from err


def sha256_text(text: str) -> str:
    """Hash text as UTF-8; 64 hexadecimal digits."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def sha256_bytes(data: bytes) -> str:
    """Hash bytes; 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hash a file's bytes; 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while chunk := handle.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def require_writable(folder: Path, *, free_bytes: int = 0) -> None:
    """Create ``folder`` if need be and make sure that it can be written and that the disk is not nearly full.

    Raises:
        StorageError: The folder cannot be created or written, or fewer than ``free_bytes`` are free.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{os.getpid()}.probe"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as err:
        raise StorageError(f"{folder}: not writable ({err.strerror or err}); choose another folder with --out") from err
    free = shutil.disk_usage(folder).free
    if free < free_bytes:
        raise StorageError(
            f"{folder}: disk nearly full, {free / 1e6:.0f} MB free of {free_bytes / 1e6:.0f} MB needed; "
            "free space or choose another disk"
        )
