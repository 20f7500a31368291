"""Two methods on the same questions: how much they differ, and whether chance would do that.

Paired, because most questions are answered alike by both: only those where one is right and the
other wrong say anything. Questions about one video are no independent draws, so the interval is
drawn by video.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

#: Draws of the bootstrap and of the sign-flip test, from a fixed seed: the same run, the same text.
DRAWS = 10_000
_SEED = 20250600993


@dataclass(frozen=True)
class Paired:
    """What a pair of methods shows on shared samples.

    Attributes
    ----------
    samples : number of shared samples.
    clusters : number of different videos among them.
    difference : mean score of the second minus that of the first.
    low, high : its 95 % interval, by a paired bootstrap over videos; None with fewer than two, and
        where every sample changes alike.
    gained, lost : samples that only the second, or only the first, has right; for scores that are
        not 0 or 1, samples whose score rises or falls.
    p : probability of a difference as large if the two were alike. Scores of 0 and 1: McNemar's
        test, exact and two-sided. Others: signs of the differences flipped at random.
    exact : whether ``p`` is McNemar's.
    """

    samples: int
    clusters: int
    difference: float
    low: float | None
    high: float | None
    gained: int
    lost: int
    p: float
    exact: bool


def paired(first: Sequence[float], second: Sequence[float], videos: Sequence[Hashable]) -> Paired:
    """Compare two methods on the same samples.

    Parameters
    ----------
    first, second : a score per sample, in the same order, at least one.
    videos : what each sample is about; samples of one video are drawn together.
    """
    ours, theirs = np.asarray(second, float), np.asarray(first, float)
    change = ours - theirs
    gained, lost = int((change > 0).sum()), int((change < 0).sum())
    exact = bool(np.isin(ours, (0, 1)).all() and np.isin(theirs, (0, 1)).all())
    names = {video: index for index, video in enumerate(dict.fromkeys(videos))}
    owner = np.array([names[video] for video in videos])
    low, high = _interval(change, owner, len(names))
    return Paired(
        samples=len(change),
        clusters=len(names),
        difference=float(change.mean()),
        low=low,
        high=high,
        gained=gained,
        lost=lost,
        p=mcnemar(gained, lost) if exact else _sign_flips(change),
        exact=exact,
    )


def mcnemar(gained: int, lost: int) -> float:
    """Return the exact two-sided probability that ``gained`` and ``lost`` differ this much.

    Under the null hypothesis each sample that tells the two apart falls to either with one half.
    """
    total = gained + lost
    tail = sum(math.comb(total, k) for k in range(min(gained, lost) + 1))
    # Of whole numbers: a float has no room for 2 ** 2000.
    return min(1.0, 2 * tail / 2**total)


def holm(values: Sequence[float]) -> list[float]:
    """Adjust probabilities for their number (Holm's step-down), in the order given."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    adjusted = [0.0] * len(values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, values[index] * (len(values) - rank)))
        adjusted[index] = largest
    return adjusted


def _interval(
    change: np.ndarray, owner: np.ndarray, clusters: int
) -> tuple[float | None, float | None]:
    # Where all change alike, every draw is the same, and that is no certainty.
    if clusters < 2 or (change == change[0]).all():
        return None, None
    sums = np.bincount(owner, change, clusters)
    counts = np.bincount(owner, minlength=clusters)
    draw = np.random.default_rng(_SEED)
    even = np.full(clusters, 1 / clusters)
    means = []
    # In chunks: draws x videos would be some hundred MB at once.
    for _ in range(10):
        weights = draw.multinomial(clusters, even, size=DRAWS // 10)
        means.append((weights @ sums) / (weights @ counts))
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return float(low), float(high)


def _sign_flips(change: np.ndarray) -> float:
    draw = np.random.default_rng(_SEED)
    reached = 0
    observed = abs(change.sum()) - 1e-12
    for _ in range(10):
        signs = draw.integers(0, 2, size=(DRAWS // 10, len(change))) * 2 - 1
        reached += int((np.abs(signs @ change) >= observed).sum())
    return (reached + 1) / (DRAWS + 1)
