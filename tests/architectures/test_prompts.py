"""The exact prompts of every family, and how their tokens are laid out, as golden files.

A golden file is rewritten by running this module with FLEXSELECT_WRITE_GOLDEN=1; the test fails
then too, so that no run can pass by writing what it should check.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import flexselect
from flexselect.core.layout import NONE, Prompt

from .factories import SECONDS_PER_PICTURE, Family, Image, Video

GOLDEN = Path(__file__).parent / "golden"

CONVERSATIONS: dict[str, Any] = {
    "video": [Video(2), "What is it?"],
    "question first": ["What is it?", Video(2), "Look well."],
    "image and video": [Image(), "This thing:", Video(2), "is it there?"],
    "two videos": [Video(2), Video(1), "Same?"],
    "system and two turns": [
        ("system", ["Be brief."]),
        ("user", [Video(2), "What is it?"]),
        ("assistant", ["A dog."]),
        ("user", ["And its colour?"]),
    ],
    "image": [Image(), "What is it?"],
    "text": ["What is it?"],
}


def test_prompts_are_as_recorded(family: Family, model: Any) -> None:
    path = GOLDEN / f"{family.name}.txt"
    text = "\n".join(
        f"=== {name}\n{render(family, model, conversation)}"
        for name, conversation in CONVERSATIONS.items()
    )
    recorded = path.read_text() if path.exists() else ""
    if os.environ.get("FLEXSELECT_WRITE_GOLDEN") and recorded != text:
        path.write_text(text)
        pytest.fail(f"wrote {path}; run again without FLEXSELECT_WRITE_GOLDEN")
    assert text == recorded


def render(family: Family, model: Any, conversation: Any) -> str:
    [request] = flexselect.architecture_of(model).read(family.inputs(conversation))
    return "".join(f"{line}\n" for line in lines(request.prompt, family.processor().tokenizer))


def lines(prompt: Prompt, tokenizer: Any) -> list[str]:
    """One line a stretch of tokens that are alike: roles, then the text or the repeated token."""
    layout = prompt.layout
    roles = [role(layout, i) for i in range(len(layout))]
    out, start = [], 0
    for stop in range(1, len(roles) + 1):
        if stop < len(roles) and roles[stop] == roles[start]:
            continue
        ids = layout.ids[start:stop].tolist()
        same = len(set(ids)) == 1 and len(ids) > 1
        shown = f"{tokenizer.decode(ids[:1])} x{len(ids)}" if same else repr(tokenizer.decode(ids))
        out.append(f"{roles[start]:<32}{shown}")
        start = stop
    return out


def role(layout: Any, index: int) -> str:
    words = []
    if layout.video[index] != NONE:
        words.append(f"video {int(layout.video[index])}")
    if layout.frame[index] != NONE:
        words.append(f"frame {int(layout.frame[index])}")
    words += [name for name in ("visual", "feature", "query") if bool(getattr(layout, name)[index])]
    return " ".join(words) or "text"


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_layout_holds_together(family: Family, model: Any, name: str) -> None:
    architecture = flexselect.architecture_of(model)
    inputs = family.inputs(CONVERSATIONS[name])
    [request] = architecture.read(inputs)
    prompt, layout = request.prompt, request.prompt.layout
    assert torch.equal(layout.ids, inputs["input_ids"][0])
    assert all(value.device.type == "cpu" for value in vars(layout).values())
    assert bool((layout.visual & layout.query).any()) is False
    assert bool(((layout.frame != NONE) & (layout.video == NONE)).any()) is False
    for video, clip in enumerate(prompt.videos):
        mine = layout.visual & (layout.video == video)
        counts = torch.bincount(layout.frame[mine], minlength=clip.frames)
        assert len(counts) == clip.frames
        assert len(set(counts.tolist())) == 1
        # In the order of the prompt, frame after frame.
        assert bool((layout.frame[mine].diff() >= 0).all())
    clips = [pixels.clip for pixels in request.pixels]
    assert len(clips) == len(prompt.videos) + len(prompt.images)
    features = sum(len(architecture.encode(p, None)[0]) for p in request.pixels)
    assert int(layout.feature.sum()) == features
    if prompt.videos:
        last = int(prompt.visual_rows()[-1])
        assert bool(layout.query.any())
        assert bool(layout.query[-1])
        asking = layout.query.nonzero()[:, 0]
        assert bool((asking > int(prompt.visual_rows()[0])).all())
        assert bool(layout.query[last + 1 :].all())
    else:
        assert not bool(layout.query.any())
    positions = architecture.positions(prompt)
    assert positions.shape[-1] == len(layout)
    assert positions.dtype == torch.long
    everything = torch.arange(len(layout))
    assert torch.equal(architecture.compact_positions(prompt, everything), positions)


@pytest.mark.parametrize("name", [n for n, c in CONVERSATIONS.items() if Image() not in c])
def test_a_prompt_laid_out_without_pixels_is_the_same(
    family: Family, model: Any, name: str
) -> None:
    """`expand` and `layout`, which need no picture, give what the processor's output is read as."""
    architecture = flexselect.architecture_of(model)
    conversation = CONVERSATIONS[name]
    [request] = architecture.read(family.inputs(conversation))
    chat = conversation if isinstance(conversation[0], tuple) else [("user", conversation)]
    clips = request.prompt.videos
    if architecture.stamps_frames:
        # Read from ids, a clip does not know when its frames were taken: that stands in words.
        pace = SECONDS_PER_PICTURE * family.pictures
        clips = tuple(replace(clip, seconds_per_frame=pace) for clip in clips)
    ids = architecture.expand(family.processor(), family.templated(chat), clips)
    prompt = architecture.layout(ids, clips, [])
    assert prompt.videos == clips
    for field, value in vars(prompt.layout).items():
        assert torch.equal(value, getattr(request.prompt.layout, field)), field


def test_pixels_of_decoded_pictures_are_the_processors(family: Family, model: Any) -> None:
    """A video prepared in pieces, as from a file, is what the processor makes of it at once."""
    pace = family.seconds_per_frame / family.pictures
    architecture = flexselect.architecture_of(model)
    [request] = architecture.read(family.inputs([Video(6, 3), "?"]))
    pictures = family.video(6, 3)
    size = 2 * family.pictures
    pieces = [
        architecture.pixels(family.processor(), pictures[i : i + size], pace)
        for i in range(0, len(pictures), size)
    ]
    [whole] = request.pixels
    assert torch.equal(torch.cat([piece.values for piece in pieces]), whole.values)
    assert [piece.clip.frames for piece in pieces] == [2, 2, 2]
    assert all(p.clip.seconds_per_frame == whole.clip.seconds_per_frame for p in pieces)
    assert all(
        (p.clip.rows, p.clip.columns) == (whole.clip.rows, whole.clip.columns) for p in pieces
    )
    second = whole.frames(2, 4)
    assert second.clip == pieces[1].clip
    assert torch.equal(second.values, pieces[1].values)
