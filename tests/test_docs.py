"""The documentation builds without a network, and what its code blocks say is what the software takes."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from glioma_nas.cli import app
from glioma_nas.config import RunConfig, parse_config

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(r"^( *)```(\w+)[^\n]*\n(.*?)^\1```", re.DOTALL | re.MULTILINE)


def blocks(language: str) -> Iterator[Any]:
    for page in PAGES:
        for number, (indent, found, text) in enumerate(BLOCK.findall(page.read_text(encoding="utf-8")), start=1):
            if found == language:
                plain = "\n".join(line.removeprefix(indent) for line in text.splitlines()) + "\n"
                yield pytest.param(plain, id=f"{page.stem}-{number}")


class Loads(HTMLParser):
    """What a page makes a browser load."""

    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in ("script", "img", "iframe", "source"):
            self.urls.append(given.get("src") or "")
        elif tag == "link" and given.get("rel") in ("stylesheet", "icon", "preload", "preconnect"):
            self.urls.append(given.get("href") or "")


@pytest.mark.slow
def test_site_builds_strictly_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > len(PAGES)
    for page in pages:
        loads = Loads()
        loads.feed(page.read_text(encoding="utf-8"))
        assert [url for url in loads.urls if re.match(r"(?:https?:)?//", url)] == [], page.name
    reference = (tmp_path / "site" / "reference" / "configuration.html").read_text(encoding="utf-8")
    for section, field in RunConfig.model_fields.items():
        assert section in reference
        for key in getattr(field.annotation, "model_fields", {}):
            assert f"<code>{key}</code>" in reference, f"{section}.{key}"


def anchors(page: Path) -> set[str]:
    """Anchors that GitHub gives the headings of a page."""
    found = re.findall(r"^#+ (.*)$", BLOCK.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "examples/README.md"])
def test_links_outside_the_site_lead_somewhere(page: str) -> None:
    # The site's own links, anchors included, are checked by its strict build.
    text = BLOCK.sub("", (ROOT / page).read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert linked.exists(), f"{page}: {target} is not there"
        assert not anchor or anchor in anchors(linked), f"{page}: {linked.name} has no heading for #{anchor}"
    for target in re.findall(r"`((?:docs|examples|benchmarks|tests)/[\w./]+)`", text):
        assert (ROOT / target).exists(), f"{page}: {target} is not there"


@pytest.mark.parametrize("text", blocks("yaml"))
def test_yaml_block_is_a_configuration_the_software_takes(text: str, tmp_path: Path) -> None:
    data = yaml.safe_load(text)
    assert isinstance(data, dict)
    if not set(data) <= set(RunConfig.model_fields):
        assert not set(data) & set(RunConfig.model_fields), f"half a configuration: {list(data)}"
        pytest.skip("not a configuration of ours")
    data.setdefault("cohort", {}).setdefault("sheet", "cohort.csv")
    parse_config(data, source="block", folder=tmp_path)


def shell_lines() -> Iterator[Any]:
    scripts = [pytest.param(path.read_text(), id=path.stem) for path in sorted((ROOT / "examples").rglob("*.sh"))]
    for block in [*blocks("bash"), *blocks("sh"), *blocks("console"), *scripts]:
        text = re.sub(r"\\\n\s*", " ", str(block.values[0]))
        for number, line in enumerate(text.splitlines()):
            words = shlex.split(line, comments=True)
            names = [index for index, word in enumerate(words) if word.endswith("glioma-nas")]
            if names:
                yield pytest.param(words[names[0] + 1 :], id=f"{block.id}-{number}")
    # The table of examples holds its commands within the text.
    text = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    for number, line in enumerate(re.findall(r"`glioma-nas ([^`]+)`", text)):
        yield pytest.param(shlex.split(line), id=f"examples-{number}")


@pytest.mark.parametrize("words", shell_lines())
def test_command_in_a_shell_block_exists_with_its_options(words: list[str]) -> None:
    command: Any = typer.main.get_command(app)
    options = {opt for parameter in command.params for opt in parameter.opts}
    rest = list(words)
    while rest and not rest[0].startswith("-") and hasattr(command, "commands"):
        assert rest[0] in command.commands, f"no command '{rest[0]}'; there are {', '.join(command.commands)}"
        command = command.commands[rest.pop(0)]
        options |= {opt for parameter in command.params for opt in parameter.opts} | {"--help"}
    for word in rest:
        if word.startswith("--"):
            assert word.split("=")[0] in options, f"no option {word}"
