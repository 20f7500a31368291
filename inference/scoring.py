"""Score: the relevance of every visual token, set by set."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core.architecture import Scorer
from ..core.errors import FlexSelectError
from ..core.layout import NONE, Layout, Prompt
from ..core.relevance import Aggregation, relevance
from ..core.sets import frame_sets
from .features import Progress, assemble, keep_freed_memory, release_cache

logger = logging.getLogger(__name__)

#: Tokens scored in one pass when sets are batched. Short sets alone leave a device idle; on a CPU
#: more than its cache holds only costs time and memory (docs/performance.md).
TOKENS_PER_BATCH = {"cpu": 1_024, "other": 16_384}


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
    """Split the frames of every video of a prompt into sets; ``last_only``: one token asks.

    Sets that differ in nothing but their pictures and the words of their text, as most sets of a
    video do, share their places and positions: those are worked out once.
    """
    layout = prompt.layout
    rank = layout.visual.cumsum(0) - 1
    kinds = _kinds(layout)
    sets: list[FrameSet] = []
    for video, clip in enumerate(prompt.videos):
        parts = frame_sets(clip.frames, frames_per_set)
        latest: tuple[FrameSet, Tensor] | None = None
        for frames, rows in zip(parts, rows_of_sets(prompt, video, parts), strict=True):
            kind = kinds[rows]
            if latest is not None and torch.equal(kind, latest[1]):
                columns = latest[0].columns
                part = replace(latest[0], frames=frames, rows=rows, members=rank[rows[columns]])
            else:
                alone = prompt.as_clip(video, frames, rows)
                columns = alone.layout.visual.nonzero()[:, 0]
                asking = alone.layout.query.nonzero()[:, 0]
                part = FrameSet(
                    video,
                    frames,
                    rows,
                    columns,
                    rank[rows[columns]],
                    asking[-1:] if last_only else asking,
                    scorer.positions(alone),
                )
                latest = part, kind
            sets.append(part)
    return sets


def _kinds(layout: Layout) -> Tensor:
    """Return all that decides a token's place in a set, as one number: int64 ``(tokens,)``."""
    starts = layout.frame.diff(prepend=layout.frame[:1]) != 0
    # Not whether a token is of a frame: between two starts all are or none is, and a frame has
    # visual tokens.
    marks = (layout.visual, layout.feature, layout.query, starts)
    return torch.stack([mark.long() << bit for bit, mark in enumerate(marks)]).sum(0)


def rows_of_sets(prompt: Prompt, video: int, sets: Sequence[Tensor]) -> list[Tensor]:
    """Return `Prompt.rows_of_frames` of every one of ``sets``, looking at the prompt once.

    Parameters
    ----------
    sets : int64 ``(frames,)`` each, of the same video; no frame in two of them.
    """
    layout = prompt.layout
    own = layout.video == video
    in_frame = own & (layout.frame != NONE)
    shared = (((layout.video == NONE) | own) & ~in_frame).nonzero()[:, 0]
    set_of = torch.full((prompt.videos[video].frames,), len(sets))
    for number, frames in enumerate(sets):
        set_of[frames] = number
    rows = in_frame.nonzero()[:, 0]
    owner = set_of[layout.frame[rows]]
    # Sorted stably, the tokens of a set lie side by side and keep their order.
    sizes = torch.bincount(owner, minlength=len(sets) + 1).tolist()
    parts = rows[owner.argsort(stable=True)].split(sizes)
    return [torch.cat((shared, part)).sort().values for part in parts[: len(sets)]]


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
    sets_per_batch : most sets a pass; default: as many as hold `TOKENS_PER_BATCH` tokens. Halved
        where the device's memory does not allow it.
    progress : called with ("rank", sets done, sets).

    Returns
    -------
    float32 ``(visual,)`` on the scorer's device.

    Raises
    ------
    FlexSelectError
        The device has too little memory for a single set.
    """
    scores: Tensor | None = None

    def rank(batch: list[FrameSet], embeds: Tensor, positions: Tensor) -> None:
        nonlocal scores
        first = batch[0]
        query, key = scorer.states(embeds, positions, layer, first.query_rows)
        values = relevance(query, key, first.query_rows, first.columns, aggregation=aggregation)
        if scores is None:
            scores = torch.zeros(prompt.num_visual, device=values.device)
        _put(scores, batch, values)

    _pass_by_pass(rank, prompt, sets, features, scorer, sets_per_batch, progress)
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

    def rank(batch: list[FrameSet], embeds: Tensor, positions: Tensor) -> None:
        rows, columns = batch[0].query_rows, batch[0].columns
        for states in scorer.layer_states(embeds, positions, layers, rows):
            for aggregation in aggregations:
                values = relevance(states.query, states.key, rows, columns, aggregation=aggregation)
                _put(scores[states.layer, aggregation], batch, values)

    _pass_by_pass(rank, prompt, sets, features, scorer, sets_per_batch, progress)
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

    def take(batch: list[FrameSet], embeds: Tensor, positions: Tensor) -> None:
        columns = batch[0].columns
        for states in scorer.layer_states(embeds, positions, layers, batch[0].query_rows):
            hidden = states.hidden
            whole = found.setdefault(states.layer, torch.zeros(len(members), hidden.shape[-1]))
            for part, own in zip(batch, hidden, strict=True):
                wanted = torch.isin(part.members, members)
                rows = columns[wanted].to(own.device)
                places = torch.searchsorted(members.contiguous(), part.members[wanted])
                whole[places] = own[rows].float().cpu()

    _pass_by_pass(take, prompt, sets, features, scorer, sets_per_batch, progress)
    return found


def _pass_by_pass(
    work: Callable[[list[FrameSet], Tensor, Tensor], None],
    prompt: Prompt,
    sets: list[FrameSet],
    features: Tensor,
    scorer: Scorer,
    sets_per_batch: int | None,
    progress: Progress | None,
) -> None:
    """Do ``work`` on sets that share a pass, their embeddings and positions, until all are done.

    Where a pass does not fit the device, ``work`` is done again on half of its sets.
    """
    keep_freed_memory()
    place = prompt.layout.feature.cumsum(0) - 1
    device = scorer.embed(prompt.layout.ids[:0]).device
    tokens = TOKENS_PER_BATCH["cpu" if device.type == "cpu" else "other"]
    done = 0
    while done < len(sets):
        batch = _batch(sets, done, sets_per_batch, tokens)
        try:
            rows = torch.cat([part.rows for part in batch])
            embeds = assemble(prompt.layout, rows, features, scorer.embed, place)
            positions = torch.stack([part.positions for part in batch], -2).to(device)
            work(batch, embeds.unflatten(0, (len(batch), -1)), positions)
        except torch.OutOfMemoryError as error:
            if len(batch) < 2:
                raise FlexSelectError(
                    "The device has too little free memory to score one set of "
                    f"{len(sets[done].rows)} tokens. Lower frames_per_set, load the model in "
                    "bfloat16, or free the device."
                ) from error
            failed = True
        else:
            failed = False
        if failed:
            # Only out here has the traceback let go of the pass's activations.
            embeds = torch.empty(0)
            sets_per_batch = len(batch) // 2
            logger.warning(
                "Out of device memory while scoring %d sets at a time; going on with %d.",
                len(batch),
                sets_per_batch,
            )
            release_cache()
            continue
        done += len(batch)
        if progress is not None:
            progress("rank", done, len(sets))


def _put(scores: Tensor, batch: list[FrameSet], values: Tensor) -> None:
    """Write ``(sets, visual)`` values of a pass to their places in ``scores``."""
    members = torch.stack([part.members for part in batch])
    scores[members.to(scores.device)] = values.to(scores.device)


def _batch(
    sets: list[FrameSet], start: int, sets_per_batch: int | None, tokens: int
) -> list[FrameSet]:
    """Take neighbouring sets whose tokens line up; no padding, so no attention mask is needed."""
    first = sets[start]
    limit = sets_per_batch or max(1, tokens // len(first.rows))
    batch = [first]
    for part in sets[start + 1 : start + limit]:
        if not _same_shape(first, part):
            break
        batch.append(part)
    return batch


def _same_shape(first: FrameSet, second: FrameSet) -> bool:
    if first.columns is second.columns:
        return True
    return (
        len(first.rows) == len(second.rows)
        and torch.equal(first.columns, second.columns)
        and torch.equal(first.query_rows, second.query_rows)
    )
