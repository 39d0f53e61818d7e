"""Local plugin files, importable as ``glioma_nas.local.<file stem>`` in this process and in its children.

A trial process, or a data loader worker, unpickles classes by module name. The paths of the files loaded here travel to
child processes in an environment variable, and a finder on ``sys.meta_path`` resolves the names from it.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from glioma_nas.errors import PluginError

ENVIRONMENT_VARIABLE = "GLIOMA_NAS_LOCAL_PLUGINS"


def plugin_files() -> list[Path]:
    """List the plugin files this process knows, in the order they were loaded."""
    return [Path(item) for item in os.environ.get(ENVIRONMENT_VARIABLE, "").split(os.pathsep) if item]


def import_plugin(path: Path) -> ModuleType:
    """Import ``path`` as ``glioma_nas.local.<stem>``.

    Raises:
        PluginError: The file is missing, its name is not an identifier or taken by another file, or it raises.
    """
    path = path.expanduser().resolve()
    if not path.is_file():
        raise PluginError(f"plugin {path}: no such file; give the path of a Python file")
    if path.suffix != ".py" or not path.stem.isidentifier():
        raise PluginError(f"plugin {path}: the name must be a Python identifier ending in .py, for example sharp.py")
    known = {file.stem: file for file in plugin_files()}
    if known.setdefault(path.stem, path) != path:
        raise PluginError(f"plugin {path}: another plugin file has that name ({known[path.stem]}); rename one")
    os.environ[ENVIRONMENT_VARIABLE] = os.pathsep.join(str(file) for file in known.values())
    name = f"{__name__}.{path.stem}"
    try:
        return importlib.import_module(name)
    except Exception as err:
        sys.modules.pop(name, None)
        raise PluginError(f"plugin {path}: {type(err).__name__} while importing it: {err}") from err


class _PluginFinder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, stem = fullname.rpartition(".")
        if package != __name__:
            return None
        for file in plugin_files():
            if file.stem == stem:
                return importlib.util.spec_from_file_location(fullname, file)
        return None


if not any(type(finder).__name__ == _PluginFinder.__name__ for finder in sys.meta_path):
    sys.meta_path.append(_PluginFinder())
