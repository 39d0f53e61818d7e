"""Check what wheel and source archive hold, install the wheel into an empty environment, run its command there.

Run by `make wheel`, which builds the wheel from the source archive. The environment sees the libraries of the one that
runs this script, but not its editable install.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Collection
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent.parent
COMPONENTS = ("search_spaces", "strategies", "evaluators", "plugins")
CODE = {".py", ".typed", ".yaml", ".json", ".js", ".css", ".html"}
FORBIDDEN_FOLDERS = {"runs", "build", "dist", "shared", "data", ".git", ".venv", "__pycache__"}
SCANS = (".nii", ".nii.gz", ".dcm", ".npy", ".npz")
WEIGHTS = (".safetensors", ".ckpt", ".onnx", ".pt", ".pt2", ".pth")
DATA = (*SCANS, *WEIGHTS, ".zip", ".whl")
MAX_WHEEL_BYTES = 3_000_000


def contents(archive: Path) -> list[str]:
    """Names in a wheel, or in a source archive below its own folder."""
    if archive.suffix == ".whl":
        return zipfile.ZipFile(archive).namelist()
    with tarfile.open(archive) as opened:
        return [member.name.partition("/")[2] for member in opened.getmembers() if member.isfile()]


def check_contents(names: Collection[str], what: str) -> None:
    """Refuse scans, weights and leftovers; of a wheel also tests and whatever is not code."""
    for name in names:
        parts = PurePosixPath(name).parts
        assert not name.lower().endswith(DATA), f"{what}: {name} is data"
        assert not FORBIDDEN_FOLDERS & set(parts), f"{what}: {name} does not belong there"
        if what == "wheel" and not parts[0].endswith(".dist-info"):
            assert parts[0] == "glioma_nas", f"{what}: {name} would lie in site-packages itself, under {parts[0]}"
            assert "tests" not in parts and not parts[-1].startswith("test_"), f"{what}: {name} belongs to the tests"
            assert PurePosixPath(name).suffix in CODE, f"{what}: {name} is no code"


def modules_of_checkout() -> set[str]:
    """Every module that the wheel must hold, under the name it has there."""
    found = {path.relative_to(ROOT).as_posix() for path in (ROOT / "glioma_nas").rglob("*.py")}
    for component in COMPONENTS:
        found |= {f"glioma_nas/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / component).rglob("*.py")}
    return found


def check_archives(folder: Path) -> Path:
    """Check both archives in ``folder``; returns the wheel."""
    (wheel,), (source,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    inside = contents(wheel)
    check_contents(inside, "wheel")
    lacking = modules_of_checkout() - set(inside)
    assert not lacking, f"{wheel.name} lacks {sorted(lacking)[:5]}; is every package listed in pyproject.toml?"
    for expected in ("py.typed", "demo.yaml", "bundle_schema.json", "report/style.css", "report/page.html"):
        assert f"glioma_nas/{expected}" in inside, f"{wheel.name} lacks {expected}"
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in inside), f"{wheel.name} lacks its licence"
    assert wheel.stat().st_size < MAX_WHEEL_BYTES, f"{wheel.name} has {wheel.stat().st_size} bytes"
    given = contents(source)
    check_contents(given, "source archive")
    for expected in ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "constraints.txt"):
        assert expected in given, f"{source.name} lacks {expected}"
    for folder_name in ("tests", "docs", "examples"):
        kept = [name for name in given if name.startswith(f"{folder_name}/")]
        assert kept, f"{source.name} lacks {folder_name}"
    return wheel


def main(folder: Path) -> None:
    wheel = check_archives(folder)

    with tempfile.TemporaryDirectory() as name:
        empty = Path(name)
        venv.create(empty / "env", with_pip=False, symlinks=True)
        python = empty / "env" / "bin" / "python"
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
        subprocess.run([*pip, str(wheel)], check=True)
        site = str(next((empty / "env").rglob("site-packages")))
        # Libraries come from here; a .pth file of an editable install lies there too, but only `site` processes those.
        libraries = next(path for path in sys.path if path.endswith("site-packages"))
        environment = {**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{libraries}", "NO_COLOR": "1"}
        work = empty / "work"
        for own in ("plugins", "strategies"):
            (work / own).mkdir(parents=True)
            (work / own / "__init__.py").write_text("raise RuntimeError('the user\\'s own package was imported')\n")
        done = subprocess.run(
            [str(python.with_name("glioma-nas")), "list"],
            cwd=work,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        for component in ("nasbranet", "co_search", "segmentation", "kinet", "zscore"):
            assert component in done.stdout, f"the wheel's `glioma-nas list` lacks {component}"
        where = subprocess.run(
            [str(python), "-c", "import glioma_nas, glioma_nas.plugins as p; print(glioma_nas.__file__, p.__file__)"],
            cwd=work,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        assert all(path.startswith(site) for path in where), where
    sys.stdout.write(f"{wheel.name}: installs, imports from an empty folder, lists its components\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
