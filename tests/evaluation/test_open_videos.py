"""Opened videos are shared by questions and methods, within a limit."""

from __future__ import annotations

import pytest

import flexselect
from flexselect.core.errors import VideoError
from flexselect.evaluation import videos as module
from flexselect.evaluation.videos import OpenVideos
from flexselect.inference.engine import Engine

HOW = {"backend": "pyav", "frames_per_chunk": None}


@pytest.fixture
def opening(monkeypatch):
    """Paths in the order in which they are decoded and encoded."""
    paths = []

    def noting(model, processor, path, **options):
        paths.append(path)
        return flexselect.open_video(model, processor, path, **options)

    monkeypatch.setattr(module, "open_video", noting)
    return paths


def test_methods_share_a_video_and_keep_their_own_selection(tiny, videos, opening):
    model, processor = tiny
    kept = OpenVideos(1.0)
    path = str(videos[0])
    counts = []
    for method in (flexselect.Full(), flexselect.FlexSelect(budget=8)):
        engine = Engine(model, method)
        for fresh in (not counts, False):
            video, opened = kept.get(path, engine, processor, sampling={}, **HOW)
            assert opened == fresh
            answer = video.ask("What number is on the red star?", max_new_tokens=1)
            counts.append(len(answer.selection.kept))
    assert opening == [path]
    assert counts[0] > counts[2] == 8
    assert (kept.opened, kept.shared) == (1, 3)
    assert kept.spared == pytest.approx(3 * sum(video.seconds.values()))


def test_another_look_at_the_video_is_another_opening(tiny, videos, opening):
    model, processor = tiny
    engine, kept = Engine(model, flexselect.Full()), OpenVideos(1.0)
    few, _ = kept.get(str(videos[0]), engine, processor, sampling={"frames": 4}, **HOW)
    many, _ = kept.get(str(videos[0]), engine, processor, sampling={"frames": 8}, **HOW)
    assert (few.record["pictures"], many.record["pictures"]) == (4, 8)
    assert len(opening) == 2


def test_the_least_recently_used_is_let_go(tiny, videos, opening):
    model, processor = tiny
    engine = Engine(model, flexselect.Full())
    first, second, third = map(str, videos[:3])
    one = flexselect.open_video(model, processor, first, method=engine.method)
    kept = OpenVideos(2.5 * one.features.model.nbytes / 2**30)
    for path in (first, second, first, third, first, second):
        kept.get(path, engine, processor, sampling={}, **HOW)
    assert opening == [first, second, third, second]
    # Even without any room the latest stays: its other questions come next.
    none = OpenVideos(0)
    assert [none.get(first, engine, processor, sampling={}, **HOW)[1] for _ in range(2)] == [
        True,
        False,
    ]


def test_a_damaged_video_is_tried_once_until_it_changes(tiny, videos, tmp_path, opening):
    model, processor = tiny
    engine, kept = Engine(model, flexselect.Full()), OpenVideos(1.0)
    path = tmp_path / "broken.mp4"
    path.write_bytes(b"no video at all")
    for _ in range(3):
        with pytest.raises(VideoError, match=r"broken\.mp4"):
            kept.get(str(path), engine, processor, sampling={}, **HOW)
    assert opening == [str(path)]
    assert (kept.opened, kept.shared) == (0, 0)
    # Replaced, it is another file.
    path.write_bytes(videos[0].read_bytes())
    video, fresh = kept.get(str(path), engine, processor, sampling={}, **HOW)
    assert fresh
    assert video.record["pictures"] == 8
