"""Unpack ZIP and TAR archives from strangers: nothing outside the target, no links, no bombs."""

from __future__ import annotations

import lzma
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

from glioma_nas.errors import StorageError

ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz")

_MAX_MEMBERS = 500_000
_MAX_BYTES = 200_000_000_000

# What the readers of zip, tar and the compressions inside them raise over damaged bytes.
_DAMAGE = (
    zipfile.BadZipFile,
    tarfile.TarError,
    EOFError,
    NotImplementedError,
    RuntimeError,
    ValueError,
    zlib.error,
    lzma.LZMAError,
)

Opener = Callable[[], IO[bytes] | None]


def is_archive(path: Path) -> bool:
    """Tell whether a file name says that it is an archive we open."""
    return path.name.lower().endswith(ARCHIVE_SUFFIXES)


def unpack(archive: Path, folder: Path) -> int:
    """Unpack into an existing folder; return how many files there were.

    Raises:
        StorageError: The archive is damaged, a member would leave ``folder`` or is a link or device, or its content is
            more than the disk holds. Nothing is written outside ``folder``, whatever the archive says.
    """
    count = total = 0
    free = shutil.disk_usage(folder).free
    try:
        with _members(archive) as members:
            for name, size, opener in members:
                target = _inside(archive, folder, name)
                count, total = count + 1, total + size
                if count > _MAX_MEMBERS or total > min(free, _MAX_BYTES):
                    raise StorageError(
                        f"{archive}: holds more than fits ({count} files, {total / 1e9:.1f} GB); unpack it yourself"
                    )
                target.parent.mkdir(parents=True, exist_ok=True)
                source = opener()
                assert source is not None
                with source, target.open("xb") as handle:
                    _copy(archive, source, handle, size)
    except _DAMAGE as err:
        raise StorageError(f"{archive}: damaged or protected archive ({' '.join(str(err).split())})") from err
    except OSError as err:
        raise StorageError(f"{archive}: cannot be unpacked ({err.strerror or err})") from err
    return count


@contextmanager
def _members(archive: Path) -> Iterator[Iterator[tuple[str, int, Opener]]]:
    if archive.name.lower().endswith(".zip"):
        with zipfile.ZipFile(archive) as handle:
            yield _zip_members(archive, handle)
    else:
        with tarfile.open(archive) as handle:
            yield _tar_members(archive, handle)


def _zip_members(archive: Path, handle: zipfile.ZipFile) -> Iterator[tuple[str, int, Opener]]:
    for info in handle.infolist():
        kind = stat.S_IFMT(info.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise StorageError(f"{archive}: member {info.filename!r} is a link or device; unpack it yourself and look")
        if not info.is_dir():
            yield info.filename, info.file_size, lambda info=info: handle.open(info)  # type: ignore[misc]


def _tar_members(archive: Path, handle: tarfile.TarFile) -> Iterator[tuple[str, int, Opener]]:
    for info in handle:
        if not (info.isreg() or info.isdir()):
            raise StorageError(f"{archive}: member {info.name!r} is a link or device; unpack it yourself and look")
        if info.isreg():
            yield info.name, info.size, lambda info=info: handle.extractfile(info)  # type: ignore[misc]
    _check_end(archive, handle)


def _check_end(archive: Path, handle: tarfile.TarFile) -> None:
    # tarfile takes a damaged header for the end, which would leave out the rest unsaid. The end is blocks of zeros, and
    # reading on to it also lets gzip compare its checksum.
    stream = handle.fileobj
    assert stream is not None
    stream.seek(handle.offset)
    end = stream.read(tarfile.BLOCKSIZE)
    rest_is_zero = not any(end)
    while chunk := stream.read(1 << 20):
        rest_is_zero = rest_is_zero and not chunk.strip(b"\0")
    if len(end) < tarfile.BLOCKSIZE or not rest_is_zero:
        raise StorageError(f"{archive}: damaged or cut off after its last readable member; copy it again")


def _inside(archive: Path, folder: Path, name: str) -> Path:
    parts = PurePosixPath(name.replace("\\", "/")).parts
    unsafe = not parts or ".." in parts or parts[0].startswith("/") or ":" in parts[0] or "\0" in name
    target = folder.joinpath(*parts) if not unsafe else folder
    if unsafe or not target.resolve().is_relative_to(folder.resolve()):
        raise StorageError(
            f"{archive}: member {name!r} would be written outside the folder; the archive is hostile or broken"
        )
    return target


def _copy(archive: Path, source: IO[bytes], target: IO[bytes], size: int) -> None:
    # Headers may understate the size, so what comes out is counted.
    left = size
    while chunk := source.read(1 << 20):
        left -= len(chunk)
        if left < 0:
            raise StorageError(f"{archive}: a member is larger than the archive says; the archive is hostile or broken")
        target.write(chunk)
