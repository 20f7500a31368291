"""The figure that a checkpoint is judged by counts what it says, and its controls are controls."""

import numpy as np
import pytest
import torch

from flexselect.core.errors import OptionError
from flexselect.testbed import check
from flexselect.testbed.models import family_of
from flexselect.testbed.questions import CHANCE, RETRIEVAL, TASKS, compose, split_seed
from flexselect.testbed.videos import decode_video, draw_plot, encode_video


@pytest.fixture
def reader(monkeypatch):
    """Stand in for a model that knows the answer to a video it has seen, and to no other."""
    known = {}
    for split in ("validation", "test"):
        for index in range(6):
            plot = compose(split_seed(split, index), 8, TASKS)
            pictures = decode_video(encode_video(draw_plot(plot)))
            known[pictures.tobytes()] = {q.text: q.answer for q in plot.questions}

    def answer(family, model, pictures, text):
        if pictures is None:
            return "heart"
        return known[pictures.tobytes()].get(text, "heart")

    monkeypatch.setattr(check, "answer", answer)


def test_a_reader_of_videos_scores_all_and_the_controls_take_it_away(reader):
    def score(control):
        return check.check_clips(None, None, split="test", count=6, control=control)

    assert score(None).accuracy() == 1
    assert score("blind").accuracy() < 0.2
    assert score("shuffled").accuracy() < 0.2
    assert score("shuffled").asked == score(None).asked == dict.fromkeys(TASKS, 6)


def test_a_single_video_is_not_asked_its_own_question_as_a_control(reader):
    def score(control):
        return check.check_clips(None, None, split="test", count=1, control=control)

    assert score(None).accuracy() == 1
    assert score("shuffled").accuracy() == 0
    assert score("shuffled").asked == score(None).asked == dict.fromkeys(TASKS, 1)


@pytest.mark.parametrize("count", [0, -1])
def test_no_videos_have_no_score(count):
    with pytest.raises(OptionError, match=f"count={count}: there must be at least one video"):
        check.check_clips(None, None, split="test", count=count)


def test_scores_are_shares_of_the_questions_asked():
    score = check.Score({"number": 3, "order": 1}, {"number": 4, "order": 4})
    assert score.accuracy() == 0.5
    assert score.accuracy(RETRIEVAL) == 0.75
    assert score.chance() == (CHANCE["number"] + CHANCE["order"]) / 2
    assert score.rows()["number"] == {"accuracy": 0.75, "asked": 4, "chance": 0.1}


def test_the_answer_is_the_models_greedy_first_word():
    family = family_of("internvl")
    star = family.tokenizer.convert_tokens_to_ids("star")
    seen = {}

    class Model:
        def __call__(self, **inputs):
            seen.update(inputs)
            logits = torch.zeros(1, inputs["input_ids"].shape[1], len(family.tokenizer))
            logits[0, -1, star] = 1
            return type("Output", (), {"logits": logits})

    plot = compose(0, 4, ["shape"])
    pictures = np.zeros((8, 56, 56, 3), np.uint8)
    assert check.answer(family, Model(), pictures, plot.questions[0].text) == "star"
    assert seen["position_ids"].shape == seen["input_ids"].shape
    assert seen["pixel_values"].shape == (8, 3, 56, 56)
    check.answer(family, Model(), None, plot.questions[0].text)
    assert not (seen["input_ids"] == family.token("context_image_token")).any()
