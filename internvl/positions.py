"""InternVL: one-axis positions, counted without gaps in every sequence the model reads."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.layout import Prompt


def whole_positions(prompt: Prompt) -> Tensor:
    """Positions of a whole prompt: int64 ``(tokens,)``, counted up from 0."""
    return torch.arange(len(prompt.layout))


def compact_positions(prompt: Prompt, rows: Tensor) -> Tensor:
    """Positions of the tokens ``rows``, counted up from 0 as the reference does (fixtures, I2)."""
    return torch.arange(len(rows))
