"""``flexselect eval``: its errors are sentences, its exit code honest, its outcome a table."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flexselect.cli import app
from flexselect.evaluation import run
from flexselect.evaluation.scores import missing_row
from flexselect.tests.paths import ROOT

runner = CliRunner()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["gpt"], "gpt"),
        (["qwen", "--methods", "best"], "best"),
        (["qwen", "--budget", "0"], "budget"),
        (["qwen", "--frames", "8", "--fps", "2"], "fps"),
        (["qwen", "--ckpt", "/nowhere/at/all"], "/nowhere/at/all"),
        (["qwen", "--ckpt", "/nowhere", "--methods", "flexselect-lite"], "selector"),
    ],
)
def test_wrong_options_cost_nothing_and_are_named(tmp_path: Path, arguments, named):
    result = runner.invoke(app, ["eval", *arguments, "--out", str(tmp_path / "runs")])
    assert result.exit_code == 1
    assert named in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.rglob("run.json"))


def test_a_failed_run_is_a_failed_command_and_goes_on_later(tmp_path: Path, monkeypatch):
    def fails(folder, plan):
        raise OSError("the disk is full")

    monkeypatch.setattr(run, "perform", fails)
    command = ["eval", "qwen", "--methods", "full", "--out", str(tmp_path)]
    assert runner.invoke(app, command).exit_code != 0
    again = runner.invoke(app, command)
    assert "Continuing" in again.stderr
    assert "--fresh" in again.stderr
    assert len(list(tmp_path.rglob("run.json"))) == 1


def test_make_eval_passes_on_what_is_given():
    options = ("ckpt", "tasks", "methods", "selector", "budget", "layer", "frames", "fps")
    options += ("gpus", "limit", "include")
    given = [f"{name.upper()}=a {name}" for name in options]
    command = ["make", "-n", "eval", "MODEL=internvl", *given, "ARGS=--fresh"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    (words,) = re.findall(r"flexselect eval .*", " ".join(done.stdout.replace("\\\n", "").split()))
    passed = [word for name in options for word in (f"--{name}", f"a {name}")]
    assert shlex.split(words) == ["flexselect", "eval", "internvl", *passed, "--fresh"]


def test_the_table_is_printed_and_kept(tmp_path: Path, cache: Path, own_accelerate):
    command = ["eval", "internvl", "--tasks", "needle_16_validation", "--methods", "full,uniform"]
    result = runner.invoke(
        app,
        [*command, "--limit", "3", "--budget", "12", "--batch-size", "2", "--out", str(tmp_path)],
        env={"COLUMNS": "200"},
    )
    assert result.exit_code == 0, result.output
    folder = (tmp_path / "internvl" / "latest").resolve()
    rows = json.loads((folder / "summary.json").read_text())
    assert [(row["method"], row["samples"], row["kept_tokens"]) for row in rows] == [
        ("full", 3, 96),
        ("uniform", 3, 12),
    ]
    table = (folder / "table.md").read_text()
    for row in ("| full | needle_16_validation | 16 | 96 → 96 |", "| 96 → 12 |"):
        assert row in table
    assert "96 → 12" in result.stdout
    assert "Run " in result.stderr


def test_a_task_without_any_usable_video_fails_the_command(tmp_path: Path, monkeypatch):
    row = missing_row("full", "videomme", "")
    row |= {"samples": 3, "failed": 3, "accuracy": 0.0, "note": None}
    monkeypatch.setattr(run, "perform", lambda folder, plan: [row])
    result = runner.invoke(app, ["eval", "qwen", "--methods", "full", "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert "videomme" in result.stderr
    assert "prepare_data.py" in result.stderr
