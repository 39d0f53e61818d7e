"""What keeps the house in order: who may import whom, what is packaged, what must not be said."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("search_spaces", "strategies", "evaluators", "plugins")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("folder", FOLDERS)
def test_component_folders_import_the_kernel_and_themselves_only(folder: str) -> None:
    forbidden = [f"glioma_nas.{other}" for other in FOLDERS if other != folder]
    forbidden += [
        "glioma_nas.pipeline",
        "glioma_nas.stages",
        "glioma_nas.cli",
        "glioma_nas.console",
        "glioma_nas.report",
    ]
    forbidden += list(FOLDERS)
    for path in sources(folder):
        for name in imports(path):
            assert not any(name == item or name.startswith(item + ".") for item in forbidden), (
                f"{path.name} imports {name}"
            )


def test_kernel_imports_no_component_folder() -> None:
    for path in sources("glioma_nas"):
        for name in imports(path):
            for folder in FOLDERS:
                assert not name.startswith((f"glioma_nas.{folder}.", f"{folder}.")), f"{path.name} imports {name}"


def test_every_package_is_listed_for_packaging() -> None:
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "glioma_nas").rglob("__init__.py")}
    found |= {
        f"glioma_nas.{'.'.join(path.parent.relative_to(ROOT).parts)}"
        for f in FOLDERS
        for path in (ROOT / f).rglob("__init__.py")
    }
    assert found == listed


def test_version_is_the_same_in_package_and_project() -> None:
    from glioma_nas import __version__

    assert PROJECT["project"]["version"] == __version__
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_only_the_console_and_the_command_line_print() -> None:
    for path in sources("glioma_nas", *FOLDERS):
        if path.name == "console.py" or path.parent.name == "cli":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            is_print = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
            assert not is_print, f"{path}:{getattr(node, 'lineno', 0)} prints"


def test_nothing_unpickles_or_evaluates_or_downloads() -> None:
    forbidden = re.compile(
        r"\bpickle\b|yaml\.load\(|allow_pickle=True|weights_only=False|(?<![.\w])eval\(|(?<![.\w])exec\("
        r"|torch\.hub|urlopen|requests\.get|shell=True"
    )
    for path in sources("glioma_nas", *FOLDERS):
        code = "\n".join(line.split("#")[0] for line in path.read_text().splitlines())
        found = [match.group() for match in forbidden.finditer(code)]
        assert not found, f"{path}: {found}"


def test_no_file_holds_two_things() -> None:
    long = {path.name: n for path in sources("glioma_nas", *FOLDERS) if (n := len(path.read_text().splitlines())) > 450}
    assert not long, f"split these: {long}"


def test_no_module_is_named_after_a_library() -> None:
    libraries = {
        "torch",
        "onnx",
        "onnxruntime",
        "openvino",
        "tensorrt",
        "nni",
        "monai",
        "pandas",
        "rich",
        "typer",
        "numpy",
    }
    for path in sources("glioma_nas", *FOLDERS):
        if path.stem not in ("__init__", "__main__"):
            assert path.stem not in libraries | sys.stdlib_module_names, path


def test_scans_and_weights_never_enter_the_repository() -> None:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    assert not re.findall(r".*\.(?:nii|nii\.gz|dcm|npy|npz|ckpt|pt|pth|safetensors|onnx)$", done.stdout, re.MULTILINE)
