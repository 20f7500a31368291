"""Requests of the harness, read into questions."""

from __future__ import annotations

import os
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lmms_eval.api.instance import Instance
from PIL import Image

from flexselect.core.errors import PromptError
from flexselect.evaluation.questions import (
    Question,
    by_video,
    deal,
    pictures_of,
    read_requests,
)

DOCS = {"talks": {"test": [{"video": "a.mp4"}, {"video": "b.mp4"}, {"video": "a.mp4"}]}}


def shows(doc):
    content = [{"type": "video", "url": doc["video"]}, {"type": "text", "text": "What?"}]
    return [{"role": "user", "content": content}]


def request(doc_id: int, to_messages=shows, **metadata) -> Instance:
    arguments = ("", to_messages, {"max_new_tokens": 4}, doc_id, "talks", "test")
    metadata = {"task": "talks", "doc_id": doc_id, "repeats": 1, **metadata}
    return Instance("generate_until", arguments, 0, metadata=metadata)


def question(video: str, doc_id: int = 0) -> Question:
    turns = [{"role": "user", "content": [{"type": "video", "path": video}]}]
    return Question("talks", "test", doc_id, 0, turns, {})


def test_a_request_becomes_a_question():
    (asked,) = read_requests([request(1)], DOCS)
    assert asked is not None
    assert asked.videos == ["b.mp4"]
    assert asked.turns[0]["content"][1] == {"type": "text", "text": "What?"}
    assert (asked.task, asked.doc_id, asked.generation) == ("talks", 1, {"max_new_tokens": 4})


def test_padding_of_processes_is_not_asked():
    assert read_requests([request(0, __padding_only__=True)], DOCS) == [None]


def test_repetitions_of_a_row_are_told_apart():
    first, second, other = read_requests([request(0), request(0), request(1)], DOCS)
    assert first is not None
    assert second is not None
    assert other is not None
    assert (first.ordinal, second.ordinal, other.ordinal) == (0, 1, 0)
    assert first.key("s") != second.key("s")


def exits(doc):
    sys.exit(f"video path:{doc['video']} does not exist, please check")


def asserts(doc):
    raise AssertionError


def opens(doc):
    return Image.open("/nowhere/a.png")


@pytest.mark.parametrize("to_messages", [exits, asserts, opens])
def test_a_task_that_gives_up_over_a_missing_video_does_not_end_the_run(to_messages):
    asked, after = read_requests([request(0, to_messages), request(1)], DOCS)
    assert asked is not None
    assert "talks 0" in str(asked.error)
    assert not asked.videos
    assert after is not None
    assert after.error is None


def test_a_bug_in_a_task_is_no_missing_video():
    with pytest.raises(KeyError):
        read_requests([request(0, lambda doc: doc["path"])], DOCS)


@pytest.mark.parametrize(
    ("part", "named"),
    [
        ({"type": "audio", "url": "a.wav"}, "audio"),
        ({"type": "video", "url": "a.mp4", "start_time": 3.0}, "part of a video"),
        ({"type": "video", "url": {"video_start": 3.0}}, "part of a video"),
    ],
)
def test_what_cannot_be_shown_is_refused(part, named):
    turns = [{"role": "user", "content": [part]}]
    with pytest.raises(PromptError, match=named):
        read_requests([request(0, lambda doc: turns)], DOCS)


def test_pictures_count_by_their_content(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (4, 4), (1, 2, 3)).save(path)

    def turns(source):
        return [{"role": "user", "content": [{"type": "image", "url": source}]}]

    def read(source):
        (asked,) = read_requests([request(0, lambda doc: turns(source))], DOCS)
        assert asked is not None
        assert asked.has_images
        return asked.key("s")

    assert read(str(path)) == read(Image.new("RGB", (4, 4), (1, 2, 3)))
    assert read(str(path)) != read(Image.new("RGB", (4, 4), (1, 2, 4)))
    (picture,) = pictures_of(lambda doc: turns(str(path)), {})
    assert picture.getpixel((0, 0)) == (1, 2, 3)


def test_a_key_follows_everything_that_decides_the_answer(tmp_path):
    video = tmp_path / "a.mp4"

    def read() -> Question:
        (asked,) = read_requests([request(0, lambda doc: shows({"video": str(video)}))], DOCS)
        assert asked is not None
        return asked

    missing = read()
    absent = missing.key("s")
    video.write_bytes(b"damaged")
    damaged = read().key("s")
    video.write_bytes(b"mended!")
    os.utime(video, ns=(1, 1))
    asked = read()
    mended = asked.key("s")
    # A video that comes while questions are asked renames none of them.
    assert missing.key("s") == absent
    others = [
        asked.key("t"),
        replace(asked, generation={"temperature": 1}).key("s"),
        replace(asked, turns=[{"role": "system", "content": []}, *asked.turns]).key("s"),
    ]
    assert len({absent, damaged, mended, *others}) == 6


def test_questions_about_a_video_come_together():
    asked = [question(video, i) for i, video in enumerate("abacb")]
    assert [[q.doc_id for q in group] for group in by_video(asked)] == [[0, 2], [1, 4], [3]]
    text = [replace(q, turns=[]) for q in asked]
    assert len(by_video(text)) == 5


@given(st.lists(st.integers(1, 20), max_size=30), st.integers(1, 8))
def test_dealing_splits_no_video_and_is_even(sizes, hands):
    asked = [question(f"{v}.mp4", i) for v, size in enumerate(sizes) for i in range(size)]
    dealt = deal(by_video(asked), hands)
    ids = sorted((q.videos[0], q.doc_id) for hand in dealt for q in hand)
    assert ids == sorted((q.videos[0], q.doc_id) for q in asked)
    videos = [{q.videos[0] for q in hand} for hand in dealt]
    assert sum(map(len, videos)) == len(sizes)
    # The lightest hand was given the last video of the heaviest: they differ by one video at most.
    loads = [len(hand) for hand in dealt]
    assert max(loads) - min(loads) <= max(sizes, default=0)
