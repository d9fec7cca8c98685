"""Documents: code blocks run or say why not; files and commands that they name exist."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import List, NamedTuple

import pytest
import tiny

from refbn_d2.__main__ import command_names
from refbn_d2.config import load_config
from refbn_d2.config_files import find_config

PAGES = sorted([*tiny.ROOT.glob("*.md"), *(tiny.ROOT / "docs").glob("*.md")])
_BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^>]+) -->\n)?"
    r"^```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^```",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    page: Path
    line: int
    language: str
    text: str
    runs: bool


def _blocks(page: Path) -> List[Block]:
    text = page.read_text()
    return [
        Block(
            page, text[: m.start("text")].count("\n") + 1, m["language"], m["text"], not m["reason"]
        )
        for m in _BLOCK.finditer(text)
    ]


BLOCKS = [block for page in PAGES for block in _blocks(page)]
SHELL = [b for b in BLOCKS if b.language == "sh"]
RUN = [b for b in BLOCKS if b.language in ("sh", "python") and b.runs]


def _name(block: Block) -> str:
    return f"{block.page.name}:{block.line}"


@pytest.fixture(scope="module")
def bin_folder(tmp_path_factory) -> Path:
    """A folder with the commands python and refbn-d2, as an installation has them."""
    folder = tmp_path_factory.mktemp("bin")
    (folder / "python").symlink_to(sys.executable)
    command = folder / "refbn-d2"
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m refbn_d2 "$@"\n')
    command.chmod(0o755)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("block", RUN, ids=_name)
def test_block_runs(block, bin_folder, tmp_path):
    command = ["bash", "-euo", "pipefail", "-c"]
    if block.language == "python":
        command = [sys.executable, "-W", "error::SyntaxWarning", "-c"]
    path = os.pathsep.join([str(bin_folder), os.environ["PATH"]])
    done = subprocess.run(
        [*command, block.text],
        cwd=tmp_path,
        env=tiny.environment(PATH=path),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("block", SHELL, ids=_name)
def test_a_shell_block_names_what_exists(block):
    """Also where it is not run: commands, targets of make, scripts and shipped configs."""
    text = block.text.replace("\\\n", " ")
    for name in re.findall(r"(?:refbn-d2|-m refbn_d2) ([a-z][\w-]*)", text):
        assert name in command_names()
    for targets in re.findall(r"^make ((?:[a-z-]+ ?)+)", text, re.MULTILINE):
        makefile = (tiny.ROOT / "Makefile").read_text()
        assert all(re.search(rf"^{t}:", makefile, re.MULTILINE) for t in targets.split()), targets
    for script in re.findall(r"\b(?:tools|dev|tests)/[\w/]+\.py\b", text):
        assert (tiny.ROOT / script).is_file(), script
    for config in re.findall(r"(?:--config-file|compare run) ([\w/.-]+\.yaml)", text):
        if "/" in config:
            assert (tiny.ROOT / config).is_file() or find_config(config)


YAML = [b for b in BLOCKS if b.language == "yaml" and not b.text.startswith("DETECTOR")]


@pytest.mark.parametrize("block", YAML, ids=_name)
def test_a_yaml_block_is_a_config(block, tmp_path):
    (tmp_path / "config.yaml").write_text(block.text)
    load_config(str(tmp_path / "config.yaml"))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere_and_lines_are_short(page):
    text = page.read_text()
    for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", text):
        assert (page.parent / target).exists(), target
    long = [
        n
        for n, line in enumerate(text.split("\n"), 1)
        if len(line) > 120 and line.lstrip()[:1] != "|"
    ]
    assert not long, f"lines over 120 columns: {long}"


def test_the_index_has_every_page():
    index = (tiny.ROOT / "docs/index.md").read_text()
    for page in (tiny.ROOT / "docs").glob("*.md"):
        assert page.name == "index.md" or f"({page.name})" in index, page.name
