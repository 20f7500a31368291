"""Relevance: how strongly the asking text attends to each visual token at the reference layer.

The attention weights themselves, heads x text x keys, are never built: queries are visited in
blocks small enough for a processor's cache, and each block is reduced to one number a key.
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

#: Bytes of float32 scores held at a time. On a CPU they should stay in its cache; a GPU needs
#: enough of them to be busy.
_BLOCK_BYTES = {"cpu": 16 << 20, "other": 256 << 20}


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
    block_rows: int | None = None,
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
    block_rows : query rows (of one key head) visited at a time; by default as many as fill a
        fixed amount of memory.

    Returns
    -------
    float32 ``(sets, visual)``; whatever the input dtype, accumulated in float32.
    """
    sets, heads, text, head_dim = query.shape
    kv_heads, tokens = key.shape[1], key.shape[2]
    scale = head_dim**-0.5 if scale is None else scale
    # Heads of a group lie side by side, so their queries become more rows against the same keys.
    rows = query.float().mul(scale).reshape(sets, kv_heads, -1, head_dim)
    keys = key.float().mT
    sees = query_rows.to(query.device).repeat(heads // kv_heads)[:, None]
    # Only keys after the first query can lie ahead of any.
    hidden_from = int(query_rows[0]) + 1
    late = torch.arange(hidden_from, tokens, device=query.device)
    first, last = int(columns[0]), int(columns[-1]) + 1
    if block_rows is None:
        held = _BLOCK_BYTES["cpu" if query.device.type == "cpu" else "other"]
        block_rows = max(16, held // (4 * sets * kv_heads * tokens))

    # A gradient needs the scores as they were; without one they are written over.
    learning = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
    reduced: Tensor | None = None
    for start in range(0, rows.shape[2], block_rows):
        scores = rows[:, :, start : start + block_rows] @ keys
        ahead = late > sees[start : start + block_rows]
        scores[..., hidden_from:].masked_fill_(ahead, float("-inf"))
        total, log_weights = scores.logsumexp(-1, keepdim=True), scores[..., first:last]
        log_weights = log_weights - total if learning else log_weights.sub_(total)
        if aggregation == "max":
            part = log_weights.amax((1, 2))
            reduced = part if reduced is None else torch.maximum(reduced, part)
        else:
            part = log_weights.exp().sum((1, 2))
            reduced = part if reduced is None else reduced + part
    assert reduced is not None
    result = reduced.exp() if aggregation == "max" else reduced / (heads * text)
    return result.index_select(-1, (columns - first).to(result.device))
