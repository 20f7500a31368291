"""Score: the relevance of every visual token, set by set."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
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
    for batch, embeds, positions in _passes(
        prompt, sets, features, scorer, sets_per_batch, progress
    ):
        first = batch[0]
        query, key = scorer.states(embeds, positions, layer, first.query_rows)
        values = relevance(query, key, first.query_rows, first.columns, aggregation=aggregation)
        if scores is None:
            scores = torch.zeros(prompt.num_visual, device=values.device)
        _put(scores, batch, values)
    return torch.zeros(0) if scores is None else scores


@torch.no_grad()
def score_layers(
    prompt: Prompt,
    sets: list[FrameSet],
    features: Tensor,
    scorer: Scorer,
    *,
    layers: Collection[int],
    aggregations: Sequence[Aggregation],
    sets_per_batch: int | None = None,
    progress: Progress | None = None,
) -> dict[tuple[int, Aggregation], Tensor]:
    """Score every visual token at several layers, each set walked through them only once.

    Parameters are those of `score`, with ``layers`` and ``aggregations`` in the place of one each.

    Returns
    -------
    (layer, aggregation) to float32 ``(visual,)`` on the host: what `score` gives for the two.
    """
    scores = {
        (layer, aggregation): torch.zeros(prompt.num_visual)
        for layer in sorted(layers)
        for aggregation in aggregations
    }
    for batch, embeds, positions in _passes(
        prompt, sets, features, scorer, sets_per_batch, progress
    ):
        rows, columns = batch[0].query_rows, batch[0].columns
        for states in scorer.layer_states(embeds, positions, layers, rows):
            for aggregation in aggregations:
                values = relevance(states.query, states.key, rows, columns, aggregation=aggregation)
                _put(scores[states.layer, aggregation], batch, values)
    return scores


@torch.no_grad()
def embed_layers(
    prompt: Prompt,
    sets: list[FrameSet],
    features: Tensor,
    scorer: Scorer,
    *,
    layers: Collection[int],
    members: Tensor,
    sets_per_batch: int | None = None,
    progress: Progress | None = None,
) -> dict[int, Tensor]:
    """Return what several layers read for some visual tokens: their states within their sets.

    Parameters are those of `score_layers`; ``members`` is int64 ``(n,)``, positions among the
    prompt's visual tokens, ascending.

    Returns
    -------
    layer to float32 ``(n, hidden)`` on the host.
    """
    found: dict[int, Tensor] = {}
    for batch, embeds, positions in _passes(
        prompt, sets, features, scorer, sets_per_batch, progress
    ):
        columns = batch[0].columns
        for states in scorer.layer_states(embeds, positions, layers, batch[0].query_rows):
            hidden = states.hidden
            whole = found.setdefault(states.layer, torch.zeros(len(members), hidden.shape[-1]))
            for part, own in zip(batch, hidden, strict=True):
                wanted = torch.isin(part.members, members)
                rows = columns[wanted].to(own.device)
                places = torch.searchsorted(members.contiguous(), part.members[wanted])
                whole[places] = own[rows].float().cpu()
    return found


def _passes(
    prompt: Prompt,
    sets: list[FrameSet],
    features: Tensor,
    scorer: Scorer,
    sets_per_batch: int | None,
    progress: Progress | None,
) -> Iterator[tuple[list[FrameSet], Tensor, Tensor]]:
    """Yield sets that share a pass with their embeddings and positions, and report progress."""
    done = 0
    for batch in _batches(sets, sets_per_batch):
        embeds = torch.stack(
            [assemble(prompt.layout, part.rows, features, scorer.embed) for part in batch]
        )
        yield batch, embeds, torch.stack([part.positions for part in batch], -2).to(embeds.device)
        done += len(batch)
        if progress is not None:
            progress("rank", done, len(sets))


def _put(scores: Tensor, batch: list[FrameSet], values: Tensor) -> None:
    """Write ``(sets, visual)`` values of a pass to their places in ``scores``."""
    members = torch.stack([part.members for part in batch])
    scores[members.to(scores.device)] = values.to(scores.device)


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
