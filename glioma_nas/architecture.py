"""The record of one network: which search space, with which options and choices. Plain JSON, never pickled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from glioma_nas.errors import ArchitectureError
from glioma_nas.files import canonical_json, read_json, sha256_text, write_json

FORMAT_VERSION = 1


def _freeze(value: Any) -> Any:
    if isinstance(value, Mapping):
        return MappingProxyType({str(key): _freeze(item) for key, item in sorted(value.items())})
    if isinstance(value, list | tuple):
        return tuple(_freeze(item) for item in value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ArchitectureError(f"an architecture holds plain JSON values only, got {type(value).__name__}: {value!r}")


def _thaw(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _thaw(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_thaw(item) for item in value]
    return value


@dataclass(frozen=True)
class Architecture:
    """One point of a search space.

    Attributes:
        space: Registered name of the search space.
        options: Keyword arguments that build the space; read-only.
        choices: NNI sample: mutable label → chosen value; read-only.
    """

    space: str
    options: Mapping[str, Any] = field(default_factory=dict)
    choices: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in (("options", self.options), ("choices", self.choices)):
            if not isinstance(value, Mapping):
                raise ArchitectureError(f"{name} of an architecture must be a mapping, got {type(value).__name__}")
        object.__setattr__(self, "options", _freeze(self.options))
        object.__setattr__(self, "choices", _freeze(self.choices))

    @property
    def id(self) -> str:
        """Twelve hexadecimal digits that depend on the content only, not on key order."""
        return sha256_text(canonical_json(self._content()))[:12]

    def sample(self) -> dict[str, Any]:
        """Return the choices as NNI takes them: a new dict with lists where the record holds tuples."""
        return dict(_thaw(self.choices))

    def space_options(self) -> dict[str, Any]:
        """Return the options as a new dict of plain values."""
        return dict(_thaw(self.options))

    def to_json(self) -> dict[str, Any]:
        """Render as plain data with the id and the format version."""
        return {"format": FORMAT_VERSION, "id": self.id, **self._content()}

    def save(self, path: Path) -> None:
        """Write to a JSON file atomically."""
        write_json(path, self.to_json())

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Architecture:
        """Read plain data made by `to_json`.

        Raises:
            ArchitectureError: A key is missing, the format is newer than this code, or the id does not fit the content.
        """
        try:
            version, given_id = data["format"], data["id"]
            record = cls(str(data["space"]), data["options"], data["choices"])
        except (KeyError, TypeError, AttributeError) as err:
            raise ArchitectureError(
                f"not an architecture record ({err!r}); expected space, options, choices, id, format"
            ) from err
        if version != FORMAT_VERSION:
            raise ArchitectureError(
                f"architecture format {version} is not the supported {FORMAT_VERSION}; upgrade glioma_nas"
            )
        if given_id != record.id:
            raise ArchitectureError(
                f"architecture id {given_id} does not fit its content ({record.id}): the file was edited"
            )
        return record

    @classmethod
    def load(cls, path: Path) -> Architecture:
        """Read a file written by `save`.

        Raises:
            StorageError: The file is missing or not JSON.
            ArchitectureError: It holds something else.
        """
        return cls.from_json(read_json(path))

    def _content(self) -> dict[str, Any]:
        return {"space": self.space, "options": _thaw(self.options), "choices": _thaw(self.choices)}
