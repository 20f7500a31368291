"""How good a ranking is: recall@K of known tokens, and rank correlation with another ranking."""

from __future__ import annotations

import torch
from torch import Tensor

from .selection import top_tokens
from .soft_rank import rank


def recall_at_k(scores: Tensor, needle: Tensor, k: int) -> float:
    """Share of the needle's tokens that are among the ``k`` best.

    Parameters
    ----------
    scores : float32 ``(visual,)``.
    needle : bool ``(visual,)``, at least one true.
    k : tokens looked at; all if larger than ``visual``.
    """
    return _hits(scores, needle, k) / int(needle.sum())


def precision_at_k(scores: Tensor, needle: Tensor, k: int) -> float:
    """Share of the ``k`` best tokens that are the needle's.

    This is what the reference reports as recall@K, with K the tokens of one frame (paper, section
    3.1). Parameters as in `recall_at_k`.
    """
    return _hits(scores, needle, k) / min(k, len(scores))


def _hits(scores: Tensor, needle: Tensor, k: int) -> int:
    return int(needle[top_tokens(scores, min(k, len(scores)))].sum())


def spearman_rho(first: Tensor, second: Tensor) -> float:
    """Spearman's rank correlation of two ``(n,)`` rankings; ties share their mean rank.

    Zero where either is constant, since it then ranks nothing.
    """
    a, b = rank(first.double()), rank(second.double())
    a, b = a - a.mean(), b - b.mean()
    norm = torch.linalg.vector_norm(a) * torch.linalg.vector_norm(b)
    return float((a @ b) / norm) if norm > 0 else 0.0
