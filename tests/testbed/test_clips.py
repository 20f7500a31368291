"""Training clips: what is asked of them has one answer, also after pruning."""

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexselect.testbed.clips import Pool, ask, drill, film_scenes, pruned_clip, whole_clip
from flexselect.testbed.questions import TASKS, shared
from flexselect.testbed.scenes import COLOURS, DIGITS, EMPTY, SHAPES, random_cells

SLOTS = {  # ranked, and the slots of the cells: Qwen2.5-VL, InternVL, LLaVA-Video
    "bare": ([True] * 4, [0, 1, 2, 3]),
    "tags": ([False] + [True] * 6, [2, 3, 4, 5]),
    "newlines": ([True] * 6, [0, 1, 3, 4]),
}


def make_pool(looks):
    marks = random_cells(200, np.random.RandomState(looks)).reshape(200, 4, 3)
    return Pool(torch.zeros(200, looks, 4, 1), marks)


POOLS = {looks: make_pool(looks) for looks in (1, 2)}


def visible(pool, clip, cell_slots):
    """Marks of a clip by scene and cell, straight from the pool."""
    found = {}
    for frame in range(len(clip.scenes)):
        for cell, slot in enumerate(cell_slots):
            mark = tuple(pool.marks[clip.scenes[frame], cell].tolist())
            if clip.kept[frame, slot] and mark[0] != EMPTY:
                found[int(clip.runs[frame]), cell] = mark
    return found


clips = st.tuples(
    st.sampled_from(sorted(SLOTS)),
    st.sampled_from([1, 2]),
    st.booleans(),
    st.integers(0, 10**6),
)


def draw(kind, looks, pruned, seed):
    ranked, cell_slots = SLOTS[kind]
    pool, rng = POOLS[looks], np.random.RandomState(seed)
    if pruned:
        clip = pruned_clip(pool, rng, tokens=24, frames=12, ranked=ranked, cell_slots=cell_slots)
    else:
        clip = whole_clip(pool, rng, frames=8, slots=len(ranked))
    return pool, clip, ranked, cell_slots, rng


@settings(max_examples=80, deadline=None)
@given(clips)
def test_clips_keep_what_they_say(case):
    _, clip, ranked, _, _ = draw(*case)
    free = ~np.array(ranked)
    assert (np.diff(clip.times) >= 0).all()
    assert clip.kept.any(axis=1).all()
    assert clip.kept[:, free].all()
    if case[2]:
        assert clip.kept[:, np.array(ranked)].sum() == 24
        assert len(clip.scenes) <= 12
    else:
        assert clip.kept.all()
        assert len(clip.scenes) <= 8
    # A scene held for two frames is one scene, shown from two looks.
    for run in set(clip.runs.tolist()):
        assert len(set(clip.scenes[clip.runs == run].tolist())) == 1
        looks = clip.looks[clip.runs == run].tolist()
        assert len(set(looks)) == len(looks)


@settings(max_examples=80, deadline=None)
@given(clips)
def test_questions_of_a_clip_have_one_answer(case):
    pool, clip, _, cell_slots, rng = draw(*case)
    seen = visible(pool, clip, cell_slots)
    for text, answer in ask(pool, clip, cell_slots, rng, tasks=TASKS, count=8):
        words = text.replace("?", "").replace(",", "").split()
        names = [w for w in words if w in (*COLOURS, *SHAPES, *DIGITS)]
        where = [
            [
                (place, mark)
                for place, mark in sorted(seen.items())
                if set(pair) <= {COLOURS[mark[0]], SHAPES[mark[1]], DIGITS[mark[2]]}
            ]
            for pair in ([names[:2], names[2:]] if "came" in words else [names])
        ]
        if "came" in words:
            (first,), (second,) = where
            assert first[0][0] != second[0][0]
            assert answer == COLOURS[min(first, second)[1][0]]
        elif "many" in words:
            assert answer == DIGITS[len({mark[2] for _, mark in where[0]})]
        elif "beside" in words:
            ((run, cell), _), *more = where[0]
            assert not more
            assert answer == DIGITS[seen[run, cell ^ 1][2]]
        else:
            axis = {"number": 2, "colour": 0, "shape": 1}[words[1]]
            answers = {(COLOURS, SHAPES, DIGITS)[axis][mark[axis]] for _, mark in where[0]}
            assert answers == {answer}


@settings(max_examples=40, deadline=None)
@given(clips)
def test_drills_name_marks_of_the_clip_without_ambiguity(case):
    pool, clip, _, cell_slots, rng = draw(*case)
    marks = [
        {COLOURS[c], SHAPES[s], DIGITS[d]} for c, s, d in visible(pool, clip, cell_slots).values()
    ]
    pairs = drill(pool, clip, cell_slots, rng, 20)
    assert len(pairs) <= 20
    for names, answer in pairs:
        fitting = [mark for mark in marks if set(names.split()) <= mark]
        assert fitting
        assert all(mark == {*names.split(), answer} for mark in fitting)


@settings(max_examples=20, deadline=None)
@given(clips)
def test_gaps_put_words_of_questions_between_the_names_and_change_nothing_else(case):
    pool, clip, _, cell_slots, rng = draw(*case)
    _, _, _, _, again = draw(*case)
    asked = {"what", "number", "colour", "shape", "is", "on", "with", "the", "one", "?"}
    gapped = drill(pool, clip, cell_slots, rng, 1000, gaps=4)
    assert len(gapped) == len(drill(pool, clip, cell_slots, again, 1000))
    marks = [
        {COLOURS[c], SHAPES[s], DIGITS[d]} for c, s, d in visible(pool, clip, cell_slots).values()
    ]
    for words, answer in gapped:
        names = [word for word in words.split() if word not in asked]
        assert len(names) == 2
        assert len(words.split()) <= 2 + 3 * 4
        assert {*names, answer} in marks
    if len(gapped) > 20:
        assert any(len(words.split()) > 2 for words, _ in gapped)


def test_every_task_is_asked_and_counts_are_not_all_one():
    counts = dict.fromkeys(("1", "2", "3", "4"), 0)
    openings = set()
    for seed in range(150):
        pool, clip, _, cell_slots, rng = draw("bare", 1, False, seed)
        for text, answer in ask(pool, clip, cell_slots, rng, tasks=TASKS, count=8):
            openings.add(" ".join(text.split()[:4]).split(" the")[0])
            if "many" in text:
                counts[answer] += 1
    assert len(openings) >= 6
    assert counts["2"] + counts["3"] + counts["4"] > counts["1"] / 2


@pytest.mark.parametrize("looks", [1, 2])
def test_pruning_prefers_marks_that_resemble_each_other(looks):
    """More than chance would: the control is every mark of the frames that are left."""
    ranked, cell_slots = SLOTS["bare"]
    pool = POOLS[looks]

    def resemblance(marks):
        return np.mean([shared(*pair) for pair in combinations(marks.tolist(), 2)])

    kept, offered, kept_empty, offered_empty = [], [], [], []
    for seed in range(100):
        rng = np.random.RandomState(seed)
        clip = pruned_clip(pool, rng, tokens=12, frames=12, ranked=ranked, cell_slots=cell_slots)
        marks = pool.marks[clip.scenes]
        empty = marks[..., 0] == EMPTY
        kept.append(resemblance(marks[clip.kept & ~empty]))
        offered.append(resemblance(marks[~empty]))
        kept_empty.append(empty[clip.kept].mean())
        offered_empty.append(empty.mean())
    assert np.mean(kept) > 1.15 * np.mean(offered)
    assert np.mean(kept_empty) < 0.5 * np.mean(offered_empty)


def test_filmed_scenes_pair_up_and_some_pairs_are_mixed():
    rng = np.random.RandomState(0)
    pictures, marks = film_scenes(64, rng, filled=0.8, mixed=True)
    assert pictures.shape == (128, 56, 56, 3)
    assert marks.shape == (64, 4, 3)
    apart = np.abs(pictures[::2].astype(int) - pictures[1::2]).mean(axis=(1, 2, 3))
    assert 1 <= (apart > 15).sum() <= 16
    assert np.median(apart) < 10


@pytest.mark.parametrize("looks", [1, 2])
def test_a_pool_finds_scenes_by_what_they_show(looks):
    pool = POOLS[looks]
    assert pool.looks == looks
    for scene in pool.scenes_with(2, 3):
        assert [2, 3] in pool.marks[scene, :, :2].tolist()
    everywhere = {scene for c in range(8) for s in range(8) for scene in pool.scenes_with(c, s)}
    assert everywhere == set(np.flatnonzero((pool.marks[..., 0] != EMPTY).any(axis=1)).tolist())
