"""From clips and their turns to tensors that a language model trains on.

A sequence is token for token what the family's processor makes of the same chat; only the tower is
left out, because its output is looked up in the pool. Sequences are padded on the right: attention
is causal, so the padding is never seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..core.errors import OptionError
from .clips import Clip, Pool
from .models import FEATURE, NEWLINE, Family
from .tokenizer import PAD, TURN_END, TURN_START

IGNORE = -100


@dataclass(frozen=True)
class Batch:
    """Tensors of one training step; ``B`` clips of ``L`` tokens.

    Attributes
    ----------
    ids : Tensor of shape (B, L), int64
        Token ids; FEATURE and NEWLINE where an embedding comes from elsewhere.
    rows : Tensor of shape (B, L), int64
        Row of the pool's flattened features for each FEATURE.
    positions : Tensor of shape (B, L) or (3, B, L), int64
        Rotary positions.
    targets : Tensor of shape (B, L), int64
        The token that follows where it is to be learned, ``IGNORE`` elsewhere.
    """

    ids: Tensor
    rows: Tensor
    positions: Tensor
    targets: Tensor


class Scribe:
    """Writes clips and turns in the token ids of one family."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.before, self.after = family.around()
        slots, ranked = family.frame_slots()
        self.slots = np.array(slots)
        self.ranked = ranked
        self.cell_slots = [at for at, slot in enumerate(slots) if slot == FEATURE]
        self.pad = int(family.tokenizer.convert_tokens_to_ids(PAD))
        self.turn_end = int(family.tokenizer.convert_tokens_to_ids(TURN_END))
        self._ids = lru_cache(maxsize=65536)(family.ids)

    @cached_property
    def turn_break(self) -> list[int]:
        """Ids between an answer's end and the next question."""
        return list(self._ids(f"\n{TURN_START}user\n"))

    @cached_property
    def reply(self) -> list[int]:
        """Ids between a question and its answer."""
        return list(self._ids(f"{TURN_END}\n{TURN_START}assistant\n"))

    def question(self, text: str) -> list[int]:
        """Write a question and what opens its answer."""
        return [*self._ids(text), *self.reply]

    def chat(self, turns: Sequence[tuple[str, str]]) -> tuple[list[int], list[bool]]:
        """Write turns as a chat; the second list marks the answers and the ends after them."""
        ids: list[int] = []
        learned: list[bool] = []
        for number, (question, answer) in enumerate(turns):
            asked = [*(self.turn_break if number else []), *self.question(question)]
            said = [*self._ids(answer), self.turn_end]
            ids += asked + said
            learned += [False] * len(asked) + [True] * len(said)
        return ids, learned

    def drill(self, pairs: Sequence[tuple[str, str]]) -> tuple[list[int], list[bool]]:
        """Write named marks one after another, in the place of a question."""
        ids: list[int] = []
        learned: list[bool] = []
        for names, answer in pairs:
            words = [*self._ids(names), *self._ids(answer)]
            ids += words
            learned += [False] * (len(words) - 1) + [True]
        return ids, learned

    def batch(
        self,
        pool: Pool,
        clips: Sequence[Clip],
        texts: Sequence[tuple[list[int], list[bool]]],
        length: int,
    ) -> Batch:
        """Assemble a batch; text that does not fit into ``length`` tokens is cut off.

        Raises
        ------
        OptionError
            If a clip alone is longer than ``length``.
        """
        framing = len(self.before) + len(self.after)
        begins = [framing + int(clip.kept.sum()) for clip in clips]
        if max(begins) > length:
            raise OptionError(f"A clip of {max(begins)} tokens does not fit into length={length}.")
        longest = max(at + len(ids) for at, (ids, _) in zip(begins, texts, strict=True))
        rows = [
            self._row(pool, clip, *text, min(length, longest))
            for clip, text in zip(clips, texts, strict=True)
        ]
        ids, features, positions, targets = (np.stack(part) for part in zip(*rows, strict=True))
        if positions.ndim == 3:
            positions = positions.swapaxes(0, 1)
        return Batch(
            *(torch.from_numpy(part.copy()) for part in (ids, features, positions, targets))
        )

    def _row(
        self, pool: Pool, clip: Clip, text: list[int], learned: list[bool], length: int
    ) -> tuple[NDArray[np.int64], ...]:
        frame, slot = np.nonzero(clip.kept)
        video = self.slots[slot]
        cell = np.searchsorted(self.cell_slots, slot).clip(max=len(self.cell_slots) - 1)
        looked_up = (clip.scenes[frame] * pool.looks + clip.looks[frame]) * len(self.cell_slots)
        start, stop = len(self.before), len(self.before) + len(video)
        begin = stop + len(self.after)
        text, learned = text[: length - begin], learned[: length - begin]

        ids = np.full(length, self.pad, dtype=np.int64)
        ids[:start], ids[start:stop] = self.before, video
        ids[stop:begin] = self.after
        ids[begin : begin + len(text)] = text
        rows = np.zeros(length, dtype=np.int64)
        rows[start:stop] = np.where(video == FEATURE, looked_up + cell, 0)
        targets = np.full(length, IGNORE, dtype=np.int64)
        at = begin + np.flatnonzero(learned)
        targets[at - 1] = ids[at]
        positions = self.family.positions(start, clip.times[frame], cell, length - stop)
        return ids, rows, positions.astype(np.int64), targets


def embed(batch: Batch, table: Tensor, features: Tensor, newline: Tensor | None) -> Tensor:
    """Look up the embeddings of a batch.

    Parameters
    ----------
    batch : Batch
        ``B`` sequences of ``L`` tokens.
    table : Tensor of shape (vocabulary, hidden)
        The model's input embeddings.
    features : Tensor of shape (scenes, looks, cells, hidden)
        The pool's features.
    newline : Tensor of shape (hidden,), optional
        LLaVA-Video's newline embedding.

    Returns
    -------
    Tensor of shape (B, L, hidden)
    """
    embeddings = torch.nn.functional.embedding(batch.ids.clamp(min=0), table)
    seen = features.flatten(0, -2)[batch.rows]
    embeddings = torch.where((batch.ids == FEATURE)[..., None], seen, embeddings)
    if newline is not None:
        embeddings = torch.where((batch.ids == NEWLINE)[..., None], newline, embeddings)
    return embeddings
