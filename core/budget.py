"""Budgets: how many visual tokens may stay, and the quota of each video and each set."""

from __future__ import annotations

from collections.abc import Sequence

from .errors import OptionError


def check_budget(budget: object) -> int:
    """Return ``budget`` as a count of visual tokens, or raise `OptionError`."""
    if isinstance(budget, bool) or not isinstance(budget, int):
        raise OptionError(
            f"budget must be a whole number of visual tokens, got {budget!r}. "
            "Give for example budget=7040."
        )
    if budget <= 0:
        raise OptionError(f"budget must be at least 1 visual token, got {budget}.")
    return budget


def set_quotas(budget: int, sizes: Sequence[int]) -> list[int]:
    """Share a budget equally over sets.

    Every set gets ``budget // sets``; the remainder is not used, as in the reference (fixtures,
    C8). A set smaller than its quota is kept whole and what it leaves goes, again in equal whole
    parts, to the others; the reference fails there (C9). A budget that covers everything keeps
    everything, and one below the number of sets gives one token to as many; the reference then
    keeps nothing.

    Parameters
    ----------
    budget : visual tokens that may stay.
    sizes : visual tokens of each set.

    Returns
    -------
    list of int, the quota of each set; never more than its size.
    """
    if budget >= sum(sizes):
        return list(sizes)
    quotas = [0] * len(sizes)
    open_sets = list(range(len(sizes)))
    left = budget
    while open_sets:
        share = left // len(open_sets)
        small = [i for i in open_sets if sizes[i] <= share]
        if not small:
            # Fewer tokens than sets: one each as far as they go, rather than none at all.
            for i in open_sets if share else open_sets[:left]:
                quotas[i] = max(share, 1)
            break
        for i in small:
            quotas[i] = sizes[i]
            left -= sizes[i]
        open_sets = [i for i in open_sets if i not in small]
    return quotas


def video_budgets(budget: int, sizes: Sequence[int]) -> list[int]:
    """Share a budget over the videos of a prompt in proportion to their visual tokens.

    The shares are whole and sum to ``min(budget, sum(sizes))``: largest remainders get the tokens
    that rounding down leaves, earlier videos first.
    """
    total = sum(sizes)
    if budget >= total:
        return list(sizes)
    shares = [budget * size // total for size in sizes]
    order = sorted(range(len(sizes)), key=lambda i: -(budget * sizes[i] % total))
    for i in order[: budget - sum(shares)]:
        shares[i] += 1
    return shares


def round_up(budget: int, multiple: int) -> int:
    """Round a budget up to a multiple, as the reference does for Qwen2.5-VL (fixtures, Q3)."""
    return -(-budget // multiple) * multiple
