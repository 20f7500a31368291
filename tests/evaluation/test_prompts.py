"""The exact prompt of every benchmark and family, as golden files.

A golden file is rewritten by running this module with FLEXSELECT_WRITE_GOLDEN=1; the test fails
then too, so that no run can pass by writing what it should check.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexselect.core.errors import DataError, OptionError
from flexselect.evaluation.prompts import adapt_text, prompt_settings
from flexselect.evaluation.subtitles import FOLDER, MOMENTS, interleave, moments
from flexselect.tests.evaluation.shapes import TASKS, rows_of

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def asked(benchmarks: Path) -> dict[str, Any]:
    """What lmms-eval makes of the prepared rows: by task its prompts and videos."""
    found = json.loads((benchmarks / "asked.json").read_text())
    return {"root": str(benchmarks / "root"), **found}


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
        ((path, was_there),) = shown
        assert was_there
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
    families = ("internvl", "llava_video", "qwen2_5_vl", "qwen3_vl")
    kept = ("egoschema_subset", "mvbench_action_sequence")
    assert same == {
        *((task, family) for task in kept for family in families),
        ("longvideobench_val_v", "llava_video"),
        ("longvideobench_val_v", "qwen2_5_vl"),
        ("longvideobench_val_v", "qwen3_vl"),
        ("mlvu_dev", "qwen3_vl"),
        ("lvbench", "qwen3_vl"),
        ("videomme", "internvl"),
        ("videomme", "qwen2_5_vl"),
    }


def test_lvbench_options_lose_their_parentheses_and_nothing_else_does() -> None:
    text = "Which?\n(A) A net (large)\n(B) B\n(E) none (D)"
    said = "Which?\nA A net (large)\nB B\n(E) none D"
    for family in ("qwen", "internvl"):
        assert adapt_text(family, "lvbench", text, {}) == said
        assert adapt_text(family, "lvbench_local", text, {}) == said
        assert adapt_text(family, "videomme", text, {}) == text


def test_subtitles_stand_among_the_moments_they_cover() -> None:
    spans = [(0.5, 2.5, "one"), (2.9, 3.1, "two"), (3.2, 3.4, "never"), (9.0, 9.5, "late")]
    # Moments 0 and 1 come before the middle of the first, 2 and 3 before that of the second;
    # the third covers no moment, even widened to 2.8-3.8 without 3.
    assert interleave(spans, [0, 1, 2, 2.95, 4]) == ["", "", "one", "", "", "two", "never", ""]
    assert interleave([(3.4, 3.5, "gone")], [0, 4]) == ["", ""]
    assert interleave([], [0, 1]) == ["", ""]


seconds = st.floats(0, 100, width=16)
spoken = st.lists(
    st.tuples(seconds, st.floats(0, 5, width=16), st.sampled_from(["one", "two"])), max_size=6
)


@given(spoken, st.floats(0.5, 100, width=16), st.floats(0, 3, width=16))
def test_subtitles_are_the_harness_own_with_other_separators(
    spans: list[tuple[float, float, str]], duration: float, offset: float
) -> None:
    # The reference differs from lmms-eval in the separators and in the number of moments.
    harness = pytest.importorskip("lmms_eval.tasks.longvideobench.utils")
    lines = [{"timestamp": [start, start + long], "text": text} for start, long, text in spans]
    times = harness.compute_frame_timestamps(duration, MOMENTS)
    assert moments(duration) == times
    theirs = harness.insert_subtitles_into_frames(times, lines, offset, duration)
    ours = [(start - offset, start + long - offset, text) for start, long, text in spans]
    assert "\n".join(text or "<image>" for text in interleave(ours, times)) == theirs


def test_moments_are_64_or_a_second_apart() -> None:
    assert moments(3.9) == [0, 1, 2]
    assert moments(64) == list(range(64))
    assert len(moments(6400)) == 64
    assert moments(6400)[1] == 100


def test_subtitles_that_are_missing_or_damaged_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    doc = rows_of("longvideobench")[0]
    with pytest.raises(DataError, match=r"q-Trail9_en\.json cannot be read.*prepare_data\.py"):
        adapt_text("internvl", "longvideobench_val_v", "Which?", doc)
    path = tmp_path / FOLDER / doc["subtitle_path"]
    path.parent.mkdir(parents=True)
    for content in ("", "[{}]", '[{"start": "1", "end": "2", "line": "x"}]'):
        path.write_text(content)
        with pytest.raises(DataError, match="cannot be read"):
            adapt_text("internvl", "longvideobench_val_v", "Which?", doc)


def test_a_family_the_reference_did_not_evaluate_is_asked_what_the_harness_asks_it(
    asked: dict[str, Any],
) -> None:
    assert prompt_settings("qwen3_vl", "videomme") == {}
    first = asked["videomme_local"]["prompts"]["qwen3_vl"][0]
    assert first.startswith("Question: Which colour")
    assert first.endswith("\nAnswer with the option letter only.")


def test_settings_belong_to_the_benchmark_wherever_its_rows_come_from() -> None:
    assert prompt_settings("qwen", "videomme") == prompt_settings("qwen2_5_vl", "videomme_local")
    assert prompt_settings("llava", "videomme") != prompt_settings("qwen", "videomme")
    assert prompt_settings("qwen", "mvbench_moving_count") == prompt_settings("qwen", "mvbench")
    assert prompt_settings("qwen", "needle_16") == {}
    with pytest.raises(OptionError, match="no model family 'gemini'"):
        prompt_settings("gemini", "videomme")
