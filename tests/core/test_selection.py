"""Top tokens against a stable sort, selections from sets, moments, and the record on disk."""

from __future__ import annotations

import dataclasses
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from flexselect.core import selection as selection_module
from flexselect.core.errors import CheckpointError
from flexselect.core.selection import Moment, Selection, select_from_sets, top_tokens

#: Values that tie, differ in sign alone, or lie at the ends of the range.
AWKWARD = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, 1e-45, -1e-45, 3e38, -3e38, 1e-30, 0.1]


def by_sorting(scores: Tensor, k: int) -> list[int]:
    order = sorted(range(len(scores)), key=lambda i: (-scores[i].item(), i))
    return sorted(order[:k])


@given(values=st.lists(st.sampled_from(AWKWARD), min_size=1, max_size=30), data=st.data())
def test_top_tokens_of_awkward_values(values: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(0, len(values)))
    scores = torch.tensor(values)
    assert top_tokens(scores, k).tolist() == by_sorting(scores, k)


@given(
    values=st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=40),
    data=st.data(),
)
def test_top_tokens_of_any_values(values: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(0, len(values)))
    scores = torch.tensor(values)
    found = top_tokens(scores, k)
    assert found.dtype == torch.long
    assert found.tolist() == by_sorting(scores, k)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ties_of_half_precision_go_to_the_lower_position(dtype: torch.dtype) -> None:
    scores = torch.rand(5000, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert len(scores.unique()) < 4000
    expected = scores.float().sort(descending=True, stable=True).indices[:700].sort().values
    assert torch.equal(top_tokens(scores, 700), expected)


def test_many_equal_tokens() -> None:
    assert top_tokens(torch.zeros(100_000), 1000).tolist() == list(range(1000))


@given(data=st.data())
def test_select_from_sets(data: st.DataObject) -> None:
    total = data.draw(st.integers(1, 30))
    count = data.draw(st.integers(1, min(4, total)))
    scores = torch.tensor(
        data.draw(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=total, max_size=total))
    )
    members = [torch.arange(g, total, count) for g in range(count)]
    quotas = [data.draw(st.integers(0, len(part))) for part in members]
    expected: list[int] = []
    for part, quota in zip(members, quotas, strict=True):
        expected += part[by_sorting(scores[part], quota)].tolist()
    found = select_from_sets(scores, members, quotas)
    assert found.dtype == torch.long
    assert found.tolist() == sorted(expected)


def test_nothing_is_a_selection_too() -> None:
    assert select_from_sets(torch.zeros(4), [torch.arange(4)], [0]).tolist() == []
    assert select_from_sets(torch.zeros(0), [], []).dtype == torch.long


def test_a_quota_for_every_set() -> None:
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        select_from_sets(torch.zeros(4), [torch.arange(2), torch.arange(2, 4)], [1])


def make(
    frames: tuple[int, ...] = (6,),
    per_frame: int = 3,
    kept: list[int] | None = None,
    scores: list[float] | None = None,
    step: float = 2.0,
) -> Selection:
    """Build a selection over videos of ``frames`` frames; scores are given by frame."""
    video = torch.cat([torch.full((n * per_frame,), v) for v, n in enumerate(frames)])
    frame = torch.cat([torch.arange(n).repeat_interleave(per_frame) for n in frames])
    by_token = None if scores is None else torch.tensor(scores).repeat_interleave(per_frame)
    return Selection(
        kept=torch.tensor(range(len(frame)) if kept is None else kept, dtype=torch.long),
        video=video,
        frame=frame,
        times=tuple(step * torch.arange(n, dtype=torch.float64) for n in frames),
        scores=by_token,
        settings={"method": "flexselect", "budget": 9},
    )


def test_counts_and_scores_by_frame() -> None:
    found = make((2, 3), kept=[0, 4, 5, 6, 14], scores=[0.1, 0.4, 0.2, 0.3, 0.5])
    assert found.num_visual == 15
    assert found.kept_per_frame().tolist() == [1, 2]
    assert found.kept_per_frame(1).tolist() == [1, 0, 1]
    torch.testing.assert_close(found.frame_scores(1), torch.tensor([0.2, 0.3, 0.5]))
    best = dataclasses.replace(found, scores=torch.arange(15).float())
    assert best.frame_scores(0).tolist() == [2.0, 5.0]
    with pytest.raises(ValueError, match="without scores"):
        make().frame_scores()


def test_a_moment_grows_while_frames_are_kept_and_relevant() -> None:
    """Frames at 0, 2, 4, … seconds; the peak is at 4, frame 4 is irrelevant, frame 0 dropped."""
    found = make(kept=list(range(3, 18)), scores=[0.9, 0.5, 0.8, 0.4, 0.1, 0.3])
    assert [(m.start, m.end, m.kept) for m in found.moments()] == [
        (2.0, 8.0, 9),
        (10.0, 12.0, 3),
        (8.0, 10.0, 3),
    ]
    assert [m.score for m in found.moments()] == pytest.approx([0.8, 0.3, 0.1])


def test_moments_of_several_videos_compete() -> None:
    found = make((2, 2), scores=[0.2, 0.05, 0.9, 0.1])
    assert [(m.video, m.start, m.kept) for m in found.moments()] == [
        (1, 0.0, 3),
        (0, 0.0, 3),
        (1, 2.0, 3),
        (0, 2.0, 3),
    ]
    assert len(found.moments(2)) == 2


def test_moments_without_scores_or_tokens() -> None:
    assert make().moments() == []
    assert make(kept=[], scores=[0.5] * 6).moments() == []
    [only] = make((1,), scores=[0.5]).moments()
    assert (only.start, only.end, only.kept) == (0.0, 0.0, 3)


def test_moments_rank_by_the_reading_too_where_it_is_there() -> None:
    """Sets of their own made frame 0 the best; read together, frame 4 is, and 2 and 3 after it."""
    kept = [1, 6, 7, 9, 12, 13, 15]
    reading = torch.tensor([0.1, 0.25, 0.3, 0.2, 0.9, 0.5, 0.01])
    found = make(kept=kept, scores=[0.9, 0.8, 0.2, 0.1, 0.1, 0.7])
    assert found.moments()[0].first_frame == 0
    both = dataclasses.replace(found, reading=reading)
    assert both.scores is not None
    worth = (reading * both.scores[both.kept]).sqrt()
    expected = torch.tensor([worth[0], 0, worth[1:3].max(), worth[3], worth[4:6].max(), worth[6]])
    ranked = both.moment_scores()
    assert ranked is not None
    torch.testing.assert_close(ranked, expected)
    assert both.moments()[0].first_frame == int(expected.argmax())
    # Scores stay what they were, and are not needed.
    assert torch.equal(both.frame_scores(), found.frame_scores())
    read = dataclasses.replace(both, scores=None)
    assert [(m.start, m.end, m.kept) for m in read.moments()] == [
        (8.0, 10.0, 2),
        (4.0, 8.0, 3),
        (0.0, 2.0, 1),
        (10.0, 12.0, 1),
    ]
    assert [m.score for m in read.moments()] == pytest.approx([0.9, 0.3, 0.1, 0.01])


def test_a_reading_of_other_tokens_is_no_selection(tmp_path: Path) -> None:
    found = make((2, 3), kept=[1, 7], scores=None)
    found = dataclasses.replace(found, reading=torch.tensor([0.5, 0.5]))
    found.save(tmp_path / "found")
    stored = load_file(tmp_path / "found.safetensors")
    pair = json.loads((tmp_path / "found.json").read_text())["pair"]
    stored["reading"] = torch.tensor([0.5])
    save_file(stored, tmp_path / "found.safetensors", metadata={"pair": pair})
    with pytest.raises(CheckpointError, match="reading is not of the tokens"):
        Selection.load(tmp_path / "found")


def test_the_reading_of_several_videos() -> None:
    found = make((2, 3), kept=[0, 4, 6, 14])
    found = dataclasses.replace(found, reading=torch.tensor([0.1, 0.2, 0.4, 0.3]))
    first, second = found.moment_scores(0), found.moment_scores(1)
    assert first is not None
    assert second is not None
    assert first.tolist() == pytest.approx([0.1, 0.2])
    assert second.tolist() == pytest.approx([0.4, 0.0, 0.3])
    assert [(m.video, m.first_frame) for m in found.moments()] == [(1, 0), (1, 2), (0, 0)]


def test_a_score_below_zero_is_no_relevance() -> None:
    """As for a selection that nobody listened to; not NaN, which sorts anywhere."""
    found = make(kept=[0, 3, 6], scores=[-0.5, 0.4, 0.1, 0, 0, 0])
    read = dataclasses.replace(found, reading=torch.tensor([0.9, 0.1, 0.1]))
    ranked = read.moment_scores()
    assert ranked is not None
    assert ranked.tolist() == pytest.approx([0, 0.2, 0.1, 0, 0, 0])
    assert [moment.first_frame for moment in read.moments()] == [1, 0]


def test_what_moments_rank_by() -> None:
    assert make().moment_scores() is None
    scored = make(scores=[0.1, 0.4, 0.2, 0.3, 0.5, 0.6])
    ranked = scored.moment_scores()
    assert ranked is not None
    assert torch.equal(ranked, scored.frame_scores())


@given(
    scores=st.lists(st.floats(0.015625, 1, width=32), min_size=1, max_size=12),
    data=st.data(),
)
def test_moments_make_sense(scores: list[float], data: st.DataObject) -> None:
    kept = data.draw(st.sets(st.integers(0, 3 * len(scores) - 1)))
    found = make((len(scores),), kept=sorted(kept), scores=scores)
    moments = found.moments(limit=99)
    assert [m.score for m in moments] == sorted((m.score for m in moments), reverse=True)
    # Together they hold every kept token once, and none overlaps another.
    assert sum(m.kept for m in moments) == len(kept)
    in_time = sorted(moments, key=lambda m: m.start)
    assert all(a.end <= b.start for a, b in pairwise(in_time))
    for moment in moments:
        inside = scores[int(moment.start / 2) : round(moment.end / 2)] or scores
        assert moment.score == pytest.approx(max(inside))
        assert moment.kept > 0
    assert found.moments(limit=2) == moments[:2]


@pytest.mark.parametrize("scores", [None, [0.1, 0.2, 0.3, 0.4, 0.5]])
def test_save_and_load(tmp_path: Path, scores: list[float] | None) -> None:
    found = make((2, 3), kept=[1, 7], scores=scores)
    path = tmp_path / "new folder" / "run.v1"
    found.save(path)
    loaded = Selection.load(path)
    for field in ("kept", "video", "frame"):
        assert torch.equal(getattr(loaded, field), getattr(found, field))
        assert getattr(loaded, field).dtype == torch.long
    assert len(loaded.times) == 2
    assert all(torch.equal(a, b) for a, b in zip(loaded.times, found.times, strict=True))
    assert all(times.dtype == torch.float64 for times in loaded.times)
    assert (loaded.scores is None) == (scores is None)
    assert loaded.reading is None
    if loaded.scores is not None:
        assert torch.equal(loaded.scores, torch.tensor(scores).repeat_interleave(3))
    assert loaded.settings == found.settings
    assert sorted(file.name for file in path.parent.iterdir()) == [
        "run.v1.json",
        "run.v1.safetensors",
    ]
    record = json.loads((path.parent / "run.v1.json").read_text())
    assert record["kept"] == 2
    assert record["visual"] == 15
    assert [Moment(**moment) for moment in record["moments"]] == found.moments()


@pytest.mark.parametrize("scores", [None, [0.1, 0.2, 0.3, 0.4, 0.5]])
def test_the_reading_is_saved_too(tmp_path: Path, scores: list[float] | None) -> None:
    found = make((2, 3), kept=[1, 7], scores=scores)
    found = dataclasses.replace(found, reading=torch.tensor([0.25, 0.75]))
    found.save(tmp_path / "read")
    loaded = Selection.load(tmp_path / "read")
    assert loaded.reading is not None
    assert torch.equal(loaded.reading, torch.tensor([0.25, 0.75]))
    assert loaded.reading.dtype == torch.float32
    assert (loaded.scores is None) == (scores is None)
    assert [moment.video for moment in loaded.moments()] == [1, 0]
    record = json.loads((tmp_path / "read.json").read_text())
    assert [Moment(**moment) for moment in record["moments"]] == found.moments()


def test_twelve_videos_come_back_in_order(tmp_path: Path) -> None:
    found = make(tuple(range(1, 13)))
    found.save(tmp_path / "many")
    assert [len(times) for times in Selection.load(tmp_path / "many").times] == list(range(1, 13))


def test_views_can_be_saved(tmp_path: Path) -> None:
    rows = torch.arange(12).reshape(6, 2)
    found = dataclasses.replace(make((2,)), frame=rows[:, 0] // 6, video=rows[:, 0] * 0)
    found.save(tmp_path / "view")
    assert torch.equal(Selection.load(tmp_path / "view").frame, found.frame)


def test_the_same_tensor_under_two_names_can_be_saved(tmp_path: Path) -> None:
    """Frame and kept may well be one tensor: a video of one token a frame, all kept."""
    same = torch.arange(6)
    found = dataclasses.replace(make((6,), per_frame=1), kept=same, frame=same)
    found.save(tmp_path / "same")
    assert torch.equal(Selection.load(tmp_path / "same").kept, same)


@pytest.mark.parametrize("ending", ["safetensors", "json"])
def test_half_written_and_missing_files(tmp_path: Path, ending: str) -> None:
    path = tmp_path / "run"
    make().save(path)
    file = tmp_path / f"run.{ending}"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=str(path)):
        Selection.load(path)
    file.unlink()
    with pytest.raises(CheckpointError, match="without an ending"):
        Selection.load(path)


@pytest.mark.parametrize("broken", ["save_file", "json"])
def test_an_interrupted_save_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    path = tmp_path / "run"
    make(kept=[1]).save(path)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    if broken == "save_file":
        monkeypatch.setattr(selection_module, "save_file", fail)
    else:
        monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OSError, match="disk full"):
        make(kept=[2]).save(path)
    monkeypatch.undo()
    assert Selection.load(path).kept.tolist() == [1]
