"""Rehearsals: training clips are what the engine leaves of a long video, and hold the answer."""

import numpy as np
import pytest
import torch

from flexselect.core.errors import OptionError
from flexselect.testbed.batches import Scribe
from flexselect.testbed.check import family_inputs
from flexselect.testbed.clips import Pool, ask
from flexselect.testbed.locate import FAMILIES
from flexselect.testbed.models import family_of
from flexselect.testbed.questions import shared
from flexselect.testbed.recipe import Selecting
from flexselect.testbed.rehearsal import Rehearsal
from flexselect.testbed.scenes import COLOURS, DIGITS, EMPTY, SHAPES, random_cells

#: Twelve tokens are whole quotas of two, three and four sets.
SELECTING = Selecting(1.0, (0, 1), "all", (12,), (2, 4), 8)


def rehearsal_of(name, selecting=SELECTING):
    family = family_of(name)
    torch.manual_seed(0)
    model = family.build(num_hidden_layers=2).eval()
    rng = np.random.RandomState(1)
    marks = random_cells(400, rng).reshape(400, 4, 3)
    looks = 2 // family.pictures_per_frame
    pool = Pool(torch.randn(400, looks, 4, 128), marks)
    scribe = Scribe(family)
    return Rehearsal(family, model, pool, scribe, selecting), pool, scribe, model


def sights(pool, clip, cell_slots):
    """Marks that a clip shows, one a token, and the scene each is in."""
    shown = []
    for frame, scene in enumerate(clip.scenes):
        for cell, slot in enumerate(cell_slots):
            mark = tuple(pool.marks[scene, cell].tolist())
            if clip.kept[frame, slot] and mark[0] != EMPTY:
                shown.append((int(clip.runs[frame]), mark))
    return shown


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_left_of_a_long_video_holds_one_answer(name):
    rehearsal, pool, scribe, _ = rehearsal_of(name)
    ranked = np.asarray(scribe.ranked)
    lengths = set()
    for seed in range(12):
        rng = np.random.RandomState(seed)
        clip = rehearsal.clip(rng, 12)
        wanted, mark = clip.focus
        shown = sights(pool, clip, scribe.cell_slots)
        assert mark in [each for _, each in shown]
        assert all(each == mark or shared(each, mark) < 2 for _, each in shown)
        # The asked mark is added where the model missed it.
        assert 12 <= clip.kept[:, ranked].sum() <= 12 + pool.looks
        assert clip.kept[:, ranked].any(axis=1).all()
        assert clip.kept[:, ~ranked].all()
        assert (np.diff(clip.times) > 0).all()
        assert (np.diff(clip.runs) >= 0).all()
        lengths.add(int(clip.runs.max()))
        (text, answer), *_ = ask(
            pool, clip, scribe.cell_slots, rng, tasks=("number", "colour", "shape"), count=4
        )
        words = (COLOURS, SHAPES, DIGITS)
        assert answer == words[wanted][mark[wanted]]
        assert all(words[axis][mark[axis]] in text for axis in range(3) if axis != wanted)
    assert max(lengths) >= 16 // pool.looks
    assert len(lengths) > 1


@pytest.mark.parametrize("name", FAMILIES)
def test_the_model_selects_as_it_is_at_the_time(name):
    rehearsal, _, _, model = rehearsal_of(name)

    def kept():
        clip = rehearsal.clip(np.random.RandomState(3), 12)
        return clip.scenes.tolist(), clip.kept.tolist()

    before = kept()
    assert kept() == before
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            layer.self_attn.q_proj.weight.normal_()
    assert kept() != before


@pytest.mark.parametrize("name", FAMILIES)
def test_the_ranked_prompt_is_token_for_token_the_processors(name):
    rehearsal, pool, scribe, _ = rehearsal_of(name)
    family, question = scribe.family, "What number is on the red star?"
    frames = 6
    engine = rehearsal._engines[0, 12]
    scenes, looks = np.arange(frames), np.zeros(frames, dtype=np.int64)
    encoded = rehearsal._encoded(engine, scenes, looks, question, 1.0)
    pictures = np.zeros((frames * family.pictures_per_frame, 56, 56, 3), dtype=np.uint8)
    inputs = family_inputs(family, pictures, question)
    assert encoded.prompt.layout.ids.tolist() == inputs["input_ids"][0].tolist()
    positions = engine.architecture.positions(encoded.prompt)
    assert torch.equal(positions.reshape(-1), inputs["position_ids"].reshape(-1))
    # Rows of features are the pool's, in the order of the cells.
    features = encoded.features.model.unflatten(0, (frames, 2, -1))[:, :, :2].flatten(1, 2)
    assert torch.equal(features, pool.features[:frames, 0])


def test_a_layer_that_the_model_has_not_is_refused():
    with pytest.raises(OptionError, match="layer"):
        rehearsal_of("internvl", Selecting(1.0, (2,), "all", (12,), (2, 4), 8))
