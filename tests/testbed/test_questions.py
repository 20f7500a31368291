"""The questions: one answer is right, half a description is not enough, splits are apart."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexselect.core.errors import OptionError
from flexselect.testbed.questions import (
    CHANCE,
    SPLITS,
    TASKS,
    compose,
    phrase,
    shared,
    split_seed,
)
from flexselect.testbed.scenes import COLOURS, DIGITS, EMPTY, GRID, SHAPES

plots = st.builds(
    lambda seed, scenes, tasks: compose(seed, scenes, tasks),
    st.integers(0, 3 * 10**9 - 1),
    st.integers(6, 40),
    st.lists(st.sampled_from(TASKS), min_size=1, max_size=4),
)


def marks_of(plot):
    """Every mark with its place, in time order."""
    found = []
    for scene, row, column in np.argwhere(plot.cells[..., 0] != EMPTY):
        found.append(((scene, row, column), tuple(plot.cells[scene, row, column].tolist())))
    return found


def solve(plot, text):
    """Answer a question from the words and the cells alone, knowing nothing of the needles."""
    words = text.replace("?", "").replace(",", "").split()
    colour = [COLOURS.index(word) for word in words if word in COLOURS]
    shape = [SHAPES.index(word) for word in words if word in SHAPES]
    digit = [DIGITS.index(word) for word in words if word in DIGITS]
    marks = marks_of(plot)
    if "came" in words:
        where = [
            [place for place, mark in marks if mark[:2] == key]
            for key in zip(colour, shape, strict=True)
        ]
        assert all(len(places) == 1 for places in where)
        return COLOURS[colour[0] if where[0] < where[1] else colour[1]]
    hits = [
        (place, mark)
        for place, mark in marks
        if (not colour or mark[0] == colour[0])
        and (not shape or mark[1] == shape[0])
        and (not digit or mark[2] == digit[0])
    ]
    if "many" in words:
        assert len({mark[2] for _, mark in hits}) == len(hits)
        return DIGITS[len(hits)]
    assert len(hits) == 1
    (scene, row, column), mark = hits[0]
    if "beside" in words:
        return DIGITS[plot.cells[scene, row, GRID - 1 - column][2]]
    asked = {"number": 2, "colour": 0, "shape": 1}[words[1]]
    return (COLOURS, SHAPES, DIGITS)[asked][mark[asked]]


@settings(max_examples=150, deadline=None)
@given(plots)
def test_one_answer_is_right_and_the_words_lead_to_it(plot):
    for question in plot.questions:
        assert solve(plot, question.text) == question.answer


@settings(max_examples=100, deadline=None)
@given(plots)
def test_no_other_mark_shares_two_attributes_with_a_needle(plot):
    for question in plot.questions:
        own = {(n.scene, n.row, n.column) for n in question.needles}
        for needle in question.needles:
            assert tuple(plot.cells[needle.scene, needle.row, needle.column]) == needle.mark
            if needle.role == "beside":
                continue
            for place, mark in marks_of(plot):
                if tuple(place) not in own:
                    assert shared(mark, needle.mark) < 2


def test_the_same_seed_tells_the_same_story_and_another_seed_another():
    first, again, other = (compose(seed, 8, ["number"]) for seed in (5, 5, 6))
    assert first.questions == again.questions
    assert (first.cells == again.cells).all()
    assert (first.cells != other.cells).any()


def test_needles_lie_anywhere_and_answers_are_even():
    scenes, answers, places = [], {task: Counter() for task in TASKS}, Counter()
    for seed in range(400):
        plot = compose(seed, 8, TASKS)
        for question in plot.questions:
            answers[question.task][question.answer] += 1
            scenes.append(question.needles[0].scene)
        places[plot.questions[0].needles[0].row, plot.questions[0].needles[0].column] += 1
    assert min(places.values()) > 60
    for task, counts in answers.items():
        # The commonest answer is what a guesser would give: it must not beat the stated chance.
        assert max(counts.values()) / 400 < CHANCE[task] + 0.08, task
        assert len(counts) >= 1 / CHANCE[task]
    assert set(scenes) == set(range(8))


def test_naming_order_says_nothing_about_time():
    first = 0
    for seed in range(300):
        question = compose(seed, 8, ["order"]).questions[0]
        first += question.text.split(" the ")[1].startswith(question.answer)
    assert 110 < first < 190


def test_splits_never_share_a_seed():
    ranges = [(split_seed(split, 0), split_seed(split, 10**9 - 1)) for split in SPLITS]
    for (_, end), (start, _) in pairwise(ranges):
        assert end < start
    assert ranges[-1][1] < 2**32
    for split, index in (("dev", 0), ("train", -1), ("train", 10**9)):
        with pytest.raises(OptionError):
            split_seed(split, index)


def test_unknown_tasks_and_crowded_videos_are_refused():
    for call in (
        lambda: compose(0, 4, ["riddle"]),
        lambda: phrase("riddle", [(0, 0, 0)]),
        lambda: compose(0, 1, ["order"]),
        lambda: compose(0, 1, ["number"] * 5),
        lambda: compose(0, 64, ["number"] * 100),
    ):
        with pytest.raises(OptionError):
            call()
