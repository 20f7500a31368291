"""``flexselect train-selector``: from rendered videos to a selector that answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from flexselect.cli import app
from flexselect.testbed.locate import checkpoint_folder

TINY = {
    "family": "qwen2_5_vl",
    "source": "this test",
    "videos": 3,
    "questions": 2,
    "frames": 32,
    "epochs": 1,
    "samples_per_device": 2,
    "devices": 1,
    "bf16": False,
    "checkpointing": False,
    "hold_out": 2,
    "evaluate_every": 1,
    "workers": 0,
    "cache": True,
    "test_videos": 1,
    "test_frames": 64,
}


def _run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, " ".join(result.output.split())


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


def test_the_testbed_run_ends_in_a_selector_that_answers_and_an_honest_summary(recipe, tmp_path):
    out = tmp_path / "selector"
    code, said = _run("train-selector", "qwen", "--recipe", str(recipe), "--out", str(out))
    assert code == 0, said
    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == 2
    assert summary["samples"] == 6
    for name in ("spearman", "recall_at_k", "accuracy_lite", "accuracy_training_free"):
        assert -1 <= summary[name] <= 1
    assert summary["comparison"]["questions"] == 4
    assert summary["comparison"]["visual_tokens"] == 128
    assert summary["comparison"]["kept_tokens"] == 64
    assert summary["seconds"] > 0
    assert f"training-free {summary['accuracy_training_free']:.1%}" in said
    assert list((out / "checkpoints" / "runs").rglob("events.out.tfevents.*"))
    video = sorted((out / "videos" / "test").glob("*.mp4"))[0]
    code, answer = _run(
        *("ask", str(video), "What number is on the red star?", "--json"),
        *("--model", str(checkpoint_folder("qwen2_5_vl")), "--selector", str(out)),
    )
    assert code == 0, answer
    assert json.loads(answer)["decided_by"]["selector"] == str(out)


def test_without_data_a_real_run_says_what_is_missing():
    code, said = _run("train-selector", "qwen", "--ckpt", "somewhere")
    assert code == 1
    assert "--data is missing" in said


def test_an_unknown_family_and_an_impossible_value_are_named(recipe):
    code, said = _run("train-selector", "gpt")
    assert (code, "'gpt'" in said) == (1, True)
    code, said = _run("train-selector", "qwen", "--recipe", str(recipe), "--epochs", "0")
    assert (code, "epochs" in said) == (1, True)
    code, said = _run("train-selector", "llava", "--recipe", str(recipe))
    assert (code, "is a recipe for qwen2_5_vl" in said) == (1, True)


def test_the_dry_run_needs_no_weights():
    code, said = _run("train-selector", "llava", "--dry-run", "--gpus", "4")
    assert code == 0, said
    assert "4 GPUs x 1 x 1 = 4 samples" in said
    assert "13,440 visual tokens" in said
    assert "ZeRO-3" in said


def test_the_dry_run_reads_the_testbeds_models_too_and_refuses_what_the_run_would(recipe):
    code, said = _run("train-selector", "qwen", "--dry-run", "--recipe", str(recipe))
    assert code == 0, said
    # Three videos with two questions each, of which two samples are held out.
    assert "steps 2: 4 samples" in said
    code, said = _run("train-selector", "qwen", "--dry-run", "--layer", "99")
    assert (code, "99" in said) == (1, True)
