"""Which code trained a stored classifier: its weights mean something to that code alone.

Another version may scale age in another way, or give a network its channels in another order, and would still load the
weights and return probabilities, wrong ones that nobody could tell from right ones. So the code is recorded beside the
weights, as a hash of the modules that decide what a classifier makes of a case, and compared before new patients are
served.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from glioma_nas import __version__
from glioma_nas.errors import StorageError
from glioma_nas.files import canonical_json, sha256_file, sha256_text

_KERNEL = ("calibration", "marker_evaluator", "marker_tuning", "markers", "slice_classifier", "uncertainty")


def classifier_code(classifier: type) -> str:
    """Return a hash of the code that decides a classifier's predictions, 12 hexadecimal digits.

    That is the module of the class, what it imports of its own package (in-tree, a pip package, local plugin files),
    and the parts of the kernel that cut inputs, pool slices, scale probabilities and decide when no call is made.
    """
    names = _own_modules(classifier.__module__) | {f"glioma_nas.{name}" for name in _KERNEL}
    files = {name: file for name in names if (file := _file(name)) is not None}
    return sha256_text(canonical_json({name: sha256_file(file) for name, file in files.items()}))[:12]


def require_same_code(record: Mapping[str, Any], classifier: type, *, folder: Path, remedy: str) -> None:
    """Make sure that the code which trained a classifier is the one that is about to use it.

    Args:
        record: What `glioma_nas.marker_evaluator.save_evaluator` wrote.
        classifier: The class that is about to predict.
        folder: Where the record lies, for the message.
        remedy: What to do about it.

    Raises:
        StorageError: It is another.
    """
    code = classifier_code(classifier)
    if record.get("code") != code:
        raise StorageError(
            f"{folder}: the classifier was trained by another version of its code ({record.get('version', 'unknown')}, "
            f"{record.get('code', 'not recorded')}; here {__version__}, {code}), which may read a case in another way: "
            f"{remedy}"
        )


def _own_modules(name: str) -> set[str]:
    """Return a module and what it imports, directly or not and wherever in it, of the package it lies in."""
    package, found, to_read = name.rpartition(".")[0], set[str](), [name]
    while to_read:
        current = to_read.pop()
        if current in found:
            continue
        found.add(current)
        file = _file(current)
        for imported in _imports(file) if package and file is not None else ():
            if imported.startswith(f"{package}.") and _file(imported) is not None:
                to_read.append(imported)
    return found


def _imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module
            # What is imported of a package may be a module of it.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _file(name: str) -> Path | None:
    """Return the file of a module; none for what is no module, or was typed in by hand."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    return None if spec is None or spec.origin is None else Path(spec.origin)
