"""What is kept, for every family: counts, frames, several videos, and the record of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import flexselect
from flexselect import FlexSelect, Random, Selection, Uniform
from flexselect.core.layout import NONE
from flexselect.inference.engine import kept_rows

from .factories import Family, Image, Video, encoded, knobs

QUESTION = "What is it?"


def selections(model: Any, inputs: dict[str, Any]) -> list[Any]:
    with torch.no_grad():
        model(**inputs)
    return model.flexselect.selections


def test_every_set_keeps_its_best_tokens(
    family: Family, model: Any, select: Callable[..., Any]
) -> None:
    """Seven frames in sets of 3, 2 and 2; no kept token scores below a dropped one of its set."""
    inputs = family.inputs([Video(7), QUESTION])
    per_frame = family.frame_tokens(model)
    select(model, 2 * per_frame)
    [found] = selections(model, inputs)
    kept = torch.zeros(found.num_visual, dtype=torch.bool)
    kept[found.kept] = True
    assert found.num_visual == 7 * per_frame
    for first in range(3):
        mine = found.frame % 3 == first
        assert int((mine & kept).sum()) == 2 * per_frame // 3
        assert found.scores[mine & kept].min() >= found.scores[mine & ~kept].max()
    assert len(set(found.scores.tolist())) > found.num_visual // 2
    assert bool((found.scores > 0).all())
    assert bool((found.scores < 1).all())


def test_scores_depend_on_the_question_and_selection_with_them(
    family: Family, model: Any, select: Callable[..., Any]
) -> None:
    select(model, 24)
    one, other = selections(
        model, family.inputs([Video(7), QUESTION], [Video(7), "Who is it that sings?"])
    )
    assert not torch.allclose(one.scores, other.scores)


def test_scores_do_not_depend_on_the_budget(family: Family, model: Any) -> None:
    inputs = family.inputs([Video(7), QUESTION])
    scores = []
    for budget in (12, 36):
        with FlexSelect(**knobs(budget))(model):
            scores.append(selections(model, inputs)[0].scores)
    assert torch.equal(*scores)


def test_sets_are_scored_without_each_other(
    family: Family, model: Any, select: Callable[..., Any]
) -> None:
    """Frames 1, 4 of a video in three sets score as a prompt with only these, text and all."""
    pictures = family.video(7, 0)
    inputs = family.inputs([Video(7), QUESTION])
    per_frame = family.frame_tokens(model)
    select(model, 24)
    [whole] = selections(model, inputs)
    [row] = encoded(model.flexselect, inputs)
    frames = torch.tensor([1, 4])
    rows = row.prompt.rows_of_frames(0, frames)
    shown = torch.stack([pictures[i :: family.pictures] for i in range(family.pictures)], 1)
    alone = family.inputs_of([shown[frames].flatten(0, 1)], [Video(2), QUESTION])
    text = ("input_ids", "attention_mask", "mm_token_type_ids")
    alone |= {name: inputs[name][:, rows] for name in text if name in inputs}
    flexselect.remove(model)
    select(model, per_frame, frames_per_set=2)
    [part] = selections(model, alone)
    mine = (whole.frame == 1) | (whole.frame == 4)
    torch.testing.assert_close(whole.scores[mine], part.scores, rtol=1e-4, atol=1e-6)


def test_scores_of_one_video_ignore_another_and_its_wrapper(
    family: Family, model: Any, select: Callable[..., Any]
) -> None:
    """Text that only frames the other video leaves with it: [A, B, q] scores A as [A, q] does."""
    select(model, 30)
    both, first, second = (
        selections(model, family.inputs(row))[0]
        for row in (
            [Video(7, 1), Video(5, 2), QUESTION],
            [Video(7, 1), QUESTION],
            [Video(5, 2), QUESTION],
        )
    )
    for video, alone in enumerate((first, second)):
        scores = both.scores[both.video == video]
        torch.testing.assert_close(scores, alone.scores, rtol=1e-4, atol=1e-6)


def test_budget_is_shared_by_size(family: Family, model: Any, select: Callable[..., Any]) -> None:
    per_frame = family.frame_tokens(model)
    select(model, 6 * per_frame, frames_per_set=64)
    [found] = selections(model, family.inputs([Video(8, 1), "and", Video(4, 2), QUESTION]))
    assert [int((found.video[found.kept] == v).sum()) for v in (0, 1)] == [
        4 * per_frame,
        2 * per_frame,
    ]
    assert [len(times) for times in found.times] == [8, 4]
    assert int(found.kept_per_frame(1).sum()) == 2 * per_frame


def test_text_and_images_all_stay(family: Family, model: Any, select: Callable[..., Any]) -> None:
    select(model, 24)
    inputs = family.inputs([Image(), "Before,", Video(7), "after.", Image(1), QUESTION])
    [row] = encoded(model.flexselect, inputs)
    [found] = selections(model, inputs)
    rows = kept_rows(row.prompt, found.kept)
    layout = row.prompt.layout
    others = ((layout.frame == NONE) & ~layout.visual).nonzero()[:, 0]
    assert bool(torch.isin(others, rows).all())
    assert int(layout.feature[others].sum()) == sum(c.rows * c.columns for c in row.prompt.images)
    assert len(row.prompt.images) == 2
    assert bool(torch.isin(row.prompt.visual_rows()[found.kept], rows).all())
    assert int(layout.visual[rows].sum()) == len(found.kept)


@pytest.mark.parametrize("shown", [[0, 1], [3], [4, 6], [1, 2, 5], [6]])
def test_compact_positions_are_those_of_a_video_of_the_kept_frames(
    family: Family, model: Any, shown: list[int]
) -> None:
    """Also where the first frames, or the last, keep nothing."""
    architecture = flexselect.architecture_of(model)
    before, after = [Image(), "First,"], ["then,", Video(3, 2), QUESTION]
    [request] = architecture.read(family.inputs([*before, Video(7, 1), *after]))
    [shorter] = architecture.read(family.inputs([*before, Video(len(shown), 1), *after]))
    layout = request.prompt.layout
    frame, video = layout.frame[layout.visual], layout.video[layout.visual]
    kept = (torch.isin(frame, torch.tensor(shown)) | (video == 1)).nonzero()[:, 0]
    rows = kept_rows(request.prompt, kept)
    positions = architecture.compact_positions(request.prompt, rows)
    if len(rows) == len(shorter.prompt.layout):
        assert torch.equal(positions, architecture.positions(shorter.prompt))
    else:
        # Text that numbers the frames may be longer than in the shorter video.
        assert torch.equal(positions, torch.arange(len(rows)))
    # With fewer tokens of the same frames the text moves no further away.
    fewer = kept_rows(request.prompt, kept[::2])
    partly = architecture.compact_positions(request.prompt, fewer)
    assert partly.shape[-1] == len(fewer)
    tail = len(QUESTION)
    assert bool((partly[..., -tail:].diff() == 1).all())
    assert bool((partly[..., -tail:] <= positions[..., -tail:]).all())


@pytest.mark.parametrize("frame", [0, 3, 6])
@pytest.mark.parametrize("positions", ["original", "compact"])
def test_one_kept_token_is_enough(
    family: Family, model: Any, frame: int, positions: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever frames a method drops, the first and the last included."""
    inputs = family.inputs([Video(7), QUESTION])

    def keep(self: Any, encoded: Any, *_: Any) -> Any:
        layout = encoded.prompt.layout
        return (layout.frame[layout.visual] == frame).nonzero()[:1, 0], None

    monkeypatch.setattr(Random, "keep", keep)
    flexselect.apply(model, Random(positions=positions))
    assert [len(found.kept) for found in selections(model, inputs)] == [1]
    out = model.generate(**inputs, max_new_tokens=2)
    assert out.shape[1] == inputs["input_ids"].shape[1] + 2


def test_random_is_seeded_and_a_prompts_own(family: Family, model: Any) -> None:
    rows = [Video(7, 1), QUESTION], [Video(7, 1), "Another?"], [Video(5, 2), QUESTION]
    flexselect.apply(model, Random(budget=24, seed=3))
    together = selections(model, family.inputs(*rows))
    again = selections(model, family.inputs(*reversed(rows)))[::-1]
    for row, one, other in zip(rows, together, again, strict=True):
        [alone] = selections(model, family.inputs(row))
        assert torch.equal(one.kept, alone.kept)
        assert torch.equal(one.kept, other.kept)
        assert one.scores is None
        assert len(one.kept) == len(set(one.kept.tolist())) == 24
        assert torch.equal(one.kept, one.kept.sort().values)
    assert not torch.equal(together[0].kept, together[1].kept)
    flexselect.remove(model)
    flexselect.apply(model, Random(budget=24, seed=4))
    assert not torch.equal(selections(model, family.inputs(rows[0]))[0].kept, together[0].kept)


@pytest.mark.parametrize("frames", [1, 2, 3, 5, 7, 8])
def test_uniform_keeps_whole_evenly_spaced_frames(family: Family, model: Any, frames: int) -> None:
    per_frame = family.frame_tokens(model)
    flexselect.apply(model, Uniform(budget=frames * per_frame))
    [found] = selections(model, family.inputs([Video(8), QUESTION]))
    counts = found.kept_per_frame()
    assert set(counts.tolist()) <= {0, per_frame}
    shown = counts.nonzero()[:, 0]
    assert len(shown) == frames
    if frames > 1:
        gaps = shown.diff()
        assert gaps.max() - gaps.min() <= 1
        # As far from the beginning as from the end, up to rounding.
        assert abs(int(shown[0]) - (7 - int(shown[-1]))) <= 1


def test_uniform_shares_by_video(family: Family, model: Any) -> None:
    per_frame = family.frame_tokens(model)
    flexselect.apply(model, Uniform(budget=6 * per_frame))
    [found] = selections(model, family.inputs([Video(8, 1), Video(4, 2), QUESTION]))
    assert int((found.kept_per_frame(0) > 0).sum()) == 4
    assert int((found.kept_per_frame(1) > 0).sum()) == 2


def test_the_record_says_what_decided_and_survives_a_file(
    family: Family, model: Any, select: Callable[..., Any], tmp_path: Path
) -> None:
    select(model, 24)
    [found] = selections(model, family.inputs([Video(7), QUESTION]))
    lite = model.flexselect.method.selector is not None
    expected = {
        "method": "flexselect-lite" if lite else "flexselect",
        "budget": 24,
        "layer": model.flexselect.method.layer,
        "aggregation": "max",
        "query": "all",
        "frames_per_set": 3,
        "positions": model.flexselect.method.positions,
        "family": family.name,
        "dtype": "float32",
        "torch": torch.__version__,
    }
    assert {name: found.settings.get(name) for name in expected} == expected
    step = family.seconds_per_frame
    torch.testing.assert_close(found.times[0], torch.arange(7).double() * step)
    found.save(tmp_path / "found")
    loaded = Selection.load(tmp_path / "found")
    assert loaded.scores is not None
    assert torch.equal(loaded.scores, found.scores)
    assert torch.equal(loaded.kept, found.kept)
    assert loaded.moments() == found.moments()
    assert loaded.settings == found.settings
    assert all(0 <= m.start < m.end <= 7 * step + 1e-9 and m.kept > 0 for m in found.moments())


def test_preset_fills_what_is_not_given(family: Family, model: Any) -> None:
    flexselect.apply(model)
    method = model.flexselect.method
    assert None not in (method.budget, method.layer, method.aggregation, method.positions)
    assert method.budget >= 6720
    assert 0 < method.layer < flexselect.architecture_of(model).num_layers
    assert method.frames_per_set == 64
    flexselect.remove(model)
    flexselect.apply(model, Random())
    assert model.flexselect.method.budget == method.budget
