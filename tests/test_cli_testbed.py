"""``flexselect ask`` without ``--model``: the testbed's tiny models answer about long videos."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from flexselect.cli import app
from flexselect.testbed import locate
from flexselect.testbed.make import make_videos
from flexselect.testbed.videos import NeedleVideo

SHORT_NAMES = {"qwen2_5_vl": "qwen", "llava_video": "llava"}


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> NeedleVideo:
    """A file of 512 frames with three questions."""
    folder = tmp_path_factory.mktemp("needles")
    (video,) = make_videos(folder, split="validation", frames=512, count=1, questions=3)
    return video


def ask(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["ask", *map(str, arguments)])


@pytest.mark.parametrize("name", locate.FAMILIES)
def test_without_a_model_the_tiny_one_finds_the_answer_and_its_moment(
    name: str, video: NeedleVideo
) -> None:
    right = first = seen = 0
    for question in video.questions:
        family = SHORT_NAMES.get(name, name)
        result = ask(video.path, question.text, "--family", family, "--json", "--device", "cpu")
        assert result.exit_code == 0, result.stderr
        report = json.loads(result.stdout)
        assert report["decided_by"]["model"] == str(locate.checkpoint_folder(name))
        assert f"tiny {name} of the testbed answered" in report["note"]
        assert "only testbed videos" in report["note"]
        assert report["kept_tokens"] <= report["visual_tokens"] / 16
        assert report["decided_by"]["pictures"] == 512
        right += report["answer"] == question.answer
        # A scene of two pictures lasts a second.
        at = question.needles[0].frames[0] / video.fps + 1e-3
        named = [moment["start"] <= at <= moment["end"] for moment in report["moments"]]
        seen += any(named)
        first += named[0]
    # Guessing gets none or one of three, and a moment of a second in four minutes one in 256.
    assert (right, first, seen) == (3, 3, 3)


def test_people_are_told_who_answered(video: NeedleVideo) -> None:
    result = ask(video.path, video.questions[0].text, "--device", "cpu", "--quiet")
    assert result.exit_code == 0, result.stderr
    assert "the tiny qwen2_5_vl of the testbed answered" in result.stderr
    assert "preset qwen2_5_vl-tiny" in " ".join(result.stdout.split())


def test_a_family_is_for_the_testbed_alone(video: NeedleVideo, tmp_path: Path) -> None:
    result = ask(video.path, "What?", "--family", "qwen", "--model", tmp_path)
    assert result.exit_code == 1
    assert "--family chooses a tiny model; leave it out" in result.stderr
    result = ask(video.path, "What?", "--family", "gpt")
    assert result.exit_code == 2
    assert "no model family 'gpt'" in " ".join(result.stderr.replace("│", " ").split())


def test_a_missing_checkpoint_says_how_to_train_it(
    video: NeedleVideo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locate, "FOLDER", tmp_path)
    result = ask(video.path, "What?", "--family", "internvl")
    assert result.exit_code == 1
    assert "testbed.train --family internvl" in result.stderr
