"""Soft and hard ranks of scores, in linear time and memory.

A soft rank sums one sigmoid for every other token: written down directly, a matrix of N x N. A
video of 512 frames has N = 107,520. The sum over a smooth kernel needs no pairs, though. Tokens
are sorted and put into boxes two temperatures wide; inside a box the sigmoid is a polynomial of
low degree to float64 accuracy, so a box is described by a few moments, boxes compare moments
instead of tokens, and boxes further apart than the sigmoid reaches only count each other (the fast
multipole method of Greengard and Rokhlin, 1987, in one dimension). Forward and backward are both
sums of this kind; the backward pass recomputes its polynomials instead of storing them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .errors import OptionError

DEFAULT_TEMPERATURE = 1e-4

# A box is 2 temperatures wide, so that its polynomials live on [-1, 1]. The poles of the sigmoid
# lie pi away, which leaves an error of about 6.4 ** -degrees: 4e-14 for the sigmoid's derivative.
_DEGREES = 18
# Boxes further apart hold tokens at least 36 temperatures apart: 1 - sigmoid(36) is 2e-16.
_REACH = 18
# Boxes whose surroundings are gathered at once, about 700 KiB; larger is no faster.
_BLOCK = 64


def soft_rank(
    x: Tensor, temperature: float = DEFAULT_TEMPERATURE, mask: Tensor | None = None
) -> Tensor:
    """Differentiable 0-based ascending rank: sum_j sigmoid((x_i - x_j) / temperature) - 1/2.

    Equals the sum over pairs to float64 accuracy (about 1e-14 of the tokens) before it is rounded
    to the result's dtype, at a cost linear in the tokens but for one sort. Differentiable once.

    Parameters
    ----------
    x : floating ``(..., tokens)``; half precision is upcast.
    temperature : width of the sigmoid, in units of `x`.
    mask : bool ``(..., tokens)``, true where a token counts. The others are neither ranked nor
        compared with.

    Returns
    -------
    float32 (float64 for float64 scores) ``(..., tokens)`` in [0, tokens - 1]; 0 where `mask` is
    false, NaN in a row where a token that counts is not finite.

    Raises
    ------
    OptionError
        If shapes, dtypes or the temperature do not fit.
    """
    rows, keep = rows_and_mask(x, mask, "x")
    ranks = soft_rank_rows(rows, keep, temperature)
    return ranks.to(rows.dtype).reshape(x.shape)


def rank(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """0-based ascending rank in which ties share the mean of their ranks; no gradient.

    Parameters
    ----------
    x : floating ``(..., tokens)``; infinite scores are ranked like any other.
    mask : bool ``(..., tokens)``, true where a token counts.

    Returns
    -------
    float32 (float64 for float64 scores) ``(..., tokens)``, multiples of 1/2; 0 where `mask` is
    false, NaN in a row where a token that counts is NaN.

    Raises
    ------
    OptionError
        If shapes or dtypes do not fit.
    """
    rows, keep = rows_and_mask(x, mask, "x")
    return hard_rank_rows(rows.detach(), keep).to(rows.dtype).reshape(x.shape)


def soft_rank_rows(rows: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """`soft_rank` of ``(rows, tokens)`` that `rows_and_mask` prepared: float64, 0 in padding."""
    if not (math.isfinite(temperature) and temperature > 0):
        raise OptionError(f"temperature must be a positive number, got {temperature}")
    ranks: Tensor = _SoftRank.apply(rows, mask, float(temperature))
    return ranks


def hard_rank_rows(x: Tensor, mask: Tensor) -> Tensor:
    """`rank` of ``(rows, tokens)``: float64, 0 in padding."""
    below, ties = standing(x, mask)
    return (below + (ties - 1) / 2).mul(mask)


def standing(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """How many tokens of its row each token exceeds and equals (itself too), float64.

    NaN in a row where a token that counts is NaN.
    """
    count = mask.sum(dim=-1, keepdim=True)
    broken = (x.isnan() & mask).any(dim=-1, keepdim=True)
    x = x.masked_fill(~mask | broken, math.inf)
    ordered = x.sort(dim=-1).values
    below = torch.searchsorted(ordered, x)
    # Padding sorts last, as infinity: whatever ends in it ends at the last token that counts.
    upto = torch.searchsorted(ordered, x, right=True).minimum(count)
    below, ties = below.double(), (upto - below).double()
    return below.masked_fill(broken, math.nan), ties.masked_fill(broken, math.nan)


def rows_and_mask(x: Tensor, mask: Tensor | None, name: str) -> tuple[Tensor, Tensor]:
    """Scores upcast to float32 at least and their mask, both as (rows, tokens)."""
    if not x.is_floating_point():
        raise OptionError(f"{name} must be a floating tensor, got {x.dtype}")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise OptionError(f"{name} must have shape (..., tokens), got {tuple(x.shape)}")
    if mask is None:
        mask = torch.ones_like(x, dtype=torch.bool)
    elif mask.dtype != torch.bool or mask.shape != x.shape:
        raise OptionError(
            f"mask must be bool and shaped like {name}, {tuple(x.shape)}, got {mask.dtype} "
            f"{tuple(mask.shape)}"
        )
    upcast = x if x.dtype == torch.float64 else x.float()
    return upcast.reshape(-1, x.shape[-1]), mask.reshape(-1, x.shape[-1])


class _SoftRank(torch.autograd.Function):
    """Soft ranks of (rows, tokens) in float64, from scores and mask."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, temperature: float) -> Tensor:
        boxes = _Boxes.of(x.detach(), mask, temperature)
        near = boxes.kernel_sum(torch.sigmoid, boxes.weight[None])[0]
        ctx.boxes, ctx.temperature = boxes, temperature
        return boxes.unsort(near + boxes.tokens_below_reach() - 0.5)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        # d rank_i / d x_j is symmetric in i and j but for its sign, so with s' the sigmoid's
        # derivative the gradient of x_i is sum_j s'_ij (g_i - g_j) / T: two sums of one kernel.
        boxes: _Boxes = ctx.boxes
        # Padding was handed out as 0, so whatever comes back for it, even NaN, is void.
        g = torch.where(boxes.weight > 0, boxes.sort(grad), 0.0)
        both = boxes.kernel_sum(_sigmoid_slope, torch.stack([boxes.weight, g]))
        return boxes.unsort((g * both[0] - both[1]) / ctx.temperature), None, None


@dataclass(frozen=True)
class _Boxes:
    """Tokens of all rows in ascending order, laid out in boxes two temperatures wide.

    Rows follow each other with more than `_REACH` boxes between them, so that one pass serves a
    batch. Empty boxes are not stored, and a gap wider than the reach is cut to just above it: keys
    stay small integers however far apart the scores are.
    """

    order: Tensor  # (rows, tokens): where each sorted token stood
    finite: Tensor  # (rows, 1): False if a token that counts is NaN or infinite
    weight: Tensor  # (rows * tokens,): 1 where a token counts, 0 in padding
    offset: Tensor  # (rows * tokens,): place inside the box, from -1 to 1
    slot: Tensor  # (rows * tokens,): the box, as an index into the next three
    key: Tensor  # (boxes,): place of the box on a common grid, ascending
    start: Tensor  # (boxes,): first token
    length: Tensor  # (boxes,): number of tokens

    @classmethod
    def of(cls, x: Tensor, mask: Tensor, temperature: float) -> _Boxes:
        finite = (x.isfinite() | ~mask).all(dim=-1, keepdim=True)
        ordered, order = x.masked_fill(~(mask & finite), math.inf).sort(dim=-1, stable=True)
        count = (mask & finite).sum(dim=-1, keepdim=True)
        counts = torch.arange(x.shape[-1], device=x.device) < count
        last = ordered.gather(-1, (count - 1).clamp(min=0)).where(count > 0, 0.0)
        # Padding sits in the last token's box, with weight zero.
        ordered = ordered.where(counts, last).double()
        place = (ordered - ordered[:, :1]) / temperature
        place.clamp_(max=torch.finfo(place.dtype).max)
        box = (place / 2).floor()
        far = _REACH + 1
        gap = box.diff(dim=-1, prepend=box[:, :1] - far).clamp_(max=far).long().flatten()
        opens = gap > 0
        start = opens.nonzero().squeeze(-1)  # of unknown size: here a GPU has to be waited for
        return cls(
            order=order,
            finite=finite,
            weight=counts.double().flatten(),
            offset=(place - 2 * box - 1).clamp_(-1, 1).flatten(),
            slot=opens.cumsum(0).sub_(1),
            key=gap.cumsum(0)[start],
            start=start,
            length=start.diff(append=start.new_full((1,), gap.numel())),
        )

    def sort(self, values: Tensor) -> Tensor:
        """Values of (rows, tokens) in sorted order, (rows * tokens,)."""
        return values.gather(-1, self.order).flatten()

    def unsort(self, values: Tensor) -> Tensor:
        """Inverse of `sort`; 0 in padding, NaN in rows that are not finite."""
        values = torch.where(self.weight > 0, values, 0.0).reshape(self.order.shape)
        values = values.masked_fill(~self.finite, math.nan)
        return torch.empty_like(values).scatter_(-1, self.order, values)

    def tokens_below_reach(self) -> Tensor:
        """For each token, how many of its row lie in boxes too far below for `kernel_sum`."""
        first = torch.searchsorted(self.key, self.key - _REACH)
        rows, tokens = self.order.shape
        row_start = torch.arange(0, rows * tokens, tokens, device=self.key.device)
        reach_start = self.start[first][self.slot].reshape(rows, tokens)
        return (reach_start - row_start[:, None]).double().flatten()

    def kernel_sum(self, kernel: Callable[[Tensor], Tensor], charges: Tensor) -> Tensor:
        """Sum over tokens j within reach of kernel((x_i - x_j) / T) * charge_j.

        charges: (charges, rows * tokens), float64; so is the result.
        """
        many, boxes = charges.shape[0], self.key.numel()
        # One box more than there are, and empty: the partner of those who find none.
        moments = charges.new_zeros(many, boxes + 1, _DEGREES)
        for degree, polynomial in enumerate(self._chebyshev()):
            for moment, charge in zip(moments, charges, strict=True):
                moment[:-1, degree] = torch.segment_reduce(
                    charge * polynomial, "sum", lengths=self.length, unsafe=True
                )
        exchange = _exchange(kernel, charges.device)
        distance = torch.arange(-_REACH, _REACH + 1, device=self.key.device)
        local = charges.new_empty(_DEGREES, many, boxes)
        for first in range(0, boxes, _BLOCK):
            block = slice(first, first + _BLOCK)
            wanted = self.key[block, None] - distance
            partner = torch.searchsorted(self.key, wanted).clamp_(max=boxes - 1)
            partner = torch.where(self.key[partner] == wanted, partner, boxes)
            around = moments.index_select(1, partner.flatten()).reshape(many, len(wanted), -1)
            local[..., block] = (around @ exchange).permute(2, 0, 1)
        total = torch.zeros_like(charges)
        for degree, polynomial in enumerate(self._chebyshev()):
            total.addcmul_(local[degree].index_select(-1, self.slot), polynomial)
        return total

    def _chebyshev(self) -> Iterator[Tensor]:
        """Chebyshev polynomials of ascending degree at each token's place in its box."""
        previous, current = torch.ones_like(self.offset), self.offset
        yield previous
        for _ in range(_DEGREES - 1):
            yield current
            previous, current = current, torch.addcmul(-previous, current, self.offset, value=2)


def _exchange(kernel: Callable[[Tensor], Tensor], device: torch.device) -> Tensor:
    """Matrix from the moments of all boxes within reach to the polynomial they make in one box.

    (distances * _DEGREES, _DEGREES): for each distance the kernel's Chebyshev coefficients.
    """
    degrees = torch.arange(_DEGREES, dtype=torch.float64, device=device)
    angles = math.pi * (degrees + 0.5) / _DEGREES
    nodes = angles.cos()
    to_coefficients = (degrees[:, None] * angles).cos() * (2 / _DEGREES)
    to_coefficients[0] /= 2
    apart = torch.arange(-_REACH, _REACH + 1, dtype=torch.float64, device=device)
    values = kernel(2 * apart[:, None, None] + nodes[:, None] - nodes)
    coefficients = to_coefficients @ values @ to_coefficients.T
    return coefficients.transpose(1, 2).reshape(-1, _DEGREES)


def _sigmoid_slope(z: Tensor) -> Tensor:
    return torch.sigmoid(z) * torch.sigmoid(-z)
