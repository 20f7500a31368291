"""Budgets: what passes for one, and how it is shared over sets and videos."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flexselect.core.budget import check_budget, round_up, set_quotas, video_budgets
from flexselect.core.errors import OptionError

SIZES = st.lists(st.integers(0, 60), max_size=9)


@pytest.mark.parametrize("budget", [1, 7040])
def test_a_count_is_a_budget(budget: int) -> None:
    assert check_budget(budget) == budget


@pytest.mark.parametrize("budget", [0, -3, None, "7040", 7040.0, float("inf"), True, [1]])
def test_anything_else_is_not(budget: object) -> None:
    with pytest.raises(OptionError) as error:
        check_budget(budget)
    assert str(error.value).startswith("budget must be")
    assert str(budget) in str(error.value)


@given(budget=st.integers(0, 400), sizes=SIZES)
@example(budget=48, sizes=[24, 24, 12])
@example(budget=10, sizes=[0, 0, 50])
def test_set_quotas(budget: int, sizes: list[int]) -> None:
    quotas = set_quotas(budget, sizes)
    assert len(quotas) == len(sizes)
    assert all(0 <= quota <= size for quota, size in zip(quotas, sizes, strict=True))
    assert sum(quotas) <= budget
    if budget >= sum(sizes):
        assert quotas == sizes
        return
    filled = [i for i, size in enumerate(sizes) if size]
    if budget < len(filled):
        # Too few for every set: one each, as far as they go.
        assert [i for i, quota in enumerate(quotas) if quota] == filled[:budget]
        assert sum(quotas) == budget
        return
    # Sets that are not kept whole get equal quotas, and no smaller one than any kept whole.
    cut = {quota for quota, size in zip(quotas, sizes, strict=True) if quota < size}
    assert len(cut) <= 1
    [share] = cut
    assert all(quota <= share for quota in quotas)
    # Only what cannot be shared in whole equal parts is lost.
    assert budget - sum(quotas) < sum(
        quota < size for quota, size in zip(quotas, sizes, strict=True)
    )
    if all(size > budget // len(sizes) for size in sizes):
        assert quotas == [budget // len(sizes)] * len(sizes)


@given(budget=st.integers(0, 400), sizes=SIZES)
def test_video_budgets(budget: int, sizes: list[int]) -> None:
    shares = video_budgets(budget, sizes)
    total = sum(sizes)
    assert sum(shares) == min(budget, total)
    assert all(0 <= share <= size for share, size in zip(shares, sizes, strict=True))
    if budget < total:
        for share, size in zip(shares, sizes, strict=True):
            assert abs(share - Fraction(budget * size, total)) < 1


def test_largest_remainders_come_first_and_earlier_videos_before_later() -> None:
    assert video_budgets(10, [10, 10, 10]) == [4, 3, 3]
    assert video_budgets(3, [1, 4, 5]) == [0, 1, 2]
    assert video_budgets(11, [10, 10, 10]) == [4, 4, 3]


@given(budget=st.integers(0, 10_000), multiple=st.integers(1, 300))
def test_round_up(budget: int, multiple: int) -> None:
    rounded = round_up(budget, multiple)
    assert rounded % multiple == 0
    assert 0 <= rounded - budget < multiple
