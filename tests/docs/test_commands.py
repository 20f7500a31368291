"""Every command and every line of Python in README and docs is one that exists.

A command is parsed by the program it is for: `flexselect` by its own options, `make` by a dry run
whose commands are parsed in turn. What cannot be run on a machine without network and GPU says so
at its end, ``# needs the hub`` or ``# needs a GPU``, or the text before it does ("This needs the
weights"); a command that names a hub id must.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer

import flexselect
from flexselect.cli import app
from flexselect.tests.paths import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PAGES = [ROOT / name for name in ("README.md", "PORTING.md", "testbed/README.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
#: Blocks of these languages hold nothing but commands; in a block of none, lines that begin with a
#: program named here are commands, and the rest is what they print.
SHELLS = {"sh", "bash", "shell"}
PROGRAMS = ("make", "flexselect", "python", "pip", "cp", "torchrun", "bash")
MARKS = re.compile(r" #.*\bneeds (the hub|a GPU)$")
#: A name with a number in it behind an owner's, and no file: Qwen/Qwen2.5-VL-7B-Instruct.
HUB_ID = re.compile(
    r"(?<![\w./-])[\w-]+/(?![\w.-]*\.(?:mp4|py|yaml|html|sh)\b)[A-Za-z][\w.-]*\d[\w.-]*(?![\w/])"
)


def blocks(path: Path) -> Iterator[tuple[str, str, bool]]:
    """Yield (language, text, whether it is said before to need the hub) of every fenced block."""
    page = path.read_text()
    fence = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```\s*$", re.M | re.S)
    for block in fence.finditer(page):
        before = page[: block.start()].rstrip()
        # What introduces the page holds for all of it, a paragraph for the block that follows it.
        said = [before.split("\n## ")[0], before.split("\n\n")[-1]]
        needs = [re.search(r"needs?\s+the\s+(hub|weights)", re.sub(fence, "", s)) for s in said]
        yield block[2], block[3], any(needs)


def commands(path: Path) -> list[tuple[str, bool]]:
    found = []
    for language, text, marked in blocks(path):
        if language and language not in SHELLS:
            continue
        for line in re.sub(r" *\\\n\s*", " ", text).splitlines():
            line = line.strip().removeprefix("$ ")
            # Settings of the environment come before the program.
            program = re.sub(r"^(\w+=\S* +)+", "", line).split(" ")[0]
            if line and not line.startswith("#") and (language or program in PROGRAMS):
                found.append((line, marked or MARKS.search(line) is not None))
    return found


CASES = [(path, *command) for path in PAGES for command in commands(path)]


@pytest.mark.parametrize(
    ("path", "line", "marked"), CASES, ids=[f"{p.relative_to(ROOT)}: {c[:60]}" for p, c, _ in CASES]
)
def test_commands_parse(path: Path, line: str, marked: bool) -> None:
    check(line)
    names_one = HUB_ID.search(line.split(" #")[0])
    assert marked or not names_one, "names a hub id: mark it with '# needs the hub'"
    assert names_one or not marked or line.endswith("needs a GPU"), "marked, and names no hub id"


def check(line: str) -> None:
    """Parse one command as its program would, or fail."""
    words = shlex.split(line, comments=True)
    while re.match(r"^\w+=", words[0]):
        words = words[1:]
    program, rest = words[0], words[1:]
    name = Path(program).name
    if name == "flexselect":
        parse(rest)
    elif name == "make":
        dry_run(rest)
    elif name.startswith("python"):
        assert rest, line
        if rest[0] == "-m":
            assert importlib.util.find_spec(rest[1]), f"no module {rest[1]}"
        elif rest[0] != "-c":
            assert (ROOT / rest[0]).is_file(), f"no file {rest[0]}"
    elif name == "bash":
        assert (ROOT / rest[0]).is_file(), f"no file {rest[0]}"
    elif name == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        for extra in re.findall(r"flexselect\[([\w,]+)\]", line):
            assert set(extra.split(",")) <= set(extras["optional-dependencies"])
    else:
        assert name in ("cp", "cd", "export", "torchrun", "accelerate"), f"what is {name}?"


def parse(words: list[str]) -> None:
    """Parse a `flexselect` command without running it; … stands for options said elsewhere."""
    group: Any = typer.main.get_command(app)
    for command in (group, *group.commands.values()):
        command.callback = lambda **_: None
    elsewhere = "…" in words
    try:
        group.main([word for word in words if word != "…"], standalone_mode=False)
    except Exception as error:
        message = getattr(error, "format_message", error.__repr__)()
        if not (elsewhere and "Missing" in message):
            pytest.fail(f"flexselect {shlex.join(words)}: {message}", pytrace=False)


def dry_run(words: list[str]) -> None:
    """Ask make what it would do, and parse that."""
    text = (ROOT / "Makefile").read_text()
    variables = [word.split("=")[0] for word in words if "=" in word]
    targets = [word for word in words if "=" not in word and not word.startswith("-")]
    phony = re.findall(r"^\.PHONY: (.*)$", text, re.M)[0].split()
    for variable in variables:
        known = re.search(rf"\$[({{]{variable}[)}}]|,{variable}\)|^{variable} ", text, re.M)
        assert known, f"the Makefile reads no {variable}"
    assert set(targets) <= set(phony), f"the Makefile has no {set(targets) - set(phony)}"
    if not shutil.which("make") or set(targets) & {"install", "test", "lint", "format", "clean"}:
        return
    # Nothing is run, and .venv is taken to be there.
    done = subprocess.run(
        ["make", "-n", "-o", "install", *words],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert ".venv/bin/" in done.stdout, "it runs nothing that could be parsed"
    for command in re.sub(r" *\\\n\s*", " ", done.stdout).splitlines():
        found = re.search(r"\.venv/bin/flexselect (.*)$", command)
        if found:
            parse(shlex.split(found[1], comments=True))


PYTHON = [
    (path, text) for path in PAGES for language, text, _ in blocks(path) if language == "python"
]


@pytest.mark.parametrize(("path", "text"), PYTHON, ids=[p.stem for p, _ in PYTHON])
def test_python_uses_what_there_is(path: Path, text: str) -> None:
    """It compiles, and every name and knob it takes of the package exists."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "flexselect":
            assert hasattr(flexselect, node.attr), f"{path}: flexselect.{node.attr}"
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "flexselect.apply":
            knobs = {field.name for field in fields(flexselect.FlexSelect)}
            assert {word.arg for word in node.keywords} <= knobs


def test_there_are_commands_and_python_to_check() -> None:
    """A pattern that finds nothing would pass everything above."""
    assert len(CASES) > 10
    assert len(PYTHON) > 5
    assert any(line.startswith("make") for _, line, _ in CASES)


@pytest.mark.parametrize(
    "line",
    [
        "flexselect ask video.mp4",
        "flexselect ask video.mp4 question --model x --bugdet 3",
        "flexselect answer video.mp4",
        "make nothing",
        "make eval MODLE=qwen",
        "python scripts/nothing.py",
        "python -m flexselect.nothing",
        "pip install 'flexselect[everything]'",
        "conda activate x",
    ],
)
def test_what_does_not_exist_is_found(line: str) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception, ModuleNotFoundError)):
        check(line)


def test_hub_ids_are_told_from_paths() -> None:
    assert HUB_ID.search("--model Qwen/Qwen2.5-VL-7B-Instruct")
    assert HUB_ID.search("CKPT=OpenGVLab/InternVL2_5-8B")
    for words in (
        "videos/test-0256.mp4",
        "tests/core -x",
        "--out out/recall",
        "testbed/checkpoints/qwen2_5_vl",
        ".",
    ):
        assert not HUB_ID.search(words), words
