"""Answers in a batch are the answers one by one, and those of `Video.ask`."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

import flexselect
from flexselect.core.errors import PromptError
from flexselect.evaluation.answering import (
    answer,
    encode_prompt,
    generation_options,
    stop_texts,
)
from flexselect.evaluation.needle import Recipe
from flexselect.inference.engine import Engine

OPTIONS = generation_options({"max_new_tokens": 4, "temperature": 0}, None)


def turns(text: str, *shown: str) -> list:
    content = [*({"type": kind} for kind in shown), {"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


@pytest.fixture
def opened(tiny, videos):
    """A method that drops tokens, and videos of different lengths opened with it."""
    model, processor = tiny
    method = flexselect.FlexSelect(budget=12)
    long = Recipe("validation", frames=24, videos=1).render(0)
    paths = [*videos[:2], long]
    opened = [flexselect.open_video(model, processor, p, method=method) for p in paths]
    return Engine(model, method), processor, opened


def test_a_batch_answers_as_one_by_one_and_as_ask_does(opened):
    engine, processor, videos = opened
    asked = ["What number is on the red star?", "What shape is the red one with 7?", "Which?"]
    prompts = [
        encode_prompt(engine, processor, turns(question, "video"), [video], [])
        for question, video in zip(asked, videos, strict=True)
    ]
    together = answer(engine, processor, prompts, OPTIONS)
    for reply, prompt, question, video in zip(together, prompts, asked, videos, strict=True):
        (alone,) = answer(engine, processor, [prompt], OPTIONS)
        said = video.ask(question, max_new_tokens=4)
        assert reply.text == alone.text == said.text
        assert reply.tokens == len(said.ids)
        assert reply.cut == said.cut
        assert torch.equal(reply.selection.kept, said.selection.kept)
        assert len(reply.selection.kept) < reply.selection.num_visual
        assert {"rank", "gather", "prefill", "answer"} == set(alone.seconds)


def test_several_videos_text_and_pictures_are_asked_about_too(opened):
    engine, processor, videos = opened
    question = "What number is on the red star?"
    both = encode_prompt(engine, processor, turns(question, "video", "video"), videos[:2], [])
    assert (
        both.prompt.num_visual
        == 2 * videos[0].encoded(turns(question, "video"), 0).prompt.num_visual
    )
    picture = Image.new("RGB", (56, 56), (200, 30, 30))
    prompts = [
        both,
        encode_prompt(engine, processor, turns(question), [], []),
        encode_prompt(engine, processor, turns(question, "image"), [], [picture]),
    ]
    replies = answer(engine, processor, prompts, OPTIONS)
    assert [reply.selection is None for reply in replies] == [False, True, True]
    for reply, prompt in zip(replies, prompts, strict=True):
        assert reply.text == answer(engine, processor, [prompt], OPTIONS)[0].text


def test_what_cannot_be_asked_says_so(opened):
    engine, processor, videos = opened
    picture = Image.new("RGB", (56, 56))
    with pytest.raises(PromptError, match=r"1 video.*1 picture"):
        encode_prompt(engine, processor, turns("?", "video", "image"), videos[:1], [picture])


@pytest.mark.parametrize(
    ("task", "greedy", "beams", "longest"),
    [
        ({"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "num_beams": 1}, True, 1, 16),
        ({"until": ["\n\n"], "do_sample": False}, True, 1, 256),
        ({"temperature": 0.7, "do_sample": False, "num_beams": 3}, True, 3, 256),
        ({"temperature": 0.7, "max_new_tokens": 8}, False, 1, 8),
        ({"image_aspect_ratio": "original", "temperature": 0.0, "do_sample": True}, True, 1, 256),
    ],
)
def test_options_of_a_task(task, greedy, beams, longest):
    options = generation_options(task, None)
    assert options["do_sample"] == (not greedy)
    assert (options["num_beams"], options["max_new_tokens"]) == (beams, longest)
    assert (options["temperature"] is None) == greedy
    assert set(options) <= {
        *("do_sample", "max_new_tokens", "num_beams", "temperature", "top_k", "top_p")
    }
    assert generation_options(task, 5)["max_new_tokens"] == 5


def test_an_answer_ends_where_the_task_says(opened):
    engine, processor, videos = opened
    prompt = encode_prompt(engine, processor, turns("Which?", "video"), videos[:1], [])
    (whole,) = answer(engine, processor, [prompt], OPTIONS)
    assert whole.text
    (ended,) = answer(engine, processor, [prompt], OPTIONS, stops=[whole.text[0]])
    assert ended.text == ""
    # What the harness adds where a task names nothing is no stop.
    assert stop_texts({"until": ["\n\n"]}) == []
    assert stop_texts({"until": "###"}) == ["###"]
