"""Sets of a hand-made prompt, and their scores under a scorer that is simple to state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flexselect.core.errors import FlexSelectError
from flexselect.core.layout import NONE, Clip, Layout, Prompt
from flexselect.core.sets import frame_sets
from flexselect.inference import scoring
from flexselect.inference.scoring import rows_of_sets, score, split_prompt
from flexselect.tests.core.handmade import index_of, make, text_of


class Scorer:
    """Attends by the embeddings themselves; positions are remembered, passes counted."""

    num_layers = 3

    def __init__(self) -> None:
        self.passes: list[tuple[int, int]] = []
        self.prompts: list[Prompt] = []
        self.embedded: list[int] = []

    def embed(self, ids: Tensor) -> Tensor:
        self.embedded.append(len(ids))
        return torch.stack([(ids * 7 % 11).float(), (ids * 3 % 5).float()], -1) / 10

    def positions(self, prompt: Prompt) -> Tensor:
        self.prompts.append(prompt)
        return torch.arange(len(prompt.layout)).expand(3, -1)

    def states(
        self, embeds: Tensor, positions: Tensor, layer: int, query_rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        assert layer == 1
        assert positions.shape == (3, *embeds.shape[:2])
        self.passes.append((embeds.shape[0], embeds.shape[1]))
        return embeds[:, None, query_rows], embeds[:, None]

    def layer_states(self, *arguments: Any) -> Any:
        raise AssertionError("one layer is asked for")


FEATURES = torch.randn(12, 2, generator=torch.Generator().manual_seed(0))


def run(frames_per_set: int, **more: Any) -> tuple[Tensor, Scorer]:
    prompt, scorer = make(), Scorer()
    options = {"layer": 1, "aggregation": "max", **more}
    sets = split_prompt(prompt, scorer, frames_per_set)
    return score(prompt, sets, FEATURES, scorer, **options), scorer


def test_sets_of_two_videos() -> None:
    prompt, scorer = make(), Scorer()
    sets = split_prompt(prompt, scorer, 2)
    assert [(part.video, part.frames.tolist()) for part in sets] == [
        (0, [0, 2]),
        (0, [1]),
        (1, [0, 1]),
    ]
    assert [text_of(prompt, part.rows) for part in sets] == [
        "ss[tAAtAA]miiqq",
        "ss[tAA]miiqq",
        "ssm(BBBB)iiqq",
    ]
    assert [part.members.tolist() for part in sets] == [[0, 1, 4, 5], [2, 3], [6, 7, 8, 9]]
    for part in sets:
        visual = prompt.visual_rows()[part.members]
        assert torch.equal(part.rows[part.columns], visual)
        asking = prompt.layout.query.nonzero()[:, 0]
        present = asking[torch.isin(asking, part.rows)]
        assert torch.equal(part.rows[part.query_rows], present)
        assert part.positions.shape == (3, len(part.rows))
    assert [clip.videos[0].seconds_per_frame for clip in scorer.prompts] == [1.0] * 3
    assert [clip.num_frames for clip in scorer.prompts] == [2, 1, 2]


class Places(Scorer):
    """Its positions tell everything of a prompt but what its text says."""

    def positions(self, prompt: Prompt) -> Tensor:
        self.prompts.append(prompt)
        layout = prompt.layout
        fields = (layout.frame, layout.visual, layout.feature, layout.query)
        return torch.stack([field.long() for field in fields])


def lettered(text: str, frame: str, ranked: str, asking: str) -> Prompt:
    """One video: frames by digit; marks, a character a token, say what is ranked and what asks."""
    letters = torch.tensor([ord(letter) for letter in text])
    visual, query = (torch.tensor([mark != "." for mark in marks]) for marks in (ranked, asking))
    frames = index_of(frame)
    video = torch.where(frames == NONE, NONE, 0)
    layout = Layout(letters, video, frames, visual, letters == ord("A"), query)
    return Prompt(layout, (Clip(int(frames.max()) + 1, 1, 2),))


def test_sets_alike_are_laid_out_once_and_embedded_in_one_call_a_pass() -> None:
    prompt = lettered("sAtAtAtAtqq", ".00112233..", ".x.x.x.x...", ".........xx")
    scorer = Places()
    sets = split_prompt(prompt, scorer, 1)
    assert len(sets) == 4
    assert len(scorer.prompts) == 1
    for part in sets:
        alone = prompt.as_clip(0, part.frames, part.rows)
        assert part.positions is sets[0].positions
        assert torch.equal(part.positions, Places().positions(alone))
        assert torch.equal(part.columns, alone.layout.visual.nonzero()[:, 0])
    scored = Scorer()
    sets = split_prompt(prompt, scored, 1)
    score(prompt, sets, FEATURES, scored, layer=1, aggregation="max", sets_per_batch=2)
    assert scored.passes == [(2, 5), (2, 5)]
    # Once for the device, once for all tokens of each pass.
    assert scored.embedded == [0, 10, 10]


@pytest.mark.parametrize(
    ("ranked", "asking"),
    [(".x.x...", "..x..xx"), (".xxx...", ".....xx")],
    ids=["what asks", "what is ranked"],
)
def test_sets_that_differ_in_one_mark_alone_are_laid_out_each(ranked: str, asking: str) -> None:
    prompt = lettered("sAtAtqq", ".0011..", ranked, asking)
    for part in split_prompt(prompt, Places(), 1):
        alone = prompt.as_clip(0, part.frames, part.rows).layout
        assert torch.equal(part.columns, alone.visual.nonzero()[:, 0])
        assert torch.equal(part.query_rows, alone.query.nonzero()[:, 0])


@pytest.mark.parametrize(
    ("text", "frame"),
    [("AAAAAAqq", "011223.."), ("AtAAtAqq", "001122.."), ("AtAtAAqq", "00112233")],
)
def test_sets_that_are_not_alike_share_nothing(text: str, frame: str) -> None:
    """Frames of unequal size, and a tag (t) that is ranked before, after or without its frame."""
    letters = torch.tensor([ord(letter) for letter in text])
    visual, frames = letters != ord("q"), index_of(frame)
    frames[~visual] = NONE
    layout = Layout(
        letters,
        torch.where(visual, 0, NONE),
        frames,
        visual,
        letters == ord("A"),
        ~visual,
    )
    prompt = Prompt(layout, (Clip(int(frames.max()) + 1, 1, 2),))
    for frames_per_set in (1, 2):
        for part in split_prompt(prompt, Places(), frames_per_set):
            alone = prompt.as_clip(0, part.frames, part.rows)
            assert torch.equal(part.positions, Places().positions(alone))


def test_only_the_last_token_asks() -> None:
    prompt = make()
    for part in split_prompt(prompt, Scorer(), 2, last_only=True):
        assert part.query_rows.tolist() == [len(part.rows) - 1]


def test_scores_are_attention_within_the_set() -> None:
    prompt = make()
    scores, _ = run(2, aggregation="mean")
    assert scores.shape == (10,)
    assert scores.dtype == torch.float32
    whole = Scorer().embed(prompt.layout.ids)
    whole[prompt.layout.feature] = FEATURES
    for part in split_prompt(prompt, Scorer(), 2):
        embeds = whole[part.rows]
        weights = []
        for row in part.query_rows.tolist():
            logits = embeds[: row + 1] @ embeds[row] / 2**0.5
            weights.append(logits.softmax(0)[part.columns])
        torch.testing.assert_close(scores[part.members], torch.stack(weights).mean(0))


@pytest.mark.parametrize("sets_per_batch", [1, 2, 3, None])
@pytest.mark.parametrize("frames_per_set", [1, 2, 3])
def test_batches_change_nothing(frames_per_set: int, sets_per_batch: int | None) -> None:
    expected, _ = run(frames_per_set, sets_per_batch=1)
    found, scorer = run(frames_per_set, sets_per_batch=sets_per_batch)
    torch.testing.assert_close(found, expected)
    assert max(count for count, _ in scorer.passes) <= (sets_per_batch or 99)


def test_sets_of_one_shape_share_a_pass() -> None:
    _, scorer = run(1)
    assert scorer.passes == [(3, 12), (2, 11)]
    _, scorer = run(1, sets_per_batch=2)
    assert scorer.passes == [(2, 12), (1, 12), (2, 11)]


def test_a_pass_holds_a_bounded_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(scoring.TOKENS_PER_BATCH, "cpu", 24)
    _, scorer = run(1)
    assert scorer.passes == [(2, 12), (1, 12), (2, 11)]
    monkeypatch.setitem(scoring.TOKENS_PER_BATCH, "cpu", 1)
    _, scorer = run(1)
    assert scorer.passes == [(1, 12)] * 3 + [(1, 11)] * 2


@pytest.mark.parametrize("frames_per_set", [1, 2, 3])
def test_all_sets_at_once_have_the_rows_of_each(frames_per_set: int) -> None:
    prompt = make()
    for video, clip in enumerate(prompt.videos):
        sets = frame_sets(clip.frames, frames_per_set)
        for frames, rows in zip(sets, rows_of_sets(prompt, video, sets), strict=True):
            assert torch.equal(rows, prompt.rows_of_frames(video, frames))
        # Frames in none of the sets are left out.
        rows = rows_of_sets(prompt, video, sets[:1])[0]
        assert torch.equal(rows, prompt.rows_of_frames(video, sets[0]))


class Small(Scorer):
    """Has memory for ``fits`` sets."""

    def __init__(self, fits: int) -> None:
        super().__init__()
        self.fits = fits

    def states(self, embeds: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        states = super().states(embeds, *arguments)
        if len(embeds) > self.fits:
            raise torch.OutOfMemoryError
        return states


def test_a_pass_that_does_not_fit_is_halved(caplog: pytest.LogCaptureFixture) -> None:
    expected, _ = run(1)
    prompt, scorer = make(), Small(fits=1)
    sets = split_prompt(prompt, scorer, 1)
    calls: list[Any] = []
    with caplog.at_level("WARNING"):
        found = score(
            prompt,
            sets,
            FEATURES,
            scorer,
            layer=1,
            aggregation="max",
            progress=lambda *call: calls.append(call),
        )
    torch.testing.assert_close(found, expected)
    assert [count for count, _ in scorer.passes] == [3, 1, 1, 1, 1, 1]
    assert calls == [("rank", done, 5) for done in (1, 2, 3, 4, 5)]
    assert "3 sets at a time; going on with 1" in caplog.messages[0]


def test_one_set_that_does_not_fit() -> None:
    prompt, scorer = make(), Small(fits=0)
    sets = split_prompt(prompt, scorer, 1)
    with pytest.raises(FlexSelectError, match=r"one set of 12 tokens.*frames_per_set") as error:
        score(prompt, sets, FEATURES, scorer, layer=1, aggregation="max")
    assert isinstance(error.value.__cause__, torch.OutOfMemoryError)


def test_progress_counts_sets() -> None:
    calls: list[Any] = []
    run(1, progress=lambda *call: calls.append(call))
    assert calls == [("rank", 3, 5), ("rank", 5, 5)]
