"""The README's first commands do what it says, run as a newcomer would, in an empty folder.

`test_commands_run.py` says of every other command how it is run.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from flexselect.tests.paths import ROOT


def run(line: str, folder: Path) -> str:
    """Run a line of the README with this interpreter's programs."""
    program, *arguments = shlex.split(line, comments=True)
    here = Path(sys.executable).parent
    done = subprocess.run(
        [here / program, *arguments],
        cwd=folder,
        env={**os.environ, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{line}\n{done.stderr}"
    return done.stdout


def test_the_first_commands_of_the_readme(tmp_path: Path) -> None:
    section = (ROOT / "README.md").read_text().split("## Commands")[1]
    (block,) = re.findall(r"```\n(flexselect models.*?)```", section, re.S)
    lines = [line for line in block.splitlines() if not line.startswith("make ")]
    printed = [run(line, tmp_path) for line in lines]
    listed, _, answered = printed
    assert {"internvl", "llava_video", "qwen2_5_vl", "qwen3_vl"} <= set(listed.split())
    (sidecar,) = (tmp_path / "videos").glob("*.json")
    (question,) = json.loads(sidecar.read_text())["questions"]
    assert f'"{question["question"]}"' in lines[2]
    assert answered.split()[0] == question["answer"]
    assert "512 → 64 visual" in answered
