"""Local plugin files, importable as ``glioma_nas.local.<file stem>`` in this process and in its children.

A trial process, or a data loader worker, unpickles classes by module name. The paths of the files loaded here travel to
child processes in an environment variable, and a finder on ``sys.meta_path`` resolves the names from it. Files of equal
name in different folders are different modules: `module_name`.
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
from glioma_nas.files import sha256_text

ENVIRONMENT_VARIABLE = "GLIOMA_NAS_LOCAL_PLUGINS"


def plugin_files() -> list[Path]:
    """List the plugin files this process knows, in the order they were loaded."""
    return [Path(item) for item in os.environ.get(ENVIRONMENT_VARIABLE, "").split(os.pathsep) if item]


def module_name(path: Path) -> str:
    """Return the name of a plugin file's module: its stem, and digits of its path if another of that stem came first.

    Child processes inherit the order of the files, and so the names.

    Args:
        path: Absolute.
    """
    first = next((file for file in plugin_files() if file.stem == path.stem), path)
    stem = path.stem if first == path else f"{path.stem}_{sha256_text(str(path))[:8]}"
    return f"{__name__}.{stem}"


def import_plugin(path: Path) -> ModuleType:
    """Import ``path`` as ``glioma_nas.local.<stem>``.

    Raises:
        PluginError: The file is missing, its name is not an identifier, or it raises.
    """
    path = path.expanduser().resolve()
    if not path.is_file():
        raise PluginError(f"plugin {path}: no such file; give the path of a Python file")
    if path.suffix != ".py" or not path.stem.isidentifier():
        raise PluginError(f"plugin {path}: the name must be a Python identifier ending in .py, for example sharp.py")
    before = plugin_files()
    if path not in before:
        os.environ[ENVIRONMENT_VARIABLE] = os.pathsep.join(str(file) for file in [*before, path])
    name = module_name(path)
    try:
        return importlib.import_module(name)
    except Exception as err:
        sys.modules.pop(name, None)
        os.environ[ENVIRONMENT_VARIABLE] = os.pathsep.join(str(file) for file in before if file != path)
        raise PluginError(f"plugin {path}: {type(err).__name__} while importing it: {err}") from err


class _PluginFinder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        for file in plugin_files() if fullname.startswith(f"{__name__}.") else ():
            if module_name(file) == fullname:
                return importlib.util.spec_from_file_location(fullname, file)
        return None


if not any(type(finder).__name__ == _PluginFinder.__name__ for finder in sys.meta_path):
    sys.meta_path.append(_PluginFinder())
