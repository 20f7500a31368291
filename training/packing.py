"""Teacher scores in half precision that keep their exact order.

Relevance is a share of attention: among 10,000 tokens most scores lie below 1e-4, where float16 is
coarse, and below 6e-8 it has nothing. So scores are stretched to the range 0 to `TOP` first, where
a billionth of the greatest score still has all of float16's digits. Even there neighbours may round
to the same number, and the ranking is what a selector learns. A second small number counts the
distinct scores within each rounded one: ties stay ties, and nothing else becomes one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.errors import FlexSelectError

#: What the greatest score becomes: as high as float16 goes with room for rounding.
TOP = 2.0**15


@dataclass(frozen=True, eq=False)
class Packed:
    """Scores as they are stored: 2 to 4 bytes a token.

    Attributes
    ----------
    half : float16 ``(tokens,)``, the scores stretched to the range 0 to `TOP`.
    fine : uint8, or int16 or int32 where that is too small, ``(tokens,)``: how many distinct
        scores with the same ``half`` are lower. None where all are 0.
    low, high : the least and the greatest score.
    """

    half: Tensor
    fine: Tensor | None
    low: float
    high: float


def pack(scores: Tensor) -> Packed:
    """Pack scores ``(tokens,)``, floating, finite and at least 0.

    Raises
    ------
    FlexSelectError
        A score is negative or not finite.
    """
    scores = scores.detach().float().cpu()
    if not bool((scores.isfinite() & (scores >= 0)).all()):
        raise FlexSelectError(
            "The teacher's relevance is not finite: it overflowed below its reference layer. Load "
            "it in bfloat16 or float32 instead of float16."
        )
    if not len(scores):
        return Packed(scores.half(), None, 0.0, 0.0)
    levels, level = scores.unique(return_inverse=True)
    low, high = float(levels[0]), float(levels[-1])
    cells = levels.double().sub(low).mul(TOP / (high - low) if high > low else 0.0).half()
    _, cell, sizes = cells.unique_consecutive(return_inverse=True, return_counts=True)
    first = sizes.cumsum(0) - sizes
    fine = torch.arange(len(levels)) - first[cell]
    if not bool(fine.any()):
        return Packed(cells[level], None, low, high)
    most = int(fine.max())
    kind = torch.uint8 if most < 2**8 else torch.int16 if most < 2**15 else torch.int32
    return Packed(cells[level], fine.to(kind)[level], low, high)


def unpack(packed: Packed) -> Tensor:
    """Return float32 ``(tokens,)``: each score within float16's precision of what it was.

    The order is exactly what it was: equal where scores were equal, and nowhere else.
    """
    if not len(packed.half):
        return packed.half.float()
    stretch = (packed.high - packed.low) / TOP
    values = packed.half.double().mul(stretch).add(packed.low).float()
    if packed.fine is None:
        fine = torch.zeros(len(values), dtype=torch.int64)
    else:
        fine = packed.fine.long()
    # Scores are at least 0, where the bits of a float, read as a whole number, order like it.
    key = (packed.half.view(torch.int16).long() << 32) + fine
    (
        _,
        level,
    ) = key.unique(return_inverse=True)
    count = int(level.max()) + 1
    bits = torch.zeros(count, dtype=torch.int64)
    bits[level] = values.view(torch.int32).long()
    # Every level at least one step of float32 above the one below.
    place = torch.arange(count)
    bits = (bits - place).cummax(0).values + place
    return bits.to(torch.int32).view(torch.float32)[level]
