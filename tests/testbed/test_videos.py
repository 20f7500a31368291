"""The files: what was drawn comes back from h264, the needle is where the sidecar says it is."""

import json
import logging
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from flexselect.core.errors import OptionError, VideoError
from flexselect.testbed import videos
from flexselect.testbed.make import main, make_videos
from flexselect.testbed.questions import TASKS, compose, describe
from flexselect.testbed.scenes import CELL, SIZES


def rivals(plot, needle):
    """Draw the video again with the needle, and with each mark that differs in one attribute."""
    cells = plot.cells.copy()
    for attribute, size in enumerate(SIZES):
        for value in range(size):
            mark = list(needle.mark)
            mark[attribute] = value
            cells[needle.scene, needle.row, needle.column] = mark
            yield tuple(mark), videos.draw_plot(replace(plot, cells=cells))


def test_the_needle_is_read_from_the_decoded_file_where_the_sidecar_says(tmp_path):
    made = videos.make_needle_video(
        tmp_path / "v.mp4", split="test", index=0, frames=16, tasks=TASKS
    )
    seen = videos.decode_video(made.path)
    assert seen.shape == (16, 56, 56, 3)
    plot = compose(made.recipe["seed"], 8, TASKS)
    for question, planned in zip(made.questions, plot.questions, strict=True):
        for spot, needle in zip(question.needles, planned.needles, strict=True):
            assert len(spot.frames) == 2
            assert spot.mark == describe(needle.mark)
            at = np.s_[
                list(spot.frames),
                spot.row * CELL : (spot.row + 1) * CELL,
                spot.column * CELL : (spot.column + 1) * CELL,
            ]
            error = {
                mark: np.abs(frames[at].astype(int) - seen[at]).mean()
                for mark, frames in rivals(plot, needle)
            }
            first, second = sorted(set(error.values()))[:2]
            assert error[needle.mark] == first < 0.95 * second


def test_a_file_has_the_same_bytes_every_time(tmp_path):
    contents = []
    for name in ("a", "b"):
        path = tmp_path / name / "v.mp4"
        videos.make_needle_video(path, split="test", index=1, frames=16, tasks=["number"])
        contents.append((path.read_bytes(), path.with_suffix(".json").read_bytes()))
    assert contents[0] == contents[1]


def test_the_codec_keeps_brightness_and_order():
    plot = compose(3, 16, ["number"])
    drawn = videos.draw_plot(plot, hold=1)
    seen = videos.decode_video(videos.encode_video(drawn))
    luma = np.array([0.299, 0.587, 0.114])
    error = np.abs(seen @ luma - drawn @ luma).mean(axis=(1, 2))
    wrong = np.abs(np.roll(seen, 1, axis=0) @ luma - drawn @ luma).mean(axis=(1, 2))
    assert error.max() < 6
    assert wrong.min() > 3 * error.max()


def test_a_sidecar_comes_back_as_it_was_written(tmp_path):
    path = tmp_path / "v.mp4"
    made = videos.make_needle_video(path, split="validation", index=4, frames=24, tasks=TASKS[:4])
    assert videos.read_sidecar(path) == made == videos.read_sidecar(path.with_suffix(".json"))
    cells = json.loads(path.with_suffix(".json").read_text())["cells"]
    needle = made.questions[0].needles[0]
    assert cells[needle.frames[0] // 2][needle.row][needle.column] == needle.mark


def test_cells_seen_follow_sampling_and_temporal_patches(tmp_path):
    spot = videos.NeedleSpot((10, 11), 1, 0, "red star 7", "asked")
    question = videos.VideoQuestion("number", "?", "7", 0.1, (spot,))
    assert question.cells_seen(range(16)).tolist() == [[10, 1, 0], [11, 1, 0]]
    assert question.cells_seen(range(16), temporal_patch=2).tolist() == [[5, 1, 0]]
    assert question.cells_seen(range(0, 16, 2)).tolist() == [[5, 1, 0]]
    assert question.cells_seen([0, 3, 8, 11], temporal_patch=2).tolist() == [[1, 1, 0]]
    assert question.cells_seen([0, 3]).shape == (0, 3)


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
    rows = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    assert [row["task"] for row in rows] == ["number", "colour", "shape"]
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


def test_bad_options_and_damaged_files_are_named(tmp_path):
    with pytest.raises(OptionError, match="multiple of hold"):
        videos.make_needle_video(
            tmp_path / "v.mp4", split="test", index=0, frames=9, tasks=["number"]
        )
    with pytest.raises(VideoError, match="no needle video"):
        videos.read_sidecar(tmp_path / "absent.mp4")
    (tmp_path / "bad.json").write_text('{"format": 1}')
    with pytest.raises(VideoError, match="not a needle video's sidecar"):
        videos.read_sidecar(tmp_path / "bad.mp4")
    (tmp_path / "bad.mp4").write_bytes(b"no video at all")
    with pytest.raises(VideoError, match=r"bad\.mp4"):
        videos.decode_video(tmp_path / "bad.mp4")
    with pytest.raises(OptionError, match="at least one frame"):
        videos.encode_video([])
    with pytest.raises(OptionError, match="even"):
        videos.encode_video([np.zeros((55, 56, 3), np.uint8)])
