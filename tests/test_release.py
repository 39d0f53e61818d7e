"""What a release must not get wrong: licences, versions, citation, the contents of wheel and source archive."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import glioma_nas

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

# Strong copyleft would bind who passes this package on together with its libraries. The lesser licence does not.
COPYLEFT = re.compile(r"\bA?GPL|\bAffero\b|(?<!Lesser )(?<!Library or Lesser )\bGeneral Public License", re.IGNORECASE)


def licence(package: Distribution) -> str:
    """Everything a package's metadata say of its licence, on one line; long texts by their first line."""
    found = [package.metadata.get("License-Expression") or ""]
    found += [text for text in package.metadata.get_all("Classifier") or [] if text.startswith("License ::")]
    if not any(found):
        found += (package.metadata.get("License") or "").strip().splitlines()[:1]
    return "; ".join(text for text in found if text)


def core() -> Iterator[Distribution]:
    """Yield every package that a plain installation brings, without any extra."""
    seen: set[str] = set()
    wanted = [Requirement(text) for text in PROJECT["dependencies"]]
    while wanted:
        requirement = wanted.pop()
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        extras = requirement.extras or {""}
        if name in seen or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        seen.add(name)
        try:
            package = distribution(requirement.name)
        except PackageNotFoundError:
            pytest.fail(f"{requirement.name} is a dependency and not installed")
        yield package
        for text in package.requires or []:
            inner = Requirement(text)
            if inner.marker is None or any(inner.marker.evaluate({"extra": extra}) for extra in extras):
                inner.marker = None
                wanted.append(inner)


def test_no_core_dependency_is_under_the_gpl() -> None:
    found = {package.metadata["Name"]: licence(package) for package in core()}
    assert len(found) > 60
    assert {name for name, text in found.items() if COPYLEFT.search(text)} == set()


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("GPL-3.0-only", True),
        ("AGPL-3.0-or-later", True),
        ("License :: OSI Approved :: GNU General Public License v3 (GPLv3)", True),
        ("License :: OSI Approved :: GNU Affero General Public License v3", True),
        ("LGPL-2.1-or-later", False),
        ("License :: OSI Approved :: GNU Lesser General Public License v3 (LGPLv3)", False),
        ("BSD-3-Clause", False),
    ],
)
def test_gate_tells_strong_copyleft_from_the_rest(text: str, refused: bool) -> None:
    assert bool(COPYLEFT.search(text)) == refused


def test_every_core_dependency_states_its_licence() -> None:
    # A package without files of its own that only pulls in NVIDIA's.
    silent = {package.metadata["Name"] for package in core() if not licence(package)} - {"cuda-toolkit"}
    assert silent == set()


def test_version_is_the_same_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    changelog = re.search(r"^## (\d\S*)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert changelog is not None
    assert PROJECT["version"] == glioma_nas.__version__ == citation["version"] == changelog[1]


def test_citation_has_what_readers_of_such_files_need() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert citation["message"] and citation["title"].startswith("glioma_nas") and citation["authors"]
    assert citation["license"] == PROJECT["license"]
    for work in [citation, *citation["references"]]:
        assert all(
            {"name"} <= set(author) or {"family-names", "given-names"} <= set(author) for author in work["authors"]
        )
    assert all({"type", "title", "year"} <= set(work) for work in citation["references"])


def write_wheel(folder: Path, *extra: str) -> Path:
    path = folder / "glioma_nas-0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("glioma_nas/__init__.py", "glioma_nas-0.dist-info/METADATA", *extra):
            archive.writestr(name, "")
    return path


@pytest.mark.parametrize(
    ("stray", "said"),
    [
        ("tests/test_cli.py", "tests"),
        ("plugins/__init__.py", "plugins"),
        ("glioma_nas/tests/test_cli.py", "tests"),
        ("glioma_nas/data/flair.nii.gz", "flair.nii.gz"),
        ("glioma_nas/weights.safetensors", "weights.safetensors"),
    ],
)
def test_wheel_with_tests_or_data_is_refused(tmp_path: Path, stray: str, said: str) -> None:
    from check_wheel import check_contents, contents

    check_contents(contents(write_wheel(tmp_path)), "wheel")
    with pytest.raises(AssertionError, match=said):
        check_contents(contents(write_wheel(tmp_path, stray)), "wheel")


def test_source_archive_with_runs_or_scans_is_refused(tmp_path: Path) -> None:
    from check_wheel import check_contents, contents

    for stray in ("runs/mine/report/report.html", "scans/flair.nii.gz", "build/wheel/x.whl"):
        path = tmp_path / "glioma_nas-0.tar.gz"
        with tarfile.open(path, "w:gz") as archive:
            archive.addfile(tarfile.TarInfo(f"glioma_nas-0/{stray}"))
        with pytest.raises(AssertionError, match=stray.split("/")[0]):
            check_contents(contents(path), "source archive")


def test_environment_is_consistent() -> None:
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_images_pin_what_the_release_was_tested_with() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = re.findall(r"\b(torch|torchvision)==([\d.]+)", dockerfile)
    assert {name for name, _ in pinned} == {"torch", "torchvision"}
    assert all(f"{name}=={version}" in constraints for name, version in pinned)
    extras = {name for text in re.findall(r"\.whl\)\[([\w,-]+)\]", dockerfile) for name in text.split(",")}
    assert extras and extras <= set(PROJECT["optional-dependencies"])


def test_nothing_but_the_package_is_sent_to_the_image() -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    sent = {line[1:] for line in rules if line.startswith("!")}
    assert sent == {"pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "constraints.txt", "glioma_nas"} | {
        "search_spaces",
        "strategies",
        "evaluators",
        "plugins",
    }
