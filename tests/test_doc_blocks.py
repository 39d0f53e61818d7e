"""Every block of code in README and documentation runs, page by page, in one folder with a small cohort.

A block that cannot run here says so to the reader, in its title: ``Not run by the tests: <reason>``. A block that would
take hours at the sizes it shows runs at those of `SMALLER`; a replacement that no longer fits its block is a failure.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from dicom_files import PATIENT, write_patient
from finished_run import CONFIG
from typer.testing import CliRunner

from glioma_nas.cli import app
from glioma_nas.testing.phantoms import write_phantom_cohort

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(r"^( *)```(\w+)([^\n]*)\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
EXECUTED = ("bash", "python", "toml")
ELSEWHERE = {"yaml": "tests/test_docs.py reads them as configurations"}
NOT_RUN = re.compile(r'title="Not run by the tests: [^"]{10,}"')

SMALLER: dict[str, dict[str, str]] = {
    "README.md": {
        '"small", image_size_px=96': '"tiny", image_size_px=32',
        "runs/demo": "runs/mine",
        "epochs=6, steps_per_epoch=8": "epochs=2, steps_per_epoch=2, batch_size=4",
        "pretrain_epochs=2": "pretrain_epochs=1, finetune_steps=1, recalibration_batches=1",
    },
    "latency.md": {'"small", image_size_px=96': '"tiny", image_size_px=32'},
}


@dataclass(frozen=True)
class Block:
    """One fenced block: where it begins, its language, what stands behind the language, and its text."""

    page: str
    line: int
    language: str
    info: str
    text: str

    @property
    def runs(self) -> bool:
        return NOT_RUN.search(self.info) is None


def blocks() -> Iterator[Block]:
    for page in PAGES:
        content = page.read_text(encoding="utf-8")
        for match in BLOCK.finditer(content):
            indent, language, info, body = match.groups()
            text = "\n".join(line.removeprefix(indent) for line in body.splitlines()) + "\n"
            yield Block(page.name, content.count("\n", 0, match.start()) + 1, language, info, text)


def test_every_block_is_run_or_says_why_not() -> None:
    for block in blocks():
        assert block.language in (*EXECUTED, *ELSEWHERE), f"{block.page}:{block.line}: nobody runs {block.language}"
        if "title=" in block.info:
            assert not block.runs, f"{block.page}:{block.line}: a title gives the reason why a block is not run"
    assert sum(block.runs for block in blocks() if block.language == "bash") >= 10


def workspace(folder: Path) -> None:
    """Make what the documentation takes for granted: a cohort, configurations, other people's data."""
    sheet = write_phantom_cohort(folder, 8, 0)
    config = {**CONFIG, "cohort": {**CONFIG["cohort"], "sheet": sheet.name}}
    config["train"] = {"epochs": 1, "steps_per_epoch": 2, "batch_size": 4}
    config["export"] = {"formats": ["safetensors"], "bundle": False, "parity_slices": 4}
    for name in ("my_cohort.yaml", "my.yaml"):
        (folder / name).write_text(yaml.safe_dump(config))
    other = write_phantom_cohort(folder / "other", 4, 1)
    other_config = {**config, "cohort": {**config["cohort"], "sheet": str(other.relative_to(folder))}}
    other_config["preprocess"] = {**config["preprocess"], "steps": ["orient", "nyul", "crop_pad", "resize"]}
    (folder / "other_cohort.yaml").write_text(yaml.safe_dump(other_config))
    elsewhere = write_phantom_cohort(folder / "elsewhere", 8, 2)
    people = pd.read_csv(elsewhere, dtype=str)
    # Of other people than the run's, which a run would refuse, half of them at either site.
    renamed = people.assign(patient_id="E" + people.patient_id, site=["A", "A", "B", "B"] * 2)
    renamed.to_csv(elsewhere, index=False)
    for place, names in (("new_patient", ("t1ce", "flair")), ("scans", ("flair",))):
        (folder / place).mkdir()
        for name in names:
            scan = (folder / "elsewhere" / "P002" / f"{name}.nii.gz").read_bytes()
            (folder / place / f"{name}.nii.gz").write_bytes(scan)
    write_patient(folder / "export")
    pd.DataFrame([{"patient_id": PATIENT, "age": 51, "sex": "F"}]).to_excel(folder / "labels.xlsx", index=False)


@pytest.mark.slow
def test_blocks_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace(tmp_path)
    monkeypatch.chdir(tmp_path)
    unused = {(page, words) for page, replacements in SMALLER.items() for words in replacements}
    failures: list[str] = []
    for block in blocks():
        if not block.runs or block.language not in EXECUTED:
            continue
        where, text = f"{block.page}:{block.line}", block.text
        if block.language == "toml":
            assert tomllib.loads(text), where
        elif block.language == "bash":
            failures += run_shell(where, text)
        else:
            for words, smaller in SMALLER.get(block.page, {}).items():
                if words in text:
                    unused.discard((block.page, words))
                    text = text.replace(words, smaller)
            failures += run_python(where, text, tmp_path)
    assert not failures, "\n\n".join(failures)
    assert not unused, "replacements that fit no block any more"


def run_shell(where: str, text: str) -> list[str]:
    """Run the lines as a shell would; what failed. A line may say in its comment that it exits with 2."""
    failures = []
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        assert words[0].endswith("glioma-nas"), f"{where}: `{line}` is no command of ours; give a reason not to run it"
        done: Any = CliRunner().invoke(app, words[1:])
        allowed = (0, 2) if "exit status 2 when" in line else (0,)
        if done.exit_code not in allowed:
            said = done.output[-1500:] or repr(done.exception)
            failures.append(f"{where}: `{line}` exits with {done.exit_code}: {said}")
    return failures


def run_python(where: str, text: str, folder: Path) -> list[str]:
    """Run a block in a process of its own: what NNI and registries keep of one must not reach the next."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", text]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return [f"{where}: {done.stderr[-1500:]}"] if done.returncode else []
