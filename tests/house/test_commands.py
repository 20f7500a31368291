"""The Makefile, `.ci/run` and the README say the same, and their exit codes are honest.

`make` runs in an empty folder with a stand-in for Python that writes down how it was called, so
no package is installed here.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from flexselect.tests.paths import ROOT

pytestmark = pytest.mark.skipif(not shutil.which("make"), reason="no make on this machine")

#: Stand-in for `python`: answers the version check, makes a .venv with itself, logs every call.
PYTHON = """#!/bin/bash
case "$1" in
  -c) exit {version_check} ;;
esac
echo "$@" >> "$(dirname "$0")/calls" 2>/dev/null
if [ "$2" = venv ]; then
  mkdir -p "$3/bin" && cp "$0" "$3/bin/python"
fi
{fail}
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    (tmp_path / "path").mkdir()
    return tmp_path


def stand_in(checkout: Path, name: str = "python3", version_check: int = 0, fail: str = "") -> None:
    file = checkout / "path" / name
    file.write_text(PYTHON.format(version_check=version_check, fail=fail))
    file.chmod(0o755)


def run(checkout: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    environment.pop("PYTHON", None)
    environment["PATH"] = f"{checkout / 'path'}:{environment['PATH']}"
    return subprocess.run(
        command, cwd=checkout, env=environment, capture_output=True, text=True, check=False
    )


def calls(checkout: Path) -> list[str]:
    found = [checkout / "path" / "calls", checkout / ".venv" / "bin" / "calls"]
    return [line for file in found if file.exists() for line in file.read_text().splitlines()]


def test_install_is_done_once(checkout: Path) -> None:
    stand_in(checkout)
    first = run(checkout, "make", "install")
    assert first.returncode == 0, first.stderr
    assert len(calls(checkout)) == 3
    assert all("-c constraints.txt" in call for call in calls(checkout)[1:])
    assert (checkout / ".venv" / "src" / "flexselect").resolve() == checkout.resolve()

    second = run(checkout, "make", "install")
    assert second.returncode == 0, second.stderr
    assert len(calls(checkout)) == 3


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_install_follows_a_change(checkout: Path, name: str) -> None:
    stand_in(checkout)
    assert run(checkout, "make", "install").returncode == 0
    stamp = (checkout / ".venv" / ".installed").stat().st_mtime
    os.utime(checkout / name, (stamp + 1, stamp + 1))
    assert run(checkout, "make", "-q", "install").returncode == 1
    assert run(checkout, "make", "install").returncode == 0
    assert len(calls(checkout)) == 6


def test_a_failed_install_is_tried_again(checkout: Path) -> None:
    stand_in(checkout, fail='[ "$2" != pip ]')
    assert run(checkout, "make", "install").returncode != 0
    assert not (checkout / ".venv" / ".installed").exists()
    stand_in(checkout)
    assert run(checkout, "make", "install").returncode == 0


def test_install_takes_a_python_that_is_supported(checkout: Path) -> None:
    stand_in(checkout, "python3", version_check=1)
    stand_in(checkout, "python3.12", version_check=1)
    stand_in(checkout, "python3.11")
    result = run(checkout, "make", "install")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("python3.11 -m venv")


def test_install_says_what_is_missing(checkout: Path) -> None:
    for name in ("python3", "python3.10", "python3.11", "python3.12"):
        stand_in(checkout, name, version_check=1)
    result = run(checkout, "make", "install")
    assert result.returncode != 0
    assert "Python 3.10, 3.11 or 3.12" in result.stderr
    assert not calls(checkout)


def test_help_lists_every_target() -> None:
    text = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    result = run(ROOT, "make", "help")
    assert re.findall(r"^  make ([\w-]+) ", result.stdout, re.MULTILINE) == phony.split()


def test_fixtures_needs_its_folder(checkout: Path) -> None:
    stand_in(checkout)
    result = run(checkout, "make", "fixtures", "FIXTURES=nowhere")
    assert result.returncode != 0
    assert "No golden data at nowhere" in result.stderr


def test_ci_runs_the_readmes_test_command(checkout: Path) -> None:
    (block,) = re.findall(r"```\n(make install.*?)```", (checkout / "README.md").read_text(), re.S)
    commands = [line.split("#")[0].strip() for line in block.splitlines()]
    assert commands == ["make install", "make test"]
    make = checkout / "path" / "make"
    make.write_text('#!/bin/sh\npwd > called; echo "make $*" >> called; echo "3 failed"; exit 7\n')
    make.chmod(0o755)
    elsewhere = checkout / "path"
    environment = {**os.environ, "PATH": f"{elsewhere}:{os.environ['PATH']}"}
    result = subprocess.run(
        [checkout / ".ci" / "run"],
        cwd=elsewhere,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 7
    assert result.stdout == "3 failed\n"
    where, what = (checkout / "called").read_text().splitlines()
    assert (Path(where).resolve(), what) == (checkout.resolve(), commands[1])


def tools(checkout: Path, **codes: int) -> None:
    """Put stand-ins for the tools into .venv: each says its name and arguments, and its code."""
    assert run(checkout, "make", "install").returncode == 0
    for tool in ("ruff", "mypy", "pytest"):
        file = checkout / ".venv" / "bin" / tool
        file.write_text(f'#!/bin/sh\necho "ran {tool} $*"\nexit {codes.get(tool, 0)}\n')
        file.chmod(0o755)


@pytest.mark.parametrize("failing", ["", "ruff", "mypy", "pytest"])
def test_test_means_lint_and_all_tests(checkout: Path, failing: str) -> None:
    stand_in(checkout)
    tools(checkout, **({failing: 1} if failing else {}))
    result = run(checkout, "make", "test")
    ran = re.findall(r"^ran (.*?) *$", result.stdout, re.MULTILINE)
    lint = ["ruff check .", "ruff format --check .", "mypy"]
    assert ran == (lint[:1] if failing == "ruff" else lint) + ["pytest -q"]
    assert (result.returncode == 0) == (not failing)


def test_fixtures_are_checked_in_the_folder_named(checkout: Path) -> None:
    stand_in(checkout)
    (checkout / "golden data").mkdir()
    result = run(checkout, "make", "fixtures", "FIXTURES=golden data")
    assert result.returncode == 0, result.stderr
    assert calls(checkout)[-1] == "scripts/check_fixture.py golden data"


def test_lint_names_files_from_the_root(checkout: Path) -> None:
    stand_in(checkout)
    tools(checkout)
    mypy = checkout / ".venv" / "bin" / "mypy"
    mypy.write_text("#!/bin/sh\necho .venv/src/flexselect/core/sets.py:1: error; exit 1\n")
    result = run(checkout, "make", "lint")
    assert result.returncode != 0
    assert "\ncore/sets.py:1: error" in result.stdout


@pytest.mark.parametrize(
    ("model", "folder"),
    [("", "qwen2_5_vl"), ("MODEL=llava", "llava_video"), ("MODEL=internvl", "internvl")],
)
def test_reports_are_of_the_run_just_made(checkout: Path, model: str, folder: str) -> None:
    stand_in(checkout)
    planned = run(checkout, "make", "-n", "eval", *model.split(), "REPORTS=1").stdout.splitlines()
    assert "flexselect eval" in planned[-2]
    assert planned[-1] == f".venv/bin/flexselect reports 'results/eval/{folder}/latest'"
    assert "reports" not in run(checkout, "make", "-n", "eval", *model.split()).stdout
