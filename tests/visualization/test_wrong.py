"""Reports of an evaluation's wrong answers, from files as the evaluation writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flexselect.cli import app
from flexselect.core.errors import OptionError
from flexselect.evaluation.journal import Journal
from flexselect.evaluation.plan import RECORD, SAMPLES
from flexselect.evaluation.scores import task_samples
from flexselect.testbed.locate import checkpoint_folder
from flexselect.testbed.videos import NeedleVideo
from flexselect.visualization.wrong import wrong_answers

from .conftest import BUDGET, FRAMES

SETTINGS: dict[str, Any] = {
    "method": "uniform",
    "positions": "compact",
    "budget": BUDGET,
    "backend": "pyav",
    "sampling": {"frames": FRAMES},
    "max_new_tokens": None,
}


@pytest.fixture
def run(tmp_path: Path, needle_video: NeedleVideo) -> Path:
    """A run of two methods: one wrong and one right answer, one unreadable video, one in turns."""
    folder = tmp_path / "run"
    question = needle_video.questions[0]
    content = [
        {"type": "video", "path": str(needle_video.path)},
        {"type": "text", "text": question.text},
    ]
    turn = {"role": "user", "content": content}
    for method in ("uniform", "random"):
        lines = [
            {
                "key": str(doc),
                "task": "needle",
                "doc_id": doc,
                "ordinal": 0,
                "videos": [str(needle_video.path)],
                "prompt": [turn] * (2 if doc == 3 else 1),
                "answer": "<i>none</i>",
                "error": "no such video" if doc == 2 else None,
            }
            for doc in range(4)
        ]
        journal = Journal(folder / method)
        journal.append(lines)
        journal.close()
        logged = [
            {"doc_id": doc, "target": question.answer, "accuracy": {"score": float(doc == 1)}}
            for doc in range(4)
        ]
        samples = task_samples(method, "needle", logged, lines, "accuracy")
        text = "".join(json.dumps(sample) + "\n" for sample in samples)
        (folder / method / SAMPLES).write_text(text)
    record = {
        "decides": {"checkpoint": str(checkpoint_folder("qwen2_5_vl"))},
        "methods": {
            name: {
                "settings": {**SETTINGS, "method": name},
                "generation": {"needle": {"max_new_tokens": 4}},
            }
            for name in ("uniform", "random")
        },
    }
    (folder / RECORD).write_text(json.dumps(record))
    return folder


def test_only_what_is_wrong_and_can_be_asked_is_reported(
    run: Path, needle_video: NeedleVideo
) -> None:
    checkpoint, wrong = wrong_answers(run)
    assert checkpoint == str(checkpoint_folder("qwen2_5_vl"))
    assert [(item.method, item.doc_id) for item in wrong] == [("uniform", 0), ("random", 0)]
    assert wrong[0].question == needle_video.questions[0].text
    assert wrong[0].expected == needle_video.questions[0].answer
    assert [item.method for item in wrong_answers(run, ["random"])[1]] == ["random"]


def test_the_command_asks_again_as_the_run_did(run: Path, needle_video: NeedleVideo) -> None:
    command = ["reports", str(run), "--methods", " uniform", "--quiet"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.stderr
    index = (run / "reports" / "index.html").read_text()
    assert '<a href="uniform-needle-0.html">' in index
    assert "&lt;i&gt;none" in index
    assert "<i>" not in index
    page = (run / "reports" / "uniform-needle-0.html").read_text()
    assert needle_video.questions[0].text in page
    # The run's own method, budget and pictures; and the answer that the run had.
    assert f"of {FRAMES * 2:,} (" in page
    assert f"<dd>{BUDGET}<" in page
    assert "<dd>uniform<" in page
    assert "In the run it said: &lt;i&gt;none&lt;/i&gt;" in page
    assert "Where the answer is" in page


def test_what_is_no_run_is_said(run: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"no run of `flexselect eval`"):
        wrong_answers(tmp_path)
    with pytest.raises(OptionError, match="no answers of flexselect; it has"):
        wrong_answers(run, ["flexselect"])
