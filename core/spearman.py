"""Losses that teach a selector to rank tokens as its teacher does, in linear time and memory.

The paper's loss is 1 - Pearson(soft ranks of the prediction, ranks of the teacher's scores);
`core.soft_rank` computes the soft ranks without pairs. Sums run in float64 and in a fixed order, so
that a run repeats bit by bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import OptionError
from .soft_rank import (
    DEFAULT_TEMPERATURE,
    hard_rank_rows,
    rows_and_mask,
    soft_rank_rows,
    standing,
)

DEFAULT_TOP_FRACTION = 1 / 16

# Soft ranks that spread less than this share of N carry no order, only rounding.
_FLAT = 1e-10
# The width of the cut in the soft recall, as a share of the cut's rank.
_CUT_WIDTH = 1 / 8


def spearman_loss(
    pred: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    temperature: float = DEFAULT_TEMPERATURE,
    reduction: str = "mean",
) -> Tensor:
    """One minus the correlation of the prediction's soft ranks with the target's ranks.

    Source: the rank supervision of arXiv 2506.00993 and `spearmanr` in the reference's training
    code. It differs from the latter on purpose in two places: tied targets share their mean rank
    instead of an arbitrary order, and a row without any order (constant prediction or target, fewer
    than two tokens) has correlation 0, so loss 1 and gradient exactly 0, not NaN.

    Parameters
    ----------
    pred : floating ``(..., tokens)``, the selector's relevance; half precision is upcast.
    target : floating ``(..., tokens)``, the teacher's relevance. Only its order matters; it gets no
        gradient.
    mask : bool ``(..., tokens)``, true where a token counts. None counts every token.
    temperature : width of the sigmoid, in units of `pred`.
    reduction : "mean" or "sum" over the leading axes, or "none" to keep them.

    Returns
    -------
    float32 (float64 for a float64 prediction) in [0, 2], a scalar unless `reduction` is "none". NaN
    if a token that counts is NaN, or infinite in `pred`: a diverged model must show.

    Raises
    ------
    OptionError
        If shapes, dtypes, temperature or reduction do not fit.
    """
    batch = _Batch.of(pred, target, mask)
    soft = soft_rank_rows(batch.pred, batch.mask, temperature)
    return batch.reduce(_one_minus_pearson(soft, batch), reduction)


def selector_loss(
    pred: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    terms: Mapping[str, float] | None = None,
    temperature: float = DEFAULT_TEMPERATURE,
    top_fraction: float = DEFAULT_TOP_FRACTION,
    reduction: str = "mean",
) -> Tensor:
    """Weighted sum of named losses between a selector's relevance and its teacher's.

    ============  =============================================================================
    "spearman"    `spearman_loss`, the paper's and the default
    "l1"          sum over tokens of ``abs(pred - target)``; the reference's for LLaVA-Video-7B
    "l2"          sum over tokens of ``(pred - target)**2``; the reference's, beside "spearman",
                  for LLaVA-Video-72B
    "top_recall"  ours: one minus a soft recall of the teacher's top tokens, in [0, 1]
    "listnet"     divergence of ``softmax(pred)`` from ``softmax(target)`` over the tokens
    ============  =============================================================================

    A high rank correlation can hide a useless top, since most tokens are bulk. "top_recall" looks
    at nothing else. With n tokens, K = max(1, round(top_fraction * n)), r the soft ranks of `pred`
    and m the membership of the target's top K (ties at its edge share what is left of it)::

        recall(c) = 1/K * sum_i m_i * sigmoid((r_i - (n - c - 1/2)) / (c/8))
        loss      = 1 - mean of recall(c) over the cuts c = K, 2K, 4K, ... below n

    The first cut is recall at the budget itself; the wider ones still pull a token that ranks too
    low for the first to feel it. The sigmoid of a rank against a cut follows Patel, Tolias and
    Matas, "Recall@k Surrogate Loss", CVPR 2022; cuts and widths that grow together, membership by
    share and linear time are ours. Its minimum is slightly above zero, and unlike "spearman" it
    parts tied predictions: its gradient at a constant prediction is finite but not zero.

    "listnet" is the top-one loss of Cao, Qin, Liu, Tsai and Li, "Learning to Rank: From Pairwise
    Approach to Listwise Approach", ICML 2007, less the entropy of the target, so that its minimum
    is 0. Of logarithms of relevance, which it is meant for, the softmax is the share of the
    attention that a token gets of all that the tokens get: what stands out weighs most, and the
    order of the bulk next to nothing. A relevance of 0 has no logarithm: keep it above that, or the
    loss is NaN or infinite.

    Parameters
    ----------
    pred, target, mask, temperature, reduction : as in `spearman_loss`.
    terms : weight of each term by name. None is the paper's loss, ``{"spearman": 1.0}``.
    top_fraction : share of a row's tokens that "top_recall" wants on top, in (0, 1]. A sixteenth is
        what the paper's budget of 6,720 is of 512 frames of LLaVA-Video.

    Returns
    -------
    float32 (float64 for a float64 prediction), a scalar unless `reduction` is "none".

    Raises
    ------
    OptionError
        If a term is unknown or its weight is not finite, or no term is given, and as in
        `spearman_loss`.
    """
    weights = _checked_terms({"spearman": 1.0} if terms is None else terms)
    if not 0 < top_fraction <= 1:
        raise OptionError(f"top_fraction must be in (0, 1], got {top_fraction}")
    batch = _Batch.of(pred, target, mask)
    total = batch.pred.new_zeros(batch.pred.shape[0])
    if weights.keys() & {"spearman", "top_recall"}:
        soft = soft_rank_rows(batch.pred, batch.mask, temperature)
    if "spearman" in weights:
        total = total + weights["spearman"] * _one_minus_pearson(soft, batch)
    if "top_recall" in weights:
        total = total + weights["top_recall"] * _one_minus_recall(soft, batch, top_fraction)
    if "listnet" in weights:
        total = total + weights["listnet"] * _divergence(batch)
    if "l1" in weights:
        total = total + weights["l1"] * batch.difference().abs().sum(dim=-1)
    if "l2" in weights:
        total = total + weights["l2"] * batch.difference().square().sum(dim=-1)
    return batch.reduce(total, reduction)


@dataclass(frozen=True)
class _Batch:
    """Prediction, target and mask as (rows, tokens), and the shape the rows came from."""

    pred: Tensor
    target: Tensor
    mask: Tensor
    leading: torch.Size

    @classmethod
    def of(cls, pred: Tensor, target: Tensor, mask: Tensor | None) -> _Batch:
        if pred.shape != target.shape:
            raise OptionError(
                f"pred and target must have the same shape, got {tuple(pred.shape)} and "
                f"{tuple(target.shape)}"
            )
        rows, keep = rows_and_mask(pred, mask, "pred")
        return cls(rows, rows_and_mask(target.detach(), mask, "target")[0], keep, pred.shape[:-1])

    @property
    def count(self) -> Tensor:
        """Tokens that count, (rows, 1), float64."""
        return self.mask.sum(dim=-1, keepdim=True).double()

    def difference(self) -> Tensor:
        """Prediction minus target, (rows, tokens), 0 in padding whatever it holds."""
        return self.pred.where(self.mask, 0.0) - self.target.where(self.mask, 0.0)

    def reduce(self, loss: Tensor, reduction: str) -> Tensor:
        """Loss of each row, (rows,), in the shape and dtype that is handed back."""
        loss = loss.to(self.pred.dtype)
        if reduction == "mean":
            return loss.mean()
        if reduction == "sum":
            return loss.sum()
        if reduction == "none":
            return loss.reshape(self.leading)
        raise OptionError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')


def _one_minus_pearson(soft: Tensor, batch: _Batch) -> Tensor:
    """One minus the correlation of soft ranks with the target's ranks, (rows,), float64."""
    count = batch.count
    hard = hard_rank_rows(batch.target, batch.mask)
    # Ranks of either kind sum to n(n-1)/2, so this is their mean without a reduction.
    mean = (count - 1) / 2
    a = (soft - mean) * batch.mask
    b = (hard - mean) * batch.mask
    n = count.squeeze(-1)
    a_square, b_square = a.square().sum(dim=-1), b.square().sum(dim=-1)
    floor = n * (_FLAT * n).square()
    flat = (a_square <= floor) | (b_square <= floor)
    # where() alone would let 0 * inf through in the backward pass.
    norm = torch.where(flat, 1.0, a_square * b_square).sqrt()
    return 1 - torch.where(flat, 0.0, (a * b).sum(dim=-1) / norm)


def _one_minus_recall(soft: Tensor, batch: _Batch, top_fraction: float) -> Tensor:
    """One minus the soft recall of the target's top, averaged over the cuts, (rows,), float64."""
    count = batch.count
    top = (top_fraction * count).round().clamp(min=1)
    below, ties = standing(batch.target, batch.mask)
    above = count - below - ties
    member = ((top - above) / ties.clamp(min=1)).clamp(0, 1).mul(batch.mask) / top
    missed = torch.zeros_like(count.squeeze(-1))
    cuts = torch.zeros_like(missed)
    # K is rounded, so it is at least 2/3 of its share; the cuts below n can then be counted without
    # waiting for a GPU to tell n.
    for doubling in range(math.floor(math.log2(1.5 / top_fraction)) + 1):
        cut = top * 2**doubling
        used = ((cut < count) | (doubling == 0)).squeeze(-1)
        # sigmoid of the negative: a well ranked top must not cancel against 1.
        outside = torch.sigmoid((count - cut - 0.5 - soft) / (_CUT_WIDTH * cut))
        missed = missed + (member * outside).sum(dim=-1) * used
        cuts = cuts + used
    return missed / cuts


def _divergence(batch: _Batch) -> Tensor:
    """Divergence of the prediction's softmax from the target's, (rows,), float64."""
    # Padding takes part as a token of no weight; a row of nothing else must not become NaN.
    pred, target = (
        scores.double().masked_fill(~batch.mask, torch.finfo(torch.float32).min).log_softmax(dim=-1)
        for scores in (batch.pred, batch.target)
    )
    return (target.exp() * (target - pred)).sum(dim=-1)


def _checked_terms(terms: Mapping[str, float]) -> Mapping[str, float]:
    known = ("spearman", "l1", "l2", "top_recall", "listnet")
    unknown = [name for name in terms if name not in known]
    if unknown:
        raise OptionError(f"unknown loss term {unknown[0]!r}: choose from {', '.join(known)}")
    if not terms:
        raise OptionError(f"at least one loss term is needed: choose from {', '.join(known)}")
    for name, weight in terms.items():
        if not math.isfinite(weight):
            raise OptionError(f"the weight of loss term {name!r} must be finite, got {weight}")
    return terms
