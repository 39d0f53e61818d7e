"""Registries and the three ways in."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from glioma_nas import local, registry
from glioma_nas.errors import ConfigError, DuplicateNameError, PluginError, UnknownNameError
from glioma_nas.registry import Registry


@pytest.fixture
def things() -> Registry[type]:
    return Registry("thing", "glioma_nas.local")


@pytest.fixture(autouse=True)
def no_local_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(local.ENVIRONMENT_VARIABLE, "")


def test_registered_component_is_found_with_its_summary(things: Registry[type]) -> None:
    @things.register("sharp")
    class Sharp:
        """Sharpen the image.

        More words.
        """

    assert things.get("sharp") is Sharp
    assert [(entry.name, entry.summary, entry.origin) for entry in things.entries()] == [
        ("sharp", "Sharpen the image.", "in-tree")
    ]


def test_unknown_name_suggests_the_nearest(things: Registry[type]) -> None:
    things.register("zoomed_conv")(int)
    with pytest.raises(UnknownNameError, match=r"unknown thing 'zoomed_con': did you mean 'zoomed_conv'\?"):
        things.get("zoomed_con")


def test_second_component_of_a_name_is_refused_naming_both(things: Registry[type]) -> None:
    things.register("x")(int)
    with pytest.raises(DuplicateNameError, match=r"builtins.int.*builtins.float"):
        things.register("x")(float)


def test_same_definition_may_be_registered_again(things: Registry[type]) -> None:
    things.register("x")(int)
    things.register("x")(int)
    assert things.names() == ["x"]


PLUGIN = '''"""A plugin."""
from glioma_nas.registry import preprocess_steps


@preprocess_steps.register("sharpen_for_test")
class Sharpen:
    """Sharpen."""
'''


def test_local_file_registers_under_its_own_origin(tmp_path: Path) -> None:
    path = tmp_path / "sharpen_plugin.py"
    path.write_text(PLUGIN)
    registry.load_file(path)
    entry = next(item for item in registry.preprocess_steps.entries() if item.name == "sharpen_for_test")
    assert entry.origin == f"file {path}"
    assert entry.component.__module__ == "glioma_nas.local.sharpen_plugin"


def test_local_plugin_is_importable_in_a_child_process(tmp_path: Path) -> None:
    path = tmp_path / "child_plugin.py"
    path.write_text("VALUE = 41 + 1\n")
    local.import_plugin(path)
    code = "import glioma_nas.local.child_plugin as p; print(p.VALUE)"
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert done.stdout.strip() == "42"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.py", None, "no such file"),
        ("not-a-name.py", "", "must be a Python identifier"),
        ("raises.py", "1 / 0\n", "ZeroDivisionError while importing it: division by zero"),
    ],
)
def test_unusable_plugin_file_is_named(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(PluginError, match=message):
        registry.load_file(tmp_path / name)


def test_plugin_files_of_one_name_stay_apart_in_child_processes_too(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "twin.py").write_text(f"FOLDER = {folder!r}\n")
    first, second = (local.import_plugin(tmp_path / folder / "twin.py") for folder in ("a", "b"))
    assert (first.FOLDER, second.FOLDER) == ("a", "b")
    assert first.__name__ == "glioma_nas.local.twin"
    assert local.import_plugin(tmp_path / "a" / "twin.py") is first
    code = f"import importlib as i; print(*(i.import_module(n).FOLDER for n in {[first.__name__, second.__name__]}))"
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == ["a", "b"]


def test_plugin_file_that_raised_leaves_its_name_to_another(tmp_path: Path) -> None:
    for folder, content in (("a", "1 / 0\n"), ("b", "VALUE = 1\n")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mended.py").write_text(content)
    with pytest.raises(PluginError, match="ZeroDivisionError"):
        local.import_plugin(tmp_path / "a" / "mended.py")
    assert local.import_plugin(tmp_path / "b" / "mended.py").__name__ == "glioma_nas.local.mended"


def test_errors_of_users_share_one_base() -> None:
    from glioma_nas.errors import GliomaNasError

    assert issubclass(ConfigError, GliomaNasError)
    assert issubclass(UnknownNameError, GliomaNasError)
