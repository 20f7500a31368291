"""Recall, precision and rank correlation against the counting definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexselect.core.metrics import precision_at_k, recall_at_k, spearman_rho
from flexselect.core.soft_rank import rank

VALUES = st.lists(st.sampled_from([-2.0, 0.0, 0.5, 1.0, 7.0]), min_size=1, max_size=15)


def counted_ranks(values: list[float]) -> list[float]:
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) - 1) / 2
        for value in values
    ]


@given(VALUES)
def test_ranks(values: list[float]) -> None:
    found = rank(torch.tensor(values, dtype=torch.float64))
    assert found.dtype == torch.float64
    assert found.tolist() == counted_ranks(values)


@given(st.lists(st.tuples(*[st.sampled_from([0.0, 1.0, 2.0, 3.0])] * 2), min_size=1, max_size=15))
def test_spearman_rho(pairs: list[tuple[float, float]]) -> None:
    first, second = (list(values) for values in zip(*pairs, strict=True))
    a, b = counted_ranks(first), counted_ranks(second)
    mean = (len(a) - 1) / 2
    cross = sum((x - mean) * (y - mean) for x, y in zip(a, b, strict=True))
    spread = (sum((x - mean) ** 2 for x in a) * sum((y - mean) ** 2 for y in b)) ** 0.5
    expected = cross / spread if spread else 0.0
    found = spearman_rho(torch.tensor(first), torch.tensor(second))
    assert isinstance(found, float)
    assert found == pytest.approx(expected)


def test_spearman_rho_of_known_rankings() -> None:
    values = torch.tensor([0.1, 0.4, 0.2, 0.9])
    assert spearman_rho(values, values.exp()) == pytest.approx(1)
    assert spearman_rho(values, -values) == pytest.approx(-1)
    # One pair of neighbours swapped: 1 - 6 * 2 / (4 * 15).
    assert spearman_rho(values, torch.tensor([0.2, 0.4, 0.1, 0.9])) == pytest.approx(0.8)
    assert spearman_rho(values, torch.zeros(4)) == 0


def test_recall_and_precision() -> None:
    scores = torch.tensor([0.9, 0.1, 0.8, 0.7, 0.0, 0.6])
    needle = torch.tensor([True, False, False, True, True, False])
    assert recall_at_k(scores, needle, 1) == pytest.approx(1 / 3)
    assert precision_at_k(scores, needle, 1) == 1
    assert recall_at_k(scores, needle, 3) == pytest.approx(2 / 3)
    assert precision_at_k(scores, needle, 3) == pytest.approx(2 / 3)
    assert recall_at_k(scores, needle, 99) == 1
    assert precision_at_k(scores, needle, 99) == 0.5


def test_ties_count_by_position() -> None:
    scores, needle = torch.zeros(4), torch.tensor([False, True, False, True])
    assert recall_at_k(scores, needle, 2) == 0.5
    assert precision_at_k(scores, needle, 2) == 0.5


@given(data=st.data(), values=VALUES)
def test_recall_and_precision_count_the_same_hits(data: st.DataObject, values: list[float]) -> None:
    size = len(values)
    chosen = data.draw(st.sets(st.integers(0, size - 1), min_size=1))
    k = data.draw(st.integers(1, size))
    needle = torch.zeros(size, dtype=torch.bool)
    needle[sorted(chosen)] = True
    best = sorted(range(size), key=lambda i: (-values[i], i))[:k]
    hits = len(chosen & set(best))
    scores = torch.tensor(values)
    assert recall_at_k(scores, needle, k) == pytest.approx(hits / len(chosen))
    assert precision_at_k(scores, needle, k) == pytest.approx(hits / k)
