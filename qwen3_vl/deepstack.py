"""Qwen3-VL: what the tower saw at several depths, as one row a visual token.

The tower hands on its last layer's features and those of a few layers below. The first become the
embeddings of the visual tokens; each of the others is added to the decoder's states of the same
tokens after one of its first layers. Here they lie side by side in one wide row, ``(1 + levels) *
hidden``, so that whatever moves, drops or pads a token does the same to all its levels. Text has
zeros in the place of the added ones.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..core.errors import FlexSelectError


def widen(embeds: Tensor, levels: int) -> Tensor:
    """Give embeddings ``(tokens, hidden)`` that add nothing their zeros for ``levels``."""
    return torch.nn.functional.pad(embeds, (0, levels * embeds.shape[-1]))


def split(wide: Tensor, hidden: int) -> tuple[Tensor, list[Tensor]]:
    """Take wide rows apart: the embeddings, and what is added after each of the first layers."""
    first, *added = wide.split(hidden, -1)
    return first, added


@contextmanager
def reading_wide_rows(decoder: Any, inputs: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Let the stock text model add the levels of wide rows on its next call.

    Its own arguments for them cannot be reached through the model around it unless that encodes the
    video itself. Everything on the way sees embeddings of the usual width.

    Parameters
    ----------
    decoder : the text model. A hook of it is held while this is open.
    inputs : with ``inputs_embeds`` of wide rows, ``(batch, tokens, (1 + levels) * hidden)``.

    Yields
    ------
    ``inputs`` with the embeddings alone, for a call of the model in the same thread.
    """
    embeds, added = split(inputs["inputs_embeds"], decoder.config.hidden_size)
    # Another thread may be answering from the same model, so only this one's states count.
    thread = threading.get_ident()
    waiting = list(added)

    def add(_: Any, args: Any, kwargs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if threading.get_ident() != thread or not waiting:
            return None
        given = kwargs["inputs_embeds"]
        if given is None or given.shape[1] != embeds.shape[1] or len(given) % len(embeds):
            raise FlexSelectError(
                "The model does not read the prompt in one piece, so what its tower saw below the "
                "last layer cannot be added. Leave out options that split the prefill."
            )
        # Beams and several sequences repeat every prompt, each beside itself.
        times = len(given) // len(embeds)
        levels = {
            "visual_pos_masks": given.new_ones(given.shape[:2], dtype=torch.bool),
            "deepstack_visual_embeds": [
                level.repeat_interleave(times, 0).flatten(0, 1) for level in waiting
            ],
        }
        waiting.clear()
        return args, {**kwargs, **levels}

    handle = decoder.register_forward_pre_hook(add, with_kwargs=True)
    try:
        yield {**inputs, "inputs_embeds": embeds}
    finally:
        handle.remove()
