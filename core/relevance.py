"""Relevance: how strongly the asking text attends to each visual token at the reference layer.

The attention weights themselves, heads x text x keys, are never built: keys are visited in blocks,
once to find every row's normaliser and once to reduce the rows to one number a key.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from .errors import OptionError

Aggregation = Literal["max", "mean"]

#: The reference's names. Its README calls the first an average; its code takes the maximum.
ALIASES: dict[str, Aggregation] = {
    "token_selection": "max",
    "token_selection_qwen": "max",
    "token_selection_mean": "mean",
    "token_selection_qwen_mean": "mean",
}

#: Bytes of float32 scores held at a time: large enough for full matrix speed, small enough that
#: a block stays in a processor's cache.
_BLOCK_BYTES = 16 << 20


def check_aggregation(name: str) -> Aggregation:
    """Return the aggregation called ``name`` here or in the reference, or raise `OptionError`."""
    resolved = ALIASES.get(name, name)
    if resolved not in get_args(Aggregation):
        raise OptionError(
            f"aggregation must be 'max' or 'mean' (or the reference's {sorted(ALIASES)}), "
            f"got {name!r}."
        )
    return resolved  # type: ignore[return-value]


def relevance(
    query: Tensor,
    key: Tensor,
    query_rows: Tensor,
    columns: Tensor,
    *,
    scale: float | None = None,
    aggregation: Aggregation = "max",
    block: int | None = None,
) -> Tensor:
    """Reduce text-to-visual attention to one score a visual token.

    The softmax of a query runs over all keys it can see (itself and everything before it); the
    result is the maximum, or the mean, over heads and queries of the weight it gives each visual
    token (paper equation 2; fixtures, C1-C5).

    Parameters
    ----------
    query : ``(sets, heads, text, head_dim)``, rotated query states of the tokens that ask.
    key : ``(sets, kv_heads, tokens, head_dim)``, rotated key states of the whole set. ``heads``
        is a multiple of ``kv_heads``; keys are shared, not repeated.
    query_rows : int64 ``(text,)``, ascending, index of each asking token within ``tokens``.
    columns : int64 ``(visual,)``, index of each visual token within ``tokens``.
    scale : factor on q·k; default ``head_dim ** -0.5``.
    aggregation : ``"max"`` or ``"mean"`` over heads and asking tokens.
    block : keys visited at a time; by default as many as fill a fixed amount of memory.

    Returns
    -------
    float32 ``(sets, visual)``; whatever the input dtype, accumulated in float32.
    """
    sets, heads, text, head_dim = query.shape
    kv_heads, tokens = key.shape[1], key.shape[2]
    rows = heads // kv_heads * text
    scale = head_dim**-0.5 if scale is None else scale
    # Heads of a group lie side by side, so their queries become more rows against the same keys.
    grouped = query.float().mul(scale).reshape(sets, kv_heads, rows, head_dim)
    if block is None:
        block = max(64, _BLOCK_BYTES // (4 * sets * kv_heads * rows))
    first_query = int(query_rows[0])
    limit = query_rows.to(query.device).repeat(heads // kv_heads)[:, None]

    def scores(start: int, stop: int) -> Tensor:
        part = grouped @ key[:, :, start:stop].float().mT
        if stop - 1 > first_query:
            ahead = torch.arange(start, stop, device=part.device) > limit
            part = part.masked_fill(ahead, float("-inf"))
        return part

    normaliser: Tensor | None = None
    for start in range(0, tokens, block):
        part = scores(start, min(start + block, tokens)).logsumexp(-1)
        normaliser = part if normaliser is None else torch.logaddexp(normaliser, part)
    assert normaliser is not None
    normaliser = normaliser[..., None]

    first, last = int(columns[0]), int(columns[-1]) + 1
    reduced = []
    for start in range(first, last, block):
        part = scores(start, min(start + block, last)) - normaliser
        reduced.append(part.amax((1, 2)) if aggregation == "max" else part.exp().mean((1, 2)))
    per_key = torch.cat(reduced, -1)
    if aggregation == "max":
        per_key = per_key.exp()
    return per_key.index_select(-1, (columns - first).to(per_key.device))
