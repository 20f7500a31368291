"""The six benchmarks through lmms-eval, from the hub's archives to the table, with tiny models.

Of two benchmarks one video is damaged and one is missing: both are counted, neither stops the run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flexselect.evaluation.compare import compare, markdown
from flexselect.testbed.locate import FAMILIES
from flexselect.tests.evaluation.shapes import METHODS, TASKS, has_checkpoint, rows_of

GOLDEN = Path(__file__).parent / "golden"

#: Task to the rows whose video is damaged or missing, see `benchmarks` in conftest.
BROKEN = {"mlvu_dev": [1, 2], "egoschema_subset": [1]}


@pytest.fixture(scope="module")
def runs(benchmarks: Path) -> Path:
    """Folder of the runs of every family whose tiny checkpoint is there."""
    return benchmarks / "runs"


def latest(runs: Path, family: str) -> Path:
    if not has_checkpoint(family):
        pytest.skip(f"the tiny {family} is not trained yet")
    return runs / family / "latest"


def rows(run: Path, task: str) -> list[dict[str, Any]]:
    found = json.loads((run / "rows.json").read_text())
    return [row for row in found if row["task"] == f"{task}_local"]


@pytest.mark.parametrize("benchmark", TASKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_benchmark_runs_end_to_end(family: str, benchmark: str, runs: Path) -> None:
    run = latest(runs, family)
    task = TASKS[benchmark]
    broken = BROKEN.get(task, [])
    found = rows(run, task)
    assert [row["method"] for row in found] == list(METHODS)
    for row in found:
        assert (row["samples"], row["failed"]) == (len(rows_of(benchmark)), len(broken))
        assert row["accuracy"] is not None
        assert row["frames"] == 4
        assert row["visual_tokens"] >= row["kept_tokens"] > 0
        assert row["ttft_s"] > 0


@pytest.mark.parametrize("benchmark", TASKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_asked_what_is_frozen(family: str, benchmark: str, runs: Path) -> None:
    run = latest(runs, family)
    task = TASKS[benchmark]
    golden = (GOLDEN / f"{task}.txt").read_text()
    asked = {}
    for line in (run / "flexselect" / "answers-0.jsonl").read_text().splitlines():
        answer = json.loads(line)
        if answer["task"] == f"{task}_local" and answer["prompt"]:
            [turn] = answer["prompt"]
            assert [part["type"] for part in turn["content"]] == ["video", "text"]
            asked[answer["doc_id"]] = turn["content"][1]["text"]
    for number, text in asked.items():
        assert f"=== {family}, row {number}\n{text}⏎\n" in golden
    gone = BROKEN["egoschema_subset"] if task == "egoschema_subset" else []
    assert sorted(asked) == [i for i in range(len(rows_of(benchmark))) if i not in gone]
    record = json.loads((run / "run.json").read_text())["methods"]["flexselect"]["prompts"]
    [turn] = record[f"{task}_local"]["example"]
    assert turn["content"][1]["text"] in asked.values(), "the run record shows one"


@pytest.mark.parametrize("family", FAMILIES)
def test_damaged_and_missing_videos_are_told_by_sample(family: str, runs: Path) -> None:
    run = latest(runs, family)
    for task, broken in BROKEN.items():
        lines = (run / "flexselect" / "samples.jsonl").read_text().splitlines()
        samples = [s for s in map(json.loads, lines) if s["task"] == f"{task}_local"]
        assert [s["doc_id"] for s in samples if s["error"]] == broken
        assert all(s["score"] == 0 for s in samples if s["error"])


def test_questions_about_one_video_share_it(runs: Path) -> None:
    run = next(latest(runs, family) for family in FAMILIES if has_checkpoint(family))
    first, second = rows(run, "lvbench")
    assert first["opened"] == 2, "three questions, two videos"
    assert second["opened"] == 0, "the second method asks about the same features"


def test_the_runs_can_be_compared(runs: Path) -> None:
    run = next(latest(runs, family) for family in FAMILIES if has_checkpoint(family))
    found = compare([run])
    assert [pair.task for pair in found.pairs] == list(TASKS.values())
    shared = {pair.task: pair.result.samples for pair in found.pairs if pair.result is not None}
    assert shared == {
        task: len(rows_of(benchmark)) - len(BROKEN.get(task, []))
        for benchmark, task in TASKS.items()
    }
    assert found.differences == {}
    assert "## lvbench" in markdown(found)
