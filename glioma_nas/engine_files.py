"""Engines built ahead of time: what they are of, and the cache that saves building them twice.

A compiled engine runs only with the library version and, for some, on the GPU it was built with, and the file itself
does not say so in words. Every engine therefore has a label beside it, ``NAME.json``, that does.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from glioma_nas.errors import BackendError, StorageError
from glioma_nas.files import canonical_json, read_bytes, read_json, sha256_bytes, sha256_text, write_bytes, write_json
from glioma_nas.latency_records import Shape

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineLabel:
    """What an engine was built of and for.

    Attributes:
        flavour: Registered name of the backend.
        version: Version of its library.
        precision: Number format.
        gpus: GPU generations or the name of the GPU.
        input_shapes: Shapes it was optimised for.
        max_batch: Largest batch it accepts; none: that of the shapes.
        model_sha256: Hash of the ONNX model.
        settings: What the builder was told beside that.
        engine_sha256: Hash of the engine; empty until it is built.
    """

    flavour: str
    version: str
    precision: str
    gpus: tuple[str, ...]
    input_shapes: tuple[Shape, ...]
    max_batch: int | None
    model_sha256: str
    settings: tuple[str, ...] = ()
    engine_sha256: str = ""

    @classmethod
    def of(
        cls,
        model: bytes,
        *,
        flavour: str,
        version: str,
        precision: str,
        gpus: Sequence[str],
        input_shapes: Sequence[Shape],
        max_batch: int | None,
        settings: Sequence[str] = (),
    ) -> EngineLabel:
        """Describe the engine that is going to be built of an ONNX model."""
        shapes = tuple(tuple(shape) for shape in input_shapes)
        model_sha256 = sha256_bytes(model)
        return cls(flavour, version, precision, tuple(gpus), shapes, max_batch, model_sha256, tuple(settings))

    def key(self) -> str:
        """Return the name of the engine in the cache: a hash of everything that decides its content."""
        content = {key: value for key, value in dataclasses.asdict(self).items() if key != "engine_sha256"}
        return sha256_text(canonical_json(content))[:32]

    def require(self, *, flavour: str, version: str) -> None:
        """Make sure that this library can run the engine.

        Raises:
            BackendError: It is of another flavour or version.
        """
        if (self.flavour, self.version) != (flavour, version):
            raise BackendError(
                f"engine of {self.flavour} {self.version} cannot run with {flavour} {version}; "
                "build it again from its ONNX file"
            )

    def require_content(self, engine: bytes) -> None:
        """Make sure that the engine is the one that was labelled.

        Raises:
            BackendError: It was changed or cut short.
        """
        if self.engine_sha256 and sha256_bytes(engine) != self.engine_sha256:
            raise BackendError(
                f"engine of {self.flavour} {self.version} is damaged: its content is not what was built; build it again"
            )


def save_engine(path: Path, engine: bytes, label: EngineLabel) -> EngineLabel:
    """Write an engine and its label, ``path`` + ``.json``; return the label with the engine's hash."""
    done = dataclasses.replace(label, engine_sha256=sha256_bytes(engine))
    write_bytes(path, engine)
    write_json(label_path(path), dataclasses.asdict(done))
    return done


def load_engine(path: Path) -> tuple[bytes, EngineLabel]:
    """Read what `save_engine` wrote.

    Raises:
        StorageError: The engine or its label is missing, or the label is not one.
        BackendError: The engine is not the one that was labelled.
    """
    data = read_json(label_path(path))
    try:
        label = EngineLabel(
            **{
                **data,
                "gpus": tuple(data["gpus"]),
                "settings": tuple(data["settings"]),
                "input_shapes": tuple(tuple(shape) for shape in data["input_shapes"]),
            }
        )
    except (KeyError, TypeError) as err:
        raise StorageError(f"{label_path(path)}: not the label of an engine ({err!r}); build the engine again") from err
    engine = read_bytes(path)
    label.require_content(engine)
    return engine, label


def label_path(path: Path) -> Path:
    """Return where the label of the engine at ``path`` lies."""
    return path.with_name(path.name + ".json")


def cached_engine(cache: Path | None, label: EngineLabel, build: Callable[[], bytes]) -> bytes:
    """Return the engine that ``label`` describes, from the cache if it is there whole, else built and kept."""
    if cache is None:
        return build()
    path = cache / f"{label.key()}.engine"
    if path.is_file() and label_path(path).is_file():
        try:
            return load_engine(path)[0]
        except (BackendError, StorageError) as err:
            _logger.warning("cached engine is built again: %s", err)
    engine = build()
    save_engine(path, engine, label)
    return engine


def engine_cache_folder() -> Path:
    """Return where built engines are kept: ``glioma_nas/engines`` in the user's cache folder (XDG_CACHE_HOME)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "glioma_nas" / "engines"
