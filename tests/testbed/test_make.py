"""The command goes on where it stopped, lists all that is there, and names what is wrong."""

import json
import logging
import subprocess
import sys

import pytest

from flexselect.testbed import videos
from flexselect.testbed.make import main, make_videos


def listed(folder):
    """Rows of a folder's list of questions."""
    return [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]


def test_the_command_resumes_and_refuses_a_folder_of_other_videos(tmp_path, caplog):
    command = ["--split", "train", "--frames", "8", "--out", str(tmp_path)]
    assert main([*command, "--count", "2"]) == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("train-*")}
    (tmp_path / "train-0008-00001.json").unlink()
    assert main([*command, "--count", "3"]) == 0
    after = {path: path.stat().st_mtime_ns for path in tmp_path.glob("train-*")}
    assert len(after) == 6
    kept = [path for path in before if path.stem.endswith("0")]
    assert kept
    assert all(before[path] == after[path] for path in kept)
    assert [row["task"] for row in listed(tmp_path)] == ["number", "colour", "shape"]
    assert not list(tmp_path.glob("*.partial"))
    assert not list(tmp_path.glob(".*"))
    with caplog.at_level(logging.ERROR):
        assert main([*command, "--count", "1", "--tasks", "order"]) == 2
    assert "tasks differ" in caplog.text


def test_the_command_runs_as_a_module_and_reports_failure_by_its_exit_code(tmp_path):
    command = [sys.executable, "-m", "flexselect.testbed.make", "--split", "test"]
    command += ["--count", "1", "--out", str(tmp_path), "--frames"]
    good, bad = (
        subprocess.run([*command, frames], capture_output=True, text=True, check=False)
        for frames in ("8", "7")
    )
    assert good.returncode == 0, good.stderr
    assert "1 videos with 1 questions" in good.stderr
    assert bad.returncode == 2
    assert "frames=7" in bad.stderr
    assert "Traceback" not in bad.stderr
    assert len(videos.decode_video(tmp_path / "test-0008-00000.mp4")) == 8


def test_questions_are_dealt_in_turn(tmp_path):
    made = make_videos(
        tmp_path, split="test", frames=16, count=2, tasks=["number", "order"], questions=3
    )
    assert [[q.task for q in video.questions] for video in made] == [
        ["number", "order", "number"],
        ["order", "number", "order"],
    ]


def test_the_list_has_the_questions_of_every_video_in_the_folder(tmp_path, caplog):
    command = ["--split", "test", "--out", str(tmp_path), "--frames"]
    assert main([*command, "8", "--count", "2", "--questions", "2"]) == 0
    assert main([*command, "8", "--count", "1", "--first", "2"]) == 0
    assert main([*command, "16", "--count", "1"]) == 0
    ids = [row["id"] for row in listed(tmp_path)]
    made = [f"test-0008-0000{video}" for video in (0, 0, 1, 1, 2)] + ["test-0016-00000"]
    assert ids == [f"{stem}-{made[:at].count(stem)}" for at, stem in enumerate(made)]
    # What is no finished needle video is not listed, and only a damaged one deserves a word.
    (tmp_path / "talk.mp4").write_bytes(b"no needles")
    (tmp_path / "test-0008-00000.mp4").write_bytes(b"")
    (tmp_path / "test-0008-00001.json").write_text("{")
    with caplog.at_level(logging.WARNING):
        assert main([*command, "16", "--count", "1"]) == 0
    assert [row["id"] for row in listed(tmp_path)] == ids[4:]
    assert [record.args[0].name for record in caplog.records if record.levelname == "WARNING"] == [
        "test-0008-00001.mp4"
    ]


@pytest.mark.parametrize("content", [b"\xff\xfe\xfa", b"{", b"[]"])
def test_a_damaged_sidecar_is_named_with_what_to_do(tmp_path, caplog, content):
    command = ["--split", "test", "--frames", "8", "--count", "1", "--out", str(tmp_path)]
    assert main(command) == 0
    sidecar = tmp_path / "test-0008-00000.json"
    sidecar.write_bytes(content)
    assert main(command) == 2
    assert f"{sidecar} is not a needle video's sidecar" in caplog.text
    assert "Move or delete it, and make the video again" in caplog.text
    sidecar.unlink()
    assert main(command) == 0
    assert videos.read_sidecar(sidecar).frames == 8


def test_a_place_that_cannot_be_written_to_is_an_error(tmp_path, caplog, monkeypatch):
    command = ["--split", "test", "--frames", "8", "--count", "1", "--out"]
    blocked = tmp_path / "file"
    blocked.touch()
    for out in (blocked, blocked / "below"):
        caplog.clear()
        assert main([*command, str(out)]) == 2
        assert f"--out {out}: cannot write to {blocked}" in caplog.text
    for name in ("test-0008-00000.mp4", "questions.jsonl"):
        caplog.clear()
        out = tmp_path / name.split(".")[0]
        (out / name).mkdir(parents=True)
        assert main([*command, str(out)]) == 2
        assert name in caplog.text
        assert not list(out.glob(".*"))
    # The folder may also be the present one, which has no name of its own.
    monkeypatch.chdir(tmp_path)
    assert main([*command, "."]) == 0
