"""Every layer looked at on one walk, and which part of a picture a visual token shows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import flexselect
from flexselect.core.layout import NONE
from flexselect.inference.features import Encoded
from flexselect.inference.scoring import embed_layers, score, score_layers, split_prompt

from .factories import FRAMES_PER_SET, Family, Video, encoded, knobs


@pytest.fixture(params=["self", "lite"])
def ranked(request: pytest.FixtureRequest, family: Family, model: Any) -> tuple[Any, Encoded, Any]:
    """(what ranks, the encoded prompt as it reads it, the features it reads)."""
    inputs = family.inputs([Video(8), "What is shown?"])
    if request.param == "self":
        applied = flexselect.apply(model, **knobs(12)).flexselect
        [one] = encoded(applied, inputs)
        return applied.architecture, one, one.features.model
    selector = family.selector(model)
    applied = flexselect.apply(model, budget=12, selector=selector).flexselect
    [one] = encoded(applied, inputs)
    here = Encoded(selector.localise(one.prompt), one.features, one.times)
    return selector, here, one.features.selector


@pytest.mark.parametrize("sets_per_batch", [1, None])
def test_one_walk_scores_every_layer_as_a_walk_each_does(
    ranked: tuple[Any, Encoded, Any], sets_per_batch: int | None
) -> None:
    scorer, one, features = ranked
    sets = split_prompt(one.prompt, scorer, FRAMES_PER_SET)
    assert len(sets) > 2
    every = range(scorer.num_layers)
    found = score_layers(
        one.prompt,
        sets,
        features,
        scorer,
        layers=every,
        aggregations=("max", "mean"),
        sets_per_batch=sets_per_batch,
    )
    assert len(found) == 2 * scorer.num_layers
    for (layer, aggregation), scores in found.items():
        alone = score(
            one.prompt,
            sets,
            features,
            scorer,
            layer=layer,
            aggregation=aggregation,
            sets_per_batch=sets_per_batch,
        )
        assert torch.equal(scores, alone), (layer, aggregation)
    assert not torch.equal(found[0, "max"], found[1, "max"])


def test_every_layer_runs_once_for_all(family: Family, model: Any) -> None:
    applied = flexselect.apply(model, **knobs(12)).flexselect
    [one] = encoded(applied, family.inputs([Video(8), "What is shown?"]))
    architecture = applied.architecture
    sets = split_prompt(one.prompt, architecture, FRAMES_PER_SET)
    ran: list[int] = []
    for index, block in enumerate(architecture.decoder.layers):
        block.register_forward_pre_hook(lambda *_, index=index: ran.append(index))
    score_layers(
        one.prompt,
        sets,
        one.features.model,
        architecture,
        layers=range(architecture.num_layers),
        aggregations=("max", "mean"),
        sets_per_batch=len(sets),
    )
    below = list(range(architecture.num_layers - 1))
    # A set whose tokens do not line up with its neighbour's takes a pass of its own.
    passes = len(ran) // len(below)
    assert 1 <= passes <= len(sets)
    assert ran == below * passes


def test_the_states_of_tokens_are_what_the_layer_reads(
    ranked: tuple[Any, Encoded, Any],
) -> None:
    """Layer 0 reads the embeddings themselves: for pictures, the tower's features."""
    scorer, one, features = ranked
    prompt = one.prompt
    sets = split_prompt(prompt, scorer, FRAMES_PER_SET)
    rows = prompt.visual_rows()
    pictures = prompt.layout.feature[rows].nonzero()[:, 0]
    chosen = pictures[1::3]
    found = embed_layers(prompt, sets, features, scorer, layers=(0, 1), members=chosen)
    wanted = (prompt.layout.feature.cumsum(0) - 1)[rows[chosen]]
    # What a family adds to later layers lies behind them in the same rows.
    own = features[wanted, : found[0].shape[-1]].float()
    torch.testing.assert_close(found[0], own, rtol=0, atol=0)
    assert found[1].shape == found[0].shape
    assert not torch.equal(found[1], found[0])


def test_a_grid_places_every_visual_token_of_a_frame_once(family: Family, model: Any) -> None:
    architecture = flexselect.architecture_of(model)
    [request] = architecture.read(family.inputs([Video(2), "?"]))
    prompt = request.prompt
    grid = architecture.grid(prompt.videos[0])
    assert len(grid.cells) == family.frame_tokens(model)
    placed = grid.cells[grid.cells != NONE]
    assert placed.tolist() == list(range(grid.rows * grid.columns))
    layout = prompt.layout
    features = layout.feature[layout.visual & (layout.frame == 0)]
    # What comes from no picture shows no part of one.
    assert bool((grid.cells[~features] == NONE).all())


def test_a_token_shows_the_cell_its_grid_says(family: Family, model: Any) -> None:
    """Change one quarter of a picture: the tokens that change most are those of its cells."""
    architecture = flexselect.architecture_of(model)
    before = family.video(2, 0)
    after = before.clone()
    height, width = before.shape[-2:]
    after[..., : height // 2, width // 2 :] = 255 - after[..., : height // 2, width // 2 :]
    seen = []
    for pictures in (before, after):
        [request] = architecture.read(family.inputs_of([pictures], [Video(2), "?"]))
        seen.append(architecture.encode(request.pixels[0], None)[0])
    clip, layout = request.prompt.videos[0], request.prompt.layout
    grid = architecture.grid(clip)
    moved = (seen[1] - seen[0]).norm(dim=-1).view(clip.frames, -1)[0]
    cells = grid.cells[layout.feature[layout.visual & (layout.frame == 0)]]
    heat = torch.zeros(grid.rows * grid.columns)
    heat[cells[cells != NONE]] = moved[cells != NONE]
    quarters = torch.nn.functional.adaptive_avg_pool2d(heat.view(1, grid.rows, grid.columns), 2)
    assert int(quarters.argmax()) == 1
