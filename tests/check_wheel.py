"""Install the built wheel into an empty environment and run its command from an empty folder. Run by `make wheel`.

The environment sees the libraries of the one that runs this script, but not its editable install.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path


def main(folder: Path) -> None:
    (wheel,) = folder.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for expected in (
        "glioma_nas/py.typed",
        "glioma_nas/demo.yaml",
        "glioma_nas/report/style.css",
        "glioma_nas/search_spaces/nasbranet.py",
        "glioma_nas/strategies/one_shot.py",
        "glioma_nas/evaluators/segmentation.py",
        "glioma_nas/plugins/kinet.py",
    ):
        assert expected in names, f"{wheel.name} lacks {expected}"
    strays = {name.split("/")[0] for name in names} - {"glioma_nas"}
    assert all(name.endswith(".dist-info") for name in strays), f"{wheel.name} puts {strays} into site-packages"

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
