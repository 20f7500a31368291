"""The exact prompt of every benchmark and family, as golden files.

A golden file is rewritten by running this module with FLEXSELECT_WRITE_GOLDEN=1; the test fails
then too, so that no run can pass by writing what it should check.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flexselect.core.errors import OptionError
from flexselect.evaluation.prompts import adapt_text, prompt_settings
from flexselect.tests.evaluation.shapes import TASKS, include, prepare_all, rows_of

GOLDEN = Path(__file__).parent / "golden"
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What lmms-eval makes of the prepared rows: by task its prompts and videos."""
    root = prepare_all(tmp_path_factory.mktemp("benchmarks"))
    names = [f"{task}_local" for task in TASKS.values()]
    done = subprocess.run(
        [sys.executable, HERE / "ask_tasks.py", json.dumps(names), *include(root)],
        env={**os.environ, "HF_HOME": str(root), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {"root": str(root), **json.loads(done.stdout)}


@pytest.mark.parametrize("benchmark", TASKS)
def test_prompts_are_as_recorded(benchmark: str, asked: dict[str, Any]) -> None:
    task = TASKS[benchmark]
    text = "".join(
        f"=== {family}, row {number}\n{prompt}⏎\n"
        for family, prompts in asked[f"{task}_local"]["prompts"].items()
        for number, prompt in enumerate(prompts)
    )
    path = GOLDEN / f"{task}.txt"
    recorded = path.read_text() if path.exists() else ""
    if os.environ.get("FLEXSELECT_WRITE_GOLDEN") and recorded != text:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        pytest.fail(f"wrote {path}; run again without FLEXSELECT_WRITE_GOLDEN")
    assert text == recorded


@pytest.mark.parametrize("benchmark", TASKS)
def test_lmms_eval_opens_the_videos_that_were_prepared(
    benchmark: str, asked: dict[str, Any]
) -> None:
    videos = asked[f"{TASKS[benchmark]}_local"]["videos"]
    assert len(videos) == len(rows_of(benchmark))
    for shown in videos:
        (path,) = shown
        assert Path(path).is_file()
        assert path.startswith(asked["root"])


@pytest.mark.parametrize("benchmark", TASKS)
def test_a_right_letter_scores_one_and_a_wrong_one_nothing(
    benchmark: str, asked: dict[str, Any]
) -> None:
    assert asked[f"{TASKS[benchmark]}_local"]["scores"] == [[1, 0]] * len(rows_of(benchmark))


def test_only_where_the_reference_departs_does_the_prompt_differ_from_lmms_evals(
    asked: dict[str, Any],
) -> None:
    same = {
        (task, family)
        for task in TASKS.values()
        for family, prompts in asked[f"{task}_local"]["prompts"].items()
        if prompts == asked[f"{task}_local"]["default"]
    }
    families = ("internvl", "llava_video", "qwen2_5_vl")
    kept = ("longvideobench_val_v", "egoschema_subset", "mvbench_action_sequence")
    assert same == {
        *((task, family) for task in kept for family in families),
        ("videomme", "internvl"),
        ("videomme", "qwen2_5_vl"),
    }


def test_lvbench_options_lose_their_parentheses_and_nothing_else_does() -> None:
    text = "Which?\n(A) A net (large)\n(B) B\n(E) none (D)"
    assert adapt_text("lvbench", text) == "Which?\nA A net (large)\nB B\n(E) none D"
    assert adapt_text("lvbench_local", text) == adapt_text("lvbench", text)
    assert adapt_text("videomme", text) == text


def test_settings_belong_to_the_benchmark_wherever_its_rows_come_from() -> None:
    assert prompt_settings("qwen", "videomme") == prompt_settings("qwen2_5_vl", "videomme_local")
    assert prompt_settings("llava", "videomme") != prompt_settings("qwen", "videomme")
    assert prompt_settings("qwen", "mvbench_moving_count") == prompt_settings("qwen", "mvbench")
    assert prompt_settings("qwen", "needle_16") == {}
    with pytest.raises(OptionError, match="no model family 'gemini'"):
        prompt_settings("gemini", "videomme")
