"""A serializer with which `NasExperiment.resume` works on current PyTorch, and which runs nothing that it loads.

NNI's default one writes a PyTorch file of arbitrary Python objects, which PyTorch since 2.6 refuses to load. What NNI's
strategies keep is plain data, arrays of random states and, in evolution, a population; that fits into JSON.

    from glioma_nas.nni_experiments.checkpoint_serializer import use_safe_checkpoints
    use_safe_checkpoints()
"""

from __future__ import annotations

import math
from collections import deque
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from nni.nas.utils.serializer import Serializer, set_default_serializer

from glioma_nas.errors import StorageError
from glioma_nas.files import read_json, write_json

_TAG = "__type__"


class JsonCheckpointSerializer(Serializer):
    """Save an experiment's state as JSON; what JSON lacks (tuples, sets, arrays) is tagged, anything else refused."""

    suffix: ClassVar[str] = ".json"

    def save(self, data: Any, path: Path) -> None:
        """See NNI's ``Serializer``.

        Raises:
            StorageError: The state holds an object of another kind.
        """
        write_json(_with_suffix(path), _encode(data))

    def load(self, path: Path) -> Any:
        """See NNI's ``Serializer``.

        Raises:
            FileNotFoundError: There is no checkpoint, which NNI takes for a start from the beginning.
            StorageError: The file is damaged.
        """
        file = _with_suffix(path)
        if not file.is_file():
            raise FileNotFoundError(file)
        return _decode(read_json(file))


def use_safe_checkpoints() -> None:
    """Make every ``NasExperiment`` of this process save and load its state with `JsonCheckpointSerializer`."""
    set_default_serializer(JsonCheckpointSerializer())


def _with_suffix(path: Path) -> Path:
    return path.with_name(path.name + JsonCheckpointSerializer.suffix)


def _encode(value: Any) -> Any:
    from nni.nas.strategy.evolution import Individual

    if isinstance(value, float) and not math.isfinite(value):
        return {_TAG: "float", "values": [str(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        return _encode(value.item())
    if isinstance(value, np.ndarray):
        return {_TAG: "array", "dtype": str(value.dtype), "values": value.tolist()}
    if isinstance(value, Individual):
        return {_TAG: "individual", "values": [_encode(value.x), _encode(value.y)]}
    if isinstance(value, list):
        return [_encode(item) for item in value]
    for kind, name in ((tuple, "tuple"), (set, "set"), (deque, "deque")):
        if isinstance(value, kind):
            return {_TAG: name, "values": [_encode(item) for item in value]}
    if isinstance(value, dict):
        if all(isinstance(key, str) and key != _TAG for key in value):
            return {key: _encode(item) for key, item in value.items()}
        return {_TAG: "dict", "values": [[_encode(key), _encode(item)] for key, item in value.items()]}
    raise StorageError(
        f"the experiment's state holds a {type(value).__module__}.{type(value).__name__}, which is no plain data; "
        "keep plain data in the strategy's state_dict()"
    )


def _decode(value: Any) -> Any:
    from nni.nas.strategy.evolution import Individual

    if isinstance(value, list):
        return [_decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    kind = value.get(_TAG)
    if kind is None:
        return {key: _decode(item) for key, item in value.items()}
    if kind == "array":
        return np.asarray(value["values"], dtype=np.dtype(value["dtype"]))
    items = [_decode(item) for item in value["values"]]
    if kind == "dict":
        return {key: item for key, item in items}  # noqa: C416 - dict() of lists reads worse
    makers: dict[str, Any] = {
        "tuple": tuple,
        "set": set,
        "deque": deque,
        "individual": lambda row: Individual(*row),
        "float": lambda row: float(row[0]),
    }
    if kind not in makers:
        raise StorageError(f"checkpoint of an experiment: unknown kind of data '{kind}'; start the experiment again")
    return makers[kind](items)
