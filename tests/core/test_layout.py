"""Layouts made by hand: sets take their frames' text along, clips stand alone, text asks."""

from __future__ import annotations

import pytest
import torch

from flexselect.core.errors import PromptError
from flexselect.core.layout import NONE, Clip, Layout, Prompt, query_mask
from flexselect.tests.core.handmade import TEXT, index_of, make, text_of


def test_counts() -> None:
    prompt = make()
    assert len(prompt.layout) == len(TEXT)
    assert prompt.num_visual == 10
    assert prompt.num_frames == 5
    assert text_of(prompt, prompt.visual_rows()) == "AAAAAABBBB"
    assert text_of(prompt, prompt.visual_rows(0)) == "AAAAAA"
    assert text_of(prompt, prompt.visual_rows(1)) == "BBBB"
    assert Prompt(prompt.layout.take(torch.tensor([0, 1]))).num_visual == 0


@pytest.mark.parametrize(
    ("video", "frames", "expected"),
    [
        (0, [0, 1, 2], "ss[tAAtAAtAA]miiqq"),
        (0, [1], "ss[tAA]miiqq"),
        (0, [0, 2], "ss[tAAtAA]miiqq"),
        (1, [0], "ssm(BB)iiqq"),
        (1, [0, 1], "ssm(BBBB)iiqq"),
        (1, [], "ssm()iiqq"),
    ],
)
def test_a_set_is_its_frames_with_their_text(video: int, frames: list[int], expected: str) -> None:
    prompt = make()
    rows = prompt.rows_of_frames(video, torch.tensor(frames, dtype=torch.long))
    assert text_of(prompt, rows) == expected
    assert bool((rows.diff() > 0).all())


def test_a_set_as_a_clip_of_its_own() -> None:
    prompt = make()
    frames = torch.tensor([0, 2])
    rows = prompt.rows_of_frames(0, frames)
    clip = prompt.as_clip(0, frames, rows)
    assert clip.videos == (Clip(2, 1, 2, 1.0),)
    assert clip.images == prompt.images
    assert text_of(clip) == "ss[tAAtAA]miiqq"
    assert clip.layout.frame.tolist() == index_of("...000111......").tolist()
    assert clip.layout.video.tolist() == index_of("..00000000.....").tolist()
    assert torch.equal(clip.layout.visual, prompt.layout.visual[rows])
    assert torch.equal(clip.layout.query, prompt.layout.query[rows])


def test_a_clip_of_the_second_video_is_video_zero() -> None:
    prompt = make()
    frames = torch.tensor([1])
    clip = prompt.as_clip(1, frames, prompt.rows_of_frames(1, frames))
    assert text_of(clip) == "ssm(BB)iiqq"
    assert clip.videos == (Clip(1, 2, 1, 1.0),)
    assert clip.layout.video.tolist() == index_of("...0000....").tolist()
    assert clip.layout.frame.tolist() == index_of("....00.....").tolist()


def test_making_a_clip_changes_nothing() -> None:
    prompt, other = make(), make()
    frames = torch.tensor([2])
    prompt.as_clip(0, frames, prompt.rows_of_frames(0, frames))
    for name, value in vars(prompt.layout).items():
        assert torch.equal(value, getattr(other.layout, name))


def test_everything_after_the_last_visual_token_asks_but_images() -> None:
    layout = make().layout
    asking = "".join(chr(i) for i in layout.ids[layout.query].tolist())
    assert asking == ")qq"


def test_the_text_after_the_video_asks() -> None:
    visual = torch.tensor([False, True, True, False, False, False])
    assert query_mask(visual, visual).tolist() == [False] * 3 + [True] * 3


def test_without_a_video_nobody_asks() -> None:
    none = torch.zeros(4, dtype=torch.bool)
    assert not bool(query_mask(none, none).any())


def test_a_video_without_a_question() -> None:
    visual = torch.tensor([False, True, True])
    with pytest.raises(PromptError, match="question after the video"):
        query_mask(visual, visual)
    image_last = torch.tensor([False, True, True, True])
    with pytest.raises(PromptError, match="question after the video"):
        query_mask(torch.tensor([False, True, True, False]), image_last)


def test_a_layout_is_checked() -> None:
    fields = dict(vars(make().layout))
    with pytest.raises(PromptError, match=r"equally long.*'query': 23"):
        Layout(**{**fields, "query": fields["query"][1:]})
    with pytest.raises(PromptError, match="outside every frame"):
        Layout(**{**fields, "frame": torch.full_like(fields["frame"], NONE)})
