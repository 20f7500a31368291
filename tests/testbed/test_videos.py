"""The files: what was drawn comes back from h264, the needle is where the sidecar says it is."""

import json
from dataclasses import replace

import numpy as np
import pytest

from flexselect.core.errors import OptionError, VideoError
from flexselect.testbed import videos
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


def test_bad_options_and_damaged_files_are_named(tmp_path):
    with pytest.raises(OptionError, match="multiple of hold"):
        videos.make_needle_video(
            tmp_path / "v.mp4", split="test", index=0, frames=9, tasks=["number"]
        )
    with pytest.raises(VideoError, match="no needle video"):
        videos.read_sidecar(tmp_path / "absent.mp4")
    for content in (b'{"format": 1}', b"{", b"\xff\xfe\xfa"):
        (tmp_path / "bad.json").write_bytes(content)
        with pytest.raises(VideoError, match=r"bad\.json is not a needle .* make the video again"):
            videos.read_sidecar(tmp_path / "bad.mp4")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(VideoError, match=r"folder\.json cannot be read \(Is a directory"):
        videos.read_sidecar(tmp_path / "folder.mp4")
    (tmp_path / "bad.mp4").write_bytes(b"no video at all")
    with pytest.raises(VideoError, match=r"bad\.mp4"):
        videos.decode_video(tmp_path / "bad.mp4")
    with pytest.raises(OptionError, match="at least one frame"):
        videos.encode_video([])
    with pytest.raises(OptionError, match="even"):
        videos.encode_video([np.zeros((55, 56, 3), np.uint8)])


def test_a_file_that_cannot_be_written_leaves_nothing_behind(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        videos.replace_file(tmp_path / "folder", b"content")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_an_empty_video_is_made_again_and_a_folder_in_its_place_is_named(tmp_path):
    path = tmp_path / "v.mp4"
    made = videos.make_needle_video(path, split="test", index=0, frames=8, tasks=["number"])
    content = path.read_bytes()
    path.write_bytes(b"")
    assert not videos.is_complete(path)
    assert videos.make_needle_video(path, split="test", index=0, frames=8, tasks=["number"]) == made
    assert path.read_bytes() == content
    for file in (path, path.with_suffix(".json")):
        file.unlink()
        file.mkdir()
        with pytest.raises(OptionError, match=f"{file.name} is a folder.* delete this one"):
            videos.make_needle_video(path, split="test", index=0, frames=8, tasks=["number"])
        file.rmdir()
