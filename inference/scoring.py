"""Score: the relevance of every visual token, set by set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.architecture import Scorer
from ..core.layout import Prompt
from ..core.relevance import Aggregation, relevance
from ..core.sets import frame_sets
from .features import Progress, assemble

#: Tokens scored in one pass when sets are batched. Short sets alone leave a device idle.
TOKENS_PER_BATCH = 16_384


@dataclass(frozen=True, eq=False)
class FrameSet:
    """One set of frames of a prompt, ready to be scored.

    Attributes
    ----------
    video : the video the frames are of.
    frames : int64 ``(frames,)``, ascending.
    rows : int64 ``(tokens,)``, the prompt's tokens that a scorer sees.
    columns : int64 ``(visual,)``, which of ``rows`` are visual.
    members : int64 ``(visual,)``, the same tokens as positions among the prompt's visual tokens.
    query_rows : int64 ``(text,)``, which of ``rows`` ask.
    positions : int64 ``(tokens,)`` or ``(axes, tokens)``.
    """

    video: int
    frames: Tensor
    rows: Tensor
    columns: Tensor
    members: Tensor
    query_rows: Tensor
    positions: Tensor


def split_prompt(
    prompt: Prompt, scorer: Scorer, frames_per_set: int, last_only: bool = False
) -> list[FrameSet]:
    """Split the frames of every video of a prompt into sets; ``last_only``: one token asks."""
    rank = prompt.layout.visual.cumsum(0) - 1
    sets = []
    for video, clip in enumerate(prompt.videos):
        for frames in frame_sets(clip.frames, frames_per_set):
            rows = prompt.rows_of_frames(video, frames)
            alone = prompt.as_clip(video, frames, rows)
            columns = alone.layout.visual.nonzero()[:, 0]
            asking = alone.layout.query.nonzero()[:, 0]
            sets.append(
                FrameSet(
                    video,
                    frames,
                    rows,
                    columns,
                    rank[rows[columns]],
                    asking[-1:] if last_only else asking,
                    scorer.positions(alone),
                )
            )
    return sets


@torch.no_grad()
def score(
    prompt: Prompt,
    sets: list[FrameSet],
    features: Tensor,
    scorer: Scorer,
    *,
    layer: int,
    aggregation: Aggregation,
    sets_per_batch: int | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Score every visual token of a prompt.

    Sets are independent. Those of equal length share a pass; each lives on the device only while
    it is scored.

    Parameters
    ----------
    prompt : in the scorer's own tokens.
    sets : from `split_prompt`.
    features : host ``(feature tokens, hidden of the scorer)``.
    scorer : the model, or a Lite selector.
    layer : reference layer, 0-based.
    aggregation : over heads and asking tokens.
    sets_per_batch : sets a pass; default: as many as hold `TOKENS_PER_BATCH` tokens.
    progress : called with ("rank", sets done, sets).

    Returns
    -------
    float32 ``(visual,)`` on the scorer's device.
    """
    scores: Tensor | None = None
    done = 0
    for batch in _batches(sets, sets_per_batch):
        first = batch[0]
        embeds = torch.stack(
            [assemble(prompt.layout, part.rows, features, scorer.embed) for part in batch]
        )
        positions = torch.stack([part.positions for part in batch], -2).to(embeds.device)
        query, key = scorer.states(embeds, positions, layer, first.query_rows)
        values = relevance(query, key, first.query_rows, first.columns, aggregation=aggregation)
        if scores is None:
            scores = torch.zeros(prompt.num_visual, device=values.device)
        members = torch.stack([part.members for part in batch])
        scores[members.to(values.device)] = values
        done += len(batch)
        if progress is not None:
            progress("rank", done, len(sets))
    return torch.zeros(0) if scores is None else scores


def _batches(sets: list[FrameSet], sets_per_batch: int | None) -> Iterator[list[FrameSet]]:
    """Group neighbouring sets whose tokens line up; no padding, so no attention mask is needed."""
    batch: list[FrameSet] = []
    for part in sets:
        limit = sets_per_batch or max(1, TOKENS_PER_BATCH // len(part.rows))
        if batch and (len(batch) >= limit or not _same_shape(batch[0], part)):
            yield batch
            batch = []
        batch.append(part)
    if batch:
        yield batch


def _same_shape(first: FrameSet, second: FrameSet) -> bool:
    return (
        len(first.rows) == len(second.rows)
        and torch.equal(first.columns, second.columns)
        and torch.equal(first.query_rows, second.query_rows)
    )
