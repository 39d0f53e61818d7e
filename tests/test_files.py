"""Atomic writing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from glioma_nas.errors import StorageError
from glioma_nas.files import (
    atomic_path,
    canonical_json,
    read_json,
    require_writable,
    sha256_file,
    write_json,
    write_text,
)


def test_failed_write_keeps_the_old_content_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def interrupted_write() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise ValueError("power cut")

    with pytest.raises(ValueError, match="power cut"):
        interrupted_write()
    assert path.read_text() == "old"
    assert [item.name for item in tmp_path.iterdir()] == ["a.txt"]


def test_json_round_trip(tmp_path: Path) -> None:
    write_json(tmp_path / "deep" / "a.json", {"b": [1, 2.5, None], "a": "ä"})
    assert read_json(tmp_path / "deep" / "a.json") == {"b": [1, 2.5, None], "a": "ä"}


def test_nan_is_not_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"a": float("nan")})


def test_broken_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(StorageError, match=r"a.json: not readable as JSON"):
        read_json(tmp_path / "a.json")


def test_canonical_json_does_not_depend_on_key_order() -> None:
    assert canonical_json({"b": 1, "a": [1]}) == canonical_json({"a": [1], "b": 1}) == '{"a":[1],"b":1}'


def test_file_hash_is_that_of_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    assert sha256_file(tmp_path / "empty") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_full_disk_is_told_before_work_starts(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="disk nearly full"):
        require_writable(tmp_path, free_bytes=1 << 60)


def test_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="not writable"):
        require_writable(tmp_path / "file" / "run")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder_is_told(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="not writable"):
        require_writable(tmp_path)
